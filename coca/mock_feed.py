"""Made-up batches in the shapes of a run, to time a model without data.

Shapes: B samples of this rank, H height, W width, C channels, K patches kept, T tokens.
"""

from collections.abc import Generator
from functools import lru_cache
from itertools import count

import numpy as np
import torch

from coca.errors import BadInput
from coca.feed import Batch, lane_digest, patches_kept, pin_memory
from coca.order import check_world_size
from coca.train_config import TrainConfig


class MockFeed:
    """The same noise at every step; made once for each size of the pictures, and the same at any world size."""

    def __init__(self, config: TrainConfig, *, rank: int, world_size: int, tokens: int | None = None) -> None:
        """
        Args:
            tokens: length of every caption, begin and end included; by default, the dearest, context_length.

        Raises:
            BadInput: the world size does not divide the lanes, or captions of that length do not fit the model.
        """
        check_world_size(config.lanes, world_size)
        context_length = config.model.text.context_length
        self._tokens = context_length if tokens is None else tokens
        if not 2 <= self._tokens <= context_length:
            raise BadInput(f"captions of {tokens} tokens", f"Give 2 to model.text.context_length = {context_length}")
        self._config, self._lanes = config, range(rank, config.lanes, world_size)
        self._pin = pin_memory()
        self._made = lru_cache(maxsize=2)(self._make)

    def batches(self, start: int) -> Generator[Batch]:
        """This rank's share of global batches ``start``, ``start + 1``, ... without end."""
        return (self.batch(number) for number in count(start))

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch ``number``."""
        return self._made(self._config.image_size(number), patches_kept(self._config, number))

    def close(self) -> None:
        """Lets go of the batches."""
        self._made.cache_clear()

    def _make(self, size: int, kept: tuple[int, int] | None) -> Batch:
        per_lane = self._config.batch_size // self._config.lanes
        pixels, tokens, patches, sample_ids, digests = [], [], [], [], []
        for lane in self._lanes:
            chance = np.random.default_rng([self._config.seed, lane])
            pixels.append(chance.integers(0, 256, (per_lane, size, size, 3), dtype=np.uint8))
            tokens.append(self._captions(chance, per_lane))
            if kept is not None:
                drawn = chance.permuted(np.tile(np.arange(kept[0]), (per_lane, 1)), axis=1)
                patches.append(np.sort(drawn[:, : kept[1]], axis=1))
            ids = [f"{lane * per_lane + place:032x}" for place in range(per_lane)]
            sample_ids.extend(ids)
            digests.append(lane_digest(ids))
        return Batch(
            pixels_BHWC=self._pin(torch.from_numpy(np.concatenate(pixels))),
            tokens_BT=self._pin(torch.from_numpy(np.concatenate(tokens))),
            lane_digests=digests,
            kept_patches_BK=self._pin(torch.from_numpy(np.concatenate(patches))) if kept is not None else None,
            sample_ids=sample_ids,
        )

    def _captions(self, chance: np.random.Generator, rows: int) -> np.ndarray:
        """Captions (rows, T) that begin and end as they should and have no special token between."""
        text = self._config.model.text
        words = np.setdiff1d(np.arange(text.vocab_size), [text.pad_id, text.begin_id, text.end_id])
        captions = chance.choice(words, (rows, self._tokens)).astype(np.int64)
        captions[:, 0], captions[:, -1] = text.begin_id, text.end_id
        return captions
