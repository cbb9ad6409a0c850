"""Configuration of the model and of one training run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from coca.typed_config import Config

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{small_name} = {small} does not divide {large_name} = {large}")


class VisionConfig(Config):
    """A plain ViT without a class token: the poolers do the pooling (Yu et al. 2022, section 3.2)."""

    image_size: Positive = 288
    """Side of the square input, pixels."""
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides("patch_size", self.patch_size, "image_size", self.image_size)
        _divides("heads", self.heads, "width", self.width)
        return self


class TextConfig(Config):
    """The two text decoders and their vocabulary."""

    vocab_size: Positive = 64_000
    """Entries of the tokenizer."""
    context_length: Annotated[int, Field(ge=2)] = 64
    """Longest caption in tokens, begin and end included; longer ones are cut."""
    width: Positive = 768
    """Width of the residual stream."""
    heads: Positive = 12
    """Attention heads; must divide width."""
    mlp_width: Positive = 3072
    """Hidden width of each MLP."""
    unimodal_layers: Positive = 12
    """Blocks of the unimodal decoder, which never sees the image."""
    multimodal_layers: Positive = 12
    """Blocks of the multimodal decoder, which cross-attends to the image tokens."""
    pad_id: Annotated[int, Field(ge=0)] = 0
    """Token id that fills rows up to the batch's longest caption."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides("heads", self.heads, "width", self.width)
        return self


class ModelConfig(Config):
    """CoCa: one image encoder, two attentional poolers in cascade, two text decoders."""

    vision: VisionConfig = VisionConfig()
    """The image encoder."""
    text: TextConfig = TextConfig()
    """The text decoders."""
    embed_dim: Positive = 768
    """Width of the contrastive embeddings."""
    caption_queries: Positive = 256
    """Queries of the captioning pooler: image tokens the decoder cross-attends to."""
    pooler_heads: Positive = 12
    """Attention heads of both poolers; must divide vision.width."""
    initial_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature at the start of training (learnable)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides("pooler_heads", self.pooler_heads, "vision.width", self.vision.width)
        return self


class Preprocessing(Config):
    """What turns RGB pixels into the model's input; travels with the weights."""

    image_size: Positive
    """Short side after resizing and side of the centre crop, pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted per channel, on the scale 0..1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Divided by per channel, after the mean."""


class AugmentConfig(Config):
    """What varies in a training picture from pass to pass."""

    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the largest square that a random crop keeps; 1 trains on the centre crop."""


class LossConfig(Config):
    """Weights of the two losses; the paper's are 1 and 2."""

    contrastive_weight: NonNegative = 1.0
    """Weight of the symmetric contrastive loss."""
    captioning_weight: NonNegative = 2.0
    """Weight of the captioning cross-entropy."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.contrastive_weight == 0 and self.captioning_weight == 0:
            raise ValueError("both loss weights are 0: nothing would be learned; set one above 0")
        return self


class OptimizerConfig(Config):
    """The optimizer and its schedule: linear warm-up, then linear decay to zero as in the paper, or cosine."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all, or muon for the hidden matrices and adamw for the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 8e-4
    """Peak rate of AdamW's parameters."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak rate of Muon's matrices."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decays."""
    warmup_fraction: Fraction = 0.02
    """Share of the steps over which the rate rises."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""


class TrainConfig(Config):
    """One training run: what decides its numbers. Where it runs is `jobs.config.TrainRunConfig`."""

    model: ModelConfig = ModelConfig()
    """The architecture."""
    augment: AugmentConfig = AugmentConfig()
    """The random views of the pictures."""
    loss: LossConfig = LossConfig()
    """The loss weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its schedule."""
    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 96
    """Samples of the global batch, all workers together."""
    lanes: Positive = 12
    """Parallel streams of samples: divides batch_size; the number of workers must divide it."""
    shuffle_window: Positive = 4
    """Row groups within which a lane shuffles samples."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the weights and of the order of the data."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the matrix products under autocast."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides("lanes", self.lanes, "batch_size", self.batch_size)
        return self
