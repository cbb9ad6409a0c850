"""Configuration of the model, of what it is fed and of how it writes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from coca.typed_config import Config

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises ValueError, naming both, unless ``small`` divides ``large``."""
    if large % small:
        raise ValueError(f"{small_name} = {small} does not divide {large_name} = {large}")


class ViTConfig(Config):
    """A vision transformer. The paper's has no class token: poolers do the pooling (Yu et al. 2022, section 3.2)."""

    kind: Literal["vit"] = "vit"
    """The encoder's architecture."""
    image_size: Positive = 288
    """Side of the square input, pixels; other sizes interpolate the positions."""
    patch_size: Positive = 18
    """Side of a patch, pixels; must divide image_size."""
    width: Positive = 768
    """Width of the residual stream."""
    layers: Positive = 12
    """Number of transformer blocks."""
    heads: Positive = 12
    """Attention heads; must divide width."""
    mlp_width: Positive = 3072
    """Hidden width of each MLP."""
    class_token: bool = False
    """A learned token before the patches, with a position of its own (CLIP)."""
    registers: NonNegativeInt = 0
    """Learned tokens that take part in attention and are dropped at the end (Darcet et al. 2023)."""
    qk_norm: bool = False
    """Layer norm on queries and keys, per head (Dehghani et al. 2023)."""
    patch_bias: bool = True
    """A bias on the patch projection."""
    pre_norm: bool = False
    """A layer norm before the first block (CLIP)."""
    final_norm: bool = True
    """A layer norm after the last block."""

    @property
    def output_width(self) -> int:
        """Width of the tokens the encoder gives."""
        return self.width

    @property
    def patches(self) -> int:
        """Patches of a picture of image_size."""
        return (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("patch_size", self.patch_size, "image_size", self.image_size)
        check_divides("heads", self.heads, "width", self.width)
        return self


class ResNetConfig(Config):
    """A bottleneck ResNet (He et al. 2015) with group normalisation, whose last feature map is the tokens."""

    kind: Literal["resnet"] = "resnet"
    """The encoder's architecture."""
    image_size: Positive = 224
    """Side of the square input, pixels; other sizes interpolate the positions."""
    blocks: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4)] = (3, 4, 6, 3)
    """Bottleneck blocks of each stage: (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101."""
    width: Positive = 64
    """Channels of the stem; stage i works at 2^i times that and puts out four times what it works at."""
    groups: Positive = 32
    """Groups of each normalisation (Wu and He 2018); must divide width."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7 x 7 with stride 2, then pooling with stride 2; small: 3 x 3 with stride 2, for small pictures."""

    @property
    def output_width(self) -> int:
        """Width of the tokens the encoder gives."""
        return 4 * self.width * 2 ** (len(self.blocks) - 1)

    @property
    def stride(self) -> int:
        """Pixels between two tokens."""
        return (4 if self.stem == "imagenet" else 2) * 2 ** (len(self.blocks) - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("groups", self.groups, "width", self.width)
        check_divides("the stride of all stages", self.stride, "image_size", self.image_size)
        return self


VisionConfig = Annotated[ViTConfig | ResNetConfig, Field(discriminator="kind")]


class TextConfig(Config):
    """The two text decoders and their vocabulary."""

    vocab_size: Positive = 64_000
    """Entries of the tokenizer."""
    context_length: Annotated[int, Field(ge=2)] = 64
    """Longest caption in tokens, begin and end included; longer ones are cut."""
    width: Positive = 768
    """Width of the residual stream, and of the image tokens the poolers give."""
    heads: Positive = 12
    """Attention heads; must divide width."""
    multimodal_heads: Positive | None = None
    """Attention heads of the multimodal decoder; by default as many as the unimodal one has."""
    mlp_width: Positive = 3072
    """Hidden width of each MLP."""
    unimodal_layers: Positive = 12
    """Blocks of the unimodal decoder, which never sees the image."""
    multimodal_layers: Positive = 12
    """Blocks of the multimodal decoder, which cross-attends to the image tokens."""
    pad_id: NonNegativeInt = 0
    """Token id that fills rows up to the batch's longest caption."""
    begin_id: NonNegativeInt = 1
    """Token id that every caption begins with."""
    end_id: NonNegativeInt = 2
    """Token id that every caption ends with."""
    tied_head: bool = False
    """Logits from the token embedding's matrix; apart from it in the paper, by its parameter counts."""
    multimodal_block: Literal["paper", "open_clip"] = "paper"
    """paper: self-attention, cross-attention, one MLP. open_clip: an MLP after each, and a norm on the image tokens."""
    embedding_slot: Literal["after_caption", "open_clip", "open_clip_corrected"] = "after_caption"
    """Where the embedding token stands. after_caption: it sees the caption and itself. open_clip: in the last position,
    with the mask shifted by one that the published weights were trained with: it sees the first padding and not itself.
    open_clip_corrected: there, without the shift."""

    @property
    def decoder_heads(self) -> int:
        """Attention heads of the multimodal decoder."""
        return self.multimodal_heads or self.heads

    @property
    def positions(self) -> int:
        """Learned positions: one a token, and one for open_clip's embedding token."""
        return self.context_length + (self.embedding_slot != "after_caption")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("heads", self.heads, "width", self.width)
        check_divides("multimodal_heads", self.decoder_heads, "width", self.width)
        return self


class ModelConfig(Config):
    """CoCa: one image encoder, attentional poolers, two text decoders."""

    vision: VisionConfig = ViTConfig()
    """The image encoder."""
    text: TextConfig = TextConfig()
    """The text decoders."""
    embed_dim: Positive | None = None
    """Width of the contrastive embeddings, reached by a projection on each side; by default, as in the paper, there is
    none and it is text.width."""
    pooling: Literal["cascade", "parallel", "open_clip"] = "cascade"
    """cascade: the contrastive pooler reads what the captioning pooler gives (the paper's choice); parallel: both read
    the encoder; open_clip: one pooler, whose first query is the image's embedding."""
    caption_queries: Positive = 256
    """Queries of the captioning pooler: image tokens the decoder cross-attends to (one less with open_clip's)."""
    pooler_heads: Positive = 12
    """Attention heads of the poolers; must divide text.width."""
    initial_temperature: PositiveFloat = 0.07
    """Temperature at the start of training (learnable)."""
    initial_logit_bias: float | None = None
    """Start of a learnable bias on similarities, which the sigmoid loss wants (Zhai et al. 2023: -10)."""

    @property
    def embedding_width(self) -> int:
        """Width of the contrastive embeddings."""
        return self.embed_dim or self.text.width

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("pooler_heads", self.pooler_heads, "text.width", self.text.width)
        if self.pooling == "open_clip" and self.caption_queries == 1:
            raise ValueError("caption_queries = 1 leaves no image token to the decoder: open_clip's pooling keeps one")
        return self


class GenerationConfig(Config):
    """How captions are written. The default is greedy: the likeliest token at every step."""

    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest caption in tokens, begin and end included; at most, and by default, the model's context_length."""
    min_length: NonNegativeInt = 0
    """Shortest caption in tokens, begin and end included."""
    temperature: NonNegative = 0.0
    """Sampling: logits are divided by it. 0 takes the likeliest token instead."""
    top_k: NonNegativeInt = 0
    """Sampling: only among the k likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sampling: only among the likeliest tokens that together have this probability (Holtzman et al. 2019)."""
    seed: NonNegativeInt = 0
    """Sampling: of the draws. Row i of a batch draws the same numbers in every batch."""
    beams: Positive = 1
    """Beam search: captions kept for each image at every step, in all groups; 1 for none."""
    beam_groups: Positive = 1
    """Beam search: groups that are searched one after the other (Vijayakumar et al. 2016); must divide beams."""
    diversity_penalty: NonNegative = 0.5
    """Beam search: taken off a token's log-probability for each choice of it by an earlier group at the same step."""
    length_penalty: float = 1.0
    """Beam search: captions compare by log-probability / length ** this; above 0 favours long ones."""
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    """Logits of tokens that have been are divided by it, or multiplied where negative (Keskar et al. 2019)."""
    no_repeat_ngram: NonNegativeInt = 0
    """Runs of this many tokens occur once at most; 0 for no such rule."""
    force_end: bool = False
    """A caption cut at max_length ends with the end token in its last place, as in open_clip."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("beam_groups", self.beam_groups, "beams", self.beams)
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(f"beams = {self.beams} and temperature = {self.temperature:g}: search or sample, not both")
        if self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(f"min_length = {self.min_length} is above max_length = {self.max_length}")
        return self


class Preprocessing(Config):
    """What turns RGB pixels into the model's input; travels with the weights."""

    image_size: Positive
    """Short side after resizing and side of the centre crop, pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted per channel, on the scale 0..1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Divided by per channel, after the mean."""
