"""Which stored pairs are part of a version: rules on rows, duplicates and popularity, over keys, never over bytes."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import SAMPLES, Reason
from pipelines.contaminants import Contaminants
from pipelines.duplicates import band_masks, near_any, signed_hashes
from pipelines.select_config import SelectConfig
from pipelines.selection_keys import (
    KEYS,
    leaders,
    lost_hashes,
    mark,
    mark_equal_pairs,
    mark_equal_pictures,
    mark_frequent_captions,
    mark_near_pictures,
    mark_popular_pictures,
    near_leaders,
)

# Rows that one process selects among by itself: about 1 GB of keys and their indices.
IN_PROCESS_ROWS = 2_000_000

# Most of the time of a small file is waiting for the store.
_THREADS = 8

# What is known of a pair. Columns that no rule of the settings needs may be left out (``candidate_columns``).
CANDIDATES = pa.schema(
    [
        *(SAMPLES.field(name) for name in ("sample_id", "url", "source_sha256", "phash")),
        pa.field("caption", pa.string()),
        pa.field("language", pa.string()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("scores", pa.map_(pa.string(), pa.float32())),
        # Null in rows to be judged; else whether the parent version has selected this stored row.
        pa.field("standing", pa.bool_()),
    ]
)

# Of the rows judged those that are not selected; `source` is the place among the sources.
UNSELECTED = pa.schema([KEYS.field("sample_id"), pa.field("reason", pa.string(), nullable=False), KEYS.field("source")])


class KeySource(Protocol):
    """Some rows of ``CANDIDATES``, read where they are needed. Travels to Ray workers."""

    @property
    def rows(self) -> int: ...

    def read(self) -> pa.Table: ...


def candidate_columns(config: SelectConfig) -> list[str]:
    """The columns of ``CANDIDATES`` that the rules look at, ``standing`` left out."""
    names = ["sample_id", "url", "source_sha256", "phash"]
    names += ["caption"] if config.needs_captions else []
    names += ["language"] if config.languages is not None else []
    names += ["original_width", "original_height"] if config.needs_sizes else []
    return names + (["scores"] if config.min_scores else [])


def select_rows(candidates: pa.Table, config: SelectConfig, contaminants: Contaminants | None = None) -> pa.Array:
    """The ``Reason`` of each new row of ``CANDIDATES`` in order, null where it is selected.

    Rows with a ``standing`` are not judged: they count, and those that are selected win.
    """
    keys = compare_rows(to_keys(candidates, config, contaminants), config)
    return keys["reason"].filter(pc.is_null(keys["standing"])).combine_chunks()


def select_new(
    new: Sequence[KeySource],
    standing: Sequence[KeySource],
    config: SelectConfig,
    contaminants: Contaminants | None = None,
    *,
    start_ray: Callable[[], object] | None = None,
    in_process_rows: int = IN_PROCESS_ROWS,
) -> pa.Table:
    """As ``select_rows``, for any number of rows: ``UNSELECTED``, sorted by ``source`` and ``sample_id``.

    Of the standing rows only those are kept that could decide about a new one. More than ``in_process_rows`` new rows
    are judged as a Ray Data job, in which each process holds the keys of one partition.

    Args:
        start_ray: called before the first job; without it Ray is initialised already.
    """
    from pipelines.selection_shuffle import read_related, select_shuffled

    if sum(source.rows for source in new) > in_process_rows:
        if start_ray is not None:
            start_ray()
        return _sorted(select_shuffled(new, standing, config, contaminants, in_process_rows))
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(lambda item: to_keys(item[1].read(), config, contaminants, item[0]), enumerate(new)))
    keys = pa.concat_tables([KEYS.empty_table(), *read])
    if sum(source.rows for source in standing) > in_process_rows:
        if start_ray is not None:
            start_ray()
        related = read_related(standing, keys, config)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = pool.map(lambda each: keep_related(to_keys(each.read(), config, None), keys, config), standing)
            related = list(rows)
    return _sorted(unselected(compare_rows(pa.concat_tables([keys, *related]), config)))


def to_keys(candidates: pa.Table, config: SelectConfig, contaminants: Contaminants | None, source: int = 0) -> pa.Table:
    """``KEYS`` of ``CANDIDATES``, with what a row alone decides."""
    count = candidates.num_rows
    candidates = candidates.combine_chunks()
    nothing = pa.nulls(count, pa.bool_())
    standing = candidates["standing"] if "standing" in candidates.column_names else nothing
    captions = hash64(candidates["caption"]) if config.needs_captions else np.zeros(count, dtype=np.uint64)
    columns = {
        **{name: candidates[name] for name in ("sample_id", "source_sha256", "phash")},
        "source": pa.array(np.full(count, source, dtype=np.int32)),
        "url_key": hash64(candidates["url"]),
        "caption_key": captions,
        "standing": standing,
        "reason": pc.if_else(pc.is_null(standing), judge_rows(candidates, config, contaminants), None),
    }
    return pa.table([columns[name] for name in KEYS.names], names=KEYS.names).cast(KEYS)


def judge_rows(candidates: pa.Table, config: SelectConfig, contaminants: Contaminants | None) -> pa.Array:
    """The rule that each row breaks by itself, null where it keeps all."""
    reason = pa.nulls(candidates.num_rows, pa.string())
    for broken, why in _row_rules(candidates, config):
        reason = mark(reason, broken, why)
    if contaminants is not None:
        reason = mark(reason, contaminants.mask(candidates["source_sha256"], candidates["phash"]), Reason.CONTAMINATED)
    return reason


def _row_rules(rows: pa.Table, config: SelectConfig) -> list[tuple[np.ndarray, Reason]]:
    rules = []
    if config.needs_captions:
        words = pc.add(pc.count_substring(rows["caption"], " "), 1).to_numpy()
        chars = pc.utf8_length(rows["caption"]).to_numpy()
        short = (words < (config.min_words or 0)) | (chars < (config.min_chars or 0))
        long = (words > (config.max_words or np.inf)) | (chars > (config.max_chars or np.inf))
        rules += [(short, Reason.CAPTION_TOO_SHORT), (long, Reason.CAPTION_TOO_LONG)]
    if config.languages is not None:
        known = pc.is_in(rows["language"], value_set=pa.array(config.languages, pa.string())).to_numpy()
        rules.append((~known, Reason.LANGUAGE))
    if config.needs_sizes:
        sides = np.stack([rows["original_width"].to_numpy(), rows["original_height"].to_numpy()]).astype(np.int64)
        small, large = sides.min(axis=0), sides.max(axis=0)
        rules.append((small < (config.min_side or 0), Reason.IMAGE_TOO_SMALL))
        rules.append((large > (config.max_aspect_ratio or np.inf) * small, Reason.ASPECT_RATIO))
    for name, lowest in config.min_scores.items():
        rules.append((~(score_column(rows, name) >= lowest), Reason.SCORE))
    return rules


def score_column(rows: pa.Table, name: str) -> np.ndarray:
    """float64 of shape (rows,): a scorer's score, NaN where there is none."""
    if "scores" not in rows.column_names:
        return np.full(rows.num_rows, np.nan)
    values = pc.map_lookup(rows["scores"], pa.scalar(name), "first").cast(pa.float64())
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def compare_rows(keys: pa.Table, config: SelectConfig) -> pa.Table:
    """``keys`` with what their comparison decides; all rows are at hand."""
    keys = keys.combine_chunks()
    if config.max_caption_count is not None:
        keys = mark_frequent_captions(keys, config.max_caption_count)
    keys = compare_pictures(keys, config)
    if config.pair_duplicates_by_phash:
        keys = mark_equal_pairs(keys)
    if config.duplicates == "perceptual":
        best, masks = leaders(keys), range(len(band_masks(config.max_hamming)))
        near = pa.concat_tables([near_leaders(best, mask_number, config.max_hamming) for mask_number in masks])
        keys = mark_near_pictures(keys, lost_hashes(near))
    return keys


def compare_pictures(keys: pa.Table, config: SelectConfig) -> pa.Table:
    """What the rows of equal pictures decide among themselves. Key: ``source_sha256``."""
    if config.max_captions_per_image is not None:
        keys = mark_popular_pictures(keys, config.max_captions_per_image)
    return keys if config.duplicates == "none" else mark_equal_pictures(keys)


def keep_related(standing: pa.Table, new: pa.Table, config: SelectConfig) -> pa.Table:
    """The standing ``KEYS`` that could decide about a row of ``new``."""
    related = pc.is_in(standing["source_sha256"], value_set=new["source_sha256"].combine_chunks()).to_numpy()
    if config.max_caption_count is not None:
        related = related | np.isin(standing["caption_key"].to_numpy(), new["caption_key"].to_numpy())
    if config.pair_duplicates_by_phash:
        related = related | np.isin(standing["phash"].to_numpy(), new["phash"].to_numpy())
    if config.duplicates == "perceptual":
        hashes = np.unique(signed_hashes(new["phash"]))
        related = related | near_any(signed_hashes(standing["phash"]), hashes, config.max_hamming)
    return standing.filter(pa.array(related))


def unselected(keys: pa.Table) -> pa.Table:
    """``UNSELECTED`` of judged ``KEYS``."""
    lost = keys.filter(pc.and_(pc.is_null(keys["standing"]), pc.is_valid(keys["reason"])))
    return lost.select(UNSELECTED.names).cast(UNSELECTED)


def hash64(texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The first 64 bits of the BLAKE2b of each text (uint64): what stands for it in comparisons."""
    digests = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts.to_pylist()
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by([("source", "ascending"), ("sample_id", "ascending")])
