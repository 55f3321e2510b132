"""One request, one trace: through all versions that it comes to, as a collector receives it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from rayprism.models.repository import ModelVersion, Repository
from rayprism.telemetry.tracing import make_tracer
from tests.serving.seen import FAIL_CANDIDATE, Gate, ask, asking, copies, push_seen, splits
from tests.support.asyncs import async_test, until
from tests.support.recorded import keep_records
from tests.support.versions import Member, Proxy, fleet
from tests.telemetry.collector import Collector, attributes_of, http_collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CONTEXT: dict[str, Any] = {"traceparent": PARENT, "tracestate": "congo=t61rcWkgMzE,rojo=1"}
STAGES = ["decode", "queue", "compute", "encode"]

both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture(scope="module")
def versions(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    return push_seen(repository, tmp_path_factory.mktemp("traced"), "traced")


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


@asynccontextmanager
async def traced(
    collector: Collector, versions: list[ModelVersion], **configs: Any
) -> AsyncIterator[tuple[Member, Proxy]]:
    """A fleet whose replicas all send traces; the collector has them when it has ended."""
    async with fleet(versions, rpcs=True, **configs) as (stable, proxy):
        for version, member in proxy.members.items():
            member.service.telemetry.tracer = make_tracer(
                {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint},
                model="traced",
                version=str(version),
                replica=f"r{version}",
                application=f"traced-{version}",
            )
        yield stable, proxy


def servers(collector: Collector) -> dict[str, Span]:
    """The span of each version's part, by who asked."""
    found = [span for span in collector.spans if span.name == "infer traced"]
    by_source = {str(attributes_of(span.attributes)["rayprism.source"]): span for span in found}
    assert len(by_source) == len(found)
    return by_source


def below(collector: Collector, parent: Span) -> dict[str, Span]:
    spans = [span for span in collector.spans if span.parent_span_id == parent.span_id]
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def of_requests(collector: Collector) -> list[Span]:
    return [span for span in collector.spans if span.name != "batch"]


def context_of(proxy: Proxy, protocol: str, index: int = 0) -> dict[str, str]:
    """The trace context that a request came to the proxy with."""
    call = proxy.calls[index]
    found = call.metadata
    if protocol == "http":
        found = {name.decode(): value.decode() for name, value in call.headers.items()}
    return {name: found[name] for name in ("traceparent", "tracestate") if name in found}


# Sent on


@both
def test_a_request_that_is_sent_on_is_one_trace(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with traced(collector, versions[:2], v1=splits()) as (stable, proxy):
            assert await ask(stable, protocol, **CONTEXT) == (True, "2")
            assert context_of(proxy, protocol)["tracestate"] == CONTEXT["tracestate"]

    run()
    assert {span.trace_id.hex() for span in of_requests(collector)} == {TRACE}
    found = servers(collector)
    assert found.keys() == {"client", "split"}
    stable, candidate = found["client"], found["split"]
    assert stable.parent_span_id.hex() == SPAN
    (forward,) = below(collector, stable).values()
    assert (forward.name, forward.kind) == ("forward", Span.SPAN_KIND_CLIENT)
    assert candidate.parent_span_id == forward.span_id
    assert list(below(collector, candidate)) == STAGES
    assert len({span.span_id for span in collector.spans}) == len(collector.spans)
    assert {span.trace_state for span in of_requests(collector)} == {CONTEXT["tracestate"]}
    assert attributes_of(stable.attributes)["rayprism.version"] == "2"
    edges = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in (stable, forward)]
    assert edges[0][0] <= edges[1][0] <= edges[1][1] <= edges[0][1]


@both
def test_a_trace_may_begin_here(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with traced(collector, versions[:2], v1=splits()) as (stable, proxy):
            faulty: dict[str, Any] = {"traceparent": "00-nonsense", "tracestate": "congo=1"}
            assert await ask(stable, protocol, **faulty) == (True, "2")
            assert context_of(proxy, protocol).keys() == {"traceparent"}, "not the client's state"

    run()
    (trace,) = {span.trace_id for span in of_requests(collector)}
    found = servers(collector)
    assert found["client"].parent_span_id == b""
    forward = below(collector, found["client"])["forward"]
    assert found["split"].parent_span_id == forward.span_id
    assert found["split"].trace_id == trace


@both
def test_what_a_candidate_fails_is_in_the_trace(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with traced(collector, versions[:2], v1=splits()) as (stable, _):
            assert await ask(stable, protocol, FAIL_CANDIDATE, **CONTEXT) == (True, "1")

    run()
    found = servers(collector)
    stable, candidate = found["client"], found["split"]
    children = below(collector, stable)
    assert list(children) == ["forward", *STAGES]
    assert candidate.parent_span_id == children["forward"].span_id
    assert candidate.status.code == Status.STATUS_CODE_ERROR
    assert attributes_of(candidate.attributes)["rayprism.reason"] == "model_failed"
    assert attributes_of(children["forward"].attributes)["error.type"] == "error"
    assert stable.status.code == Status.STATUS_CODE_UNSET, "the client got its answer"
    assert attributes_of(stable.attributes)["rayprism.fallback"] == "error"


# Copies


@both
def test_a_copy_hangs_below_the_request_that_it_is_of(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with traced(collector, versions, v1=copies(2, 3)) as (stable, proxy):
            assert await ask(stable, protocol, **CONTEXT) == (True, "1")
            await until(lambda: all(stable.shadow(version)["compared"] for version in (2, 3)))
            sent = [context_of(proxy, protocol, index) for index in (0, 1)]
            assert sent[0] == sent[1]
            assert sent[0]["tracestate"] == CONTEXT["tracestate"]

    run()
    spans = [span for span in of_requests(collector) if span.name == "infer traced"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    by_source: dict[str, list[Span]] = {}
    for span in spans:
        by_source.setdefault(attributes_of(span.attributes)["rayprism.source"], []).append(span)
    (stable,) = by_source["client"]
    assert stable.parent_span_id.hex() == SPAN
    assert [span.parent_span_id for span in by_source["shadow"]] == [stable.span_id] * 2


# Not traced


@both
@pytest.mark.parametrize("has_tracer", [True, False])
@pytest.mark.parametrize("kind", ["split", "shadow"])
def test_a_context_that_is_not_ours_goes_on_as_it_came(
    collector: Collector, versions: list[ModelVersion], protocol: str, has_tracer: bool, kind: str
) -> None:
    """Without a tracer whatever it says; with one where the client wants no trace."""
    unsampled = {"traceparent": PARENT[:-1] + "0", "tracestate": "congo=1"}
    sent: dict[str, Any] = unsampled if has_tracer else CONTEXT

    @async_test
    async def run() -> None:
        config = splits() if kind == "split" else copies(2)
        opened = traced(collector, versions[:2], v1=config)
        if not has_tracer:
            opened = fleet(versions[:2], rpcs=True, v1=config)
        async with opened as (stable, proxy):
            assert (await ask(stable, protocol, **sent))[0]
            await until(lambda: proxy.calls)
            assert context_of(proxy, protocol) == sent
            if kind == "shadow":
                await until(lambda: stable.shadow(2)["compared"])

    run()
    assert collector.spans == []


@both
def test_who_was_not_drawn_at_the_stable_version_is_not_drawn_again(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        none = {"telemetry": {"trace_percent": 0}}
        async with traced(collector, versions[:2], v1=splits() | none) as (stable, proxy):
            assert await ask(stable, protocol) == (True, "2")
            assert context_of(proxy, protocol) == {}

    run()
    assert collector.spans == []


@both
def test_a_share_is_drawn(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        half = {"telemetry": {"trace_percent": 50}}
        async with traced(collector, versions[:1], v1=half) as (stable, _):
            drawn = iter([0.0, 0.499, 0.5, 0.999])
            stable.service.telemetry._draw = lambda: next(drawn)
            records = keep_records(stable)
            for _ in range(4):
                assert await ask(stable, protocol) == (True, "1")
            assert [record.trace is not None for record in records] == [True, True, False, False]

    run()
    assert len({span.trace_id for span in of_requests(collector)}) == 2


@both
def test_refusals_are_traced(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with traced(collector, versions[:1]) as (stable, _):
            assert not (await ask(stable, protocol, shape=(1, 2, 3), **CONTEXT))[0]

    run()
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert attributes_of(span.attributes)["rayprism.reason"] == "invalid_input"


# Batches


@both
def test_a_batch_is_linked_to_its_requests(
    collector: Collector, versions: list[ModelVersion], protocol: str
) -> None:
    unsampled: dict[str, Any] = {"traceparent": PARENT[:-1] + "0"}

    @async_test
    async def run() -> None:
        async with traced(collector, versions[:1]) as (stable, _):
            gate = Gate(stable)
            first = asking(stable, protocol, **unsampled)
            await until(lambda: gate.entered == 1)
            others = [asking(stable, protocol, **sent) for sent in (CONTEXT, {}, unsampled)]
            await until(lambda: stable.service.scheduler.queued_rows == 3)
            gate.open.set()
            assert [(await one)[0] for one in (first, *others)] == [True] * 4

    run()
    requests = [span for span in collector.spans if span.name == "infer traced"]
    batch = collector.named("batch")  # nobody of the first one is traced
    assert len(requests) == 2
    linked = {(link.trace_id, link.span_id) for link in batch.links}
    assert linked == {(span.trace_id, span.span_id) for span in requests}
    assert TRACE in {span.trace_id.hex() for span in requests}
    assert batch.trace_id not in {span.trace_id for span in requests}, "it belongs to both"
    assert attributes_of(batch.attributes) == {
        "rayprism.model": "traced",
        "rayprism.version": "1",
        "rayprism.batch.number": 2,
        "rayprism.batch.rows": 3,
        "rayprism.batch.requests": 3,
    }
    for span in requests:
        compute = below(collector, span)["compute"]
        assert attributes_of(compute.attributes)["rayprism.batch.number"] == 2
