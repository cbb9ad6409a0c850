"""Where and on what a training run or a search of the loss weights works; what decides its numbers is coca.config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from coca.train_config import FeedConfig, TrainConfig
from coca.typed_config import Config

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class WorkersConfig(Config):
    """The Ray Train workers of one run."""

    count: Positive = 1
    """Number of workers, one process each; must divide train.lanes."""
    least: Positive | None = None
    """Elastic: go on with fewer where the cluster has no room for count, down to this many, and with more again once it
    has; always a number that divides train.lanes. By default count is fixed."""
    cpus: PositiveFloat = 1.0
    """Logical CPUs each worker reserves."""
    threads: Positive = 1
    """Threads each worker computes with on a CPU."""
    use_gpu: bool | None = None
    """One GPU for each worker; by default wherever the cluster has any, or the run began on GPUs."""
    max_failures: Annotated[int, Field(ge=0)] = 10
    """Failures in a row, without a new checkpoint between them, after which a run fails."""
    hang_timeout_s: PositiveFloat = 600.0
    """A worker that ends no step for so long says where it stands and ends, and counts as died."""


class DataConfig(Config):
    """One dataset of a run."""

    uri: str
    """A path or s3:// uri."""
    version: Positive | None = None
    """Its version; the newest by default."""
    weight: PositiveFloat = 1.0
    """Its share of the lanes, and so of every batch, beside the other datasets' weights."""


class TrainRunConfig(Config):
    """One `coca train`."""

    data: Annotated[tuple[DataConfig, ...], Field(min_length=1)]
    """Datasets to train on, mixed by weight."""
    out: str
    """Run folder, reachable by every worker: a path or s3:// uri."""
    held_out: str | None = None
    """Evaluation set (Parquet with `image` and `captions`) that train.evaluate_every is about."""
    held_out_pictures: Positive = 512
    """Pictures of it that an evaluation looks at, from its start."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Where the rows of metrics.jsonl go besides."""
    workers: WorkersConfig = WorkersConfig()
    """The workers."""
    feed: FeedConfig = FeedConfig()
    """How samples get to them."""
    train: TrainConfig = TrainConfig()
    """The run itself."""


class TuneConfig(Config):
    """One `coca tune`: a seeded quasi-random search over both loss weights."""

    data: str
    """Dataset to train on: a path or s3:// uri."""
    held_out: str
    """Evaluation set (Parquet with `image` and `captions`) that judges the trials."""
    out: str
    """Study folder, reachable by every worker."""
    trials: Positive = 8
    """Number of trials; the first has the weights of the recipe."""
    concurrent_trials: Positive = 1
    """Trials that run at the same time."""
    smallest_weight: PositiveFloat = 0.25
    """Lower end of the range both weights are drawn from, logarithmically."""
    largest_weight: PositiveFloat = 4.0
    """Upper end of that range."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draw."""
    workers: WorkersConfig = WorkersConfig()
    """The workers of each trial."""
    train: TrainConfig = TrainConfig()
    """The run of each trial, but for its loss weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.smallest_weight > self.largest_weight:
            raise ValueError(
                f"smallest_weight = {self.smallest_weight:g} is above largest_weight = {self.largest_weight:g}"
            )
        return self
