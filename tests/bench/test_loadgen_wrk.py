from __future__ import annotations

import shutil

import pytest

from bench.loadgen.generator import LoadFailed, Plan, drive, summarise
from bench.loadgen.wrk import WrkRecords, read_output
from bench.models.bodies import Body
from tests.bench.loadgen_server import KnownServer, Reply

PRINTED = """Running 5s test @ http://127.0.0.1:1/
  1 threads and 16 connections
BENCH {"answered":110,"duration_s":2.0,"errors":{"connect":1,"read":2,"write":3,"timeout":4,\
"status":10}}
"""
LATENCIES = "1000 90\n20000 15\n300000 5\n"


def test_what_wrk_counted_becomes_a_sample() -> None:
    found = summarise(read_output(PRINTED, LATENCIES, (0.5,)), 2.0, target_s=0.1)
    assert found["client"] == "wrk"
    assert found["requests"] == 116
    assert found["ok"] == 100
    assert found["rate"] == 50.0
    assert found["goodput"] == pytest.approx(50.0 * 105 / 110)
    assert found["latency_s"]["p50"] == 0.001
    assert found["latency_s"]["p90"] == 0.02
    assert found["latency_s"]["p99"] == found["latency_s"]["max"] == 0.3
    assert found["errors"] == {"status": 10, "connect": 1, "broken": 5, "timeout": 4}
    assert found["generator"]["limited"] is None


def test_a_busy_wrk_is_said_to_be_the_limit() -> None:
    found = summarise(read_output(PRINTED, LATENCIES, (0.99,)), 2.0, None)
    assert "99% of a core" in found["generator"]["limited"]
    assert found["goodput"] == found["rate"]


def test_no_line_is_a_failure() -> None:
    with pytest.raises(LoadFailed, match="no result"):
        read_output("unable to connect", "")


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
    found = summarise(records, 1, None)
    assert len(started) == 1
    # Requests that were on their way at the end are not counted, and wrk knows milliseconds there.
    assert len(seen) - 4 <= found["requests"] <= len(seen)
    assert found["errors"]["status"] == pytest.approx(found["requests"] / 10, abs=2)
    assert found["ok"] == found["requests"] - found["errors"]["status"]
    assert 0.005 <= found["latency_s"]["p50"] < 0.05
    assert 0.08 <= found["latency_s"]["p95"] < 0.3
    assert {each.body for each in seen} == {b'{"a":1}', b'{"b":2}'}
    assert all(b"x-load: smoke" in each.headers for each in seen)
    assert all(b"content-type: application/json" in each.headers for each in seen)
