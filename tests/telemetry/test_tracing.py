"""Traces, as a collector receives them."""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from opentelemetry import trace as global_api
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from rayprism.errors import SetupError
from rayprism.telemetry.records import BatchRecord, RequestRecord
from rayprism.telemetry.trace_context import parse_traceparent
from rayprism.telemetry.tracing import Target, Trace, Tracer, make_tracer, trace_target
from tests.telemetry.collector import Collector, attributes_of, grpc_collector, http_collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Make = Callable[..., Tracer]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with http_collector() as collector:
        yield collector


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made = []

    def make(environment: dict[str, str] | None = None, **variables: str) -> Tracer:
        values = {**(environment or {}), **variables}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        tracer = make_tracer(
            values, model="flights", version="3", replica="r1", application="flights-app"
        )
        assert tracer is not None
        made.append(tracer)
        return tracer

    yield make
    for tracer in made:
        tracer.close(0.1)


def begin(tracer: Tracer, parent: str | None = None, state: str | None = None) -> Trace:
    trace = tracer.begin(parent, state, 1.0, 0.5)
    assert trace is not None
    return trace


def answered(trace: Trace | None, began_s: float = 0.0) -> RequestRecord:
    """A request that went through every stage here, in 10 ms steps."""
    t = began_s or time.monotonic() - 1
    return RequestRecord(
        "http",
        "client",
        "request-1",
        t,
        rows=4,
        decoded_s=t + 0.01,
        prepared_s=t + 0.02,
        started_s=t + 0.03,
        batch=BatchRecord(7, 12, 3, t + 0.03, t + 0.031, t + 0.039, t + 0.04),
        computed_s=t + 0.04,
        ended_s=t + 0.05,
        trace=trace,
    )


def children(spans: list[Span], of: Span) -> dict[str, Span]:
    return {span.name: span for span in spans if span.parent_span_id == of.span_id}


# --- the spans


def test_a_request_is_a_tree_of_spans(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    trace = begin(tracer)
    record = answered(trace)
    tracer.finish(record)
    tracer.close()

    assert collector.paths == ["/v1/traces"]
    server = collector.named("infer flights")
    assert server.kind == Span.SPAN_KIND_SERVER
    assert server.parent_span_id == b""
    assert server.trace_id.hex() == trace.trace_id
    assert trace.traceparent == f"00-{server.trace_id.hex()}-{server.span_id.hex()}-03"
    assert server.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(server.attributes) == {
        "rayprism.model": "flights",
        "rayprism.version": "3",
        "rayprism.protocol": "http",
        "rayprism.source": "client",
        "rayprism.request_id": "request-1",
        "rayprism.reason": "ok",
        "rayprism.rows": 4,
        "http.request.method": "POST",
    }
    below = children(collector.spans, server)
    assert list(below) == ["decode", "prepare", "queue", "compute", "encode"]
    assert {span.trace_id for span in collector.spans} == {server.trace_id}
    assert len({span.span_id for span in collector.spans}) == 6
    assert attributes_of(below["compute"].attributes) == {
        "rayprism.batch.number": 7,
        "rayprism.batch.rows": 12,
        "rayprism.batch.requests": 3,
    }


def test_times_are_those_of_the_record_on_the_wall_clock(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    record = answered(begin(tracer))
    began_ns = time.time_ns() - int((time.monotonic() - record.began_s) * 1e9)
    tracer.finish(record)
    tracer.close()

    server = collector.named("infer flights")
    assert server.start_time_unix_nano == pytest.approx(began_ns, abs=50_000_000, rel=0)
    assert server.end_time_unix_nano - server.start_time_unix_nano == pytest.approx(5e7, abs=1e3)
    below = children(collector.spans, server)
    edges = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in below.values()]
    assert edges[0][0] == server.start_time_unix_nano
    assert edges[-1][1] == server.end_time_unix_nano
    assert all(one[1] == following[0] for one, following in pairwise(edges))


def test_the_resource_says_who_it_is(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    tracer.finish(answered(begin(tracer)))
    tracer.close()
    resource = collector.resource
    assert resource["service.name"] == "rayprism"
    assert resource["service.instance.id"] == "r1"
    assert resource["rayprism.model"] == "flights"
    assert resource["rayprism.version"] == "3"
    assert resource["rayprism.replica"] == "r1"
    assert resource["rayprism.application"] == "flights-app"


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SERVICE_NAME": "ours"},
        {"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,deployment.environment.name=test"},
    ],
)
def test_the_service_may_have_a_name_of_its_own(
    collector: Collector, make: Make, variables: dict[str, str]
) -> None:
    tracer = make({ENDPOINT: collector.endpoint, **variables})
    tracer.finish(answered(begin(tracer)))
    tracer.close()
    assert collector.resource["service.name"] == "ours"


def test_over_grpc(make: Make) -> None:
    with grpc_collector() as collector:
        tracer = make({ENDPOINT: collector.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
        record = answered(begin(tracer))
        record.protocol = "grpc"
        tracer.finish(record)
        tracer.close()
        server = collector.named("infer flights")
        assert len(children(collector.spans, server)) == 5
        assert attributes_of(server.attributes)["rpc.system.name"] == "grpc"


def test_a_request_that_failed_early_has_the_stages_that_it_came_to(
    collector: Collector, make: Make
) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    t = time.monotonic()
    for reason, decoded_s in (("invalid_input", 0.0), ("overloaded", t + 1)):
        record = RequestRecord("http", "client", reason, t, reason=reason, decoded_s=decoded_s)
        record.ended_s = t + 2
        record.trace = begin(tracer)
        tracer.finish(record)
    tracer.close()
    bad, overloaded = [span for span in collector.spans if span.name == "infer flights"]
    assert not children(collector.spans, bad)
    assert bad.status.code == Status.STATUS_CODE_UNSET  # the client's fault
    assert "error.type" not in attributes_of(bad.attributes)
    assert list(children(collector.spans, overloaded)) == ["decode"]
    assert overloaded.status.code == Status.STATUS_CODE_ERROR
    assert overloaded.status.message == "overloaded"
    assert attributes_of(overloaded.attributes)["error.type"] == "overloaded"


def test_what_waited_until_its_deadline_was_in_the_queue(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    t = time.monotonic()
    record = RequestRecord("http", "client", "x", t, reason="deadline_exceeded", decoded_s=t + 1)
    record.ended_s = t + 3
    record.trace = begin(tracer)
    tracer.finish(record)
    tracer.close()
    queue = collector.named("queue")
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(2e9, abs=1e3)


def test_an_id_that_is_no_text_does_not_cost_the_trace(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    record = answered(begin(tracer))
    record.request_id = "\ud800" + "x" * 500
    tracer.finish(record)
    tracer.close()
    written = attributes_of(collector.named("infer flights").attributes)["rayprism.request_id"]
    assert written == "\ufffd" + "x" * 127


def test_a_batch_is_linked_to_its_requests(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    traces = [begin(tracer), begin(tracer, PARENT)]
    t = time.monotonic()
    tracer.batch(BatchRecord(9, 5, 3, t, t + 0.1, t + 0.2, t + 0.3), traces)
    tracer.batch(BatchRecord(10, 1, 1, t, t + 0.1), [])
    tracer.close()
    (batch,) = collector.spans
    assert batch.name == "batch"
    assert batch.parent_span_id == b""
    assert batch.trace_id.hex() not in {trace.trace_id for trace in traces}
    linked = [f"00-{link.trace_id.hex()}-{link.span_id.hex()}" for link in batch.links]
    assert linked == [trace.traceparent[:-3] for trace in traces]
    assert attributes_of(batch.attributes) == {
        "rayprism.model": "flights",
        "rayprism.version": "3",
        "rayprism.batch.number": 9,
        "rayprism.batch.rows": 5,
        "rayprism.batch.requests": 3,
    }
    assert batch.end_time_unix_nano - batch.start_time_unix_nano == pytest.approx(3e8, abs=1e3)


def test_a_batch_that_failed_says_so(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    t = time.monotonic()
    tracer.batch(BatchRecord(1, 1, 1, t, t + 0.5), [begin(tracer)])
    tracer.close()
    batch = collector.named("batch")
    assert batch.status.code == Status.STATUS_CODE_ERROR
    assert batch.end_time_unix_nano - batch.start_time_unix_nano == pytest.approx(5e8, abs=1e3)


# --- from program to program


def test_a_client_that_traces_is_the_parent(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    trace = begin(tracer, PARENT, "congo=t61rcWkgMzE")
    tracer.finish(answered(trace))
    tracer.close()
    server = collector.named("infer flights")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, SPAN)
    assert server.trace_state == trace.tracestate == "congo=t61rcWkgMzE"


def test_the_version_that_it_is_sent_on_to_hangs_below_the_forwarding(
    collector: Collector, make: Make
) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    here = begin(tracer, PARENT, "congo=1")
    there = begin(tracer, here.forward_traceparent, here.tracestate)
    shadow = begin(tracer, here.traceparent, here.tracestate)
    t = time.monotonic()
    record = RequestRecord("http", "client", "x", t, version="4", forwarded_to="4", trace=here)
    record.forward_began_s, record.forward_ended_s, record.ended_s = t + 0.1, t + 0.3, t + 0.4
    for one in (record, answered(there), answered(shadow)):
        tracer.finish(one)
    tracer.close()

    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    servers = [span for span in collector.spans if span.name == "infer flights"]
    stable, candidate, copy = servers
    forward = collector.named("forward")
    assert forward.kind == Span.SPAN_KIND_CLIENT
    assert forward.parent_span_id == stable.span_id
    assert candidate.parent_span_id == forward.span_id
    assert copy.parent_span_id == stable.span_id
    assert attributes_of(forward.attributes) == {"rayprism.version": "4"}
    assert forward.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(stable.attributes)["rayprism.version"] == "4"
    assert forward.end_time_unix_nano - forward.start_time_unix_nano == pytest.approx(2e8, abs=1e3)


def test_an_answer_instead_of_a_candidates(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    record = answered(begin(tracer))
    record.forwarded_to, record.fallback = "4", "late"
    record.forward_began_s, record.forward_ended_s = record.began_s, record.began_s + 0.005
    tracer.finish(record)
    tracer.close()
    forward, decode = collector.named("forward"), collector.named("decode")
    assert forward.status.code == Status.STATUS_CODE_ERROR
    assert forward.status.message == "late"
    assert decode.start_time_unix_nano == forward.end_time_unix_nano
    attributes = attributes_of(collector.named("infer flights").attributes)
    assert attributes["rayprism.fallback"] == "late"
    assert attributes["rayprism.forwarded_to"] == "4"
    assert attributes["rayprism.version"] == "3"


# --- which are traced


def test_nothing_is_sent_of_what_is_not_traced(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    tracer.finish(answered(None))
    tracer.close()
    assert collector.requests == []


@pytest.mark.parametrize(
    ("parent", "share", "draw", "traced"),
    [
        (PARENT, 0.0, 0.0, True),
        (f"{PARENT[:-1]}0", 1.0, 0.0, False),
        (f"{PARENT[:-1]}2", 1.0, 0.0, False),
        (None, 0.0, 0.0, False),
        ("", 0.5, 0.499, True),
        (None, 0.5, 0.5, False),
        (None, 1.0, 0.999, True),
        ("00-nonsense", 1.0, 0.5, True),
        ("00-nonsense", 0.0, 0.0, False),
        (f"ff{PARENT[2:]}", 0.0, 0.0, False),
    ],
)
def test_who_decides(
    collector: Collector, make: Make, parent: str | None, share: float, draw: float, traced: bool
) -> None:
    trace = make({ENDPOINT: collector.endpoint}).begin(parent, None, share, draw)
    assert (trace is not None) == traced


def test_a_faulty_parent_is_not_the_parent(collector: Collector, make: Make) -> None:
    trace = begin(make({ENDPOINT: collector.endpoint}), PARENT.upper(), "a=1")
    assert trace.trace_id != TRACE
    assert trace.tracestate == ""
    assert trace.parent == 0


def test_the_flags_are_passed_on(collector: Collector, make: Make) -> None:
    tracer = make({ENDPOINT: collector.endpoint})
    for sent, passed_on in (("01", 1), ("03", 3), ("fd", 1)):
        header = begin(tracer, PARENT[:-2] + sent).traceparent
        parsed = parse_traceparent(header)
        assert parsed is not None
        assert parsed.flags == passed_on


def test_only_so_many_traces_begin_here_in_a_second(collector: Collector, make: Make) -> None:
    spans = make({ENDPOINT: collector.endpoint})._spans
    now_s = 50.0
    tracer = Tracer(spans, most_new_per_s=10, clock=lambda: now_s)

    def begun(parent: str | None) -> int:
        return sum(tracer.begin(parent, None, 1.0, 0.0) is not None for _ in range(100))

    assert begun(None) == 10
    assert begun(PARENT) == 100
    now_s += 0.5
    assert begun(None) == 5
    now_s += 3600
    assert begun(None) == 10


def test_a_models_seed_does_not_make_the_ids(collector: Collector, make: Make) -> None:
    ids = set()
    for _ in range(2):
        random.seed(0)
        trace = begin(make({ENDPOINT: collector.endpoint}))
        ids |= {trace.trace_id, trace.traceparent, trace.forward_traceparent}
    assert len(ids) == 6


# --- what goes wrong


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def test_nobody_listens(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        tracer = make({ENDPOINT: endpoint})
        for _ in range(20):
            tracer.finish(answered(begin(tracer)))
        began_s = time.monotonic()
        tracer.close(0.2)
        assert time.monotonic() - began_s < 5
        tracer.finish(answered(begin(tracer)))
        tracer.close()
    (line,) = messages(caplog)
    assert line.startswith("120 spans of traces are lost, 120 so far: ")


def test_a_collector_that_refuses_is_logged_once(
    collector: Collector, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400
    tracer = make({ENDPOINT: collector.endpoint}, OTEL_BSP_MAX_QUEUE_SIZE="6")
    for number in range(1, 4):
        tracer.finish(answered(begin(tracer)))
        wait_until(lambda number=number: len(collector.requests) == number)
    tracer.close()
    (line,) = messages(caplog)
    assert "6 spans of traces are lost, 6 so far: Failed to export" in line
    assert "400" in line
    assert caplog.records[0].name == "ray.serve.rayprism"


def test_a_collector_that_hangs_costs_whole_traces_and_no_time(
    collector: Collector, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    collector.gate.clear()
    tracer = make({ENDPOINT: collector.endpoint}, OTEL_BSP_MAX_QUEUE_SIZE="20")
    began_s = time.monotonic()
    for _ in range(100):
        tracer.finish(answered(begin(tracer)))
    assert time.monotonic() - began_s < 5
    collector.gate.set()
    tracer.close()
    by_trace = Counter(span.trace_id for span in collector.spans)
    assert set(by_trace.values()) == {6}
    assert 3 <= len(by_trace) < 100
    assert "6 spans of traces are lost" in messages(caplog)[0]


def test_closing_does_not_wait_for_a_collector_that_hangs(collector: Collector, make: Make) -> None:
    collector.gate.clear()
    tracer = make({ENDPOINT: collector.endpoint})
    tracer.finish(answered(begin(tracer)))
    began_s = time.monotonic()
    tracer.close(0.1)
    assert time.monotonic() - began_s < 5
    assert collector.asked.is_set()


def wait_until(condition: Callable[[], bool], most_s: float = 10.0) -> None:
    end_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


# --- configuration


def test_global_providers_stay(collector: Collector, make: Make) -> None:
    before = global_api.get_tracer_provider()
    make({ENDPOINT: collector.endpoint})
    assert global_api.get_tracer_provider() is before


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: " "},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {ENDPOINT: "http://a:1", "OTEL_SDK_DISABLED": "TRUE"},
        {ENDPOINT: "http://a:1", "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: "http://a:1", "OTEL_TRACES_EXPORTER": "console"},
    ],
)
def test_no_tracer(environment: dict[str, str]) -> None:
    made = make_tracer(environment, model="m", version="1", replica="r", application="a")
    assert made is None


@pytest.mark.parametrize(
    ("environment", "target"),
    [
        ({ENDPOINT: "http://a:1/"}, Target("http/protobuf", "http://a:1/v1/traces", 2048)),
        (
            {ENDPOINT: "http://a:1/x", "OTEL_TRACES_EXPORTER": "console, otlp"},
            Target("http/protobuf", "http://a:1/x/v1/traces", 2048),
        ),
        (
            {ENDPOINT: "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://b:2/own"},
            Target("http/protobuf", "https://b:2/own", 2048),
        ),
        (
            {ENDPOINT: "a:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            Target("grpc", "a:1", 2048),
        ),
        (
            {
                ENDPOINT: "http://a:1",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
                "OTEL_BSP_MAX_QUEUE_SIZE": "9",
            },
            Target("grpc", "http://a:1", 9),
        ),
    ],
)
def test_where_traces_go(environment: dict[str, str], target: Target) -> None:
    assert trace_target(environment) == target


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(SetupError) as raised:
        trace_target({ENDPOINT: "a:1", "OTEL_BSP_MAX_QUEUE_SIZE": "many"})
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: has to begin with http" in str(raised.value)
    assert "OTEL_BSP_MAX_QUEUE_SIZE" in str(raised.value)
    with pytest.raises(SetupError, match="grpc or http/protobuf; got http/json"):
        trace_target({ENDPOINT: "http://a:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})


def test_a_setting_that_the_exporter_refuses(make: Make) -> None:
    with pytest.raises(SetupError, match="OTEL_EXPORTER_OTLP_"):
        make(
            {ENDPOINT: "http://a:1"},
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
            OTEL_EXPORTER_OTLP_TIMEOUT="soon",
        )


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_exporter_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    module = f"opentelemetry.exporter.otlp.proto.{protocol}"
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    environment = {ENDPOINT: "http://a:1", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    if protocol == "http":
        environment["OTEL_EXPORTER_OTLP_PROTOCOL"] = "http/protobuf"
    with pytest.raises(SetupError, match=r"pip install 'rayprism\[traces\]'"):
        make_tracer(environment, model="m", version="1", replica="r", application="a")
