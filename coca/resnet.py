"""The ResNet image encoder: its last feature map is the tokens.

Shapes: B batch, C channels, H height, W width, S tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from coca.config import ResNetConfig
from coca.layers import run_block
from coca.vision import interpolate_positions


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut; the stride lies on the 3 x 3 (He et al. 2015, ResNet-B).

    Group normalisation: unlike that of a batch, it gives a picture the same numbers whichever pictures stand beside it,
    so the loss does not depend on how a batch is split.
    """

    def __init__(self, inputs: int, width: int, outputs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.reduce_norm = nn.GroupNorm(groups, width)
        self.spatial = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.spatial_norm = nn.GroupNorm(groups, width)
        self.expand = nn.Conv2d(width, outputs, 1, bias=False)
        self.residual_norm = nn.GroupNorm(groups, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.shortcut_norm = None if same else nn.GroupNorm(groups, outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        residual_BCHW = F.relu(self.reduce_norm(self.reduce(x_BCHW)))
        residual_BCHW = F.relu(self.spatial_norm(self.spatial(residual_BCHW)))
        residual_BCHW = self.residual_norm(self.expand(residual_BCHW))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BCHW = self.shortcut_norm(self.shortcut(x_BCHW))
        return F.relu(x_BCHW + residual_BCHW)


class ResNet(nn.Module):
    """Stem, stages of bottlenecks, and a position for each token, since pooling by attention has no sense of place."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        imagenet = config.stem == "imagenet"
        kernel = 7 if imagenet else 3
        self.stem = nn.Conv2d(3, config.width, kernel, stride=2, padding=kernel // 2, bias=False)
        self.stem_norm = nn.GroupNorm(config.groups, config.width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else None
        self.blocks = nn.ModuleList()
        inputs = config.width
        for stage, count in enumerate(config.blocks):
            width = config.width * 2**stage
            for index in range(count):
                halve = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Bottleneck(inputs, width, 4 * width, stride=halve, groups=config.groups))
                inputs = 4 * width
        side = config.image_size // config.stride
        self.positions_SD = nn.Parameter(torch.empty(side * side, config.output_width))
        self.norm = nn.LayerNorm(config.output_width)
        self.checkpoint_activations = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # so that gradients, which come channels last, lie as their weights do
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images_BCHW: Tensor, kept_patches_BK: Tensor | None = None) -> Tensor:
        """Tokens (B, S, D) of the last feature map, row by row; sides that the config's stride divides."""
        assert kept_patches_BK is None, "a ResNet has no patches to leave out"
        stride, (height, width) = self.config.stride, images_BCHW.shape[2:]
        if height % stride or width % stride:
            raise ValueError(f"a picture of {height} x {width} pixels has sides that {stride} does not divide")
        # Convolutions run channels last, as the pixels come.
        x_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        x_BCHW = F.relu(self.stem_norm(self.stem(x_BCHW)))
        if self.pool is not None:
            x_BCHW = self.pool(x_BCHW)
        for block in self.blocks:
            x_BCHW = run_block(block, x_BCHW, recompute=self.checkpoint_activations)
        trained = self.config.image_size // stride
        positions_SD = interpolate_positions(self.positions_SD, (trained, trained), (height // stride, width // stride))
        return self.norm(x_BCHW.flatten(2).transpose(1, 2) + positions_SD)
