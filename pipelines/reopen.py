"""Which verdicts of the ledger looser settings have made void: those links are due again."""

from typing import Any

from coca.contract import Reason, VersionRecord
from pipelines.config import RefreshConfig


def reopened_reasons(config: RefreshConfig, parent: VersionRecord | None) -> frozenset[Reason]:
    """Reasons under which links were refused by settings that the parent version had and that are looser now.

    A setting that the parent's record does not know has been added since and counts as unchanged.
    """
    if parent is None:
        return frozenset()
    now, before = config.model_dump(mode="json"), parent.config
    return frozenset(reason for reason, loosened in _LOOSENED.items() if loosened(now, before))


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


_LIMITS = ("image", "limits")
_LOOSENED = {
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
