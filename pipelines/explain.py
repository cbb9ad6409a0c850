"""Everything a dataset knows about one url: what was asked and answered when, what is stored of it, and why not."""

import difflib
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, ip_address
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.addresses import WEB_PORTS, IPAddress, is_destination_allowed, parse_networks
from coca.contract import Reason, canonical_url, link_bucket
from coca.dataset import Dataset
from pipelines.ledger import Ledger
from pipelines.rows import read_annotations, read_rows
from pipelines.tables import read_data_files

_SCANNED_EVENTS, _SCANNED_URLS = 500_000, 5_000
_EVENT = [
    "sample_id", "caption", "event_at", "state", "reason", "status", "attempts", "stored", "next_check_at",
    "refresh_id", "source_sha256", "etag", "last_modified",
]  # fmt: skip
_STORED = (
    "caption", "format", "width", "height", "original_width", "original_height", "source_sha256", "sha256", "phash",
    "fetched_at", "extra", "tokens", "language", "scores", "selected", "reason",
)  # fmt: skip
_SAME_PICTURE = (Reason.DUPLICATE_IMAGE, Reason.IMAGE_TOO_POPULAR)


@dataclass(frozen=True)
class Explanation:
    """What ``coca data explain`` prints."""

    dataset: str
    version: int
    url: str
    """As it was given."""
    canonical: str | None
    """The form it is known by; None where it is no web url."""
    allowed: bool | None
    """Whether its address may be reached; None where its host is a name, which is judged at each connection."""
    address: str
    """The same in words."""
    bucket: str | None
    events: list[dict[str, Any]]
    """Every event of the ledger, oldest first."""
    pairs: list[dict[str, Any]]
    """Each pair of the url and a caption: ``state``, ``reason``, ``due`` and ``row``, what is stored of it or None."""
    withdrawals: list[dict[str, Any]]
    """Entries of the withdrawn list that name the url, one of its samples or one of its pictures."""
    nearest: str | None
    """A known url of the same host, where this one is not known."""


def explain(dataset: Dataset, url: str) -> Explanation:
    """Look a url up in the bucket of its hash, then its pairs in the files of the refreshes that stored them."""
    canonical = canonical_url(url)
    allowed, address = _judge_address(canonical, dataset.record.config)
    # A link that is no url has events under the text it came with.
    known_as = canonical or url.strip()
    bucket = link_bucket(known_as)
    files = Ledger.of_version(dataset).paths
    events: list[dict[str, Any]] = []
    if bucket in files:
        found = read_data_files(dataset.store, "links", files[bucket], _EVENT, pc.field("url") == known_as)
        events = found.sort_by([("event_at", "ascending"), ("sample_id", "ascending")]).to_pylist()
    latest = {event["sample_id"]: event for event in events}
    refreshes = {event["refresh_id"] for event in events}
    rows = _find_stored(dataset, {key for key, event in latest.items() if _may_be_stored(key, events)}, refreshes)
    return Explanation(
        dataset=dataset.store.uri,
        version=dataset.record.version,
        url=url,
        canonical=canonical,
        allowed=allowed,
        address=address,
        bucket=bucket,
        events=events,
        pairs=[_pair(event, rows.get(key)) for key, event in latest.items()],
        withdrawals=_withdrawals(dataset, known_as, events),
        nearest=_nearest(dataset, known_as, files) if not events else None,
    )


def _judge_address(canonical: str | None, config: dict[str, Any]) -> tuple[bool | None, str]:
    if canonical is None:
        return False, "no http(s) url with a host and without credentials: refused as invalid_url"
    parts = urlsplit(canonical)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    networks = parse_networks(config.get("fetch", {}).get("allow_networks", []))
    address = _literal(parts.hostname or "")
    if address is None:
        if port in WEB_PORTS or networks:
            return None, "its host is a name: every address it leads to is checked at the moment of connecting"
        return False, f"port {port} is none of the web's, {' and '.join(map(str, WEB_PORTS))}"
    if is_destination_allowed(address, port, networks):
        return True, f"{address} port {port} may be reached"
    return False, f"{address} port {port} must not be reached: only public addresses, ports 80 and 443"


def _literal(host: str) -> IPAddress | None:
    """The address that a host spells out, also in the odd forms that resolvers take (127.1, 0x7f000001)."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    if not host or not set(host.lower()) <= set("0123456789abcdefx."):
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _may_be_stored(key: str, events: list[dict[str, Any]]) -> bool:
    # What is stored stays, whatever the link answers later. Contract 1 does not say `stored`.
    return any(event["sample_id"] == key and (event["stored"] or event["state"] == "ok") for event in events)


def _find_stored(dataset: Dataset, keys: set[str], refreshes: set[str]) -> dict[str, dict[str, Any]]:
    """sample id -> where its row is and what it holds."""
    found: dict[str, dict[str, Any]] = {}
    groups = dataset.row_groups.to_pylist()
    # Files are named by the refresh that wrote them; after a compaction any may hold it.
    order = sorted(range(len(groups)), key=lambda index: _refresh_of(groups[index]["samples_path"]) not in refreshes)
    for index in order:
        if not keys - found.keys():
            break
        ids = read_annotations(dataset, index, ["sample_id"])["sample_id"]
        inside = np.flatnonzero(pc.is_in(ids, value_set=pa.array(sorted(keys), pa.string())).to_numpy())
        for at in inside.tolist():
            found[ids[at].as_py()] = _read_stored(dataset, index, groups[index], ids[at].as_py(), at)
    return found


def _read_stored(dataset: Dataset, index: int, group: dict[str, Any], key: str, at: int) -> dict[str, Any]:
    place = {"file": group["samples_path"], "row_group": group["row_group"], "row": at}
    rows = read_rows(dataset, index, _STORED).filter(pc.field("sample_id") == key).to_pylist()
    if not rows:  # there, and left out by every reader
        return {**place, "withdrawn": True}
    row = rows[0] | {"scores": dict(rows[0]["scores"] or ())}
    return {**place, "withdrawn": False, **row, "winner": _winner(dataset, row) if not row["selected"] else None}


def _winner(dataset: Dataset, row: dict[str, Any]) -> dict[str, Any] | None:
    """The selected row of the same picture, or of the nearest one by perceptual hash."""
    if row["reason"] in _SAME_PICTURE:
        for index in _with_selected(dataset):
            rows = read_rows(dataset, index, ("url", "caption", "source_sha256", "selected"))
            same = rows.filter((pc.field("source_sha256") == row["source_sha256"]) & pc.field("selected"))
            if same.num_rows:
                return same.drop_columns(["source_sha256", "selected"]).slice(0, 1).to_pylist()[0] | {"distance": 0}
        return None
    if row["reason"] != Reason.NEAR_DUPLICATE:
        return None
    best: dict[str, Any] | None = None
    for index in _with_selected(dataset):
        rows = read_rows(dataset, index, ("url", "caption", "phash", "selected")).filter(pc.field("selected"))
        if rows.num_rows == 0:
            continue
        distances = np.bitwise_count((rows["phash"].to_numpy() ^ np.int64(row["phash"])).view(np.uint64))
        at = int(distances.argmin())
        if best is None or distances[at] < best["distance"]:
            near = rows.select(["sample_id", "url", "caption"]).slice(at, 1).to_pylist()[0]
            best = near | {"distance": int(distances[at])}
    return best


def _with_selected(dataset: Dataset) -> list[int]:
    return np.flatnonzero(dataset.row_groups["selected"].to_numpy()).tolist()


def _withdrawals(dataset: Dataset, url: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted: dict[str, set[str | None]] = {"url": {url}}
    wanted |= {name: {event[name] for event in events} for name in ("sample_id", "source_sha256")}
    table = dataset.withdrawn.table
    named = [
        pc.is_in(table[name], value_set=pa.array(sorted(filter(None, values)), pa.string()))
        for name, values in wanted.items()
    ]
    found = table.filter(pc.or_(pc.or_(named[0], named[1]), named[2])).sort_by("withdrawn_at")
    return found.select(["url", "sample_id", "source_sha256", "reason", "withdrawn_at"]).to_pylist()


def _pair(latest: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    next_check: datetime | None = latest["next_check_at"]
    due = "never" if next_check is None else "now" if next_check <= datetime.now(UTC) else next_check.isoformat()
    return {**{name: latest[name] for name in ("sample_id", "caption", "state", "reason")}, "due": due, "row": row}


def _nearest(dataset: Dataset, url: str, files: dict[str, list[str]]) -> str | None:
    """The known url of its host that is most like this one: of all where the ledger is small, else of its bucket."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if not parts.netloc:
        return None
    whole = dataset.record.links.rows <= _SCANNED_EVENTS
    paths = [path for bucket, inside in files.items() if whole or bucket == link_bucket(url) for path in inside]
    if not paths:
        return None
    of_host = pc.starts_with(pc.field("url"), f"http://{parts.netloc}/") | pc.starts_with(
        pc.field("url"), f"https://{parts.netloc}/"
    )
    urls = read_data_files(dataset.store, "links", paths, ["url"], of_host)["url"].unique().to_pylist()
    urls.sort(key=lambda known: -_shared_start(known, url))
    near = difflib.get_close_matches(url, urls[:_SCANNED_URLS], n=1, cutoff=0.0)
    return near[0] if near else None


def _shared_start(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _refresh_of(path: str) -> str:
    return path.rpartition("/")[2].partition("-")[0]
