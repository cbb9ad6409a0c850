"""Linear layers that can be laid out for the matrix kernels of a CPU.

A step of generation multiplies a few rows by every weight of the decoders, so its time is that of reading them. As a
parameter lies in memory they are read at a third of the memory's rate or less; reordered once by oneDNN, at nearly all
of it (docs/decisions/0017-packed-weights-on-cpus.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# Rows that the layout is chosen for. One for a single row is slow for all others; this one is good for any.
_ROWS = 16


class Linear(nn.Linear):
    """``nn.Linear``; within ``packed`` and without gradients it multiplies by the reordered copy of its weight."""

    packed_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self._usable(x)
        return super().forward(x) if weight is None else self._multiply(x, weight, "none")

    def gelu(self, x: Tensor) -> Tensor:
        """The layer with a GELU after it, in one pass where it is packed."""
        weight = self._usable(x)
        return F.gelu(super().forward(x)) if weight is None else self._multiply(x, weight, "gelu")

    def _usable(self, x: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or x.dtype != torch.float32 or torch.is_grad_enabled():
            return None
        return None if torch.is_autocast_enabled(x.device.type) else self.packed_weight

    def _multiply(self, x: Tensor, weight: Tensor, after: str) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, after, [], "none")
        return output


@contextmanager
def packed(*modules: nn.Module) -> Iterator[None]:
    """Within it, linear layers of these modules that lie on a CPU in float32 hold a second, reordered copy.

    The weights must not change meanwhile. What was packed outside stays so. Packing takes about as long as four steps
    of generation. Where oneDNN is missing nothing is packed.
    """
    fresh = [each for module in modules for each in module.modules() if isinstance(each, Linear) and _packable(each)]
    with torch.no_grad():
        for each in fresh:
            each.packed_weight = torch.ops.mkldnn._reorder_linear_weight(each.weight.detach(), _ROWS)
    try:
        yield
    finally:
        for each in fresh:
            each.packed_weight = None


def _packable(layer: Linear) -> bool:
    weight = layer.weight
    return (
        layer.packed_weight is None
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
