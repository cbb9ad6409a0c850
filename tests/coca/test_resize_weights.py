"""A checkpoint of another size computes what interpolation computed."""

import pytest
import torch

from coca.config import ModelConfig, ResNetConfig
from coca.errors import BadInput
from coca.model import CoCa
from coca.resize_weights import at_image_size


def with_vision(config: ModelConfig, **changes: object) -> ModelConfig:
    vision = config.vision.model_copy(update=changes)
    return config.model_copy(update={"vision": vision})


@pytest.fixture
def configs(tiny_model: ModelConfig) -> dict[str, ModelConfig]:
    resnet = ResNetConfig(image_size=32, blocks=(1, 1), width=8, groups=2, stem="small")
    return {
        "vit": with_vision(tiny_model, image_size=32),
        "class_token": with_vision(tiny_model, image_size=32, class_token=True, registers=2),
        "resnet": tiny_model.model_copy(update={"vision": resnet}),
    }


@pytest.mark.parametrize("kind", ["vit", "class_token", "resnet"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_outputs_equal_those_by_interpolation(configs: dict[str, ModelConfig], kind: str, size: int) -> None:
    torch.manual_seed(0)
    before = CoCa(configs[kind])
    config, weights = at_image_size(configs[kind], before.state_dict(), size)
    after = CoCa(config)
    after.load_state_dict(weights)
    assert config.vision.image_size == size
    images, tokens = torch.randn(2, 3, size, size), torch.randint(3, 320, (2, 6))
    with torch.no_grad():
        for one, other in zip(after(images, tokens), before(images, tokens), strict=True):
            assert torch.equal(one, other)


def test_what_came_in_is_unchanged(configs: dict[str, ModelConfig]) -> None:
    weights = CoCa(configs["vit"]).state_dict()
    positions, shape = weights["vision.positions_SD"], weights["vision.positions_SD"].shape
    _, resized = at_image_size(configs["vit"], weights, 64)
    assert weights["vision.positions_SD"] is positions
    assert positions.shape == shape != resized["vision.positions_SD"].shape
    assert all(resized[name] is weights[name] for name in weights if name != "vision.positions_SD")


@pytest.mark.parametrize(("kind", "unit"), [("vit", "patch_size = 8"), ("resnet", "stride = 4")])
def test_a_size_that_does_not_fit_is_refused(configs: dict[str, ModelConfig], kind: str, unit: str) -> None:
    with pytest.raises(BadInput, match=f"{unit} does not divide an image size of 30"):
        at_image_size(configs[kind], CoCa(configs[kind]).state_dict(), 30)
