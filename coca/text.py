"""The two text decoders.

Shapes: B batch, T token positions, D width, V vocabulary, S image tokens.

The text embedding token stands right after the last real token of each caption, before the padding. Every attention
here is causal, so the token sees the whole caption and itself, no caption token sees it, and nothing real sees
padding: one plain causal mask serves both losses (docs/decisions/0001-embedding-token-before-padding.md).
"""

from typing import cast

import torch
from torch import Tensor, nn

from coca.config import TextConfig
from coca.layers import Block, CrossBlock, KeyValueCache


class UnimodalDecoder(nn.Module):
    """Causal text transformer; its output at the embedding token is the caption's embedding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions_TD = nn.Parameter(torch.empty(config.context_length, config.width))
        self.embedding_token_D = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, causal=True) for _ in range(config.unimodal_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids, padded on the right, to (embedding_BD, hidden_BTD).

        ``hidden_BTD`` is meaningful at real tokens only. The embedding token's position is its own learned vector, so a
        caption's embedding does not depend on how far its batch is padded.
        """
        batch, length = tokens_BT.shape
        x_BTD = self.token_embedding(tokens_BT) + self.positions_TD[:length]
        x_BTD = torch.cat([x_BTD, x_BTD.new_zeros(batch, 1, x_BTD.shape[-1])], dim=1)
        lengths_B = (tokens_BT != self.config.pad_id).sum(dim=1)
        at_end_BT1 = (torch.arange(length + 1, device=tokens_BT.device) == lengths_B[:, None])[..., None]
        x_BTD = torch.where(at_end_BT1, self.embedding_token_D.to(x_BTD.dtype), x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        rows_B = torch.arange(batch, device=tokens_BT.device)
        return x_BTD[rows_B, lengths_B], x_BTD[:, :length]

    def step(self, tokens_BT: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """Hidden states of new tokens that continue the cached ones (generation: no embedding token)."""
        start = caches[0].length
        x_BTD = self.token_embedding(tokens_BT) + self.positions_TD[start : start + tokens_BT.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BTD = block(x_BTD, cache)
        return self.norm(x_BTD)


class MultimodalDecoder(nn.Module):
    """Causal transformer over the unimodal states with cross-attention to the image tokens, and the untied head."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossBlock(config.width, image_width, config.heads, config.mlp_width)
            for _ in range(config.multimodal_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def _cross_blocks(self) -> list[CrossBlock]:
        return [cast(CrossBlock, block) for block in self.blocks]

    def image_keys_values(self, image_tokens_BSD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each block's keys and values of the image: once per image, whatever the length of its caption."""
        return [block.keys_values(image_tokens_BSD) for block in self._cross_blocks()]

    def forward(
        self,
        hidden_BTD: Tensor,
        image_keys_values: list[tuple[Tensor, Tensor]],
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits (B, T, V): position t predicts token t + 1."""
        for index, block in enumerate(self._cross_blocks()):
            hidden_BTD = block(hidden_BTD, image_keys_values[index], caches[index] if caches else None)
        return self.head(self.norm(hidden_BTD))
