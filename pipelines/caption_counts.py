"""How many links share a caption, over a whole table of links, by a shuffle of 64-bit keys."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.storage import Store
from pipelines.judge import caption_hashes
from pipelines.staging import write_table

# The hash of a caption and 64 bits of the pair's id: a pair that occurs twice counts once.
KEYS = pa.schema([pa.field("caption", pa.uint64(), nullable=False), pa.field("pair", pa.uint64(), nullable=False)])


def spill_caption_keys(store: Store, folder: str, name: str, judged: pa.Table, shards: int) -> None:
    """Write the keys of the pairs that passed, a file for each stretch of caption hashes."""
    passed = judged.filter(pc.is_null(judged["reason"]))
    if passed.num_rows == 0:
        return
    ids = np.frombuffer(bytes.fromhex("".join(passed["sample_id"].to_pylist())), dtype="<u8").reshape(-1, 2)
    captions = caption_hashes(passed["caption"])
    shard = (captions >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)
    for number in range(shards):
        chosen = shard == number
        if chosen.any():
            keys = pa.table({"caption": captions[chosen], "pair": ids[chosen, 0]}, schema=KEYS)
            write_table(store, f"{folder}/c{number:03d}/{name}", keys)


def frequent_captions(keys: pa.Table, most: int) -> np.ndarray:
    """Hashes, ascending, of the captions that more than ``most`` different pairs of a shard have."""
    pairs = np.empty(keys.num_rows, dtype=[("caption", "<u8"), ("pair", "<u8")])
    pairs["caption"], pairs["pair"] = keys["caption"].to_numpy(), keys["pair"].to_numpy()
    captions, counts = np.unique(np.unique(pairs)["caption"], return_counts=True)
    return captions[counts > most]


def too_frequent(captions: pa.ChunkedArray, frequent: np.ndarray) -> np.ndarray:
    """Which captions are among the frequent ones."""
    if len(frequent) == 0:
        return np.zeros(len(captions), dtype=bool)
    hashes = caption_hashes(captions)
    places = np.minimum(np.searchsorted(frequent, hashes), len(frequent) - 1)
    return np.asarray(frequent[places] == hashes)
