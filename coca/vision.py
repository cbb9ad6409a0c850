"""The image encoder.

Shapes: B batch, C channels, H height, W width, S patches, D width.
"""

import torch
from torch import Tensor, nn

from coca.config import VisionConfig
from coca.layers import Block


class VisionTransformer(nn.Module):
    """A plain pre-norm ViT: patches, learned positions, blocks, a final norm. No class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.positions_SD = nn.Parameter(torch.empty(patches, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, causal=False) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, image_size, image_size) to one token per patch (B, S, D), row by row."""
        x_BSD = self.patch_embedding(images_BCHW).flatten(2).transpose(1, 2) + self.positions_SD
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.norm(x_BSD)
