"""Transformer parts shared by the image encoder, the poolers and the text decoders.

Shapes: B batch, T positions of any kind, S source tokens attended to, D width, H heads, K head width, Q queries,
L positions of a key-value cache, R rows kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from coca.packed import Linear

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each (B, H, S, K)."""


class KeyValueCache:
    """Keys and values of the positions one attention layer has seen, in memory for all that may come.

    ``length`` counts the stored positions. Where it is a tensor of one element, shapes never change: a new position is
    written there and all of the memory is attended to under a mask, as torch.compile with static shapes wants it.
    """

    def __init__(self, rows: int, heads: int, positions: int, head_width: int, like: Tensor) -> None:
        # Positions come first: those in use are one piece of memory, whichever rows stay.
        self.keys_LBHK = like.new_zeros(positions, rows, heads, head_width)
        self.values_LBHK = torch.zeros_like(self.keys_LBHK)
        self.length: int | Tensor = 0

    def append(self, keys_BHTK: Tensor, values_BHTK: Tensor) -> KeysValues:
        """Store new positions (one, where ``length`` is a tensor) and give back all that are to be attended to."""
        if isinstance(self.length, Tensor):
            self.keys_LBHK.index_copy_(0, self.length, keys_BHTK.permute(2, 0, 1, 3))
            self.values_LBHK.index_copy_(0, self.length, values_BHTK.permute(2, 0, 1, 3))
            return self.keys_LBHK.permute(1, 2, 0, 3), self.values_LBHK.permute(1, 2, 0, 3)
        end = self.length + keys_BHTK.shape[2]
        self.keys_LBHK[self.length : end] = keys_BHTK.permute(2, 0, 1, 3)
        self.values_LBHK[self.length : end] = values_BHTK.permute(2, 0, 1, 3)
        self.length = end
        return self.keys_LBHK[:end].permute(1, 2, 0, 3), self.values_LBHK[:end].permute(1, 2, 0, 3)

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        assert isinstance(self.length, int), "the rows of a static cache stay"
        self.keys_LBHK = self._selected(self.keys_LBHK, rows_R)
        self.values_LBHK = self._selected(self.values_LBHK, rows_R)

    def _selected(self, stored_LBHK: Tensor, rows_R: Tensor) -> Tensor:
        selected = stored_LBHK.new_empty(len(stored_LBHK), len(rows_R), *stored_LBHK.shape[2:])
        torch.index_select(stored_LBHK[: self.length], 1, rows_R, out=selected[: self.length])
        return selected


def run_block(block: Callable[..., Tensor], *inputs: object, recompute: bool) -> Tensor:
    """One block; with ``recompute`` its activations are not kept for the backward pass but computed again."""
    if recompute and torch.is_grad_enabled():
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return output
    return block(*inputs)


def _split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    batch, length, width = x_BTD.shape
    return x_BTD.view(batch, length, heads, width // heads).transpose(1, 2)


def _merge_heads(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, causal or full, with a layer norm on queries and keys where asked for."""

    def __init__(self, width: int, heads: int, *, causal: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.key_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.out = Linear(width, width)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """
        Args:
            mask: True where a position (row) sees another (column), instead of the plain causal mask.
            cache: ``x_BTD`` continues its positions: by one, or by a first block of any length.
        """
        q, k, v = (_split_heads(part, self.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        causal = self.causal and mask is None
        if cache is not None:
            first = isinstance(cache.length, int) and cache.length == 0
            assert first or x_BTD.shape[1] == 1, "a cache is continued one position at a time"
            causal = causal and first
            k, v = cache.append(k, v)
        return self.out(_merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)))


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another of its own width."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(source_width, 2 * width)
        self.out = Linear(width, width)

    def keys_values(self, source_BSD: Tensor) -> KeysValues:
        """Keys and values of the source: computed once per image in generation."""
        k, v = self.kv(source_BSD).chunk(2, dim=-1)
        return _split_heads(k, self.heads), _split_heads(v, self.heads)

    def forward(self, x_BTD: Tensor, keys_values: KeysValues) -> Tensor:
        """Sources may be fewer than rows: then each serves as many rows in turn (the beams of one image)."""
        sources = len(keys_values[0])
        q = _split_heads(self.q(x_BTD).view(sources, -1, x_BTD.shape[-1]), self.heads)
        attended = _merge_heads(F.scaled_dot_product_attention(q, *keys_values))
        return self.out(attended.view(x_BTD.shape))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(width, hidden)
        self.contract = Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.contract(self.expand.gelu(x_BTD))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, causal: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal, qk_norm=qk_norm)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), mask, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class CrossBlock(nn.Module):
    """Pre-norm decoder block: causal self-attention, cross-attention to the image, MLP.

    One MLP per block is what the paper's parameter counts imply. open_clip's block has another one after the
    self-attention, and a norm of its own on the image tokens (``open_clip``).
    """

    def __init__(self, width: int, heads: int, mlp_width: int, *, open_clip: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True)
        self.middle_norm = nn.LayerNorm(width) if open_clip else None
        self.middle_mlp = Mlp(width, mlp_width) if open_clip else None
        self.cross_norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width) if open_clip else None
        self.cross_attention = CrossAttention(width, width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def keys_values(self, source_BSD: Tensor) -> KeysValues:
        """The cross-attention's keys and values of the image tokens."""
        return self.cross_attention.keys_values(
            source_BSD if self.source_norm is None else self.source_norm(source_BSD)
        )

    def forward(
        self,
        x_BTD: Tensor,
        keys_values: KeysValues,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), mask, cache)
        if self.middle_norm is not None and self.middle_mlp is not None:
            x_BTD = x_BTD + self.middle_mlp(self.middle_norm(x_BTD))
        x_BTD = x_BTD + self.cross_attention(self.cross_norm(x_BTD), keys_values)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class AttentionalPooler(nn.Module):
    """Learned queries attend to a sequence: Q tokens out, however many go in (Yu et al. 2022, section 3.2).

    The queries are learned where attention uses them: a norm and a projection of a constant would be a constant again.
    open_clip's pooler has both, and a norm on its source (``open_clip``).
    """

    def __init__(self, width: int, source_width: int, heads: int, queries: int, *, open_clip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.queries_QD = nn.Parameter(torch.empty(queries, width))
        self.query_norm = nn.LayerNorm(width) if open_clip else None
        self.query_projection = Linear(width, width) if open_clip else None
        self.source_norm = nn.LayerNorm(source_width) if open_clip else None
        self.kv = Linear(source_width, 2 * width)
        self.out = Linear(width, width)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, source_BSD: Tensor) -> Tensor:
        queries_QD = self.queries_QD
        if self.query_norm is not None and self.query_projection is not None and self.source_norm is not None:
            queries_QD, source_BSD = self.query_projection(self.query_norm(queries_QD)), self.source_norm(source_BSD)
        k, v = (_split_heads(part, self.heads) for part in self.kv(source_BSD).chunk(2, dim=-1))
        q = _split_heads(queries_QD[None].to(k.dtype), self.heads).expand(len(k), -1, -1, -1)
        return self.out_norm(self.out(_merge_heads(F.scaled_dot_product_attention(q, k, v))))
