"""The memory of a training step: weights, gradients, optimizer state, and what the forward pass keeps for the backward.

Counted from the config, block by block; nothing is allocated.
"""

import functools
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from torch import Tensor, nn

from coca.config import ModelConfig, ResNetConfig, ViTConfig
from coca.cost import (
    Bottleneck,
    bottlenecks,
    encoder_tokens,
    image_tokens,
    meta_model,
    stem_positions,
    text_lengths,
)
from coca.model import CoCa

Precision = Literal["bfloat16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


class Memory(NamedTuple):
    """Bytes of a training step without torch.compile, which keeps less; each operation's work space comes on top."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments. All of these three are float32."""
    weight_copies: int
    """The matrices in bfloat16, as autocast keeps them from pass to pass back."""
    activations: int
    """What the forward pass keeps for the backward pass."""

    @property
    def total(self) -> int:
        return sum(self)


def memory(
    config: ModelConfig, batch_size: int, precision: Precision, *, checkpointing: bool, tokens: int | None = None
) -> Memory:
    """Memory of one device that holds the whole model and ``batch_size`` samples.

    Args:
        checkpointing: of activations: each block keeps its input, and one block at a time all that it needs.
        tokens: the captions' length, begin and end included; by default the context's.
    """
    count, matrices = _counts(config)
    mixed = precision == "bfloat16"
    return Memory(
        weights=4 * count,
        gradients=4 * count,
        optimizer=8 * count,
        weight_copies=2 * matrices if mixed else 0,
        activations=batch_size * _activation_bytes(config, mixed, checkpointing, tokens),
    )


@functools.lru_cache
def _counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that autocast copies."""
    model = meta_model(config)
    copied = sum(matrix.numel() for matrix in autocast_matrices(model))
    return sum(parameter.numel() for parameter in model.parameters()), copied


def autocast_matrices(model: CoCa) -> list[Tensor]:
    """What autocast keeps copies of in bfloat16: matrices of products and convolutions, but for the head."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer.weight for layer in layers if layer is not model.multimodal.head]


@dataclass(frozen=True)
class _Kept:
    """What a part keeps of one sample for the backward pass.

    Linear layers and convolutions keep their input, attention its queries, keys, values, output and a number per query
    and head, a norm its input and two numbers per position, a GELU its input, a ReLU its output. What one part puts out
    and the next takes in is kept once.
    """

    wide: int = 0
    """Elements in float32 also under autocast: the residual stream, what norms work on."""
    narrow: int = 0
    """Elements in the precision of the products."""
    casts: int = 0
    """Bytes of copies that only autocast makes: it runs norms in float32, and casts an input for each layer anew."""
    entry: int = 0
    """Elements of a block's input, in float32 and not among the above: all that checkpointing keeps."""
    output: int = 0
    """Elements of a block's output where the block itself keeps it, as the next block's input."""

    def __add__(self, other: "_Kept") -> "_Kept":
        sums = (getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        return _Kept(*sums)

    def bytes(self, mixed: bool) -> int:
        return 4 * self.wide + 2 * self.narrow + self.casts if mixed else 4 * (self.wide + self.narrow)


def _activation_bytes(config: ModelConfig, mixed: bool, checkpointing: bool, tokens: int | None) -> int:
    lengths = text_lengths(config.text, tokens)
    encoder = _encoder_blocks(config)
    blocks = encoder + _text_blocks(config, *lengths)
    outside = _outside_blocks(config, lengths[1])
    entries = 4 * sum(block.entry for block in blocks)
    if not checkpointing:
        inside = sum(block.bytes(mixed) for block in blocks) + 4 * encoder[-1].output
        return outside.bytes(mixed) + entries + inside
    if config.text.multimodal_block == "paper":
        outside += _Kept(casts=4 * config.caption_queries * config.text.width)  # before they are cast
    return outside.bytes(mixed) + entries + max(block.bytes(mixed) + 4 * block.output for block in blocks)


def _self_attention(length: int, width: int, heads: int, *, masked: bool = False, qk_norm: bool = False) -> _Kept:
    kept = _Kept(length * (2 + heads), 5 * length * width, entry=length * width)
    if masked:
        kept += _Kept(narrow=length**2)
    if qk_norm:
        # New queries and keys, in another order, so that the heads of the output are merged in a copy.
        kept += _Kept(wide=4 * length * heads, narrow=3 * length * width, casts=4 * 2 * length * width)
    return kept


def _cross_attention(length: int, source: int, width: int, heads: int, *, source_norm: bool) -> _Kept:
    kept = _Kept(_normed(length, width) + length * heads, 3 * length * width + 2 * source * width)
    return kept + (_Kept(2 * source, source * width) if source_norm else _Kept(casts=2 * source * width))


def _mlp(length: int, width: int, mlp_width: int) -> _Kept:
    return _Kept(_normed(length, width), length * (width + 2 * mlp_width))


def _normed(length: int, width: int) -> int:
    return length * (width + 2)


def _bottleneck(block: Bottleneck) -> _Kept:
    before, after, inputs, width, shortcut = block
    inner, output, entry = width * (before + after), 4 * width * after, inputs * before
    normed = inner + output * (1 + shortcut)
    return _Kept(normed + inner, casts=2 * (inner + entry * (1 + shortcut)), entry=entry, output=output)


def _encoder_blocks(config: ModelConfig) -> list[_Kept]:
    vision = config.vision
    if vision.kind == "resnet":
        return [_bottleneck(block) for block in bottlenecks(vision)]
    length, width = encoder_tokens(config) + vision.registers, vision.width
    attention = _self_attention(length, width, vision.heads, qk_norm=vision.qk_norm)
    return [attention + _mlp(length, width, vision.mlp_width)] * vision.layers


def _text_blocks(config: ModelConfig, embedded: int, predicted: int) -> list[_Kept]:
    text = config.text
    open_clip = text.multimodal_block == "open_clip"
    masked = text.embedding_slot != "after_caption"
    unimodal = _self_attention(embedded, text.width, text.heads, masked=masked)
    unimodal += _mlp(embedded, text.width, text.mlp_width)
    multimodal = _self_attention(predicted, text.width, text.decoder_heads)
    multimodal += _cross_attention(
        predicted, image_tokens(config), text.width, text.decoder_heads, source_norm=open_clip
    )
    for _ in range(1 + open_clip):
        multimodal += _mlp(predicted, text.width, text.mlp_width)
    return [unimodal] * text.unimodal_layers + [multimodal] * text.multimodal_layers


def _outside_blocks(config: ModelConfig, predicted: int) -> _Kept:
    """Stem, poolers and the last norm, with the gradient that the captioning loss makes of the states after it."""
    vision, text = config.vision, config.text
    stem = _resnet_stem(vision) if vision.kind == "resnet" else _vit_stem(vision)
    last = _Kept(_normed(predicted, text.width) + predicted * text.width)
    return stem + _poolers(config) + last


def _vit_stem(vision: ViTConfig) -> _Kept:
    length = vision.class_token + vision.patches + vision.registers
    norms = vision.pre_norm + vision.final_norm
    return _Kept(norms * _normed(length, vision.width), 3 * vision.image_size**2)


def _resnet_stem(vision: ResNetConfig) -> _Kept:
    first = next(bottlenecks(vision))
    stem = stem_positions(vision) * vision.width
    if vision.stem == "imagenet":
        stem += stem + 2 * first.inputs * first.before  # what pooling takes in, and its indices of 8 bytes
    tokens = _normed((vision.image_size // vision.stride) ** 2, vision.output_width)
    return _Kept(stem + tokens, 3 * vision.image_size**2)


def _poolers(config: ModelConfig) -> _Kept:
    source, source_width, width = encoder_tokens(config), config.vision.output_width, config.text.width
    queries = config.caption_queries
    kept = _Kept(narrow=source * source_width) + _pooler(source, width, config.pooler_heads, queries)
    if config.pooling == "open_clip":
        kept += _Kept(_normed(source, source_width))
    elif config.pooling == "cascade":
        kept += _pooler(queries, width, config.pooler_heads, 1)
    else:
        kept += _pooler(source, width, config.pooler_heads, 1) + _Kept(casts=2 * source * source_width)
    return kept + (_Kept(queries * width) if config.text.multimodal_block == "open_clip" else _Kept(0, queries * width))


def _pooler(source: int, width: int, heads: int, queries: int) -> _Kept:
    return _Kept(_normed(queries, width) + queries * heads, 2 * source * width + queries * width)
