"""Bins whose range doubles, and a fair choice of rows."""

import math

import numpy as np
import pyarrow as pa
import pytest

from pipelines.histogram import Histogram, Reservoir


def test_bins_that_need_not_grow_are_numpys() -> None:
    values = np.random.default_rng(0).uniform(0, 8, 1000)
    histogram = Histogram(0, 8, 16)
    histogram.add(values[:300])
    histogram.add(values[300:])
    assert histogram.counts.tolist() == np.histogram(values, 16, (0, 8))[0].tolist()
    assert (histogram.count, histogram.smallest, histogram.largest) == (1000, values.min(), values.max())
    assert histogram.mean == pytest.approx(values.mean())


def test_the_range_doubles_to_either_side_and_loses_nothing() -> None:
    values = np.random.default_rng(0).normal(5, 40, 5000)
    histogram = Histogram(0, 1, 64)
    for part in np.array_split(values, 7):
        histogram.add(part)
    assert histogram.counts.sum() == 5000
    assert histogram.counts.tolist() == np.histogram(values, histogram.edges)[0].tolist()
    assert math.log2(histogram.high - histogram.low).is_integer()


def test_quantiles_lie_within_a_bin_of_the_true_ones() -> None:
    values = np.random.default_rng(0).lognormal(8, 1, 20_000)
    histogram = Histogram(8, 16, 64, log2=True)
    histogram.add(values)
    for share in (0.1, 0.5, 0.9):
        true = np.quantile(values, share)
        assert abs(math.log2(histogram.quantile(share) / true)) < (histogram.high - histogram.low) / 64
    assert (histogram.quantile(0), histogram.quantile(1)) == (values.min(), values.max())


def test_whole_numbers_keep_a_bin_of_their_own() -> None:
    histogram = Histogram(-0.5, 63.5)
    histogram.add(np.array([0, 0, 3, 63]))
    assert {n: int(c) for n, c in enumerate(histogram.counts) if c} == {0: 2, 3: 1, 63: 1}
    histogram.add(np.array([64]))
    assert {n: int(c) for n, c in enumerate(histogram.counts) if c} == {0: 2, 1: 1, 31: 1, 32: 1}


def test_what_is_no_number_is_set_apart() -> None:
    histogram = Histogram(0, 4, log2=True)
    histogram.add(np.array([math.nan, math.inf, 0.0, -1.0, 2.0]))
    assert (histogram.count, histogram.unusable) == (1, 4)
    assert math.isnan(Histogram(0, 1).quantile(0.5))


def test_a_histogram_fits_the_first_values() -> None:
    assert Histogram.fitting(np.array([0.3, -0.2])).high == 0.5
    assert Histogram.fitting(np.array([1.0])).high == 1.0
    assert Histogram.fitting(np.array([17.0, math.nan])).high == 32.0
    assert Histogram.fitting(np.array([0.0])).high == 1.0


def test_every_row_is_as_likely_to_stay_wherever_it_passes() -> None:
    random, stayed = np.random.default_rng(0), np.zeros(40)
    for _ in range(2000):
        reservoir = Reservoir(4)
        for start in (0, 1, 10, 37):
            stop = {0: 1, 1: 10, 10: 37, 37: 40}[start]
            reservoir.add(pa.table({"n": list(range(start, stop))}), random)
        assert len(reservoir.rows) == 4
        stayed[[row["n"] for row in reservoir.rows]] += 1
    # Each stays 200 times of 2000, with a standard deviation of 13.4.
    assert np.abs(stayed - 200).max() < 5 * 13.4


def test_a_reservoir_of_few_rows_holds_them_all_with_what_is_added() -> None:
    reservoir = Reservoir(5)
    reservoir.add(pa.table({"n": [1, 2]}), np.random.default_rng(0), row_group=7)
    reservoir.add(pa.table({"n": pa.array([], pa.int64())}), np.random.default_rng(0))
    assert sorted(row["n"] for row in reservoir.rows) == [1, 2]
    assert {row["row_group"] for row in reservoir.rows} == {7}
