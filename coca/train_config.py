"""Configuration of one training run: what decides its numbers."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from coca.config import Fraction, ModelConfig, NonNegative, NonNegativeInt, Positive, PositiveFloat, check_divides
from coca.typed_config import Config


class AugmentConfig(Config):
    """What varies in a training picture from pass to pass."""

    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of the largest square that a random crop keeps; 1 trains on the centre crop."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches of each picture that a ViT does not see in training (Li et al. 2022)."""
    unmasked_fraction: Fraction = 0.0
    """Share of the steps, at the end of the run, that see every patch again."""


class LossConfig(Config):
    """Weights of the two losses; the paper's are 1 and 2."""

    contrastive_weight: NonNegative = 1.0
    """Weight of the symmetric contrastive loss."""
    captioning_weight: NonNegative = 2.0
    """Weight of the captioning cross-entropy."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over the global batch as in the paper, or a sigmoid for each pair (Zhai et al. 2023)."""
    repeated_captions: Literal["negatives", "ignored"] = "negatives"
    """What the pictures of other pairs with the same caption are to a pair in the contrastive loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the captioning target spread evenly over the vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.contrastive_weight == 0 and self.captioning_weight == 0:
            raise ValueError("both loss weights are 0: nothing would be learned; set one above 0")
        return self


class ParameterRule(Config):
    """What is different for some parameters."""

    match: str
    """A regular expression that is searched for in the parameter's name, as `coca weights inspect` prints it."""
    learning_rate_factor: NonNegative = 1.0
    """On the rate of the schedule; 0 leaves the parameters as they are, without state and out of the norm."""
    weight_decay: NonNegative | None = None
    """Instead of optimizer.weight_decay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match = {self.match!r} is no regular expression: {error}") from None
        return self


class OptimizerConfig(Config):
    """The optimizer and its schedule: linear warm-up, then linear decay to zero as in the paper, or another."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """adamw for all; adafactor for all, as the paper trains; or muon for the hidden matrices and adamw for the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 8e-4
    """Peak rate of AdamW's or Adafactor's parameters."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak rate of Muon's matrices."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay, on matrices only unless a rule says otherwise."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Moment decays of AdamW; for Adafactor the second is the most that 1 - step**-0.8 may reach."""
    rules: tuple[ParameterRule, ...] = ()
    """Other rates and decays for some parameters; the first rule that matches a name counts."""
    warmup_fraction: Fraction = 0.02
    """Share of the steps over which the rate rises."""
    schedule: Literal["linear", "cosine", "warmup_stable_decay"] = "linear"
    """Shape of the decay after the warm-up; warmup_stable_decay holds the peak, then falls linearly at the end."""
    decay_fraction: Fraction = 0.2
    """Share of the steps over which warmup_stable_decay falls (Hu et al. 2024)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, which checkpoints then offer for use (Polyak and Juditsky
    1992); it warms up as min(ema_decay, (1 + step) / (10 + step))."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps whose gradients are no numbers change no weight; after more of them than this the run ends, naming the
    samples."""


class ParallelConfig(Config):
    """How a model is spread over the workers. Decides speed and memory, and numbers only by the order of sums."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds all weights; fsdp: weights, gradients and optimizer state lie in shards (FSDP2)."""
    shard_workers: Positive | None = None
    """fsdp: workers over which one copy of the weights is sharded, as many as a node has GPUs, say; copies are kept
    equal among them (hybrid shards). By default one copy lies over all."""
    micro_batches: Positive = 1
    """Parts in which a worker computes its share of a batch, one after the other, so that less memory is needed. The
    contrastive loss still sees the whole batch, with exact gradients (Gao et al. 2021), for one more forward pass."""
    reshard_after_forward: bool = True
    """fsdp: let gathered weights go after the forward pass and gather them again: less memory, more traffic."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "ddp" and self.shard_workers is not None:
            raise ValueError(f"shard_workers = {self.shard_workers} is for kind = fsdp: set that, or leave it away")
        if self.kind == "ddp" and not self.reshard_after_forward:
            raise ValueError("reshard_after_forward is for kind = fsdp: set that, or leave it away")
        return self


class FeedConfig(Config):
    """How samples get to a worker. Decides speed and memory, never which samples come or how they look."""

    source: Literal["dataset", "mock", "recorded"] = "dataset"
    """dataset; mock: one made-up batch again and again, to time the model without data; recorded: the batches that an
    earlier run with feed.record wrote, to time it without decoding."""
    record: str | None = None
    """Folder to write the batches into as they come, for source: recorded."""
    recording: str | None = None
    """source: recorded: the folder to read from; after its last batch it begins again."""
    decode: Literal["processes", "threads", "ray"] = "processes"
    """Where pictures are decoded and cropped: beside the trainer in processes; in its threads, which start at once and
    share its interpreter, enough for one or two CPUs; or by Ray tasks, on nodes with free CPUs."""
    decode_workers: NonNegativeInt = 0
    """Threads or processes of each worker, or Ray tasks of all workers together; 0 for as many as there are CPUs: on
    the node, shared among its workers, or with ray in the cluster."""
    prefetch_batches: Positive = 2
    """Batches that are prepared ahead of the step."""
    prefetch_mib: Positive = 2048
    """With ray: pictures under way to tasks and back, of all workers together, at most."""
    read_ahead: NonNegativeInt = 2
    """Row groups of each lane that are read before they are needed."""
    cache_dir: str | None = None
    """Folder on local disk that keeps what was read from S3, for later passes and restarts."""
    cache_gib: PositiveFloat = 100.0
    """Most that the cache holds; the least recently used row groups go first."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "recorded") != (self.recording is not None):
            raise ValueError(
                "to replay batches give both: source = recorded, and recording, the folder that was record"
            )
        if self.record is not None and self.recording is not None:
            raise ValueError("record and recording are both given: what is replayed is recorded already")
        return self


class ResolutionPhase(Config):
    """A part of a run whose pictures have a size of their own."""

    from_step: NonNegativeInt
    """First step of the phase, counted from 0."""
    image_size: Positive
    """Side of the pictures, pixels; positions are interpolated from those of model.vision.image_size."""


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
    resolutions: tuple[ResolutionPhase, ...] = ()
    """Other sizes of the pictures on the way: small ones first, then larger. By default model.vision.image_size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the matrix products under autocast."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more work."""
    compile: bool = False
    """Compile model and losses with torch.compile; needs a C++ compiler on a CPU."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept."""
    keep_best: str | None = None
    """Measure of metrics.jsonl by which the best checkpoint so far is kept too: "loss", or one of the held-out set such
    as "held_out_image_to_text_recall_at_1". Lower is better for names that end in loss, else higher."""
    evaluate_every: NonNegativeInt = 0
    """Steps between evaluations on the held-out set; 0 for none on the way. The last step makes one."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over the workers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("lanes", self.lanes, "batch_size", self.batch_size)
        if self.loss.contrastive == "sigmoid" and self.model.initial_logit_bias is None:
            raise ValueError("loss.contrastive = sigmoid needs a bias: set model.initial_logit_bias, to -10 say")
        if self.loss.contrastive == "softmax" and self.model.initial_logit_bias is not None:
            raise ValueError("model.initial_logit_bias is for loss.contrastive = sigmoid: leave it away with softmax")
        if self.augment.patch_dropout and self.model.vision.kind != "vit":
            raise ValueError("augment.patch_dropout is for a ViT: a ResNet has no patches, set it to 0")
        self._check_resolutions()
        return self

    def _check_resolutions(self) -> None:
        starts = [phase.from_step for phase in self.resolutions]
        if starts != sorted(set(starts)):
            raise ValueError(f"resolutions start at {starts}: give each a later from_step than the one before")
        unit = self.model.vision.patch_size if self.model.vision.kind == "vit" else self.model.vision.stride
        for phase in self.resolutions:
            check_divides("the patch size or stride", unit, "resolutions.image_size", phase.image_size)

    def image_size(self, step: int) -> int:
        """Side of the pictures of a step, counted from 0."""
        begun = [phase.image_size for phase in self.resolutions if phase.from_step <= step]
        return begun[-1] if begun else self.model.vision.image_size

    def patch_dropout(self, step: int) -> float:
        """Share of the patches that a step leaves out, counted from 0."""
        unmasked = round(self.augment.unmasked_fraction * self.steps)
        return 0.0 if step >= self.steps - unmasked else self.augment.patch_dropout
