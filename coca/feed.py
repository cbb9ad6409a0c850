"""Batches for one rank: row groups read, pictures decoded and captions padded, in the order of `coca.order`.

Shapes: B samples of this rank, H height, W width, C channels, K patches kept, T tokens of the batch's longest caption.
"""

import hashlib
import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from coca.augment import kept_patches, random_view
from coca.config import Preprocessing
from coca.dataset import Dataset
from coca.errors import RunFailed
from coca.images import ImageLimits, ImageProblem, decode_rgb
from coca.order import Order
from coca.train_config import TrainConfig

DecodeMap = Callable[[Callable[["Picture"], np.ndarray], Iterable["Picture"]], Iterable[np.ndarray]]
"""Applies a function to pictures in order: `map`, or the `map` of a pool of threads."""


@dataclass
class Batch:
    """One rank's share of a global batch: its lanes in ascending order."""

    pixels_BHWC: Tensor  # uint8
    tokens_BT: Tensor  # int64, padded on the right
    lane_digests: list[int]  # of the sample ids, one for each lane
    kept_patches_BK: Tensor | None = None  # where patches are dropped: int64, ascending


def normalize(pixels_BHWC: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels to the float32 model input (B, C, H, W), on the pixels' device."""
    mean = torch.tensor(preprocessing.mean, device=pixels_BHWC.device) * 255
    std = torch.tensor(preprocessing.std, device=pixels_BHWC.device) * 255
    return ((pixels_BHWC.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def pad_tokens(captions: list[list[int]], context_length: int, pad_id: int, end_id: int) -> Tensor:
    """Rows padded to the longest (B, T); those over ``context_length`` are cut and keep their end."""
    cut = [row if len(row) <= context_length else [*row[: context_length - 1], end_id] for row in captions]
    tokens_BT = torch.full((len(cut), max(len(row) for row in cut)), pad_id, dtype=torch.int64)
    for index, row in enumerate(cut):
        tokens_BT[index, : len(row)] = torch.tensor(row)
    return tokens_BT


class Picture(NamedTuple):
    """One picture to decode, and what its random view depends on."""

    encoded: bytes
    sample_id: str
    lane_pass: int


class Feed:
    """Reads one rank's lanes. Holds two windows of row groups a lane, each read once a pass."""

    def __init__(
        self, dataset: Dataset, config: TrainConfig, *, rank: int, world_size: int, decode_map: DecodeMap = map
    ) -> None:
        """
        Raises:
            BadInput: lanes, batch size, world size and dataset do not fit each other.
        """
        self._dataset, self._config, self._decode_map = dataset, config, decode_map
        self._order = Order(
            dataset.row_groups["selected"].to_numpy().astype(np.int64),
            lanes=config.lanes,
            batch_size=config.batch_size,
            window=config.shuffle_window,
            seed=config.seed,
        )
        self._lanes = self._order.lanes_of(rank, world_size)
        self._row_groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._capacity = 2 * config.shuffle_window * len(self._lanes)

    def batches(self, start: int) -> Generator[Batch]:
        """Global batches ``start``, ``start + 1``, ... without end; a thread prepares the next ones."""
        return _prefetch((self.batch(number) for number in itertools.count(start)), depth=2)

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch ``number``."""
        pictures: list[Picture] = []
        captions: list[list[int]] = []
        digests: list[int] = []
        for lane in self._lanes:
            refs = self._order.lane_batch(lane, number)
            for ref in refs:
                table = self._row_group(ref.row_group)
                sample_id, image = table["sample_id"][ref.row].as_py(), table["image"][ref.row].as_py()
                pictures.append(Picture(image, sample_id, ref.lane_pass))
                captions.append(table["tokens"][ref.row].as_py())
            digests.append(_digest([picture.sample_id for picture in pictures[-len(refs) :]]))
        tokenizer = self._dataset.tokenizer
        context_length = self._config.model.text.context_length
        tokens_BT = pad_tokens(captions, context_length, tokenizer.pad_id, tokenizer.end_id)
        pixels_BHWC = torch.from_numpy(self._decode(pictures))
        return Batch(pixels_BHWC, tokens_BT, digests, self._kept_patches(pictures))

    def _decode(self, pictures: list[Picture]) -> np.ndarray:
        pixels: list[np.ndarray] = []
        try:
            for decoded in self._decode_map(self._decode_one, pictures):
                pixels.append(decoded)
        except ImageProblem as problem:
            sample_id = pictures[len(pixels)].sample_id
            raise RunFailed(f"sample {sample_id} of {self._dataset.store.uri} does not decode: {problem}") from problem
        return np.stack(pixels)

    def _decode_one(self, picture: Picture) -> np.ndarray:
        return random_view(
            decode_rgb(picture.encoded, ImageLimits()),
            self._config.model.vision.image_size,
            self._config.augment,
            seed=self._config.seed,
            sample_id=picture.sample_id,
            lane_pass=picture.lane_pass,
        )

    def _kept_patches(self, pictures: list[Picture]) -> Tensor | None:
        vision, dropped = self._config.model.vision, self._config.augment.patch_dropout
        if vision.kind != "vit" or not dropped:
            return None
        keep = max(1, round(vision.patches * (1 - dropped)))
        rows = [
            kept_patches(
                vision.patches, keep, seed=self._config.seed, sample_id=each.sample_id, lane_pass=each.lane_pass
            )
            for each in pictures
        ]
        return torch.from_numpy(np.stack(rows))

    def _row_group(self, index: int) -> pa.Table:
        table = self._row_groups.get(index)
        if table is None:
            table = self._dataset.read_row_group(index, columns=("sample_id", "image"))
            self._row_groups[index] = table
            if len(self._row_groups) > self._capacity:
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(index)
        return table


def batch_digest(lane_digests: list[int]) -> str:
    """One digest of a global batch from its lanes' digests in lane order: the same for any number of ranks."""
    return hashlib.sha256(np.array(lane_digests, dtype="<i8").tobytes()).hexdigest()[:16]


def _digest(sample_ids: list[str]) -> int:
    joined = "\n".join(sample_ids).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little", signed=True)


def _prefetch(batches: Iterator[Batch], depth: int) -> Generator[Batch]:
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                offer(batch)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
