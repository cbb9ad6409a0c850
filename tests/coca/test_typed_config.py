"""Configs: precedence, and errors that name the key and the way out."""

from pathlib import Path

import pytest

from coca.config import ResNetConfig
from coca.errors import BadInput
from coca.train_config import TrainConfig
from coca.typed_config import resolve_config
from jobs.recipes import scenes_resnet


def test_precedence_is_default_file_set(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("steps: 20\nseed: 3\noptimizer: {learning_rate: 0.5}\n")
    config = resolve_config(TrainConfig(steps=10), file, ["steps=30", "optimizer.betas=[0.8, 0.9]"])
    assert (config.steps, config.seed, config.batch_size) == (30, 3, 96)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (0.5, (0.8, 0.9))


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(steps=7)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert resolve_config(TrainConfig(), tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepps=3", r"unknown config key 'stepps'. Did you mean 'steps'\?"),
        ("model.vision.widht=8", r"unknown config key 'model.vision.widht'. Did you mean 'width'\?"),
        ("model.vision={kind: resnet, patch_size: 8}", r"unknown config key 'model.vision.\w+'"),
        (
            "model.vision.kind=swin",
            r"config key 'model.vision' = .*: Input tag 'swin' .* expected tags: 'vit', 'resnet'",
        ),
        ("model.vision.patch_size=7", r"config key 'model.vision' = .*: patch_size = 7 does not divide image_size"),
        ("model.vision.patch_size=some", r"config key 'model.vision.patch_size' = 'some'"),
        ("loss.contrastive=sigmoid", r"loss.contrastive = sigmoid needs a bias: set model.initial_logit_bias"),
        ("model.initial_logit_bias=-10", r"model.initial_logit_bias is for loss.contrastive = sigmoid"),
        ("steps=0", r"config key 'steps' = 0: Input should be greater than 0"),
        ("steps=many", r"config key 'steps' = 'many'"),
        ("lanes=7", r"lanes = 7 does not divide batch_size = 96"),
        ("loss={contrastive_weight: 0, captioning_weight: 0}", "both loss weights are 0"),
        ("steps", r"--set 'steps' is not of the form a.b=VALUE"),
        ("steps=[", r"the value of --set 'steps=\[' is not YAML"),
    ],
)
def test_what_is_wrong_is_named(setting: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve_config(TrainConfig(), None, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "holds a list, not a mapping"), ("a: [", "is not YAML"), (None, "cannot read the config file")],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=message):
        resolve_config(TrainConfig(), file)


def test_a_field_of_several_configs_takes_each(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(scenes_resnet().to_yaml())
    config = resolve_config(scenes_resnet(), tmp_path / "config.yaml", ["model.vision.width=32"])
    assert isinstance(config.model.vision, ResNetConfig)
    assert config.model.vision.width == 32
    with pytest.raises(BadInput, match=r"augment\.patch_dropout is for a ViT"):
        resolve_config(scenes_resnet(), None, ["augment.patch_dropout=0.5"])


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().steps = 3  # type: ignore[misc]


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(BadInput, match=r"cannot read the config file .*: it is not UTF-8 text"):
        resolve_config(TrainConfig(), tmp_path / "config.yaml")
