"""Which parameter is treated how."""

import pytest

from coca.config import ModelConfig
from coca.errors import BadInput
from coca.model import CoCa
from coca.parameter_rules import Treatment, treatments
from coca.train_config import OptimizerConfig, ParameterRule


def config(*rules: ParameterRule, name: str = "adamw") -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, "weight_decay": 0.1, "rules": rules})


def treated(model: ModelConfig, config: OptimizerConfig) -> dict[str, Treatment]:
    return treatments(dict(CoCa(model).named_parameters()), config)


def test_matrices_decay_and_vectors_do_not(tiny_model: ModelConfig) -> None:
    found = treated(tiny_model, config())
    assert found.keys() == dict(CoCa(tiny_model).named_parameters()).keys()
    assert found["vision.blocks.0.attention.qkv.weight"] == Treatment("adamw", 1.0, 0.1)
    assert found["vision.blocks.0.attention.qkv.bias"] == Treatment("adamw", 1.0, 0.0)
    assert found["log_logit_scale"] == Treatment("adamw", 1.0, 0.0)


def test_muon_takes_the_hidden_matrices_only(tiny_model: ModelConfig) -> None:
    found = treated(tiny_model, config(name="muon"))
    taken = {name for name, treatment in found.items() if treatment.optimizer == "muon"}
    assert all(name.endswith(("qkv.weight", "out.weight", "q.weight", "kv.weight", "expand.weight", "contract.weight"))
               for name in taken)  # fmt: skip
    assert len(taken) == 4 * 1 + 2 * 2 + 4 * 2 + 7 * 2
    assert {found[name].optimizer for name in found.keys() - taken} == {"adamw"}


def test_adafactor_takes_all(tiny_model: ModelConfig) -> None:
    assert {each.optimizer for each in treated(tiny_model, config(name="adafactor")).values()} == {"adafactor"}


def test_the_first_rule_that_matches_counts(tiny_model: ModelConfig) -> None:
    rules = [
        ParameterRule(match=r"^vision.*bias$", weight_decay=0.3),
        ParameterRule(match="^vision", learning_rate_factor=0.5),
        ParameterRule(match=r"qkv\.weight", learning_rate_factor=2.0, weight_decay=0.0),
    ]
    found = treated(tiny_model, config(*rules))
    assert found["vision.blocks.0.attention.qkv.bias"] == Treatment("adamw", 1.0, 0.3)
    assert found["vision.blocks.0.attention.qkv.weight"] == Treatment("adamw", 0.5, 0.1)
    assert found["vision.norm.weight"] == Treatment("adamw", 0.5, 0.0)
    assert found["multimodal.blocks.0.attention.qkv.weight"] == Treatment("adamw", 2.0, 0.0)
    assert found["unimodal.norm.bias"] == Treatment("adamw", 1.0, 0.0)


def test_a_rule_that_matches_nothing_is_refused_with_near_names(tiny_model: ModelConfig) -> None:
    with pytest.raises(BadInput) as problem:
        treated(tiny_model, config(ParameterRule(match="^vision"), ParameterRule(match="visoin.blocks")))
    assert problem.value.cause == "optimizer.rules[1].match = 'visoin.blocks' matches no parameter's name"
    assert problem.value.way_out.startswith("Near to it: vision.blocks, ")


def test_a_rule_behind_others_that_take_all_it_matches_is_refused(tiny_model: ModelConfig) -> None:
    with pytest.raises(BadInput, match=r"rules\[1\].match = 'qkv' never counts.*Move it before them"):
        treated(tiny_model, config(ParameterRule(match="."), ParameterRule(match="qkv")))
