"""Adafactor against the formulas of its docstring, written once more in float64 numpy with loops."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coca.adafactor import Adafactor

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.85)  # a cap that is reached at step 11


def reference(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The weight after all gradients."""
    weight = weight.astype(np.float64)
    shape = weight.shape
    matrix = weight.ndim >= 2
    first = np.zeros(shape)
    rows, columns, whole = np.zeros(shape[:1]), np.zeros(shape[1:]), np.zeros(shape)
    for t, gradient in enumerate(gradients, start=1):
        squares = gradient.astype(np.float64) ** 2 + 1e-30
        beta2 = min(BETAS[1], 1 - t**-0.8)
        if matrix:
            rows = beta2 * rows + (1 - beta2) * np.array([row.mean() for row in squares])
            columns = beta2 * columns + (1 - beta2) * squares.mean(0)
            second = np.stack([row * columns for row in rows]) / rows.mean()
        else:
            whole = beta2 * whole + (1 - beta2) * squares
            second = whole
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient / np.sqrt(second)
        weight = weight - RATE * DECAY * weight - RATE * first
    return weight


def make(*weights: Tensor) -> Adafactor:
    group = {"params": [nn.Parameter(weight) for weight in weights], "weight_decay": DECAY}
    return Adafactor([group], learning_rate=RATE, betas=BETAS)


def run(optimizer: Adafactor, gradients: list[np.ndarray]) -> Tensor:
    (weight,) = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(7, 5), (1, 6), (6, 1), (4, 3, 2, 2), (8,), ()])
def test_fifteen_steps_equal_the_reference(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape)
    gradients = [np.asarray(rng.normal(size=shape) * rng.lognormal(size=shape)) for _ in range(15)]
    ours = run(make(torch.tensor(weight)), gradients)
    np.testing.assert_allclose(ours, reference(weight, gradients), rtol=1e-12, atol=1e-14)
    single = run(make(torch.tensor(weight, dtype=torch.float32)), gradients)
    np.testing.assert_allclose(single, reference(weight, gradients), rtol=1e-5, atol=1e-6)


def test_one_step_by_hand() -> None:
    """Rows' mean squares 12.5 and 0.5, columns' 5 and 8; V of the first entry is 12.5 * 5 / 6.5."""
    optimizer = make(torch.ones(2, 2, dtype=torch.float64))
    weight = run(optimizer, [np.array([[3.0, 4.0], [1.0, 0.0]])])
    first = 0.1 * 3 / (12.5 * 5 / 6.5) ** 0.5
    assert weight[0, 0].item() == pytest.approx(1 - RATE * DECAY - RATE * first, rel=1e-14)
    assert weight[1, 1].item() == pytest.approx(1 - RATE * DECAY, rel=1e-14)


def test_gradients_of_nothing_but_zeros_move_nothing() -> None:
    weight = run(make(torch.ones(3, 4)), [np.zeros((3, 4))] * 3)
    torch.testing.assert_close(weight, torch.full((3, 4), (1 - RATE * DECAY) ** 3), rtol=1e-6, atol=0)


def test_memory_is_a_row_a_column_and_the_first_moment() -> None:
    optimizer = make(torch.ones(30, 20), torch.ones(8, 3, 2, 2), torch.ones(9))
    states = [optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"]]
    assert [{name: value.numel() for name, value in state.items()} for state in states] == [
        {"step": 1, "first_moment": 600, "row": 30, "column": 20},
        {"step": 1, "first_moment": 96, "row": 8, "column": 12},
        {"step": 1, "first_moment": 9, "second_moment": 9},
    ]


def test_channels_last_weights_get_the_same_numbers() -> None:
    """Bites where a matrix is made by ``view``, or state and weight lie in different orders."""
    rng = np.random.default_rng(1)
    weight, gradients = torch.tensor(rng.normal(size=(4, 3, 2, 2))), [rng.normal(size=(4, 3, 2, 2)) for _ in range(3)]
    plain = run(make(weight.clone()), gradients)
    last = run(make(weight.clone(memory_format=torch.channels_last)), gradients)
    torch.testing.assert_close(last, plain, rtol=1e-14, atol=0)
