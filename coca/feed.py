"""Batches for one rank: row groups read, pictures decoded and captions padded, in the order of `coca.order`.

Shapes: B samples of this rank, H height, W width, C channels, T tokens of the batch's longest caption.
"""

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from coca.config import Preprocessing
from coca.dataset import Dataset
from coca.errors import RunFailed
from coca.images import ImageLimits, ImageProblem, decode_rgb, model_pixels
from coca.order import Order

DecodeMap = Callable[[Callable[[bytes], np.ndarray], Iterable[bytes]], Iterable[np.ndarray]]
"""Applies a function to many encoded images in order: `map`, or the `map` of a pool of threads or processes."""


@dataclass
class Batch:
    """One rank's share of a global batch: its lanes in ascending order."""

    pixels_BHWC: Tensor  # uint8
    tokens_BT: Tensor  # int64, padded on the right
    lane_digests: list[int]  # of the sample ids, one for each lane


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


class Feed:
    """Reads one rank's lanes. Holds two windows of row groups a lane, read once a pass each."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        lanes: list[int],
        *,
        image_size: int,
        context_length: int,
        window: int,
        decode_map: DecodeMap = map,
    ) -> None:
        self._dataset, self._order, self._lanes = dataset, order, lanes
        self._image_size, self._context_length = image_size, context_length
        self._decode_map = decode_map
        self._row_groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._capacity = 2 * window * len(lanes)

    def batches(self, start: int) -> Iterator[Batch]:
        """Global batches ``start``, ``start + 1``, ... without end; a thread prepares the next ones."""
        return _prefetch((self.batch(number) for number in _count(start)), depth=2)

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch ``number``."""
        images: list[bytes] = []
        captions: list[list[int]] = []
        ids: list[str] = []
        digests: list[int] = []
        for lane in self._lanes:
            lane_ids = []
            for ref in self._order.lane_batch(lane, number):
                table = self._row_group(ref.row_group)
                lane_ids.append(table["sample_id"][ref.row].as_py())
                images.append(table["image"][ref.row].as_py())
                captions.append(table["tokens"][ref.row].as_py())
            ids.extend(lane_ids)
            digests.append(_digest(lane_ids))
        tokenizer = self._dataset.tokenizer
        tokens_BT = pad_tokens(captions, self._context_length, tokenizer.pad_id, tokenizer.end_id)
        return Batch(torch.from_numpy(self._decode(images, ids)), tokens_BT, digests)

    def _decode(self, images: list[bytes], ids: list[str]) -> np.ndarray:
        pixels: list[np.ndarray] = []
        try:
            for decoded in self._decode_map(self._decode_one, images):
                pixels.append(decoded)
        except ImageProblem as problem:
            raise RunFailed(
                f"sample {ids[len(pixels)]} of {self._dataset.store.uri} does not decode: {problem}"
            ) from problem
        return np.stack(pixels)

    def _decode_one(self, data: bytes) -> np.ndarray:
        return model_pixels(decode_rgb(data, ImageLimits()), self._image_size)

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


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def _prefetch(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for batch in batches:
                while not stop.is_set():
                    try:
                        ready.put(batch, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)

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
