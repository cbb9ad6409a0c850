"""Selection among more rows than one process holds: Ray Data shuffles of keys, a partition at a time in a process."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pipelines.contaminants import Contaminants
from pipelines.duplicates import band_masks, signed_hashes
from pipelines.ray_data import quiet_ray_data
from pipelines.select_config import SelectConfig
from pipelines.selection import KeySource, compare_pictures, keep_related, to_keys, unselected
from pipelines.selection_keys import (
    KEYS,
    LEADERS,
    leaders,
    lost_hashes,
    mark_equal_pairs,
    mark_frequent_captions,
    mark_near_pictures,
    near_leaders,
)

# Odd, from the golden ratio: spreads keys whose low bits are alike.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)

TableStep = Callable[[pa.Table], pa.Table]


def read_related(standing: Sequence[KeySource], new: pa.Table, config: SelectConfig) -> list[pa.Table]:
    """The ``KEYS`` of standing rows that could decide about one of ``new``, which a process holds."""
    held = ray.put(new.combine_chunks())
    with quiet_ray_data():
        rows = _read(standing, lambda table, _: keep_related(to_keys(table, config, None), ray.get(held), config))
        return _take(rows, KEYS)


def select_shuffled(
    new: Sequence[KeySource],
    standing: Sequence[KeySource],
    config: SelectConfig,
    contaminants: Contaminants | None,
    rows_per_partition: int,
) -> pa.Table:
    """``selection.UNSELECTED``, unsorted. This process holds the unselected rows and the pairs of near hashes."""
    sources = [*new, *standing]
    partitions = max(1, -(-sum(source.rows for source in sources) // rows_per_partition))

    def keys_of(table: pa.Table, place: int) -> pa.Table:
        return to_keys(table, config, contaminants if place < len(new) else None, place)

    with quiet_ray_data():
        keys = _read(sources, keys_of)
        most = config.max_caption_count
        if most is not None:
            keys = _by(keys, "caption_key", partitions, lambda table: mark_frequent_captions(table, most))
        keys = _by(keys, "source_sha256", partitions, lambda table: compare_pictures(table, config))
        if config.pair_duplicates_by_phash:
            keys = _by(keys, "phash", partitions, mark_equal_pairs)
        if config.duplicates == "perceptual":
            keys = keys.materialize()
            lost = ray.put(lost_hashes(_near(keys, config, partitions)))
            keys = _by(keys, "phash", partitions, lambda table: mark_near_pictures(table, ray.get(lost)))
        tables = _take(keys.map_batches(unselected, **_WHOLE_BLOCKS), unselected(KEYS.empty_table()).schema)
    return pa.concat_tables(tables)


def _near(keys: Any, config: SelectConfig, partitions: int) -> pa.Table:
    """All pairs of near hashes: each hash goes to one partition for every mask."""
    masks = band_masks(config.max_hamming)

    def under_each_mask(table: pa.Table) -> pa.Table:
        hashes = signed_hashes(table["phash"])
        copies = []
        for number, mask in enumerate(masks):
            band = (hashes & mask) * np.uint64(2 * number + 1)
            copies.append(
                table.append_column("mask", pa.array(np.full(len(hashes), number, dtype=np.int32))).append_column(
                    "band", pa.array(band)
                )
            )
        return pa.concat_tables(copies)

    def near_in(table: pa.Table) -> pa.Table:
        numbers = np.unique(table["mask"].to_numpy())
        found = [
            near_leaders(_where(table, "mask", number).select(LEADERS.names), number, config.max_hamming)
            for number in numbers
        ]
        return pa.concat_tables([near_leaders(LEADERS.empty_table(), 0, config.max_hamming), *found])

    best = _by(keys, "phash", partitions, leaders)
    # A copy is half as wide as a row of keys.
    copies = partitions * max(1, len(masks) // 2)
    near = _by(best.map_batches(under_each_mask, **_WHOLE_BLOCKS), "band", copies, near_in)
    empty = near_leaders(LEADERS.empty_table(), 0, config.max_hamming)
    return pa.concat_tables(_take(near, empty.schema))


_WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}


def _read(sources: Sequence[KeySource], function: Callable[[pa.Table, int], pa.Table]) -> Any:
    """``function`` of each source and its place; one source is one task."""

    def read(places: pa.Table) -> pa.Table:
        return pa.concat_tables([function(sources[place].read(), place) for place in places["place"].to_pylist()])

    items = [{"place": place} for place in range(len(sources))]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, **_WHOLE_BLOCKS)


def _by(dataset: Any, key: str, partitions: int, function: TableStep) -> Any:
    """``function`` of each partition, in which all rows that share ``key`` lie together."""

    def number(table: pa.Table) -> pa.Table:
        return table.append_column("partition", pa.array(_partition(table[key], partitions)))

    def step(table: pa.Table) -> pa.Table:
        return function(table.drop_columns("partition"))

    numbered = dataset.map_batches(number, **_WHOLE_BLOCKS)
    return numbered.groupby("partition", num_partitions=partitions).map_groups(step, batch_format="pyarrow")


def _partition(column: pa.ChunkedArray, partitions: int) -> np.ndarray:
    if pa.types.is_string(column.type):  # a digest in hex
        values = np.array([int(text[:16], 16) for text in column.to_pylist()], dtype=np.uint64)
    else:
        values = column.to_numpy().view(np.uint64)
    high = (values * _SPREAD) >> np.uint64(32)
    return np.asarray((high % np.uint64(partitions)).astype(np.int32))


def _take(dataset: Any, schema: pa.Schema) -> list[pa.Table]:
    tables = [
        batch.select(schema.names).cast(schema)
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        if batch.num_rows
    ]
    return [schema.empty_table(), *tables]


def _where(table: pa.Table, column: str, value: int) -> pa.Table:
    return table.filter(pa.array(table[column].to_numpy() == value))
