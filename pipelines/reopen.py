"""Which verdicts of the ledger looser settings have made void: those links are due again."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coca.contract import Reason, VersionRecord
from coca.dataset import Dataset, list_versions
from coca.storage import Store
from pipelines.config import RefreshConfig
from pipelines.ledger import TEXT_RULES, Reopened


def reopened_by_refresh(config: RefreshConfig, store: Store, parent: VersionRecord | None) -> Reopened:
    """For each refresh that a version record tells of, the reasons that ``config`` no longer refuses by.

    Refreshes whose records are gone count as the parent.
    """
    if parent is None:
        return {}
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        records = list(pool.map(lambda version: Dataset(store.uri, version).record, list_versions(store)))
    void = {record.refresh_id: reopened_reasons(config, record) for record in records}
    return {**void, "": reopened_reasons(config, parent)}


def reopened_reasons(config: RefreshConfig, before: VersionRecord) -> frozenset[Reason]:
    """Reasons under which links were refused by settings that a record has and that are looser now.

    A setting that the record does not know has been added since and counts as unchanged.
    """
    now, then = config.model_dump(mode="json"), before.config
    return TEXT_RULES | {reason for reason, loosened in _LOOSENED.items() if loosened(now, then)}


def _lowered(*path: str) -> Any:
    return lambda now, before: _compare(now, before, path, lambda new, old: new < old)


def _raised(*path: str) -> Any:
    return lambda now, before: _compare(now, before, path, lambda new, old: new > old)


def _extended(*path: str) -> Any:
    return lambda now, before: _compare(now, before, path, lambda new, old: not set(new) <= set(old))


def _shortened(*path: str) -> Any:
    return lambda now, before: _compare(now, before, path, lambda new, old: not set(old) <= set(new))


def _changed(*path: str) -> Any:
    return lambda now, before: _at(before, path) is not None and _at(now, path) != _at(before, path)


def _switched_off(*path: str) -> Any:
    return lambda now, before: _compare(now, before, path, lambda new, old: old and not new)


def _compare(now: dict[str, Any], before: dict[str, Any], path: tuple[str, ...], looser: Any) -> bool:
    new, old = _at(now, path), _at(before, path)
    return new is not None and old is not None and bool(looser(new, old))


def _at(settings: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


_READ_THREADS = 16
_LIMITS = ("image", "limits")
_LOOSENED = {
    Reason.INVALID_URL: _raised("judge", "max_url_chars"),
    Reason.TOO_MANY_REDIRECTS: _raised("fetch", "max_redirects"),
    Reason.FORBIDDEN_ADDRESS: _extended("fetch", "allow_networks"),
    Reason.OPTED_OUT: _shortened("fetch", "opt_out_directives"),
    Reason.ROBOTS_DISALLOWED: _switched_off("fetch", "robots_txt"),
    Reason.TDM_RESERVED: _switched_off("fetch", "tdm_reservation"),
    Reason.BLOCKED_IMAGE: _changed("judge", "block_hashes"),
    Reason.NOT_AN_IMAGE: _extended(*_LIMITS, "formats"),
    Reason.IMAGE_TOO_SMALL: _lowered(*_LIMITS, "min_side"),
    Reason.ASPECT_RATIO: _raised(*_LIMITS, "max_aspect_ratio"),
    Reason.TOO_MANY_PIXELS: _raised(*_LIMITS, "max_pixels"),
    Reason.BODY_TOO_LARGE: _raised(*_LIMITS, "max_bytes"),
    Reason.BODY_TOO_SMALL: _lowered(*_LIMITS, "min_bytes"),
}
