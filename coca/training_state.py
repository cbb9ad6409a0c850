"""What a run is at a step: all that it needs to go on as if it had never stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from coca.errors import BadInput
from coca.manifest import DAMAGED, read_json, read_listed, read_manifest
from coca.storage import Store
from coca.typed_config import Config, build_config

RESUME = "resume.json"


@dataclass(frozen=True)
class TrainingState:
    """A run after ``position`` global batches."""

    position: int
    tensors: dict[str, Tensor]
    """``model/...``, ``optimizer/...``, ``ema/...``, ``rng/torch``; plain tensors are the same on all ranks, DTensors
    lie in pieces."""
    fixed: dict[str, Any]
    """Config fields that a resumed run must share."""
    counters: dict[str, int]
    """What the run has counted so far: skipped steps, say."""


class Score(Config):
    """How good a checkpoint is."""

    name: str
    """The measure, as metrics.jsonl names it."""
    value: Annotated[float, Field(allow_inf_nan=False)]
    """Its value at the checkpoint's step."""


class ResumeFile(Config):
    """resume.json."""

    position: Annotated[int, Field(ge=0)]
    """Global batches consumed."""
    fixed: dict[str, Any]
    """Config fields that a resumed run must share."""
    counters: dict[str, int] = Field(default_factory=dict)
    """What the run has counted so far."""
    score: Score | None = None
    """By which the best checkpoint is kept."""

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1).encode()


def read_resume(folder: Store) -> ResumeFile:
    """resume.json of a checkpoint folder, held against its manifest.

    Raises:
        BadInput: it is damaged, or the checkpoint holds none.
    """
    entries, _ = read_manifest(folder)
    values = read_json(read_listed(folder, RESUME, entries), folder, RESUME)
    try:
        return build_config(ResumeFile, values)
    except BadInput as problem:
        raise BadInput(f"{folder.uri}/{RESUME}: {problem.cause}", DAMAGED) from None


class HostCopies:
    """Copies of tensors in CPU memory that is kept from one time to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of each tensor, copied into memory that the next call with its name writes over.

        Tensors under two names that are the same memory are copied once.
        """
        copies: dict[str, Tensor] = {}
        taken: dict[tuple[Any, ...], Tensor] = {}
        on_device = False
        for name, tensor in tensors.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            same = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
            if local.numel() == 0 or same not in taken:
                taken[same] = self._buffer(name, local).copy_(local, non_blocking=True)
            copies[name] = taken[same]
            on_device |= local.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer
