"""Muon on whole matrices against its formulas and torch's; sharded ones are in test_shards.py."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coca.muon import Muon, orthogonalized, share_out


def reference(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The formulas of Muon's docstring in float64; rate 0.02, decay 0.1, momentum 0.95."""
    buffer = np.zeros_like(weight)
    rows, columns = weight.shape
    for gradient in gradients:
        buffer = 0.95 * buffer + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * buffer
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * max(1, rows / columns) ** 0.5 * x
    return weight


def make(weight: Tensor) -> Muon:
    return Muon([{"params": [nn.Parameter(weight)], "weight_decay": 0.1}], learning_rate=0.02)


def run(muon: torch.optim.Optimizer, gradients: list[np.ndarray]) -> Tensor:
    (weight,) = muon.param_groups[0]["params"]
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=weight.dtype)
        muon.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (5, 5), (1, 7)])
def test_steps_equal_the_reference(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=shape), [rng.normal(size=shape) for _ in range(4)]
    ours = run(make(torch.tensor(weight)), gradients)
    np.testing.assert_allclose(ours, reference(weight, gradients), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (3, 8)])
def test_in_bfloat16_the_iteration_is_that_of_torch(shape: tuple[int, ...]) -> None:
    """Read off a step of torch's from 0, without momentum and decay, at rate 1."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0, momentum=0).step()
    ratio = max(1, shape[0] / shape[1]) ** 0.5
    assert torch.equal(weight.detach(), torch.zeros(shape).add_(orthogonalized(gradient.bfloat16()), alpha=-ratio))


def test_steps_are_near_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    weight, gradients = torch.tensor(rng.normal(size=(12, 8)), dtype=torch.float32), [rng.normal(size=(12, 8))] * 3
    theirs = torch.optim.Muon([nn.Parameter(weight.clone())], lr=0.02, weight_decay=0.1)
    ours = run(make(weight.clone()), gradients)
    torch.testing.assert_close(ours, run(theirs, gradients), rtol=0, atol=2e-3)


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((40, 16), (16, 40)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape) * 1e-3))
        assert 0.6 < values.min() < values.max() < 1.3


def test_work_is_shared_evenly() -> None:
    shapes = [(768, 3072), (3072, 768), (768, 768), (2304, 768)] * 12
    owners = share_out(shapes, 4)
    work = [sum(min(s) ** 2 * max(s) for s, o in zip(shapes, owners, strict=True) if o == rank) for rank in range(4)]
    assert max(work) / min(work) < 1.05
    assert share_out([(2, 2)], 3) == [0]
