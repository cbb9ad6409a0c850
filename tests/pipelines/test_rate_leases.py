"""Leases of a domain's limits: never more out than there is, whoever dies, and in the end everyone's fair share."""

import asyncio
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.rate_leases import LeaseBook, RateLeases, RayLeases, start_rate_leases

LASTS_S, DRAIN_S = 10.0, 5.0


def book(connections: int = 8, rate: float = 40.0, **options: float) -> LeaseBook:
    return LeaseBook(connections, rate, LASTS_S, DRAIN_S, **options)


def test_the_first_gets_all_and_makes_room_at_its_next_renewal() -> None:
    leases = book()
    first = leases.acquire("d", "a", 0.0)
    assert first is not None
    assert (first.connections, first.requests_per_second, first.lasts_s) == (8, 40.0, LASTS_S)
    assert leases.acquire("d", "b", 1.0) is None
    half = leases.renew("d", "a", 8, 2.0)
    assert half is not None
    assert (half.connections, half.requests_per_second) == (4, 20.0)
    assert leases.held("d", 2.0) == (8, 40.0)  # eight are in flight, and the old rate until "a" is heard of again
    assert leases.acquire("d", "b", 3.0) is None
    assert leases.renew("d", "a", 3, 4.0) == half
    other = leases.acquire("d", "b", 5.0)
    assert other is not None
    assert (other.connections, other.requests_per_second) == (4, 20.0)
    assert leases.held("d", 5.0) == (8, 40.0)


def test_what_is_released_goes_to_who_stays() -> None:
    leases = book()
    leases.acquire("d", "b", 0.0)
    leases.acquire("d", "a", 0.0)
    leases.renew("d", "b", 0, 1.0)
    leases.renew("d", "b", 0, 2.0)
    assert leases.acquire("d", "a", 3.0) is not None
    leases.release("d", "b", 4.0)
    # Connections at once; the rate when "b" could have asked again, had it stayed.
    during, after = leases.renew("d", "a", 4, 4.01), leases.renew("d", "a", 4, 4.06)
    assert during is not None
    assert after is not None
    assert (during.connections, during.requests_per_second) == (8, 20.0)
    assert (after.connections, after.requests_per_second) == (8, 40.0)


def test_the_dead_keep_their_share_until_their_last_request_must_have_ended() -> None:
    leases = book()
    leases.acquire("d", "dead", 0.0)
    assert leases.acquire("d", "a", LASTS_S + DRAIN_S - 0.01) is None
    assert leases.renew("d", "dead", 0, LASTS_S + DRAIN_S) is None
    lease = leases.acquire("d", "a", LASTS_S + DRAIN_S)
    assert lease is not None
    assert lease.connections == 8


def test_more_workers_than_connections_wait_for_one_to_leave() -> None:
    leases = book(connections=2, rate=1.0)
    now = 0.0
    for _ in range(4):
        now += 1.0
        for name in "abcd":
            if leases.renew("d", name, 0, now) is None:
                leases.acquire("d", name, now)
    assert leases.held("d", now) == (2, 1.0)
    leases.release("d", "a", now)
    assert leases.acquire("d", "c", now) is None  # the rate of "a" cools for two seconds
    assert leases.acquire("d", "c", now + 2.0) is not None


def test_a_lost_answer_is_asked_for_again_without_taking_twice() -> None:
    leases = book()
    assert leases.acquire("d", "a", 0.0) == leases.acquire("d", "a", 1.0)
    assert leases.held("d", 1.0) == (8, 40.0)


def test_domains_do_not_touch_each_other_and_are_forgotten() -> None:
    leases = book()
    assert leases.acquire("d", "a", 0.0) is not None
    assert leases.acquire("e", "b", 0.0) is not None
    leases.release("e", "b", 1.0)
    assert leases.prune(2.0) == 1
    assert leases.prune(100.0) == 0


def test_a_book_that_may_have_lost_leases_opens_late() -> None:
    leases = book(opens_at=20.0)
    assert leases.acquire("d", "a", 19.9) is None
    assert leases.acquire("d", "a", 20.0) is not None
    assert RateLeases(8, 40.0, LASTS_S, DRAIN_S, restarted=True).acquire("d", "a") is None
    assert RateLeases(8, 40.0, LASTS_S, DRAIN_S, restarted=False).acquire("d", "a") is not None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "renew", "renew", "release", "die"]),
        st.sampled_from("abcde"),
        st.floats(0, 4),
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 9), st.floats(0.05, 100))
@settings(max_examples=200, deadline=None)
def test_never_more_is_out_than_there_is(steps: list[Any], connections: int, rate: float) -> None:
    """Against a model of workers that keep what they heard last, and use it up to the moment it ends."""
    leases, now = LeaseBook(connections, rate, LASTS_S, DRAIN_S), 0.0
    told: dict[str, tuple[int, float, float]] = {}  # connections in use, rate, end
    tenure = dict.fromkeys("abcde", 0)
    for action, name, wait_s, use in steps:
        now += wait_s
        holder = f"{name}{tenure[name]}"
        live = holder in told and told[holder][2] > now
        in_use = min(use, told[holder][0]) if live else 0
        lease = None
        if action == "acquire" and not live:
            lease = leases.acquire("d", holder, now)
        elif action == "renew" and live:
            lease = leases.renew("d", holder, in_use, now)
            assert lease is not None
        elif action == "release":
            leases.release("d", holder, now)
            told.pop(holder, None)
            tenure[name] += 1
        elif action == "die":
            tenure[name] += 1  # what it holds stays in `told` until its end
        if lease is not None:
            assert lease.connections >= 1
            assert lease.requests_per_second >= rate / (2 * connections) * 0.999
            told[holder] = (max(lease.connections, in_use), lease.requests_per_second, now + lease.lasts_s)
        alive = [(used, share) for used, share, ends_at in told.values() if ends_at > now]
        assert sum(used for used, _ in alive) <= leases.held("d", now)[0] <= connections
        assert sum(share for _, share in alive) <= leases.held("d", now)[1] * 1.0001
        assert leases.held("d", now)[1] <= rate * 1.0001


@given(st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_who_stays_gets_a_fair_share(workers: int, connections: int) -> None:
    leases = LeaseBook(connections, 10.0, LASTS_S, DRAIN_S)
    shares: dict[int, Any] = {}
    for round_number in range(2 * workers + 4):
        for worker in range(workers):
            lease = leases.renew("d", str(worker), 0, round_number) or leases.acquire("d", str(worker), round_number)
            shares[worker] = lease
    got = [lease for lease in shares.values() if lease is not None]
    assert len(got) == min(workers, connections)
    assert sum(lease.connections for lease in got) == connections
    assert max(lease.connections for lease in got) - min(lease.connections for lease in got) <= 1
    assert sum(lease.requests_per_second for lease in got) == pytest.approx(10.0)


@pytest.mark.ray
def test_the_actor_shares_between_clients(ray_cluster: Any) -> None:
    async def run() -> None:
        client = start_rate_leases(8, 40.0, lasts_s=5.0, drain_s=0.0)
        other = pickle.loads(pickle.dumps(client))
        assert isinstance(other, RayLeases)
        first = await client.acquire("d", "a")
        assert first is not None
        assert first.connections == 8
        assert await other.acquire("d", "b") is None
        for _ in range(2):
            half = await client.renew("d", "a", 0)
            assert half is not None
        second = await other.acquire("d", "b")
        assert second is not None
        assert second.connections == half.connections == 4
        await client.release("d", "a")
        assert await client.renew("d", "a", 0) is None

    asyncio.run(run())
