"""The image encoders: pictures to tokens. Each has ``forward(images_BCHW, kept_patches_BK)`` and gives (B, S, D).

Shapes: B batch, C channels, H height, W width, S tokens, K patches kept, N learned
tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from coca.config import ViTConfig
from coca.layers import Block, run_block


class VisionTransformer(nn.Module):
    """A pre-norm ViT: patches, learned positions, blocks (Dosovitskiy et al. 2021)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token_D = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.registers_RD = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        self.positions_SD = nn.Parameter(torch.empty(config.class_token + config.patches, width))
        self.pre_norm = nn.LayerNorm(width) if config.pre_norm else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, causal=False, qk_norm=config.qk_norm)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width) if config.final_norm else None
        self.checkpoint_activations = False

    def forward(self, images_BCHW: Tensor, kept_patches_BK: Tensor | None = None) -> Tensor:
        """Tokens (B, S, D): the class token where there is one, then a token per patch, row by row.

        Args:
            images_BCHW: sides that patch_size divides; at another size than the config's, positions are interpolated.
            kept_patches_BK: indices of the patches to see, the others are left out (patch dropout).
        """
        positions_SD = self._positions(images_BCHW.shape[2:])
        x_BSD = self._embed_patches(images_BCHW) + positions_SD[int(self.config.class_token) :]
        if kept_patches_BK is not None:
            x_BSD = x_BSD.gather(1, kept_patches_BK[..., None].expand(-1, -1, x_BSD.shape[-1]))
        if self.class_token_D is not None:
            x_BSD = torch.cat([_repeat((self.class_token_D + positions_SD[0])[None], x_BSD), x_BSD], dim=1)
        if self.registers_RD is not None:
            x_BSD = torch.cat([x_BSD, _repeat(self.registers_RD, x_BSD)], dim=1)
        if self.pre_norm is not None:
            x_BSD = self.pre_norm(x_BSD)
        for block in self.blocks:
            x_BSD = run_block(block, x_BSD, recompute=self.checkpoint_activations)
        if self.registers_RD is not None:
            x_BSD = x_BSD[:, : -len(self.registers_RD)]
        return x_BSD if self.norm is None else self.norm(x_BSD)

    def _embed_patches(self, images_BCHW: Tensor) -> Tensor:
        patch, (height, width) = self.config.patch_size, images_BCHW.shape[2:]
        if height % patch or width % patch:
            raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
        return self.patch_embedding(images_BCHW).flatten(2).transpose(1, 2)

    def _positions(self, size: torch.Size) -> Tensor:
        config = self.config
        grid = (size[0] // config.patch_size, size[1] // config.patch_size)
        trained = config.image_size // config.patch_size
        if grid == (trained, trained):
            return self.positions_SD
        patches_SD = interpolate_positions(self.positions_SD[config.class_token :], (trained, trained), grid)
        return torch.cat([self.positions_SD[: config.class_token], patches_SD])


def _repeat(tokens_ND: Tensor, like_BSD: Tensor) -> Tensor:
    return tokens_ND.to(like_BSD.dtype).expand(len(like_BSD), -1, -1)


def interpolate_positions(positions_SD: Tensor, trained: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions learned on one grid (rows, columns), for another: bicubic, smoothed where the grid shrinks."""
    if trained == wanted:
        return positions_SD
    grid_1DHW = positions_SD.unflatten(0, trained).permute(2, 0, 1)[None].float()
    resized = F.interpolate(grid_1DHW, wanted, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(positions_SD.dtype)
