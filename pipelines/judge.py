"""Judging pairs before any request: what the url and the caption alone decide."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason, canonical_url, sample_id
from pipelines.judge_config import JudgeConfig

JUDGED = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)


def judge_links(links: pa.Table, config: JudgeConfig) -> pa.Table:
    """Every row of a links table (``url``, ``caption``) with its key and what is already decided.

    Returns:
        ``JUDGED``, in the order of ``links``: canonical url (as it came where there is none), caption with its
        whitespace collapsed, and a ``Reason`` where the pair is refused. Of equal pairs that pass, one stands and
        the others are ``duplicate_pair``.
    """
    rows = [
        _judge(url, caption, config)
        for url, caption in zip(links["url"].to_pylist(), links["caption"].to_pylist(), strict=True)
    ]
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, JUDGED, strict=True)], schema=JUDGED
    )
    return _mark_duplicates(table)


def _judge(raw_url: str | None, raw_caption: str | None, config: JudgeConfig) -> tuple[str, str, str, str | None]:
    caption = " ".join((raw_caption or "").split())
    url = canonical_url(raw_url) if raw_url else None
    if url is None or len(url) > config.max_url_chars:
        kept = (raw_url or "").strip()
        return sample_id(kept, caption), kept, caption, Reason.INVALID_URL.value
    reason = judge_caption(caption, config)
    return sample_id(url, caption), url, caption, reason.value if reason else None


def judge_caption(caption: str, config: JudgeConfig) -> Reason | None:
    """The rule that a caption (whitespace collapsed) breaks, None where it keeps all."""
    if not caption:
        return Reason.EMPTY_CAPTION
    words = caption.count(" ") + 1
    if words < config.min_words or len(caption) < config.min_chars:
        return Reason.CAPTION_TOO_SHORT
    if words > config.max_words or len(caption) > config.max_chars:
        return Reason.CAPTION_TOO_LONG
    return None


def _mark_duplicates(table: pa.Table) -> pa.Table:
    passed = np.flatnonzero(table["reason"].is_null().to_numpy(zero_copy_only=False))
    ids = table["sample_id"].to_numpy(zero_copy_only=False)[passed].astype("S32")
    _, first = np.unique(ids, return_index=True)
    repeated = np.zeros(table.num_rows, dtype=bool)
    repeated[np.delete(passed, first)] = True
    reason = pc.if_else(pa.array(repeated), Reason.DUPLICATE_PAIR.value, table["reason"])
    return table.set_column(table.schema.get_field_index("reason"), JUDGED.field("reason"), reason)
