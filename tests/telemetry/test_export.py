"""Points reach a real gRPC server once each, whatever fails on the way, and nothing waits long."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA

from rayprism.telemetry.catalogue import find_metric
from rayprism.telemetry.export import (
    Backlog,
    Exporter,
    Sender,
    export_in_thread,
    send_once,
)
from rayprism.telemetry.recorder import Point, Recorder
from tests.telemetry.agent import Agent, plain_channel, run_agent

ROWS = "rayprism_rows_total"
LABELS = (("model", "flights"), ("version", "2"))
QUICK_S = 0.01
LONG_S = 60.0


@pytest.fixture
def agent() -> Iterator[Agent]:
    with run_agent() as agent:
        yield agent


def recorder() -> Recorder:
    return Recorder(model="flights", version="2", replica="r1")


def rows(value: float) -> Point:
    return Point(ROWS, "counter", LABELS, value)


def gauge(value: float, replica: str = "r1") -> Point:
    return Point("rayprism_queue_rows", "gauge", (*LABELS, ("replica", replica)), value)


def sender(find: Callable[[], str | None], **more: Any) -> Sender:
    return Sender(find, open_channel=plain_channel, **more)


def exporter(source: Recorder, agent: Agent, every_s: float = QUICK_S) -> Exporter:
    return Exporter(source, agent.find, every_s=every_s, open_channel=plain_channel)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# What is sent


def test_the_request_has_what_rays_agent_reads(agent: Agent) -> None:
    source = recorder()
    source.count(ROWS).add(3)
    source.histogram("rayprism_batch_rows").observe(5)
    source.gauge("rayprism_queue_rows", lambda: 7)
    assert sender(agent.find).send(source.take())
    (request,) = agent.requests
    metrics = {metric.name: metric for metric in agent.metrics(request)}
    assert list(metrics) == [
        ROWS,
        "rayprism_batch_rows_bucket",
        "rayprism_batch_rows_count",
        "rayprism_batch_rows_sum",
        "rayprism_queue_rows",
    ]
    assert metrics.pop("rayprism_queue_rows").WhichOneof("data") == "gauge"
    for metric in metrics.values():
        assert metric.WhichOneof("data") == "sum"
        assert metric.sum.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA
        assert metric.sum.is_monotonic == (metric.name == ROWS)
    assert metrics[ROWS].description == find_metric(ROWS).meaning
    buckets = metrics["rayprism_batch_rows_bucket"]
    assert buckets.description == find_metric("rayprism_batch_rows").meaning
    assert len(buckets.sum.data_points) == 13
    (point,) = metrics[ROWS].sum.data_points
    assert point.WhichOneof("value") == "as_double"
    assert point.time_unix_nano > 0
    assert [(tag.key, tag.value.WhichOneof("value")) for tag in point.attributes] == [
        ("model", "string_value"),
        ("version", "string_value"),
    ]
    assert agent.value(ROWS, model="flights", version="2") == 3
    both = {"model": "flights", "version": "2"}
    assert agent.value("rayprism_batch_rows_bucket", **both, le="4.0") == 0
    assert agent.value("rayprism_batch_rows_bucket", **both, le="8.0") == 1
    assert agent.value("rayprism_batch_rows_bucket", **both, le="+Inf") == 1
    assert agent.value("rayprism_batch_rows_sum", **both) == 5
    assert agent.value("rayprism_queue_rows", **both, replica="r1") == 7


def test_a_series_that_has_nothing_yet_is_sent_as_zero(agent: Agent) -> None:
    source = recorder()
    source.count(ROWS)
    assert sender(agent.find).send(source.take())
    assert agent.value(ROWS, model="flights", version="2") == 0


def test_a_point_that_is_no_number_spoils_nothing(agent: Agent) -> None:
    link = sender(agent.find)
    assert link.send([rows(2)])
    assert link.send([rows(float("nan")), rows(float("inf"))])
    assert link.send([rows(3)])
    assert agent.value(ROWS, model="flights", version="2") == 5


# What is kept


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.booleans())))
def test_a_backlog_loses_nothing_and_doubles_nothing(
    takes: list[tuple[int, int, bool]],
) -> None:
    backlog = Backlog()
    sent = {"1": 0.0, "2": 0.0}
    for first, second, works in takes:
        backlog.add(
            [
                Point(ROWS, "counter", (("model", "flights"), ("version", version)), value)
                for version, value in (("1", first), ("2", second))
            ]
        )
        points = backlog.points()
        assert len(points) == 2, "one for each series, however long it takes"
        if works:
            for point in points:
                sent[point.labels[1][1]] += point.value
            backlog.clear()
    left = {point.labels[1][1]: point.value for point in backlog.points()}
    for version, index in (("1", 0), ("2", 1)):
        assert sent[version] + left.get(version, 0) == sum(take[index] for take in takes)


def test_only_the_newest_gauges_are_sent() -> None:
    backlog = Backlog()
    backlog.add([gauge(1, "old"), gauge(1)])
    backlog.add([gauge(2)])
    assert backlog.points() == [gauge(2)]


def test_what_a_failure_keeps_comes_with_the_next(agent: Agent) -> None:
    link = sender(agent.find)
    assert link.send([rows(1)])
    agent.refuses = True
    assert not link.send([rows(2), gauge(5)])
    assert not link.send([rows(4), gauge(6)])
    agent.refuses = False
    assert link.send([rows(8), gauge(7)])
    assert agent.value(ROWS, model="flights", version="2") == 15
    assert agent.value("rayprism_queue_rows", model="flights", version="2", replica="r1") == 7
    assert len(agent.requests) == 2
    assert link.send([])
    assert agent.value(ROWS, model="flights", version="2") == 15


def test_an_agent_that_comes_back_elsewhere_is_found() -> None:
    addresses: list[str] = []
    link = sender(lambda: addresses[-1])
    with run_agent() as agent:
        addresses.append(agent.address)
        assert link.send([rows(1)])
    assert not link.send([rows(2)])
    with run_agent() as agent:
        addresses.append(agent.address)
        assert link.send([rows(4)])
        assert agent.value(ROWS, model="flights", version="2") == 6


def test_an_agent_that_comes_back_at_the_same_place_is_found_at_once() -> None:
    with run_agent() as agent:
        address = agent.address
        link = sender(lambda: address)
        assert link.send([rows(1)])
    for _ in range(5):
        assert not link.send([rows(1)])
    with run_agent(int(address.rpartition(":")[2])) as agent:
        assert link.send([rows(1)])
        assert agent.value(ROWS, model="flights", version="2") == 6


def test_what_got_no_answer_is_not_sent_again(agent: Agent) -> None:
    # The agent has it, or will read it: counted twice would be worse than not at all.
    link = sender(agent.find)
    agent.go_on.clear()
    assert not link.send([rows(1)], 0.2)
    agent.go_on.set()
    agent.wait_for(taken=1)
    assert link.send([rows(2)])
    assert agent.value(ROWS, model="flights", version="2") == 3


def test_the_agent_is_looked_for_only_when_it_is_not_connected(agent: Agent) -> None:
    looks = 0

    def find() -> str:
        nonlocal looks
        looks += 1
        return agent.address

    link = sender(find)
    for _ in range(3):
        assert link.send([rows(1)])
    assert looks == 1


def test_without_an_agent_it_looks_rarely_and_says_so_once(
    caplog: pytest.LogCaptureFixture, agent: Agent
) -> None:
    caplog.set_level(logging.INFO)
    clock, looks = Clock(), 0
    address: str | None = None

    def find() -> str | None:
        nonlocal looks
        looks += 1
        return address

    link = sender(find, clock=clock)
    for _ in range(60):
        assert not link.send([rows(1)])
        clock.now_s += 5
    assert 6 + 4 <= looks <= 8 + 5, "each time for half a minute, then once a minute"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "is not there" in record.message
    address = agent.address
    clock.now_s += 60
    assert link.send([rows(1)])
    assert agent.value(ROWS, model="flights", version="2") == 61


def test_failures_are_told_after_a_while_and_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()

    def find() -> str:
        raise ConnectionError("the head node is gone")

    link = sender(find, clock=clock)
    for _ in range(6):
        assert not link.send([rows(1)])
        clock.now_s += 5
    assert caplog.records == [], "an agent starts later than its node"
    for _ in range(24):
        assert not link.send([rows(1)])
        clock.now_s += 5
    assert len(caplog.records) == 2
    assert "for 30 s" in caplog.records[0].message
    assert "ConnectionError: the head node is gone" in caplog.records[0].message


def test_the_reason_of_a_refusal_is_told(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    link = sender(agent.find, clock=clock)
    agent.refuses = True
    assert not link.send([rows(1)])
    clock.now_s += 30
    assert not link.send([rows(1)])
    assert "UNAVAILABLE: starting" in caplog.text


# Drivers


def test_a_loop_sends_again_and_again(agent: Agent) -> None:
    source = recorder()
    count = source.count(ROWS)

    async def run() -> None:
        export = exporter(source, agent)
        export.start()
        for taken in range(1, 4):
            count.add(1)
            await asyncio.to_thread(agent.wait_for, taken=taken * 2)
        await export.close()

    asyncio.run(run())
    assert agent.value(ROWS, model="flights", version="2") == 3


def test_close_sends_the_last_points(agent: Agent) -> None:
    source = recorder()
    count = source.count(ROWS)

    async def run() -> None:
        export = exporter(source, agent, LONG_S)
        export.start()
        await asyncio.to_thread(agent.wait_for, taken=1)
        count.add(9)
        await export.close()
        await export.close()

    asyncio.run(run())
    assert agent.value(ROWS, model="flights", version="2") == 9
    assert len(agent.requests) == 2


def test_close_waits_for_what_is_on_its_way(agent: Agent) -> None:
    source = recorder()
    count = source.count(ROWS)

    async def run() -> None:
        export = exporter(source, agent, LONG_S)
        agent.go_on.clear()
        count.add(1)
        export.start()
        await asyncio.to_thread(agent.wait_for, asked=1)
        count.add(2)
        closing = asyncio.create_task(export.close())
        await asyncio.sleep(0)
        agent.go_on.set()
        await closing

    asyncio.run(run())
    assert agent.value(ROWS, model="flights", version="2") == 3


def test_a_silent_agent_blocks_neither_the_loop_nor_the_end(agent: Agent) -> None:
    source = recorder()
    source.count(ROWS)

    async def run() -> float:
        export = exporter(source, agent)
        agent.go_on.clear()
        export.start()
        await asyncio.to_thread(agent.wait_for, asked=1)
        began_s = time.monotonic()
        await asyncio.sleep(0)
        assert time.monotonic() - began_s < 1
        await export.close(within_s=0.2)
        return time.monotonic() - began_s

    assert asyncio.run(run()) < 2


def test_a_search_that_hangs_blocks_neither_the_loop_nor_the_end() -> None:
    found = threading.Event()

    def find() -> None:
        found.wait(10)

    async def run() -> float:
        export = Exporter(recorder(), find, open_channel=plain_channel)
        export.start()
        await asyncio.sleep(0)
        began_s = time.monotonic()
        await export.close(within_s=0.1)
        return time.monotonic() - began_s

    assert asyncio.run(run()) < 2
    found.set()


def test_a_gauge_that_cannot_be_read_ends_nothing(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    source = recorder()
    reads = 0

    def read() -> float:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise ZeroDivisionError
        return 4

    source.gauge("rayprism_queue_rows", read)

    async def run() -> None:
        export = exporter(source, agent)
        export.start()
        await asyncio.to_thread(agent.wait_for, taken=1)
        await export.close()

    asyncio.run(run())
    assert "could not be collected" in caplog.text
    assert agent.value("rayprism_queue_rows", model="flights", version="2", replica="r1") == 4


def test_closing_what_never_began_is_nothing(agent: Agent) -> None:
    asyncio.run(exporter(recorder(), agent).close())
    assert agent.asked == 0


def test_a_thread_sends_while_the_block_runs_and_after_it(agent: Agent) -> None:
    source = recorder()
    count = source.count(ROWS)
    with export_in_thread(source, agent.find, every_s=LONG_S, open_channel=plain_channel):
        agent.wait_for(taken=1)
        count.add(5)
    assert agent.value(ROWS, model="flights", version="2") == 5
    with export_in_thread(source, agent.find, every_s=QUICK_S, open_channel=plain_channel):
        agent.wait_for(taken=5)


def test_a_thread_that_cannot_send_delays_the_end_only_a_little(agent: Agent) -> None:
    agent.go_on.clear()
    began_s = time.monotonic()
    export = export_in_thread(recorder(), agent.find, within_s=0.1, open_channel=plain_channel)
    with pytest.raises(KeyboardInterrupt), export:
        raise KeyboardInterrupt
    assert time.monotonic() - began_s < 5


def test_a_process_that_ends_sends_once(agent: Agent) -> None:
    source = recorder()
    source.count("rayprism_loads_total", outcome="golden_mismatch").add()
    assert send_once(source.take(), agent.find, open_channel=plain_channel)
    labels = {"model": "flights", "version": "2", "outcome": "golden_mismatch"}
    assert agent.value("rayprism_loads_total", **labels) == 1
    assert not send_once([rows(1)], lambda: None, open_channel=plain_channel)


def test_a_process_that_ends_waits_no_longer_than_it_is_told() -> None:
    over = threading.Event()

    def find() -> None:
        over.wait(10)

    began_s = time.monotonic()
    assert not send_once([rows(1)], find, within_s=0.1)
    assert time.monotonic() - began_s < 2
    over.set()


def test_the_default_channel_is_rays(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    from rayprism.telemetry import ray_agent

    opened: list[str] = []

    def open_channel(address: str) -> grpc.Channel:
        opened.append(address)
        return real(address)

    real = ray_agent.open_channel
    monkeypatch.setattr(ray_agent, "open_channel", open_channel)
    assert Sender(agent.find).send([rows(1)])
    assert opened == [agent.address]
