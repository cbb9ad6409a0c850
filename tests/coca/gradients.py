"""A tiny model's losses and gradients over any number of processes, to be compared with those of one."""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coca.accumulate import forward_backward
from coca.config import ModelConfig
from coca.distributed import rank, sum_over_ranks, world_size
from coca.model import CoCa
from coca.objective import Objective
from coca.parallel import parallelize
from coca.train_config import LossConfig, ParallelConfig

CPU = torch.device("cpu")
LENGTHS = (7, 2, 5, 3, 7, 4, 2, 6)  # begin and end included: parts of the batch have different numbers of targets
ROWS = len(LENGTHS)


class Case(NamedTuple):
    """What is computed, and how it is spread."""

    model: ModelConfig
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    patch_dropout: bool = False
    checkpointing: bool = False
    compiled: bool = False
    precision: torch.dtype = torch.float32
    bfloat16: bool = False


class Result(NamedTuple):
    """The losses of the global batch and every parameter's gradient, whole."""

    losses: Tensor
    gradients: dict[str, Tensor]


def build(case: Case) -> Objective:
    torch.manual_seed(0)
    model = CoCa(case.model).to(case.precision)
    for name, parameter in model.named_parameters():
        if name.endswith("residual_norm.weight"):
            nn.init.ones_(parameter)  # from 0, as training begins, nothing behind it has a gradient
    model.checkpoint_activations(case.checkpointing)
    return Objective(model, case.loss, compiled=case.compiled)


def batch(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(images, tokens, kept patches); rows 0 and 4 have one caption, as have 1 and 6, in other parts of the batch."""
    generator = torch.Generator().manual_seed(1)
    side = case.model.vision.image_size
    images = torch.randn(ROWS, 3, side, side, generator=generator, dtype=case.precision)
    tokens = torch.randint(3, case.model.text.vocab_size, (ROWS, max(LENGTHS)), generator=generator)
    tokens[4] = tokens[0]
    for row, length in enumerate(LENGTHS):
        tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = 1, 2, 0
    kept = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(ROWS)])
    return images, tokens, kept if case.patch_dropout else None


def compute(case: Case) -> Result:
    """What each process runs, on its share of the batch."""
    # Traced and cut into graphs as ever, but without the minutes that a C++ compiler takes.
    torch.compiler.reset()
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        objective = build(case)
        over_all = parallelize(objective, case.parallel, CPU, "bfloat16" if case.bfloat16 else "float32")
    losses = run_once(case, over_all)
    return Result(sum_over_ranks(losses) / world_size(), whole_gradients(objective.model))


def run_once(case: Case, objective: nn.Module) -> Tensor:
    share: list[Any] = [None if value is None else value.chunk(world_size())[rank()] for value in batch(case)]

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if case.bfloat16 else nullcontext()

    return torch.stack(forward_backward(objective, *share, case.loss, case.parallel.micro_batches, autocast))


def whole_gradients(model: CoCa) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradients


def assert_close(found: Result, expected: Result, tolerance: float = 1e-5) -> None:
    """Losses relative to their values, gradients to the largest of their tensor."""
    torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
    assert found.gradients.keys() == expected.gradients.keys()
    zero = 1e-6 * max(gradient.abs().max() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        largest = gradient.abs().max()
        # A bias on all keys alike changes no attention: its gradient is 0 but for rounding.
        assert largest > zero or name.endswith("key_norm.bias"), f"{name} has no gradient"
        error = (found.gradients[name] - gradient).abs().max()
        allowed = tolerance * largest if largest > zero else zero
        assert error <= allowed, f"{name}: gradients differ by {error / largest:.1e}"
