"""The average of the weights against its formula, and the exchange of both."""

import pytest
import torch
from torch import nn

from coca.ema import Ema


def test_updates_follow_the_formula() -> None:
    """The warm-up's 1/10, 2/11, 3/12 ... until the decay is smaller."""
    model = nn.Linear(3, 2).double()
    ema = Ema(model, decay=0.25)
    expected = model.weight.detach().clone()
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 0.25)):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state()["weight"], expected, rtol=1e-14, atol=1e-15)
    assert ema.state().keys() == {"weight", "bias"}


def test_state_is_live() -> None:
    """A restore writes into what ``state`` gives; the next update goes on from there."""
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.5)
    ema.state()["bias"].fill_(8.0)
    model.bias.data.fill_(0.0)
    ema.update(100)
    assert ema.state()["bias"].tolist() == [4.0, 4.0]


def test_applied_swaps_and_swaps_back() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    average, storage = model.weight.detach().clone(), model.weight.data_ptr()
    model.weight.data.normal_()
    weight = model.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.weight, average)
        assert model.weight.data_ptr() == storage
    assert torch.equal(model.weight, weight)
    assert torch.equal(ema.state()["weight"], average)


def test_applied_swaps_back_after_an_exception() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    model.weight.data.normal_()
    weight = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(model.weight, weight)


def test_swapped_weights_are_neither_averaged_nor_saved() -> None:
    ema = Ema(nn.Linear(1, 1), decay=0.9)
    with ema.applied():
        with pytest.raises(AssertionError, match="holds the averages"):
            ema.update(0)
        with pytest.raises(AssertionError, match="holds the averages"):
            ema.state()
