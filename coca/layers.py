"""Transformer parts shared by the image encoder, the poolers and the text decoders.

Shapes: B batch, T text positions or tokens of any kind, S source tokens attended to, D width, H heads, K head width,
Q queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass
class KeyValueCache:
    """Keys and values of the positions one attention layer has seen; grown in place up to ``max_length``."""

    keys_BHTK: Tensor
    values_BHTK: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, batch: int, heads: int, max_length: int, head_width: int, like: Tensor) -> "KeyValueCache":
        shape = (batch, heads, max_length, head_width)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def append(self, keys_BHTK: Tensor, values_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions and return all stored so far."""
        end = self.length + keys_BHTK.shape[2]
        self.keys_BHTK[:, :, self.length : end] = keys_BHTK
        self.values_BHTK[:, :, self.length : end] = values_BHTK
        self.length = end
        return self.keys_BHTK[:, :, :end], self.values_BHTK[:, :, :end]


def _split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    batch, length, width = x_BTD.shape
    return x_BTD.view(batch, length, heads, width // heads).transpose(1, 2)


def _merge_heads(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, causal or full."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """With a cache, ``x_BTD`` continues the cached positions: one position, or a first block of any length."""
        q, k, v = (_split_heads(part, self.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        causal = self.causal
        if cache is not None:
            assert cache.length == 0 or x_BTD.shape[1] == 1, "a cache is continued one position at a time"
            causal = causal and cache.length == 0
            k, v = cache.append(k, v)
        return self.out(_merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another of its own width."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, K) of the source: computed once per image in generation."""
        k, v = self.kv(source_BSD).chunk(2, dim=-1)
        return _split_heads(k, self.heads), _split_heads(v, self.heads)

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        q = _split_heads(self.q(x_BTD), self.heads)
        return self.out(_merge_heads(F.scaled_dot_product_attention(q, *keys_values)))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class CrossBlock(nn.Module):
    """Pre-norm decoder block with one MLP: causal self-attention, cross-attention to the image, MLP.

    One MLP per block is what the paper's parameter counts imply.
    """

    def __init__(self, width: int, source_width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, source_width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def keys_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values of the image tokens."""
        return self.cross_attention.keys_values(source_BSD)

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cache)
        x_BTD = x_BTD + self.cross_attention(self.cross_norm(x_BTD), keys_values)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class AttentionalPooler(nn.Module):
    """Learned queries attend to a sequence: Q tokens out, however many go in (Yu et al. 2022, section 3.2)."""

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.queries_QD = nn.Parameter(torch.empty(queries, width))
        self.query_norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, heads)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, source_BSD: Tensor) -> Tensor:
        queries_BQD = self.query_norm(self.queries_QD).expand(source_BSD.shape[0], -1, -1)
        keys_values = self.attention.keys_values(self.source_norm(source_BSD))
        return self.out_norm(self.attention(queries_BQD, keys_values))
