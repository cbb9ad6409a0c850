"""Which admitted pairs are part of the version: of the same picture under several urls, one url."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import State


def winning_urls(latest: pa.Table, unselected: Iterable[str], source_sha256: pa.ChunkedArray) -> dict[str, str]:
    """For each of the given digests that earlier versions have selected: the url under which they hold it.

    Args:
        latest: the latest ledger event of each pair.
        unselected: sample ids that earlier versions stored but passed over.
    """
    stored = latest.filter(
        pc.and_(
            pc.equal(latest["state"], State.OK.value),
            pc.is_in(latest["source_sha256"], value_set=source_sha256.unique()),
        )
    )
    passed_over = pa.array(list(unselected), pa.string())
    chosen = stored.filter(pc.invert(pc.is_in(stored["sample_id"], value_set=passed_over)))
    return dict(zip(chosen["source_sha256"].to_pylist(), chosen["url"].to_pylist(), strict=True))


def duplicate_images(admitted: pa.Table, winners: dict[str, str]) -> set[str]:
    """Sample ids whose picture is already selected under another url.

    The url in ``winners`` wins, else the one with the lowest sample id; all captions of the winning url stay.

    Args:
        admitted: ``sample_id``, ``url``, ``source_sha256`` of the pairs of one batch.
        winners: digest -> url; the winners of this batch are added.
    """
    duplicates = set()
    ordered = admitted.select(["sample_id", "url", "source_sha256"]).sort_by("sample_id")
    for row in ordered.to_pylist():
        if winners.setdefault(row["source_sha256"], row["url"]) != row["url"]:
            duplicates.add(row["sample_id"])
    return duplicates
