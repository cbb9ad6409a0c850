"""The ResNet: shapes, places, and numbers that do not depend on the batch."""

import pytest
import torch
from torch import Tensor

from coca.config import ResNetConfig
from coca.resnet import ResNet

SMALL = ResNetConfig(image_size=32, blocks=(1, 2), width=8, groups=4, stem="small")


def encoder(config: ResNetConfig = SMALL) -> ResNet:
    torch.manual_seed(0)
    encoder = ResNet(config).double()
    for parameter in encoder.parameters():
        parameter.data = torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
    return encoder


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(4, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_last_feature_map_is_the_tokens() -> None:
    assert encoder()(pictures()).shape == (4, 8 * 8, 64)
    assert encoder()(pictures(64, 48)).shape == (4, 16 * 12, 64)
    assert SMALL.stride == 4
    assert SMALL.output_width == 64


@pytest.mark.parametrize(("blocks", "parameters"), [((3, 4, 6, 3), 23_508_032), ((3, 4, 23, 3), 42_500_160)])
def test_resnet_50_and_101_have_the_published_parameters(blocks: tuple[int, ...], parameters: int) -> None:
    """As torchvision's without their classifier; the positions and the last norm are ours."""
    config = ResNetConfig(blocks=blocks)
    with torch.device("meta"):
        encoder = ResNet(config)
    ours = encoder.positions_SD.numel() + 2 * config.output_width
    assert encoder.positions_SD.shape == (49, 2048)
    assert sum(p.numel() for p in encoder.parameters()) - ours == parameters


def test_a_picture_has_the_same_tokens_in_any_batch() -> None:
    vision = encoder()
    together = vision(pictures())
    for index in range(4):
        alone = vision(pictures()[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-12)


def test_tokens_know_their_place() -> None:
    """Without positions, a uniform picture has the same token everywhere but at its border."""
    tokens = encoder()(torch.ones(1, 3, 32, 32, dtype=torch.float64)).unflatten(1, (8, 8))
    assert (tokens[0, 3, 3] - tokens[0, 4, 4]).abs().max() > 1e-3


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        vision = encoder()
        vision.checkpoint_activations = recompute
        vision(pictures()).square().sum().backward()
        gradients.append([p.grad for p in vision.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels has sides that 4 does not divide"):
        encoder()(pictures(30, 32))
