"""Weights for pictures of another size than the config's.

Shapes: S positions of the image encoder, D width.
"""

import torch
from torch import Tensor

from coca.config import ModelConfig
from coca.errors import BadInput
from coca.vision import interpolate_positions

_POSITIONS = "vision.positions_SD"


def at_image_size(config: ModelConfig, weights: dict[str, Tensor], size: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, weights) of the model whose own image size is ``size`` pixels.

    It gives for such pictures what the model that came in gives by interpolating its positions, which here is done once
    and for all. Other tensors are passed on as they are.

    Raises:
        BadInput: the patch size, or the stride of a ResNet, does not divide ``size``.
    """
    vision = config.vision
    name, unit = ("patch_size", vision.patch_size) if vision.kind == "vit" else ("stride", vision.stride)
    if size % unit:
        raise BadInput(f"{name} = {unit} does not divide an image size of {size}", f"Give a multiple of {unit}")
    resized = config.model_copy(update={"vision": vision.model_copy(update={"image_size": size})})
    trained, wanted = vision.image_size // unit, size // unit
    positions_SD = weights[_POSITIONS]
    tokens = len(positions_SD) - trained * trained  # the class token's position lies on no grid
    grid_SD = interpolate_positions(positions_SD[tokens:], (trained, trained), (wanted, wanted))
    return resized, weights | {_POSITIONS: torch.cat([positions_SD[:tokens], grid_SD])}
