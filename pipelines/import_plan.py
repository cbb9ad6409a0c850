"""The plan of an import: due pairs regrouped by the shard that holds their bytes, so that a shard is read once."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import PublishConfig
from pipelines.join import DUE
from pipelines.plan import DueFile, Plan, pack, with_leased
from pipelines.staging import Staging

# Rows of a shard as img2dataset writes it by default: a part that holds all of them reads the shard once.
SHARD_ROWS = 10_000


def regroup_by_shard(staging: Staging, plan: Plan, batch_urls: int) -> Plan:
    """The same pairs in batches that are stretches of shards."""
    files = [file for batch in plan.batches for file in batch.files]
    by_shard = sorted(
        (shard, number, file) for number, path in enumerate(files) for shard, file in _split(staging, path, number)
    )
    batches, waiting = pack([file for _, _, file in by_shard], batch_urls, np.inf)
    assert waiting == 0
    return plan.model_copy(update={"batches": batches})


def _split(staging: Staging, path: str, number: int) -> Iterator[tuple[int, DueFile]]:
    """Write the pairs of a due file anew, a file for each shard that holds some."""
    due = staging.read_table(path, DUE)
    for shard in pc.unique(due["piece"]).to_pylist():
        rows = due.filter(pc.equal(due["piece"], shard))
        file = f"{staging.folder}/by-shard/{shard:05d}-{number:05d}.parquet"
        staging.write_table(file, rows)
        asked = rows["url"].filter(pc.is_null(rows["reason"]))
        yield shard, DueFile(file, pc.count_distinct(asked).as_py(), pc.sum(rows["rows"]).as_py())


def deal_by_shard(due: pa.Table, _: int, config: PublishConfig) -> tuple[list[pa.Table], pa.Table, int]:
    """``plan.deal_parts`` of an import: parts are stretches of one shard's rows, in its order."""
    refused = with_leased(due.filter(pc.is_valid(due["reason"])), None)
    asked = with_leased(
        due.filter(pc.is_null(due["reason"])).sort_by([("piece", "ascending"), ("place", "ascending")]), None
    )
    if asked.num_rows == 0:
        return [], refused, 0
    pieces = asked["piece"].to_numpy()
    starts = np.flatnonzero(np.diff(pieces, prepend=-1))
    cuts = sorted(
        {
            cut
            for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True)
            for cut in range(start, end, max(config.links_per_part, SHARD_ROWS))
        }
    )
    ends = [*cuts[1:], len(pieces)]
    return [asked.slice(start, end - start) for start, end in zip(cuts, ends, strict=True)], refused, 0
