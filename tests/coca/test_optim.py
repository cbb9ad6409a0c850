"""Schedules at points computed by hand, and which parameters Muon takes."""

import pytest
import torch

from coca.config import ModelConfig
from coca.model import CoCa
from coca.optim import Optimizer, schedule
from coca.train_config import OptimizerConfig


def test_linear_schedule() -> None:
    config = OptimizerConfig(warmup_fraction=0.1)
    values = [schedule(step, 100, config) for step in (0, 4, 9, 10, 55, 100)]
    assert values == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1, 0.5, 0])


def test_cosine_schedule() -> None:
    config = OptimizerConfig(warmup_fraction=0, schedule="cosine")
    assert [schedule(step, 90, config) for step in (0, 30, 45, 90)] == pytest.approx([1, 0.75, 0.5, 0])


def test_muon_takes_the_hidden_matrices_only(tiny_model: ModelConfig) -> None:
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, OptimizerConfig(name="muon"), steps=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = optimizer._inner[1][0]
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert all(name.endswith(("qkv.weight", "out.weight", "q.weight", "kv.weight", "expand.weight", "contract.weight"))
               for name in taken)  # fmt: skip
    assert len(taken) == 4 * 1 + 2 * 2 + 4 * 2 + 7 * 2


def test_every_parameter_has_one_optimizer(tiny_model: ModelConfig) -> None:
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, OptimizerConfig(name="muon"), steps=10)
    owned = [p for inner, _ in optimizer._inner for group in inner.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


def test_gradients_are_clipped_to_the_global_norm(tiny_model: ModelConfig) -> None:
    model = CoCa(tiny_model)
    optimizer = Optimizer(model, OptimizerConfig(max_grad_norm=0.5), steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert optimizer.step(0) == pytest.approx(count**0.5, rel=1e-5)
