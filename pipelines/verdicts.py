"""The verdict on each pair of a url, from how its fetch ended."""

from datetime import datetime, timedelta
from typing import Any

from coca.contract import Reason, State
from pipelines.config import RecheckConfig
from pipelines.fetch import Fetched
from pipelines.ledger import next_check, state_of
from pipelines.outcomes import IMAGE_KEYS
from pipelines.prepare import Prepared

_CARRIED = ("sample_id", "url", "caption", "language", "rows", "standing_rows", "standing_reason", "url_stored")


def outcome_rows(
    pairs: list[dict[str, Any]],
    fetched: Fetched[Prepared],
    now: datetime,
    recheck: RecheckConfig,
    *,
    fetched_at: datetime | None = None,
) -> list[dict[str, Any]]:
    """The outcomes of all pairs of one url (rows of ``plan.PLAN``), without tokens.

    Args:
        fetched_at: when the bytes came, ``now`` by default.
    """
    rows = []
    for place, pair in enumerate(pairs):
        verdict = _recheck_verdict(pair, fetched) if pair["stored"] else _first_verdict(fetched)
        # An event is later than the pair's last one, though a clock may have gone back.
        event_at = now if pair["known_at"] is None else max(now, pair["known_at"] + timedelta(microseconds=1))
        state, since = State(verdict["state"]), fetched_at or event_at
        rows.append(
            {
                **{name: pair[name] for name in _CARRIED},
                "status": fetched.status,
                "attempts": fetched.requests,
                "event_at": event_at,
                "fetched_at": since,
                "next_check_at": next_check(state, since, pair["failures"], recheck, fetched.retry_after_s),
                "requests": 0 if place else fetched.requests,
                "bytes": 0 if place else fetched.bytes,
                **verdict,
            }
        )
    return rows


def _first_verdict(fetched: Fetched[Prepared]) -> dict[str, Any]:
    prepared = fetched.result
    reason = fetched.reason or (prepared.reason if prepared else None)
    stored = prepared.stored if prepared else None
    return {
        "state": state_of(reason).value,
        "reason": reason.value if reason else None,
        "etag": fetched.etag,
        "last_modified": fetched.last_modified,
        "source_sha256": prepared.source_sha256 if prepared else None,
        "stored": stored is not None,
        "admitted": stored is not None,
        **({name: getattr(stored, name) for name in IMAGE_KEYS} if stored else {}),
    }


def _recheck_verdict(pair: dict[str, Any], fetched: Fetched[Prepared]) -> dict[str, Any]:
    """Of a pair whose bytes are stored: they stay whatever the answer, but for an opt-out, which withdraws them."""
    state = _recheck_state(pair["source_sha256"], fetched)
    opted_out = fetched.reason is not None and state is State.OPTED_OUT
    return {
        "state": state.value,
        "reason": fetched.reason.value if fetched.reason and opted_out else pair["standing_reason"],
        # Validators belong to the bytes that are stored, not to whatever a server answers with now.
        "etag": (fetched.etag if state is State.OK else None) or pair["etag"],
        "last_modified": (fetched.last_modified if state is State.OK else None) or pair["last_modified"],
        "source_sha256": pair["source_sha256"],
        "stored": True,
        "admitted": False,
    }


def _recheck_state(stored_sha256: str | None, fetched: Fetched[Prepared]) -> State:
    if fetched.not_modified or (fetched.result and fetched.result.source_sha256 == stored_sha256):
        return State.OK
    if fetched.result is not None or fetched.reason in (Reason.BODY_TOO_LARGE, Reason.BODY_TOO_SMALL):
        return State.CHANGED
    return state_of(fetched.reason)
