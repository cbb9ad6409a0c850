"""One step of optimization on one process; what shards change is in test_shards.py."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from coca.config import ModelConfig
from coca.model import CoCa
from coca.optim import Optimizer
from coca.train_config import OptimizerConfig, ParameterRule

NAMES = ("adamw", "adafactor", "muon")


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def config(name: str, **values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, **values})


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    values = model.state_dict() | optimizer.state()
    return {name: value.detach().clone() for name, value in values.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_adamw_gets_the_numbers_of_torch(tiny_model: ModelConfig) -> None:
    """Clipping, schedule, groups and update, bit for bit."""
    torch.manual_seed(0)
    model = CoCa(tiny_model)
    other = copy.deepcopy(model)
    optimizer = Optimizer(model, OptimizerConfig(warmup_fraction=0), steps=4)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in other.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=8e-4)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(other, step)
        norm = nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = 8e-4 * (1 - step / 4)
        reference.step()
        assert optimizer.step(step) == float(norm)
    assert_equal(model.state_dict(), other.state_dict())


def test_the_fused_adamw_of_cuda_gets_the_same_numbers(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel for CPUs stands in; one gradient is missing in each step."""
    torch.manual_seed(0)
    model = CoCa(tiny_model)
    other = copy.deepcopy(model)
    plain = Optimizer(other, OptimizerConfig(), steps=4)
    monkeypatch.setattr("coca.optim._has_fused_kernel", lambda groups: True)
    fused = Optimizer(model, OptimizerConfig(), steps=4)
    for step in range(3):
        for each, optimizer in ((model, fused), (other, plain)):
            give_gradients(each, step)
            each.logit_scale.grad = None
            optimizer.step(step)
    states = plain.state()
    for name, value in fused.state().items():
        torch.testing.assert_close(value, states[name], rtol=1e-5, atol=1e-7)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_and_gradients_are_cleared(tiny_model: ModelConfig, name: str) -> None:
    model = CoCa(tiny_model)
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model, config(name), steps=10)
    give_gradients(model, 0)
    optimizer.step(0)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_clipped_to_the_global_norm(tiny_model: ModelConfig) -> None:
    """Adam's first moment after a step is a tenth of the clipped gradient."""
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, OptimizerConfig(max_grad_norm=0.5), steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert optimizer.step(0) == pytest.approx(count**0.5, rel=1e-5)
    moment = optimizer.state()["unimodal.norm.bias/exp_avg"]
    torch.testing.assert_close(moment, torch.full_like(moment, 0.05 / count**0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_that_is_no_number_changes_nothing(tiny_model: ModelConfig, name: str, bad: float) -> None:
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, config(name), steps=10)
    give_gradients(model, 0)
    optimizer.step(0)
    before = snapshot(model, optimizer)
    give_gradients(model, 1)
    assert model.log_logit_scale.grad is not None
    model.log_logit_scale.grad.fill_(bad)
    assert not math.isfinite(optimizer.step(1))
    assert_equal(snapshot(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_is_there_before_the_first_step(tiny_model: ModelConfig, name: str) -> None:
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, config(name), steps=10)
    fresh = optimizer.state()
    assert all(not value.any() for value in fresh.values())
    assert {key.rpartition("/")[0] for key in fresh} == dict(model.named_parameters()).keys()
    give_gradients(model, 0)
    optimizer.step(0)
    after = optimizer.state()
    assert fresh.keys() == after.keys()
    assert all(fresh[key] is after[key] and value.any() for key, value in fresh.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_a_straight_one(tiny_model: ModelConfig, name: str) -> None:
    """By writing into the live tensors, counters included, bit for bit."""
    torch.manual_seed(0)
    model = CoCa(tiny_model)
    straight = Optimizer(model, config(name), steps=10)
    for step in range(3):
        give_gradients(model, step)
        straight.step(step)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(straight.state())

    other = CoCa(tiny_model)
    other.load_state_dict(weights)
    resumed = Optimizer(other, config(name), steps=10)
    for key, value in resumed.state().items():
        value.copy_(state[key])
    for step in range(3, 6):
        give_gradients(model, step)
        give_gradients(other, step)
        assert straight.step(step) == resumed.step(step)
    assert_equal(snapshot(other, resumed), snapshot(model, straight))


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_changes_rate_and_decay(tiny_model: ModelConfig, name: str) -> None:
    """Half the rate halves the first move of every kind of optimizer; a decay of 1 / rate leaves only that move."""
    torch.manual_seed(0)
    model = CoCa(tiny_model)
    part = "vision.blocks.0.attention.qkv.weight"
    values = {"weight_decay": 0, "learning_rate": 0.1, "muon_learning_rate": 0.1, "warmup_fraction": 0}
    moves = {}
    for factor, decay in ((1.0, 0.0), (0.5, 0.0), (1.0, 10.0)):
        rules = [ParameterRule(match="qkv", learning_rate_factor=factor, weight_decay=decay)]
        copied = copy.deepcopy(model)
        optimizer = Optimizer(copied, config(name, rules=rules, **values), steps=10)
        give_gradients(copied, 0)
        optimizer.step(0)
        moves[factor, decay] = copied.state_dict()[part] - model.state_dict()[part]
    torch.testing.assert_close(moves[0.5, 0.0], moves[1.0, 0.0] / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moves[1.0, 10.0], moves[1.0, 0.0] - model.state_dict()[part], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_of_nothing_leaves_parameters_without_state_and_out_of_the_norm(
    tiny_model: ModelConfig, name: str
) -> None:
    model = CoCa(tiny_model)
    before = copy.deepcopy(model.state_dict())
    rules = [ParameterRule(match="^vision", learning_rate_factor=0, weight_decay=1.0)]
    optimizer = Optimizer(model, config(name, rules=rules), steps=10)
    assert not [key for key in optimizer.state() if key.startswith("vision")]
    give_gradients(model, 0)
    learning = [p.grad for key, p in model.named_parameters() if not key.startswith("vision")]
    expected = float(nn.utils.get_total_norm([gradient for gradient in learning if gradient is not None]))
    assert optimizer.step(0) == pytest.approx(expected, rel=1e-6)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if not key.startswith("vision")}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_learning_rate_is_the_scheduled_one(tiny_model: ModelConfig) -> None:
    optimizer = Optimizer(CoCa(tiny_model), OptimizerConfig(learning_rate=0.2, warmup_fraction=0.5), steps=8)
    assert [optimizer.learning_rate(step) for step in (0, 3, 4, 6)] == pytest.approx([0.04, 0.16, 0.2, 0.1])
