"""The whole load generator, against servers whose delays are known.

Machines that run tests are busy: what a latency must be at least is exact, since client and server
read one clock; above it there is room, but less than to the next percentile that it could be.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.loadgen import histogram
from bench.loadgen.generator import LoadFailed, Plan, drive, summarise
from bench.loadgen.histogram import decode, percentile_of
from bench.loadgen.records import Records
from bench.models.bodies import Body
from bench.scenario import Arrivals
from tests.bench.loadgen_server import KnownServer, Reply

JSON = (("content-type", "application/json"),)
BODIES = [Body(json.dumps({"n": number}).encode(), JSON) for number in range(600)]
"""More than any test sends in an open loop: each request can be known by its body."""
MARKER = "loadgen-smoke"
FAST_S, SLOW_S, SLOWEST_S = 0.005, 0.06, 0.25
NOISE_S = {"p25": 0.1, "p50": 0.1, "p75": 0.1}
MOST_NOISE_S = 1.0
"""In single requests a busy machine may add anything to what is known to be the least."""
FIGURES = ("min", "p25", "p50", "p75", "p90", "p95", "p99", "p999", "max")


def known_delay(number: int) -> Reply:
    """Of 100 requests one takes 250 ms, nine take 60 ms and 90 take 5 ms."""
    place = number % 100
    return Reply(delay_s=SLOWEST_S if place == 57 else SLOW_S if place % 11 == 3 else FAST_S)


def measure(plan: Plan, **options: Any) -> tuple[Records, dict[str, Any]]:
    records = drive(plan, MARKER, **options)
    assert isinstance(records, Records)
    return records, summarise(records, plan.seconds, target_s=None)


def measure_open(
    policy: Callable[[int], Reply], **options: Any
) -> tuple[KnownServer, float, Records, dict[str, Any]]:
    """An open loop of a constant rate, again where the generator was held up by the machine.

    Returns:
        The server, when measuring started, the records, and the figures.
    """
    for _ in range(4):
        with KnownServer(policy) as server:
            plan = Plan(
                url=server.url,
                bodies=BODIES,
                loop="open",
                arrivals=Arrivals(kind="constant"),
                **options,
            )
            started: list[float] = []
            records, found = measure(plan, on_start=started.append)
        if found["generator"]["late_s"]["p99"] < 0.02:
            break
    return server, started[0], records, found


def waited_by_server(server: KnownServer, started: float, first: int, rate: float) -> Any:
    """From each intended time of a constant rate to when the server answered.

    Args:
        server: It has seen requests with the bodies of BODIES.
        started: When measuring started.
        first: Requests of the warm-up.
        rate: Requests/s.
    """
    answered = {json.loads(seen.body)["n"]: seen.answered for seen in server.seen}
    return np.array(
        [
            answered[number] - started - (number - first) / rate
            for number in range(first, len(answered))
        ]
    )


def check_percentiles(found: dict[str, Any], measured: Any, true: Any) -> None:
    """That figures are those of what was measured, and what was measured is true.

    Args:
        found: The figures.
        measured: What the client measured.
        true: What the server knows, of the same requests: at most as much, since its answer was
            still to be read.
    """
    for name in FIGURES:
        point = {"min": 0.0, **histogram.POINTS, "max": 100.0}[name]
        assert found[name] == np.percentile(measured, point, method="inverted_cdf"), name
        least = np.percentile(true, point, method="inverted_cdf")
        assert least <= found[name] < least + NOISE_S.get(name, MOST_NOISE_S), name


def test_the_known_delays_have_the_shares_that_the_tests_take_for_granted() -> None:
    delays = [known_delay(number).delay_s for number in range(1000)]
    assert [delays.count(delay) for delay in (FAST_S, SLOW_S, SLOWEST_S)] == [900, 90, 10]


def test_open_loop_of_two_workers_finds_known_percentiles() -> None:
    server, started, records, found = measure_open(
        known_delay,
        headers={"x-load": "smoke"},
        rate=400,
        seconds=1.0,
        warm_up_s=0.25,
        processes=2,
    )
    seen, measured = server.seen, records.measured()
    assert found["requests"] == found["ok"] == 400
    assert found["offered_rate"] == 400
    in_time = (records.done_s >= 0) & (records.done_s < 1.0)
    assert found["rate"] == np.count_nonzero(in_time) == pytest.approx(400, rel=0.5)
    assert found["errors"] == {}
    assert found["refused"]["count"] == 0

    true = waited_by_server(server, started, first=100, rate=400)
    check_percentiles(found["latency_s"], measured.done_s - measured.intended_s, true)
    assert FAST_S <= found["latency_s"]["p50"] < SLOW_S
    assert found["latency_s"]["p95"] >= SLOW_S
    assert found["latency_s"]["p999"] >= SLOWEST_S
    recorded = decode(found["histogram"])
    assert recorded.get_total_count() == 400
    assert percentile_of(recorded, 99.5) >= SLOWEST_S * 0.999
    assert percentile_of(recorded, 50.0) == pytest.approx(found["latency_s"]["p50"], rel=0.01)

    # Both workers keep to the one schedule: together their times have equal gaps.
    np.testing.assert_allclose(np.sort(measured.intended_s), np.arange(400) / 400, atol=1e-6)
    assert (measured.sent_s >= measured.intended_s).all()
    assert sorted(each.body for each in seen) == sorted(body.content for body in BODIES[:500])
    assert all(b"x-load: smoke" in each.headers for each in seen)
    assert all(b"content-type: application/json" in each.headers for each in seen)
    assert len(found["generator"]["cpu_share"]) == 2
    assert all(0 < share < 1 for share in found["generator"]["cpu_share"])
    assert found["generator"]["waited_share"] == 0


def test_closed_loop_finds_known_percentiles() -> None:
    with KnownServer(known_delay) as server:
        plan = Plan(url=server.url, bodies=BODIES, connections=8, seconds=1.0, warm_up_s=0.0)
        records, found = measure(plan)
    true = [each.answered - each.arrived for each in server.seen if each.answered is not None]
    assert found["ok"] == len(true) > 100
    check_percentiles(found["service_s"], records.done_s - records.sent_s, true)
    assert found["latency_s"] == pytest.approx(found["service_s"])
    assert found["offered_rate"] is None
    # Little's law: so many are on their way as there are connections.
    assert found["rate"] * found["service_s"]["mean"] == pytest.approx(8, rel=0.3)
    assert found["service_s"]["mean"] * found["ok"] <= 8 * records.done_s.max()
    assert server.connections == 8


def test_a_closed_loop_leaves_its_warm_up_out() -> None:
    with KnownServer(lambda number: Reply(delay_s=0.2 if number < 2 else 0.0)) as server:
        plan = Plan(url=server.url, bodies=BODIES, connections=2, seconds=0.2, warm_up_s=0.4)
        started: list[float] = []
        records, found = measure(plan, on_start=started.append)
    assert found["latency_s"]["max"] < 0.2
    assert (records.measured().sent_s < 0.2).all()
    before = sum(each.arrived < started[0] for each in server.seen)
    # One a connection may have been sent before, and have arrived after.
    assert len(server.seen) - before - 2 <= found["requests"] <= len(server.seen) - before


def test_a_stall_shows_in_an_open_loop_and_hides_in_the_service_times() -> None:
    """One stall of half a second, in which nobody is answered: no coordinated omission.

    By hand: of 1.5 s a third is stalled, so a third of the requests waits between 0.5 s and 0, in
    equal steps: a tenth of all waits longer than 0.5 s * (1 - 0.1 / (1/3)) = 0.35 s. Only four, one
    for each connection, are on their way meanwhile.
    """
    rate, connections = 200.0, 4
    server, started, records, found = measure_open(
        lambda number: Reply(block_s=0.5 if number == 100 else 0.0),
        rate=rate,
        connections=connections,
        seconds=1.5,
        warm_up_s=0.0,
    )
    begun, ended = (moment - started for moment in server.seen[100].blocked)
    intended = np.arange(300) / rate
    stalled = (intended >= begun) & (intended < ended)
    by_hand = histogram.figures(np.where(stalled, ended - intended, 0.0))
    # What this stall was longer than half a second, everything in it waited longer.
    assert by_hand["p90"] == pytest.approx(0.35 + (ended - begun - 0.5), abs=0.02)
    assert found["ok"] == 300
    for name in FIGURES:
        assert found["latency_s"][name] >= by_hand[name], name
    check_percentiles(
        found["latency_s"],
        records.done_s - records.intended_s,
        waited_by_server(server, started, first=0, rate=rate),
    )
    # What a client sees that waits for its answers before it goes on.
    assert found["service_s"]["p95"] < 0.3 < 0.35 < found["latency_s"]["p95"]
    assert found["service_s"]["max"] > 0.45
    in_client = found["generator"]["waited_share"] * 300
    assert in_client >= np.count_nonzero(stalled) - connections
    assert "all connections were in use" in found["generator"]["note"]
    series = found["series"]
    assert len(series["p99_s"]) == 3
    assert max(series["p99_s"]) > 0.45
    assert sum(series["ok_rate"]) * 0.5 == found["rate"] * 1.5 <= 300


def failing(number: int) -> Reply:
    """Of 20 requests: 4 refused, 2 fail, 1 dropped, 1 never answered; 2 end their connection."""
    place = number % 20
    if place in (1, 6, 11):
        return Reply(status=429, headers=(("Retry-After", "1"),), body=b"busy")
    if place == 16:
        return Reply(status=503, body=b"full")
    if place in (3, 13):
        return Reply(status=500, body=b"it broke", delay_s=0.002)
    if place == 8:
        return Reply(status=None, close=True)
    if place == 18:
        return Reply(status=None)
    if place in (4, 14):
        return Reply(headers=(("Connection", "close"),), close=True)
    return Reply(delay_s=0.002)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_every_failure_is_counted_as_what_it_is(loop: str) -> None:
    with KnownServer(failing) as server:
        plan = Plan(
            url=server.url,
            bodies=BODIES,
            loop="open" if loop == "open" else "closed",
            rate=200 if loop == "open" else None,
            connections=32 if loop == "open" else 4,
            seconds=0.5,
            warm_up_s=0.0,
            timeout_s=0.7,
        )
        records, found = measure(plan)
        statuses = server.statuses()
        dropped = sum(each.reply.status is None and each.reply.close for each in server.seen)
        silent = sum(each.reply.status is None and not each.reply.close for each in server.seen)
    assert found["requests"] == len(server.seen)
    assert found["ok"] == statuses[200] > 0
    assert found["errors"] == {"status_500": statuses[500], "broken": dropped, "timeout": silent}
    assert min(found["errors"].values()) > 0
    assert found["refused"]["count"] == statuses[429] + statuses[503]
    assert found["refused"]["with_retry_after"] == statuses[429]
    assert found["refused"]["rate"] == pytest.approx(found["refused"]["count"] / 0.5)
    assert found["refused"]["latency_s"]["p50"] < 0.1
    assert found["example_error"].startswith(("status_500: it broke", "broken: ", "timeout: "))
    waited = (records.done_s - records.intended_s)[records.reason == 4]
    assert (waited > 0.7).all()
    assert np.median(waited) < 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_nobody_there_is_a_result_too(loop: str) -> None:
    plan = Plan(
        url=f"http://127.0.0.1:{free_port()}/infer",
        bodies=BODIES,
        loop="open" if loop == "open" else "closed",
        rate=100 if loop == "open" else None,
        arrivals=Arrivals(kind="constant"),
        connections=4,
        seconds=0.3,
        warm_up_s=0.0,
    )
    _, found = measure(plan)
    assert found["errors"] == {"connect": found["requests"]}
    assert found["requests"] == 30 if loop == "open" else found["requests"] >= 4
    assert found["ok"] == found["rate"] == 0
    assert found["latency_s"]["p99"] is None
    assert "connect: " in found["example_error"]


def test_what_finds_no_connection_in_time_is_counted_too() -> None:
    with KnownServer(lambda number: Reply(status=None)) as server:
        plan = Plan(
            url=server.url,
            bodies=BODIES,
            loop="open",
            rate=500,
            arrivals=Arrivals(kind="constant"),
            connections=2,
            seconds=0.2,
            warm_up_s=0.0,
            timeout_s=0.2,
        )
        _, found = measure(plan)
        sent = len(server.seen)
    assert found["requests"] == 100
    assert found["errors"] == {"timeout": sent, "not_sent": 100 - sent}
    assert 2 <= sent < 100


def test_a_worker_that_cannot_work_says_why() -> None:
    plan = Plan(url="ftp://nowhere", bodies=BODIES, seconds=0.1)
    with pytest.raises(LoadFailed, match=r"(?s)ended with 1: .*allowed is http://"):
        drive(plan, MARKER)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"bodies": []}, "no bodies"),
        ({"processes": 2, "connections": 1}, "1 connections for 2 processes"),
        ({"loop": "open"}, "needs a rate"),
        ({"rate": 5.0}, "a closed loop has none"),
        ({"client": "wrk", "body_kind": "binary"}, "wrk is for"),
    ],
)
def test_a_plan_that_cannot_be_driven_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Plan(**{"url": "http://127.0.0.1:1/", "bodies": BODIES, **options})
