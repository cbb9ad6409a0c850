"""The rules of selection that compare rows. Each needs together only the rows that share its key.

Tables hold ``KEYS``; a row whose ``standing`` is null is judged, the others are rows of the parent version, which only
count and win. Every function gives the same reasons whatever the order of rows, and however rows that do not share its
key are split over tables.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason
from pipelines.duplicates import band_masks, is_blank, near_pairs_under, resolve, signed_hashes

KEYS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("url_key", pa.uint64(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("phash", pa.int64(), nullable=False),
        pa.field("caption_key", pa.uint64(), nullable=False),
        pa.field("standing", pa.bool_()),
        pa.field("reason", pa.string()),
    ]
)

# One row for each perceptual hash: the best of the rows that have it.
LEADERS = KEYS.remove(7).remove(5).remove(3).remove(1)
_NEAR = pa.schema([field.with_name(f"{end}_{field.name}") for end in ("better", "worse") for field in LEADERS])
LOST = pa.schema([pa.field("phash", pa.int64(), nullable=False), pa.field("winner_url", pa.uint64(), nullable=False)])


def mark(reason: pa.Array, broken: np.ndarray, why: Reason) -> pa.Array:
    """``reason`` with ``why`` where it was null and a rule is broken."""
    hit = pc.and_(pc.is_null(reason), pa.array(broken))
    return pc.if_else(hit, pa.scalar(why.value), reason)


def mark_frequent_captions(keys: pa.Table, most: int) -> pa.Table:
    """``caption_too_frequent`` where more than ``most`` rows have the caption. Key: ``caption_key``."""
    return _with_reason(keys, _is_new(keys) & (_group_sizes(keys["caption_key"]) > most), Reason.CAPTION_TOO_FREQUENT)


def mark_popular_pictures(keys: pa.Table, most: int) -> pa.Table:
    """``image_too_popular`` where more than ``most`` rows have the picture. Key: ``source_sha256``."""
    return _with_reason(keys, _is_new(keys) & (_group_sizes(keys["source_sha256"]) > most), Reason.IMAGE_TOO_POPULAR)


def mark_equal_pictures(keys: pa.Table) -> pa.Table:
    """``duplicate_image`` where the picture is selected under another url. Key: ``source_sha256``."""
    winner = _winners(keys, _codes(keys["source_sha256"]), _in_play(keys))
    urls = keys["url_key"].to_numpy()
    loses = (winner >= 0) & (urls[winner] != urls)
    return _with_reason(keys, _is_new(keys) & loses, Reason.DUPLICATE_IMAGE)


def mark_equal_pairs(keys: pa.Table) -> pa.Table:
    """``near_duplicate`` where the caption is selected with the same perceptual hash. Key: ``phash``."""
    hashes, captions = signed_hashes(keys["phash"]), keys["caption_key"].to_numpy()
    _, pair = np.unique(np.stack([hashes, captions], axis=1), axis=0, return_inverse=True)
    winner = _winners(keys, pair.reshape(-1), _in_play(keys))
    loses = (winner >= 0) & (winner != np.arange(keys.num_rows))
    return _with_reason(keys, _is_new(keys) & loses, Reason.NEAR_DUPLICATE)


def leaders(keys: pa.Table) -> pa.Table:
    """``LEADERS`` of the hashes that say something of their picture. Key: ``phash``."""
    in_play = _in_play(keys) & ~is_blank(signed_hashes(keys["phash"]))
    winner = _winners(keys, _codes(keys["phash"]), in_play)
    return keys.take(np.unique(winner[winner >= 0])).select(LEADERS.names).cast(LEADERS)


def near_leaders(table: pa.Table, mask_number: int, max_hamming: int) -> pa.Table:
    """Pairs of leaders that agree under a mask of ``band_masks`` and lie near, at least one of them new.

    Key: ``phash`` under that mask.
    """
    hashes, rank = signed_hashes(table["phash"]), _rank(table)
    left, right = near_pairs_under(hashes, band_masks(max_hamming)[mask_number], max_hamming)
    new = _is_new(table)
    left, right = left[new[left] | new[right]], right[new[left] | new[right]]
    swap = rank[left] > rank[right]
    ends = (table.take(np.where(swap, right, left)), table.take(np.where(swap, left, right)))
    return pa.table([column for end in ends for column in end.columns], schema=_NEAR)


def lost_hashes(near: pa.Table) -> pa.Table:
    """``LOST``: the hashes that give way to a near one, from all pairs of ``near_leaders``, repeats allowed."""
    ends = [near.select([f"{end}_{name}" for name in LEADERS.names]) for end in ("better", "worse")]
    nodes = pa.concat_tables([end.rename_columns(LEADERS.names) for end in ends])
    hashes, first = np.unique(nodes["phash"].to_numpy(), return_index=True)
    nodes = nodes.take(first)
    order = np.argsort(_rank(nodes))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    better, worse = (rank[np.searchsorted(hashes, near[f"{end}_phash"].to_numpy())] for end in ("better", "worse"))
    winner = resolve(better, worse, len(order))
    lost = np.flatnonzero(winner >= 0)
    urls = nodes["url_key"].to_numpy()[order]
    return pa.table([nodes["phash"].to_numpy()[order][lost], urls[winner[lost]]], schema=LOST)


def mark_near_pictures(keys: pa.Table, lost: pa.Table) -> pa.Table:
    """``near_duplicate`` where a near picture is selected under another url. Key: ``phash``.

    A further picture of the winner's own url stays: a server may encode it anew for each request.
    """
    hashes, urls = keys["phash"].to_numpy(), keys["url_key"].to_numpy()
    in_play = _in_play(keys) & ~is_blank(hashes.view(np.uint64))
    leader = _winners(keys, _codes(keys["phash"]), in_play)
    winner_url = urls[leader]
    place = pc.index_in(keys["phash"], value_set=lost["phash"].combine_chunks()).to_numpy(zero_copy_only=False)
    gives_way = ~np.isnan(place.astype(np.float64))
    winner_url[gives_way] = lost["winner_url"].to_numpy()[place[gives_way].astype(np.int64)]
    loses = in_play & (leader >= 0) & (urls != winner_url)
    return _with_reason(keys, _is_new(keys) & loses, Reason.NEAR_DUPLICATE)


def _with_reason(keys: pa.Table, broken: np.ndarray, why: Reason) -> pa.Table:
    reason = mark(keys["reason"].combine_chunks(), broken, why)
    return keys.set_column(keys.schema.get_field_index("reason"), KEYS.field("reason"), reason)


def _is_new(keys: pa.Table) -> np.ndarray:
    return np.asarray(pc.is_null(keys["standing"]).to_numpy())


def _in_play(keys: pa.Table) -> np.ndarray:
    """Rows that can win: selected in the parent version, or new and not refused yet."""
    return np.asarray(pc.and_(pc.is_null(keys["reason"]), pc.fill_null(keys["standing"], True)).to_numpy())


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.combine_chunks().dictionary_encode().indices.to_numpy())


def _group_sizes(column: pa.ChunkedArray) -> np.ndarray:
    """For each row how many rows share its value."""
    codes = _codes(column)
    return np.bincount(codes)[codes] if len(codes) else codes


def _rank(keys: pa.Table) -> np.ndarray:
    """Rows of the parent version first, then by ``sample_id``."""
    ids = pc.rank(keys["sample_id"], sort_keys="ascending", tiebreaker="dense").to_numpy().astype(np.int64)
    return ids + _is_new(keys) * (len(ids) + 1)


def _winners(keys: pa.Table, codes: np.ndarray, in_play: np.ndarray) -> np.ndarray:
    """For each row the place of the best row in play of its group, -1 where there is none."""
    places = np.flatnonzero(in_play)
    order = places[np.lexsort((_rank(keys)[places], codes[places]))]
    first = np.r_[True, codes[order][1:] != codes[order][:-1]] if len(order) else np.empty(0, dtype=bool)
    best = np.full(codes.max(initial=-1) + 1, -1, dtype=np.int64)
    best[codes[order[first]]] = order[first]
    return best[codes] if len(codes) else codes
