"""A part as it is taken in and written: a samples file, and its outcomes in staging."""

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import SAMPLES, Reason
from coca.errors import RunFailed
from coca.tokenizer import Tokenizer
from pipelines.config import RecheckConfig, RefreshConfig
from pipelines.fetch import Fetched
from pipelines.judge_config import JudgeConfig
from pipelines.language import identify
from pipelines.outcomes import OUTCOMES, refused_outcomes
from pipelines.prepare import Prepared, StoredImage
from pipelines.spool import Spool, Spooled
from pipelines.staging import Staging, encode_table
from pipelines.verdicts import outcome_rows

# Images of a row group are one Arrow column, which ends at 2 GiB; readers hold several row groups at once.
MAX_ROW_GROUP_BYTES = 1 << 30


class Taken:
    """What has come in of a part; its images lie in a spool."""

    def __init__(self, recheck: RecheckConfig) -> None:
        self._recheck = recheck
        self._spool = Spool()
        self.rows: list[dict[str, Any]] = []
        """``OUTCOMES`` of all pairs, without tokens."""
        self._images: dict[str, tuple[StoredImage, Spooled, str | None]] = {}
        """``sample_id`` -> the image without its bytes, their place, and the pair's ``extra``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.__exit__()

    def add(
        self, pairs: list[dict[str, Any]], fetched: Fetched[Prepared], *, fetched_at: datetime | None = None
    ) -> Reason | None:
        """Take in all pairs of one url.

        Args:
            fetched_at: when the bytes came, now by default.

        Returns:
            The verdict on the first.
        """
        outcomes = outcome_rows(pairs, fetched, datetime.now(UTC), self._recheck, fetched_at=fetched_at)
        self.rows += outcomes
        stored = fetched.result.stored if fetched.result else None
        if stored is not None and any(outcome["admitted"] for outcome in outcomes):
            place, bare = self._spool.add(stored.image), replace(stored, image=b"")
            for pair, outcome in zip(pairs, outcomes, strict=True):
                if outcome["admitted"]:
                    self._images[outcome["sample_id"]] = (bare, place, pair["extra"])
        return Reason(outcomes[0]["reason"]) if outcomes[0]["reason"] else None

    def refuse(self, refused: pa.Table) -> None:
        """Take in pairs (``plan.PLAN``) that are refused without a request."""
        self.rows += refused_outcomes(refused).to_pylist()

    def sample(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """``contract.SAMPLES`` of an admitted outcome."""
        stored, place, extra = self._images[outcome["sample_id"]]
        image = {**vars(stored), "image": self._spool.read(place)}
        return {**outcome, **image, "extra": extra}


def write_part(
    staging: Staging,
    batch: int,
    part: int,
    taken: Taken,
    config: RefreshConfig,
    tokenizer: Tokenizer,
    check: Callable[[], None] = lambda: None,
) -> pa.Table:
    """Write the samples file of a part, then its outcomes to staging: they mark the part done.

    Args:
        check: of the right to write, right before each file; what it raises ends the part.

    Returns:
        ``OUTCOMES``, sorted by ``sample_id``.
    """
    rows = sorted(taken.rows, key=lambda row: row["sample_id"])
    admitted = [row for row in rows if row["admitted"]]
    captions = [row["caption"] for row in admitted]
    languages = _languages(admitted, config.judge)
    for row, tokens, language in zip(admitted, tokenizer.encode(captions), languages, strict=True):
        row["tokens"], row["language"] = tokens, language
    if admitted:
        size = config.publish.row_group_rows
        groups = (
            pa.Table.from_pylist([taken.sample(row) for row in admitted[start : start + size]], schema=SAMPLES)
            for start in range(0, len(admitted), size)
        )
        staging.dataset.write_checked(staging.samples_path(batch, part), encode_samples(groups), check)
    outcomes = pa.Table.from_pylist(rows, schema=OUTCOMES)
    staging.dataset.write_checked(staging.outcome_path(batch, part), encode_table(outcomes), check)
    return outcomes


def _languages(admitted: list[dict[str, Any]], config: JudgeConfig) -> list[str | None]:
    """Of captions that the intake has not told already."""
    if not config.identify_language or config.languages:
        return [row["language"] for row in admitted]
    return identify([row["caption"] for row in admitted], config.min_language_confidence)


def encode_samples(row_groups: Iterable[pa.Table]) -> bytes:
    """A samples file: image bytes as they are (they do not compress), everything else zstd.

    Raises:
        RunFailed: one row group's images would not fit a reader's memory.
    """
    others = [name for name in SAMPLES.names if name != "image"]
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        SAMPLES,
        compression={**dict.fromkeys(others, "zstd"), "image": "none"},
        use_dictionary=others,
        write_statistics=others,
    ) as writer:
        for table in row_groups:
            if table.nbytes > MAX_ROW_GROUP_BYTES:
                raise RunFailed(
                    f"one row group holds more than {MAX_ROW_GROUP_BYTES >> 20:,} MiB of images: "
                    "set publish.rows_per_row_group lower, or store smaller images (image.resize, image.size)"
                )
            writer.write_table(table, row_group_size=table.num_rows)
    return buffer.getvalue()
