from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadgen.generator import LoadFailed, Plan, drive, summarise
from bench.loadgen.wrk import WrkRecords, read_output, uncorrected
from bench.models.bodies import Body
from tests.bench.loadgen_server import KnownServer, Reply

PRINTED = """Running 5s test @ http://127.0.0.1:1/
  1 threads and 16 connections
BENCH {"answered":114,"duration_us":2000000,"errors":{"connect":1,"read":2,"write":3,"timeout":4,\
"status":10}}
"""
LATENCIES = "1000 90\n20000 15\n30000 5\n"


def test_what_wrk_counted_becomes_a_sample() -> None:
    found = summarise(read_output(PRINTED, LATENCIES, 1, (0.5,)), 2.0, target_s=0.02)
    assert found["client"] == "wrk"
    assert found["requests"] == 120
    assert found["ok"] == 100
    assert found["rate"] == 50.0
    assert found["goodput"] == pytest.approx(50.0 * 105 / 110)
    assert found["latency_s"]["p50"] == 0.001
    assert found["latency_s"]["p90"] == 0.02
    assert found["latency_s"]["p99"] == found["latency_s"]["max"] == 0.03
    assert found["errors"] == {"status": 10, "connect": 1, "broken": 5, "timeout": 4}
    assert found["generator"]["limited"] is None


def test_a_busy_wrk_is_said_to_be_the_limit() -> None:
    found = summarise(read_output(PRINTED, LATENCIES, 1, (0.99,)), 2.0, None)
    assert "99% of a core" in found["generator"]["limited"]
    assert found["goodput"] == found["rate"]


@given(
    st.dictionaries(st.integers(1, 400), st.integers(1, 50), max_size=40),
    st.integers(1, 60),
)
def test_what_wrk_adds_is_taken_away_again(measured: dict[int, int], interval: int) -> None:
    # As wrk does it, from the least to the greatest.
    corrected = Counter(measured)
    for value in range(2 * interval, max(measured, default=0) + 1):
        lesser = value - interval
        while measured.get(value) and lesser > interval:
            corrected[lesser] += measured[value]
            lesser -= interval
    table = np.array(sorted(corrected.items()), np.int64).reshape(-1, 2)
    assert dict(uncorrected(table, interval).tolist()) == measured


def test_latencies_that_are_not_those_of_the_answers_are_refused() -> None:
    with pytest.raises(LoadFailed, match="its latencies are not those"):
        read_output(PRINTED, "1000 200\n", 1)


def test_no_line_is_a_failure() -> None:
    with pytest.raises(LoadFailed, match="no result"):
        read_output("unable to connect", "", 1)


def test_bodies_of_several_lines_are_refused() -> None:
    plan = Plan(url="http://127.0.0.1:1/", bodies=[Body(b"{\n}")], client="wrk")
    with pytest.raises(LoadFailed, match="one line each"):
        drive(plan, "loadgen-wrk")


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_finds_known_percentiles() -> None:
    def known(number: int) -> Reply:
        return Reply(
            status=500 if number % 10 == 9 else 200,
            delay_s=0.08 if number % 10 == 3 else 0.005,
        )

    with KnownServer(known) as server:
        plan = Plan(
            url=server.url,
            bodies=[Body(b'{"a":1}', (("content-type", "application/json"),)), Body(b'{"b":2}')],
            headers={"x-load": "smoke"},
            connections=4,
            seconds=1,
            warm_up_s=0.0,
            client="wrk",
        )
        started: list[float] = []
        records = drive(plan, "loadgen-wrk", started.append)
        seen = list(server.seen)
    assert isinstance(records, WrkRecords)
    assert records.counts.sum() == records.answered
    found = summarise(records, 1, None)
    assert len(started) == 1
    # Requests that were on their way at the end are not counted, and wrk knows milliseconds there.
    assert len(seen) - 4 <= found["requests"] <= len(seen)
    assert found["errors"]["status"] == pytest.approx(found["requests"] / 10, abs=2)
    assert found["ok"] == found["requests"] - found["errors"]["status"]
    assert 0.005 <= found["latency_s"]["p50"] < 0.05
    # A tenth of the answers took so long, and no more: nothing was added to what was measured.
    slow = records.counts[records.values_s >= 0.079].sum()
    assert slow == pytest.approx(records.answered / 10, abs=2 + 0.05 * records.answered)
    assert 0.079 <= found["latency_s"]["p95"] < 0.5
    assert {each.body for each in seen} == {b'{"a":1}', b'{"b":2}'}
    assert all(b"x-load: smoke" in each.headers for each in seen)
    assert all(b"content-type: application/json" in each.headers for each in seen)
