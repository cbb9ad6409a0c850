"""Counts of numbers in a fixed number of bins, and a fair choice of rows: both in bounded memory, however many pass."""

import math
from typing import Any

import numpy as np
import pyarrow as pa


class Histogram:
    """A number of equal bins, fixed; where a value lies outside, bins are merged in pairs and the range doubles.

    So the range need not be known before, and no value is kept.

    Args:
        low, high: the first range. A value on an edge counts above it, the highest edge apart; for whole numbers give
            halves, so that none lies on one.
        log2: the bins are equal in the logarithm: ``low`` and ``high`` are exponents, and only positive values count.
    """

    def __init__(self, low: float, high: float, bins: int = 64, *, log2: bool = False) -> None:
        assert bins % 2 == 0
        assert low < high
        self.low, self.high, self.log2 = float(low), float(high), log2
        self.counts = np.zeros(bins, dtype=np.int64)
        self.count = self.unusable = 0
        self.total = 0.0
        self.smallest, self.largest = math.inf, -math.inf

    @classmethod
    def fitting(cls, values: np.ndarray, bins: int = 64) -> "Histogram":
        """Empty, with 0 to the power of two at or above the largest of these values as its first range."""
        usable = np.abs(values[np.isfinite(values)])
        largest = float(usable.max()) if len(usable) else 0.0
        return cls(0.0, 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0, bins)

    @property
    def edges(self) -> np.ndarray:
        """Of the bins, in the unit of the values: shape (bins + 1,)."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return np.exp2(edges) if self.log2 else edges

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def add(self, values: np.ndarray) -> None:
        """Count numbers; those that are not finite (or not positive, where the logarithm is taken) are set apart."""
        values = np.asarray(values, dtype=np.float64)
        usable = np.isfinite(values) & ((values > 0) | (not self.log2))
        self.unusable += int(len(values) - usable.sum())
        values = values[usable]
        if not len(values):
            return
        self.count += len(values)
        self.total += float(values.sum())
        self.smallest = min(self.smallest, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        places = np.log2(values) if self.log2 else values
        while places.min() < self.low:
            self._double(upwards=False)
        while places.max() > self.high:
            self._double(upwards=True)
        bins = ((places - self.low) / (self.high - self.low) * len(self.counts)).astype(np.int64)
        self.counts += np.bincount(bins.clip(0, len(self.counts) - 1), minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of all lie, as if they lay evenly within their bin."""
        if not self.count:
            return math.nan
        below = np.concatenate([[0], np.cumsum(self.counts)])
        edge = float(np.interp(share * self.count, below, np.linspace(self.low, self.high, len(below))))
        value = 2.0**edge if self.log2 else edge
        return min(max(value, self.smallest), self.largest)

    def _double(self, *, upwards: bool) -> None:
        half = len(self.counts) // 2
        pairs, nothing = self.counts.reshape(half, 2).sum(axis=1), np.zeros(half, dtype=np.int64)
        width = self.high - self.low
        if upwards:
            self.counts, self.high = np.concatenate([pairs, nothing]), self.high + width
        else:
            self.counts, self.low = np.concatenate([nothing, pairs]), self.low - width


class Reservoir:
    """``size`` rows drawn fairly from all that pass: each row draws a number, the lowest stay."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: list[tuple[float, int, dict[str, Any]]] = []
        self._passed = 0

    def add(self, table: pa.Table, random: np.random.Generator, **constant: Any) -> None:
        """Let rows pass; ``constant`` is added to each that stays."""
        numbers = random.random(table.num_rows)
        enter = np.flatnonzero(numbers < self._rows[-1][0]) if len(self._rows) == self.size else np.arange(len(numbers))
        if len(enter) > self.size:
            enter = enter[np.argpartition(numbers[enter], self.size)[: self.size]]
        drawn = table.take(pa.array(enter)).to_pylist()
        self._rows += [
            (float(numbers[at]), self._passed + int(at), row | constant) for at, row in zip(enter, drawn, strict=True)
        ]
        self._rows = sorted(self._rows, key=lambda row: row[:2])[: self.size]
        self._passed += table.num_rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order of the draw, which is no order of the data."""
        return [row for _, _, row in self._rows]
