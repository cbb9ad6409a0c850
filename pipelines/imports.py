"""Taking over what img2dataset fetched: its shards are the source of the pairs and of the bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from pipelines.config import BudgetConfig, RecheckConfig, RefreshConfig
from pipelines.import_shards import Shard, list_shards, read_shard
from pipelines.links_config import LinksConfig
from pipelines.refresh import Kind, RefreshResult, open_target, run_refresh
from pipelines.tasks import StartRay

_PAIRS = pa.schema([pa.field(name, pa.string()) for name in ("url", "caption", "extra")])
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class ShardSource:
    """The pairs of shards (an ``intake.PairSource``)."""

    pieces: tuple[Shard, ...]

    def rows(self, piece: Shard) -> int | None:
        return piece.rows

    def read(self, piece: Shard) -> Iterator[pa.Table]:
        rows = read_shard(piece)
        while stretch := [{name: getattr(row, name) for name in _PAIRS.names} for row in islice(rows, _ROWS_AT_ONCE)]:
            yield pa.Table.from_pylist(stretch, schema=_PAIRS)


def import_dataset(config: RefreshConfig, source: str, *, start_ray: StartRay | None = None) -> RefreshResult:
    """Add the output of img2dataset in ``source`` to a dataset; no host is asked.

    What failed there has its reason in the ledger, and a refresh asks again where that may pass.

    Raises:
        BadInput: no such output, or settings that cannot be used with this dataset.
    """
    store = open_target(config)
    shards = tuple(list_shards(source))
    config = config.model_copy(
        update={"links": LinksConfig(uri=source), "budget": BudgetConfig(), "recheck": RecheckConfig()}
    )
    return run_refresh(store, ShardSource(shards), config, Kind("import", shards), scorers=(), start_ray=start_ray)
