"""What the model answers for one image or text. No torch: the HTTP side reads these too."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ModelInfo:
    """The checkpoint behind an engine."""

    step: int
    digest: str
    """Of the checkpoint's manifest, hence of every file in it."""
    embedding_dim: int
    image_size: int
    """Side of the square the model sees, pixels."""
    context_length: int
    """Longest text in tokens, begin and end included."""

    @property
    def version(self) -> str:
        return f"step_{self.step}-{self.digest}"


@dataclass(frozen=True)
class Caption:
    """The caption of one image."""

    text: str
    complete: bool
    """False where it was cut at the longest length allowed."""
    batch_size: int
    """Images that shared the pass."""


@dataclass(frozen=True)
class Embedding:
    """The embedding of one image or text."""

    vector: np.ndarray
    """float32 of shape (embedding_dim,), unit length."""
    tokens: int
    """Of the text, begin and end included; 0 for an image."""
    batch_size: int
    """Inputs that shared the pass."""


@dataclass(frozen=True)
class Refusal:
    """Why one input got no answer; the others of its batch are not touched."""

    reason: str
    detail: str
