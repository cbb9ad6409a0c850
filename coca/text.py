"""The two text decoders.

Shapes: B batch, T token positions, D width, V vocabulary, S image tokens, L positions of a cache.

The text embedding token stands right after the last real token of each caption, before the padding. Every attention
here is causal, so the token sees the whole caption and itself, no caption token sees it, and nothing real sees
padding: one plain causal mask serves both losses (docs/decisions/0001-embedding-token-before-padding.md).
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from coca.config import TextConfig
from coca.layers import Block, CrossBlock, KeysValues, KeyValueCache, run_block
from coca.packed import Linear


class UnimodalDecoder(nn.Module):
    """Causal text transformer; its output at the embedding token is the caption's embedding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions_TD = nn.Parameter(torch.empty(config.positions, config.width))
        self.embedding_token_D = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, causal=True) for _ in range(config.unimodal_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.checkpoint_activations = False

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids, padded on the right, to (embedding_BD, hidden_BTD).

        The embedding is normed; ``hidden_BTD`` is the raw residual stream for the multimodal decoder, meaningful at
        real tokens only. Neither depends on how far the batch is padded.
        """
        length = tokens_BT.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"captions of {length} tokens: at most {self.config.context_length} have a position")
        embed = self._embed if self.config.embedding_slot == "after_caption" else self._embed_open_clip
        x_BTD, mask, at_B = embed(tokens_BT)
        for block in self.blocks:
            x_BTD = run_block(block, x_BTD, mask, recompute=self.checkpoint_activations)
        rows_B = torch.arange(len(x_BTD), device=x_BTD.device)
        return self.norm(x_BTD[rows_B, at_B]), x_BTD[:, :length]

    def _embed(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Input states with the embedding token in each row after its last real token, and its index there.

        The token's position is its own learned vector.
        """
        length = tokens_BT.shape[1]
        x_BTD = F.pad(self.token_embedding(tokens_BT) + self.positions_TD[:length], (0, 0, 0, 1))
        place_T = torch.arange(1, length + 2, device=tokens_BT.device)
        # CLIP's padding is a token as well, and may stand within a caption.
        lengths_B = ((tokens_BT != self.config.pad_id) * place_T[:length]).amax(dim=1)
        at_end_BT1 = (place_T - 1 == lengths_B[:, None])[..., None]
        return torch.where(at_end_BT1, self.embedding_token_D.to(x_BTD.dtype), x_BTD), None, lengths_B

    def _embed_open_clip(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Input states as open_clip has them: padding, then the embedding token in the last position of the context.

        A mask hides the padding from it. open_clip's is shifted by one: the first padding token is seen, and the
        embedding token does not see itself unless the caption fills the context (open_clip issue 549). Only the first
        column of padding is ever seen, so one stands for all.
        """
        config = self.config
        if tokens_BT.shape[1] < config.context_length:
            tokens_BT = F.pad(tokens_BT, (0, 1), value=config.pad_id)
        batch, length = tokens_BT.shape
        x_BTD = self.token_embedding(tokens_BT) + self.positions_TD[:length]
        token_B1D = (self.embedding_token_D + self.positions_TD[-1]).to(x_BTD.dtype).expand(batch, 1, -1)
        x_BTD = torch.cat([x_BTD, token_B1D], dim=1)
        shifted = (1, 0) if config.embedding_slot == "open_clip" else (0, 1)
        seen_B1T = F.pad(tokens_BT != config.pad_id, shifted, value=True)[:, None]
        causal_TT = torch.ones(length + 1, length + 1, dtype=torch.bool, device=tokens_BT.device).tril()
        return x_BTD, (causal_TT & seen_B1T)[:, None], tokens_BT.new_full((batch,), length)

    def decode(self, tokens_BT: Tensor, caches: list[KeyValueCache], mask: Tensor | None = None) -> Tensor:
        """States of new tokens that continue the cached ones (generation: no embedding token), as ``hidden_BTD``."""
        start = caches[0].length
        if isinstance(start, Tensor):
            positions_TD = self.positions_TD.index_select(0, start)
        else:
            positions_TD = self.positions_TD[start : start + tokens_BT.shape[1]]
        x_BTD = self.token_embedding(tokens_BT) + positions_TD
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BTD = block(x_BTD, mask, cache)
        return x_BTD


class MultimodalDecoder(nn.Module):
    """Causal transformer over the unimodal states with cross-attention to the image tokens.

    The head that turns its states into logits is apart (``CoCa.head_VD``): it may be tied, or fused with the loss.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        open_clip = config.multimodal_block == "open_clip"
        self.blocks = nn.ModuleList(
            CrossBlock(config.width, config.decoder_heads, config.mlp_width, open_clip=open_clip)
            for _ in range(config.multimodal_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = None if config.tied_head else Linear(config.width, config.vocab_size, bias=False)
        self.checkpoint_activations = False

    def _cross_blocks(self) -> list[CrossBlock]:
        return [cast(CrossBlock, block) for block in self.blocks]

    def image_keys_values(self, image_tokens_BSD: Tensor) -> list[KeysValues]:
        """Each block's keys and values of the image: once per image, whatever the length of its caption."""
        return [block.keys_values(image_tokens_BSD) for block in self._cross_blocks()]

    def forward(self, hidden_BTD: Tensor, image_tokens_BSD: Tensor) -> Tensor:
        """Normed states (B, T, D): the head makes of position t the prediction of token t + 1."""

        def run(block: CrossBlock, hidden_BTD: Tensor, image_tokens_BSD: Tensor) -> Tensor:
            return block(hidden_BTD, block.keys_values(image_tokens_BSD))

        for block in self._cross_blocks():
            hidden_BTD = run_block(run, block, hidden_BTD, image_tokens_BSD, recompute=self.checkpoint_activations)
        return self.norm(hidden_BTD)

    def decode(
        self,
        hidden_BTD: Tensor,
        image_keys_values: list[KeysValues],
        caches: list[KeyValueCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, with the image's keys and values at hand. With caches, new positions continue theirs.

        One image may serve several rows in turn: then it has one row of keys and values.
        """
        for index, block in enumerate(self._cross_blocks()):
            hidden_BTD = block(hidden_BTD, image_keys_values[index], mask, caches[index] if caches else None)
        return self.norm(hidden_BTD)
