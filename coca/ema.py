"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from coca.shards import local, sharded_like


class Ema:
    """Averages of a model's parameters (Polyak and Juditsky 1992), sharded as they are.

    To be made after the model is spread over ranks, and from its weights at the start of the run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._parameters = dict(model.named_parameters())
        self._averages = {name: local(p.detach()).clone() for name, p in self._parameters.items()}
        self._swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the optimizer's ``step``, counted from 0.

        average <- d average + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)), so that the first weights
        are soon forgotten.
        """
        assert not self._swapped, "the model holds the averages"
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), self._weights(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter, sharing memory with this object: a restore can write into them."""
        assert not self._swapped, "the model holds the averages"
        return {name: sharded_like(self._parameters[name], part) for name, part in self._averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the averages; afterwards its weights again, bit for bit."""
        assert not self._swapped, "the model holds the averages"
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # FSDP2 may still hold gathered weights from a forward pass, and would not gather them again.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for weight, average in zip(self._weights(), self._averages.values(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self._swapped = not self._swapped

    def _weights(self) -> list[Tensor]:
        return [local(parameter) for parameter in self._parameters.values()]
