"""Counts against those of the paper, of open_clip, and of PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coca.config import ModelConfig
from coca.cost import ENCODER, PARTS, TEXT, TRAINING, bottlenecks, flops, parameters
from coca.errors import BadInput
from coca.model import CoCa
from coca.variants import VARIANTS, variant

EXACT = {
    "base": (85_999_872, 296_832_768, 386_576_641),
    "large": (303_569_920, 483_857_408, 793_992_193),
    "giant": (1_011_740_288, 1_180_294_016, 2_204_305_025),
    "coca_ViT-B-32": (87_454_464, 164_133_888, 253_560_065),
    "coca_ViT-L-14": (303_177_728, 331_135_488, 638_450_177),
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_of_encoder_text_and_all(name: str) -> None:
    counts = parameters(variant(name))
    assert list(counts) == list(PARTS)
    assert (counts[ENCODER], sum(counts[part] for part in TEXT), sum(counts.values())) == EXACT[name]


@pytest.mark.parametrize(
    ("name", "encoder", "text"),
    [
        ("base", 86e6, 297e6),  # table 1 of the paper, which rounds
        ("large", 303e6, 484e6),
        ("giant", 1009e6, 1179e6),  # the weights alone: the table's 1B and 1.1B are too coarse
    ],
)
def test_parameters_are_the_papers(name: str, encoder: float, text: float) -> None:
    counts = parameters(variant(name))
    assert counts[ENCODER] == pytest.approx(encoder, rel=0.01)
    assert sum(counts[part] for part in TEXT) == pytest.approx(text, rel=0.01)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_counted_in_a_part_of_its_own(name: str) -> None:
    with torch.device("meta"):
        model = CoCa(variant(name))
    counts = parameters(variant(name))
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["temperature, bias"] == 1


def counted(config: ModelConfig, tokens: int, batch: int, *, training: bool) -> float:
    """PyTorch's own count for one sample of a batch."""
    size = config.vision.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = CoCa(config)(torch.empty(batch, 3, size, size), torch.ones(batch, tokens, dtype=torch.long))
        if training:
            (output.logits.sum() + output.image_features.sum() + output.text_features.sum()).backward()
    return counter.get_total_flops() / batch


def changed(name: str, **vision: object) -> ModelConfig:
    config = variant(name)
    return config.model_copy(update={"vision": config.vision.model_copy(update=vision)})


CONFIGS = {name: variant(name) for name in VARIANTS if name in ("base", "base_resnet50", "small", "coca_ViT-B-32")} | {
    "parallel": variant("small").model_copy(update={"pooling": "parallel"}),
    "registers": changed("small", class_token=True, registers=5),
    "small stem": changed("base_resnet50", stem="small", image_size=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_pytorchs(name: str) -> None:
    """At a batch of 32, for what is made once per batch is left out."""
    config = CONFIGS[name]
    length = config.text.context_length
    assert sum(flops(config).values()) == pytest.approx(counted(config, length, 32, training=False), rel=0.001)
    short = length // 2
    assert sum(flops(config, short).values()) == pytest.approx(counted(config, short, 32, training=False), rel=0.001)


@pytest.mark.parametrize("name", ["base", "base_resnet50", "coca_ViT-B-32"])
def test_training_is_three_times_forward(name: str) -> None:
    """But for the gradient of the picture, which nobody needs."""
    config = variant(name)
    measured = counted(config, config.text.context_length, 32, training=True)
    assert TRAINING * sum(flops(config).values()) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("base", 85.9),  # by hand from the formula
        ("large", 228.7),
        ("giant", 707),
        ("coca_ViT-B-32", 33.3),  # open_clip, docs/model_profile.csv
        ("coca_ViT-L-14", 214.5),
    ],
)
def test_flops_are_those_published(name: str, forward: float) -> None:
    assert sum(flops(variant(name)).values()) / 1e9 == pytest.approx(forward, rel=0.01)


def test_bottlenecks_are_the_models() -> None:
    for name in ("base_resnet101", "small_resnet"):
        config = variant(name)
        assert config.vision.kind == "resnet"
        with torch.device("meta"):
            blocks = CoCa(config).vision.blocks
        ours = [(block.inputs, block.width, block.shortcut) for block in bottlenecks(config.vision)]
        assert ours == [
            (block.reduce.in_channels, block.reduce.out_channels, block.shortcut is not None) for block in blocks
        ]


@pytest.mark.parametrize("tokens", [1, 65])
def test_captions_must_have_a_length_that_the_model_takes(tokens: int) -> None:
    with pytest.raises(BadInput, match=f"captions of {tokens} tokens: the model takes 2 to 64"):
        flops(variant("base"), tokens)
