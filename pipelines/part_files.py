"""A part as it is taken in and written: a samples file, and its outcomes in staging."""

import io
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import SAMPLES, Reason
from coca.errors import RunFailed
from coca.tokenizer import Tokenizer
from pipelines.config import RecheckConfig, RefreshConfig
from pipelines.fetch import Fetched
from pipelines.judge_config import JudgeConfig
from pipelines.language import identify
from pipelines.outcomes import OUTCOMES
from pipelines.prepare import Prepared
from pipelines.staging import Staging
from pipelines.verdicts import outcome_rows

# A part's images are one Arrow column, which ends at 2 GiB.
MAX_PART_BYTES = 1 << 30


class Taken:
    """What has come in of a part."""

    def __init__(self, recheck: RecheckConfig) -> None:
        self._recheck = recheck
        self.rows: list[dict[str, Any]] = []
        """``OUTCOMES`` of all pairs, without tokens."""
        self.images: dict[str, dict[str, Any]] = {}
        """``sample_id`` -> the image columns of the admitted ones."""
        self._bytes = 0

    def add(self, pairs: list[dict[str, Any]], fetched: Fetched[Prepared], at: datetime) -> Reason | None:
        """Take in all pairs of one url.

        Returns:
            The verdict on the first.

        Raises:
            RunFailed: the part's images would not fit one block.
        """
        outcomes = outcome_rows(pairs, fetched, at, self._recheck)
        self.rows += outcomes
        stored = fetched.result.stored if fetched.result else None
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if stored is not None and outcome["admitted"]:
                self._bytes += len(stored.image)
                self.images[outcome["sample_id"]] = {**vars(stored), "extra": pair["extra"]}
        if self._bytes > MAX_PART_BYTES:
            raise RunFailed(
                f"one part holds more than {MAX_PART_BYTES >> 20:,} MiB of images: "
                "set publish.links_per_part lower, or store smaller images (image.resize, image.size)"
            )
        return Reason(outcomes[0]["reason"]) if outcomes[0]["reason"] else None


def write_part(
    staging: Staging, batch: int, part: int, taken: Taken, config: RefreshConfig, tokenizer: Tokenizer
) -> pa.Table:
    """Write the samples file of a part, then its outcomes to staging: they mark the part done.

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
        samples = [{**row, **taken.images[row["sample_id"]], "fetched_at": row["event_at"]} for row in admitted]
        data = encode_samples(pa.Table.from_pylist(samples, schema=SAMPLES), config.publish.row_group_rows)
        staging.dataset.write(staging.samples_path(batch, part), data)
    outcomes = pa.Table.from_pylist(rows, schema=OUTCOMES)
    staging.write_table(staging.outcome_path(batch, part), outcomes)
    return outcomes


def _languages(admitted: list[dict[str, Any]], config: JudgeConfig) -> list[str | None]:
    """Of captions that the intake has not told already."""
    if not config.identify_language or config.languages:
        return [row["language"] for row in admitted]
    return identify([row["caption"] for row in admitted], config.min_language_confidence)


def encode_samples(samples: pa.Table, rows_per_row_group: int) -> bytes:
    """A samples file: image bytes as they are (they do not compress), everything else zstd."""
    others = [name for name in samples.column_names if name != "image"]
    buffer = io.BytesIO()
    pq.write_table(
        samples,
        buffer,
        row_group_size=rows_per_row_group,
        compression={**dict.fromkeys(others, "zstd"), "image": "none"},
        use_dictionary=others,
        write_statistics=others,
    )
    return buffer.getvalue()
