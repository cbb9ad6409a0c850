"""Settings of the demo."""

from typing import Annotated

from pydantic import Field

from coca.typed_config import Config

Positive = Annotated[int, Field(gt=0)]


class DemoConfig(Config):
    """One `coca demo`: how large its web is and how long its model learns."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the web, the split and the training."""
    scenes: Annotated[int, Field(ge=200)] = 6000
    """Sound links of the web; planted dirt comes on top."""
    share_two: Annotated[float, Field(ge=0.25, le=0.9)] = 0.3
    """Share of those links that show two things."""
    vocab_size: Annotated[int, Field(ge=259)] = 512
    """Most entries of the tokenizer."""
    workers: Positive = 2
    """Ray Train workers of the training stage."""
    steps: Positive = 1000
    """Optimizer steps of the training stage."""
    trials: Positive = 4
    """Trials of the search over the loss weights."""
    trial_steps: Positive = 60
    """Optimizer steps of a trial."""
    questions: Annotated[int, Field(ge=1, le=32)] = 8
    """Unseen pictures sent to the served model."""
