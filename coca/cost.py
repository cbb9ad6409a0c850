"""What a model costs: parameters and floating-point operations, from its config; nothing of its size is allocated.

FLOPs are of one sample's forward pass, 2 for each multiply-accumulate of a matrix product or convolution:

| part                      | FLOPs                                                               |
| ------------------------- | ------------------------------------------------------------------- |
| self-attention and MLP    | 2 n (4 d^2 + 2 d f) + 4 n^2 d                                       |
| cross-attention           | 4 n d^2 + 4 S d^2 + 4 n S d                                         |
| MLP of its own            | 4 n d f                                                             |
| pooler                    | 4 S c d + 4 Q S d + 2 Q d^2                                         |
| patches, convolutions     | 2 n k^2 i o                                                         |
| projection, head          | 2 n d o                                                             |

for n positions of width d, f inside the MLP, S source tokens of width c, Q queries, kernels of side k from i to o
channels. Training takes three times that: the backward pass forms two products where the forward pass forms one. Left
out: norms, activations, the embedding lookup, the contrastive loss (4 G E for G samples in the global batch), and
open_clip's projection of the queries, which is made once per batch. Causal attention counts in full.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from coca.config import ModelConfig, ResNetConfig, TextConfig
from coca.errors import BadInput
from coca.model import CoCa

TRAINING = 3  # passes forward that a training step is worth

ENCODER = "image encoder"
POOLERS = "poolers"
EMBEDDINGS = "text embeddings"
UNIMODAL = "unimodal decoder"
MULTIMODAL = "multimodal decoder"
HEAD = "head"
PROJECTIONS = "projections"
OTHERS = "temperature, bias"
PARTS = (ENCODER, POOLERS, EMBEDDINGS, UNIMODAL, MULTIMODAL, HEAD, PROJECTIONS, OTHERS)
TEXT = (EMBEDDINGS, UNIMODAL, MULTIMODAL, HEAD)
"""What the paper's table counts as text; its total is this and the image encoder."""

_PREFIXES = (
    ("vision.", ENCODER),
    ("caption_pooler.", POOLERS),
    ("contrastive_pooler.", POOLERS),
    ("unimodal.token_embedding.", EMBEDDINGS),
    ("unimodal.positions_TD", EMBEDDINGS),
    ("unimodal.embedding_token_D", EMBEDDINGS),
    ("unimodal.", UNIMODAL),
    ("multimodal.head.", HEAD),
    ("multimodal.", MULTIMODAL),
    ("image_projection.", PROJECTIONS),
    ("text_projection.", PROJECTIONS),
    ("", OTHERS),
)


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each of ``PARTS``."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in meta_model(config).named_parameters():
        part = next(part for prefix, part in _PREFIXES if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts


def flops(config: ModelConfig, tokens: int | None = None) -> dict[str, int]:
    """Floating-point operations of each of ``PARTS`` in one sample's forward pass.

    Args:
        tokens: the caption's length, begin and end included; by default the context's.
    """
    text = config.text
    embedded, predicted = text_lengths(text, tokens)
    cross = 4 * predicted * text.width**2 + _cross_flops(predicted, image_tokens(config), text.width, text.width)
    if text.multimodal_block == "open_clip":
        cross += 4 * predicted * text.width * text.mlp_width
    return {
        ENCODER: _encoder_flops(config),
        POOLERS: _pooler_flops(config),
        EMBEDDINGS: 0,
        UNIMODAL: text.unimodal_layers * _block_flops(embedded, text.width, text.mlp_width),
        MULTIMODAL: text.multimodal_layers * (_block_flops(predicted, text.width, text.mlp_width) + cross),
        HEAD: 2 * predicted * text.width * text.vocab_size,
        PROJECTIONS: 2 * 2 * text.width * (config.embed_dim or 0),
        OTHERS: 0,
    }


def meta_model(config: ModelConfig) -> CoCa:
    """The model with shapes alone."""
    with torch.device("meta"):
        return CoCa(config)


class Bottleneck(NamedTuple):
    """A block of a ResNet: positions of its map before and after the stride, channels in and within."""

    before: int
    after: int
    inputs: int
    width: int
    shortcut: bool


def bottlenecks(config: ResNetConfig) -> Iterator[Bottleneck]:
    """The blocks of a ResNet, in order."""
    side = config.image_size // (4 if config.stem == "imagenet" else 2)
    inputs = config.width
    for stage, count in enumerate(config.blocks):
        width = config.width * 2**stage
        for index in range(count):
            halve = 2 if stage > 0 and index == 0 else 1
            after = side // halve
            yield Bottleneck(side**2, after**2, inputs, width, shortcut=halve == 2 or inputs != 4 * width)
            side, inputs = after, 4 * width


def stem_positions(config: ResNetConfig) -> int:
    """Positions of a ResNet's first map."""
    return (config.image_size // 2) ** 2


def encoder_tokens(config: ModelConfig) -> int:
    """Tokens that the image encoder gives."""
    vision = config.vision
    if vision.kind == "resnet":
        return (vision.image_size // vision.stride) ** 2
    return vision.class_token + vision.patches


def image_tokens(config: ModelConfig) -> int:
    """Tokens that the multimodal decoder cross-attends to."""
    return config.caption_queries - (config.pooling == "open_clip")


def text_lengths(text: TextConfig, tokens: int | None) -> tuple[int, int]:
    """Positions of the unimodal decoder, embedding token included, and of the multimodal one, which has one to predict
    for each but the last."""
    tokens = text.context_length if tokens is None else tokens
    if not 2 <= tokens <= text.context_length:
        raise BadInput(f"captions of {tokens} tokens: the model takes 2 to {text.context_length}", "Give one of these")
    padding = text.embedding_slot != "after_caption" and tokens < text.context_length
    return tokens + 1 + padding, tokens - 1


def _block_flops(length: int, width: int, mlp_width: int) -> int:
    return 2 * length * (4 * width**2 + 2 * width * mlp_width) + 4 * length**2 * width


def _cross_flops(queries: int, source: int, source_width: int, width: int) -> int:
    """Keys, values and the attention itself; what is done to the queries and the output comes on top."""
    return 4 * source * source_width * width + 4 * queries * source * width


def _pooler_flops(config: ModelConfig) -> int:
    width, source, source_width = config.text.width, encoder_tokens(config), config.vision.output_width
    queries = config.caption_queries
    total = _cross_flops(queries, source, source_width, width) + 2 * queries * width**2
    if config.pooling == "cascade":
        total += _cross_flops(1, queries, width, width) + 2 * width**2
    elif config.pooling == "parallel":
        total += _cross_flops(1, source, source_width, width) + 2 * width**2
    return total


def _encoder_flops(config: ModelConfig) -> int:
    vision = config.vision
    if vision.kind == "resnet":
        kernel = 7 if vision.stem == "imagenet" else 3
        total = 2 * stem_positions(vision) * 3 * kernel**2 * vision.width
        for before, after, inputs, width, shortcut in bottlenecks(vision):
            total += 2 * before * inputs * width + 2 * after * (9 + 4) * width**2
            total += 2 * after * inputs * 4 * width if shortcut else 0
        return total
    length = encoder_tokens(config) + vision.registers
    patches = 2 * vision.patches * 3 * vision.patch_size**2 * vision.width
    return patches + vision.layers * _block_flops(length, vision.width, vision.mlp_width)
