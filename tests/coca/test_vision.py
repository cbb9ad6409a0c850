"""The ViT: positions at other sizes, dropped patches, tokens of its own."""

import pytest
import torch
from torch import Tensor

from coca.config import ViTConfig
from coca.vision import VisionTransformer, interpolate_positions


def encoder(**fields: object) -> VisionTransformer:
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32).model_copy(update=fields)
    encoder = VisionTransformer(config).double()
    for parameter in encoder.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    return encoder


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_one_token_a_patch(class_token: bool, registers: int) -> None:
    tokens = encoder(class_token=class_token, registers=registers)(pictures())
    assert tokens.shape == (2, 16 + class_token, 16)


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (16, 24)])
def test_other_sizes_and_aspect_ratios(size: tuple[int, int]) -> None:
    tokens = encoder(class_token=True)(pictures(*size))
    assert tokens.shape == (2, 1 + size[0] // 8 * (size[1] // 8), 16)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels cannot be cut into patches of 8 x 8"):
        encoder()(pictures(30, 32))


def test_interpolated_positions_keep_a_plane() -> None:
    """A position that is linear in row and column is so on a finer grid, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    finer = interpolate_positions(plane, (8, 8), (16, 8)).unflatten(0, (16, 8))
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(finer[4:12, 3, 0], expected[4:12], rtol=0, atol=1e-5)
    torch.testing.assert_close(finer[5, :, 1], torch.arange(8.0), rtol=0, atol=1e-5)


def test_the_same_grid_is_left_as_it_is() -> None:
    positions = torch.randn(16, 4)
    assert interpolate_positions(positions, (4, 4), (4, 4)) is positions


def test_interpolated_positions_learn() -> None:
    vision = encoder()
    vision(pictures(64, 48)).sum().backward()
    assert vision.positions_SD.grad is not None
    assert vision.positions_SD.grad.any()


def test_keeping_all_patches_changes_nothing_and_dropping_drops() -> None:
    vision = encoder(class_token=True)
    whole = vision(pictures())
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(vision(pictures(), everything), whole, rtol=0, atol=1e-12)
    some = torch.tensor([[0, 3, 9], [1, 2, 15]])
    kept = vision(pictures(), some)
    assert kept.shape == (2, 4, 16)
    changed = pictures()
    changed[0, :, :8, 8:16] += 1  # patch 1, which the first picture is not seen by
    torch.testing.assert_close(vision(changed, some), kept, rtol=0, atol=0)
    changed[1, :, :8, 8:16] += 1
    assert (vision(changed, some)[1] - kept[1]).abs().max() > 1e-6


def test_query_and_key_norms_are_there_only_where_asked() -> None:
    assert not [name for name, _ in encoder().named_parameters() if "query_norm" in name]
    assert len([name for name, _ in encoder(qk_norm=True).named_parameters() if "query_norm" in name]) == 4
