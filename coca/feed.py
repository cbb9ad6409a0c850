"""Batches for one rank: row groups read, pictures decoded and captions padded, in the order of `coca.order`.

Shapes: B samples of this rank, H height, W width, C channels, K patches kept, T tokens of the batch's longest caption.
"""

import hashlib
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from coca.augment import kept_patches
from coca.config import Preprocessing
from coca.decode import Decoder, Picture
from coca.lane_rows import LaneRows, Row
from coca.mixture import Mixture
from coca.prefetch import prefetch
from coca.train_config import FeedConfig, TrainConfig


@dataclass
class Batch:
    """One rank's share of a global batch: its lanes in ascending order."""

    pixels_BHWC: Tensor  # uint8
    tokens_BT: Tensor  # int64, padded on the right
    lane_digests: list[int]  # of the sample ids, one for each lane
    kept_patches_BK: Tensor | None  # where patches are dropped: int64, ascending
    sample_ids: list[str]  # of the B samples


class BatchSource(Protocol):
    """Where a training loop gets its batches from."""

    def batches(self, start: int) -> Generator[Batch]:
        """This rank's share of global batches ``start``, ``start + 1``, ... without end."""
        ...

    def close(self) -> None:
        """Ends what works for it. Close generators of `batches` before."""
        ...


def normalize(pixels_BHWC: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels to the float32 model input (B, C, H, W), on the pixels' device."""
    mean, std = _mean_and_std(preprocessing, pixels_BHWC.device)
    return ((pixels_BHWC.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@lru_cache
def _mean_and_std(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the scale 0..255; made once for a device, since a copy to it waits for what is under way there."""
    return torch.tensor(preprocessing.mean, device=device) * 255, torch.tensor(preprocessing.std, device=device) * 255


def pad_tokens(captions: Sequence[Sequence[int] | np.ndarray], context_length: int, pad_id: int, end_id: int) -> Tensor:
    """Rows padded to the longest (B, T), int64; those over ``context_length`` are cut and keep their end."""
    width = min(context_length, max(len(row) for row in captions))
    tokens_BT = np.full((len(captions), width), pad_id, dtype=np.int64)
    for padded, row in zip(tokens_BT, captions, strict=True):
        padded[: len(row)] = row[:width]
        if len(row) > width:
            padded[-1] = end_id
    return torch.from_numpy(tokens_BT)


def patches_kept(config: TrainConfig, number: int) -> tuple[int, int] | None:
    """Of how many patches how many a picture of global batch ``number`` is seen by; None where it is by all."""
    vision, dropped = config.model.vision, config.patch_dropout(number)
    if vision.kind != "vit" or not dropped:
        return None
    patches = (config.image_size(number) // vision.patch_size) ** 2
    return patches, max(1, round(patches * (1 - dropped)))


def batch_digest(lane_digests: list[int]) -> str:
    """One digest of a global batch from its lanes' digests in lane order: the same for any number of ranks."""
    return hashlib.sha256(np.array(lane_digests, dtype="<i8").tobytes()).hexdigest()[:16]


def lane_digest(sample_ids: list[str]) -> int:
    """The digest of what one lane gives to a batch."""
    joined = "\n".join(sample_ids).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little", signed=True)


def pin_memory() -> Callable[[Tensor], Tensor]:
    """What moves a tensor to page-locked memory for the CUDA device of this thread, from whatever thread; without CUDA
    it stays where it is."""
    if not torch.cuda.is_available():
        return lambda tensor: tensor
    device = torch.cuda.current_device()

    def pin(tensor: Tensor) -> Tensor:
        with torch.cuda.device(device):
            return tensor.pin_memory()

    return pin


class _Begun(NamedTuple):
    """A batch whose pictures are being decoded."""

    number: int
    rows: list[Row]
    lane_digests: list[int]
    pixels_BHWC: "Future[np.ndarray]"


class Feed:
    """Reads one rank's lanes of a mixture. Its memory: the windows its lanes are in, and what is prepared ahead."""

    def __init__(
        self,
        mixture: Mixture,
        config: TrainConfig,
        feed: FeedConfig,
        *,
        rank: int,
        world_size: int,
        decoder: Decoder,
    ) -> None:
        """
        Args:
            decoder: closed with the feed.

        Raises:
            BadInput: lanes, batch size, world size and datasets do not fit each other.
        """
        self._tokenizer, self._config, self._depth, self._decoder = (
            mixture.tokenizer,
            config,
            feed.prefetch_batches,
            decoder,
        )
        order = mixture.order(config)
        self._lanes = [order.lanes[number] for number in order.lanes_of(rank, world_size)]
        self._rows = {
            source: LaneRows(
                mixture.ordered[source],
                mixture.later[source],
                [lane for lane in self._lanes if lane.source == source],
                window=config.shuffle_window,
                per_lane=order.per_lane,
                feed=feed,
            )
            for source in sorted({lane.source for lane in self._lanes})
        }
        self._pin = pin_memory()

    def batches(self, start: int) -> Generator[Batch]:
        """Global batches ``start``, ``start + 1``, ... without end; threads prepare the next ones."""
        return prefetch(map(self._begin, itertools.count(start)), self._finish, self._depth)

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch ``number``.

        Raises:
            BadInput: a dataset is damaged.
            RunFailed: a picture does not decode.
        """
        return self._finish(self._begin(number))

    def close(self) -> None:
        """Ends reading and decoding."""
        for rows in self._rows.values():
            rows.close()
        self._decoder.close()

    def _begin(self, number: int) -> _Begun:
        for source_rows in self._rows.values():
            source_rows.enter(number)
        by_lane = [self._rows[lane.source].take(lane, number) for lane in self._lanes]
        digests = [lane_digest([row.sample_id for row in rows]) for rows in by_lane]
        rows = [row for rows in by_lane for row in rows]
        pictures = [Picture(row.encoded, row.sample_id, row.lane_pass) for row in rows]
        return _Begun(number, rows, digests, self._decoder.submit(pictures, self._config.image_size(number)))

    def _finish(self, begun: _Begun) -> Batch:
        context_length = self._config.model.text.context_length
        captions = [row.tokens for row in begun.rows]
        tokens_BT = pad_tokens(captions, context_length, self._tokenizer.pad_id, self._tokenizer.end_id)
        kept_patches_BK = self._kept_patches(begun)
        return Batch(
            pixels_BHWC=self._pin(torch.from_numpy(begun.pixels_BHWC.result())),
            tokens_BT=self._pin(tokens_BT),
            lane_digests=begun.lane_digests,
            kept_patches_BK=None if kept_patches_BK is None else self._pin(kept_patches_BK),
            sample_ids=[row.sample_id for row in begun.rows],
        )

    def _kept_patches(self, begun: _Begun) -> Tensor | None:
        of = patches_kept(self._config, begun.number)
        if of is None:
            return None
        seed = self._config.seed
        rows = [kept_patches(*of, seed=seed, sample_id=row.sample_id, lane_pass=row.lane_pass) for row in begun.rows]
        return torch.from_numpy(np.stack(rows))
