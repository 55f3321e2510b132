"""Makes spans out of records, and hands them to OpenTelemetry's exporter.

Imports OpenTelemetry, so it is itself imported only where traces are configured.

Spans are made whole, as `ReadableSpan`, and given to a `BatchSpanProcessor`: what a span of the SDK
becomes when it ends. The way through the SDK's tracer is there for spans that live while they are
measured. It would have to be tricked into ids that are already known to other programs (by an id
generator that hands them out in the order of the calls), looks for a context, asks a sampler and
takes locks, for 17 microseconds a span instead of 1. Its docstring says that users should not make
a `ReadableSpan`; the tests keep watch that what is received is right.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from rayprism.telemetry.losses import Losses
from rayprism.telemetry.outcomes import outcome_of
from rayprism.telemetry.readings import shown_id, stages
from rayprism.telemetry.records import BatchRecord, RequestRecord
from rayprism.telemetry.trace_context import RANDOM, SAMPLED
from rayprism.telemetry.tracing import Target, Trace

__all__ = ["QuietExporter", "Spans", "make_exporter"]

Value = str | int
Attributes = dict[str, Value]

_OFFSET_S = 10.0
"""How long the difference between the two clocks is taken for right."""

_MOST_LINKS = 128
"""Of a batch, as the SDK bounds them by default."""

_NOISY = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)
_BY_PROTOCOL: dict[str, Attributes] = {
    "http": {"http.request.method": "POST"},
    "grpc": {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
    },
}
"""Source: https://opentelemetry.io/docs/specs/semconv/ for HTTP and RPC spans."""

_OK = Status(StatusCode.UNSET)


def make_exporter(target: Target) -> SpanExporter:
    """The exporter for a target.

    Raises:
        ImportError: It is not installed.
        Exception: It refuses a variable of its own.
    """
    if target.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc

        return by_grpc.OTLPSpanExporter(endpoint=target.endpoint)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http

    return by_http.OTLPSpanExporter(endpoint=target.endpoint)


class _Mute(logging.Filter):
    """Keeps what one thread logs out of the log, and remembers the last of it."""

    def __init__(self) -> None:
        super().__init__()
        self.thread: int | None = None
        self.last = "no reason is known"

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            return True
        self.last = record.getMessage()
        return False


class QuietExporter(SpanExporter):
    """An exporter that neither raises nor logs each of its failures.

    The SDK's exporters log every batch that they try again, and every one that they give up; here
    that becomes a line a minute.

    Args:
        exporter: Does the work.
        losses: Where spans are counted that could not be sent.
    """

    def __init__(self, exporter: SpanExporter, losses: Losses) -> None:
        self.taken = 0
        """Spans that the processor's queue is rid of."""
        self._exporter = exporter
        self._losses = losses
        self._closed = False
        self._mute = _Mute()
        for name in _NOISY:
            logging.getLogger(name).addFilter(self._mute)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends spans. The processor calls it from one thread at a time."""
        self.taken += len(spans)
        self._mute.thread = threading.get_ident()
        try:
            result = self._exporter.export(spans)
            why = self._mute.last
        except Exception as error:
            result, why = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        finally:
            self._mute.thread = None
        if result is not SpanExportResult.SUCCESS:
            self._losses.add(len(spans), why)
        return result

    def shutdown(self) -> None:
        """Ends also what is being tried again. Only the first call does anything."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()

    def unmute(self) -> None:
        """Leaves the loggers as they were."""
        for name in _NOISY:
            logging.getLogger(name).removeFilter(self._mute)


class Spans:
    """Makes spans and sends them, from a thread of its own.

    A trace of which some spans are missing misleads: when too many wait to be sent, a request's
    are left out together.

    Args:
        exporter: Where they go.
        queue_spans: Most that wait to be sent.
        model: The model's name.
        version: Of this replica.
        replica: Serve's id of it.
        application: Serve's name of the application.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        queue_spans: int,
        model: str,
        version: str,
        replica: str,
        application: str,
    ) -> None:
        self._model = model
        self._version = version
        self._losses = Losses("spans of traces")
        self._exporter = QuietExporter(exporter, self._losses)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=queue_spans,
            max_export_batch_size=min(512, queue_spans),
        )
        self._resource = _resource(model, version, replica, application)
        self._scope = InstrumentationScope("rayprism")
        self._queue_spans = queue_spans
        self._handed = 0
        self._closed = False
        self._bits = random.Random().getrandbits
        self._offset_ns = 0
        self._offset_until_s = 0.0

    def add_request(self, record: RequestRecord, trace: Trace) -> None:
        """The spans of a request that has ended."""
        found = stages(record)
        if not self._has_room(1 + len(found)):
            return
        offset_ns = self._wall_clock(record.ended_s)
        flags = TraceFlags(trace.flags)
        state = TraceState.from_header([trace.tracestate]) if trace.tracestate else None
        server = SpanContext(trace.trace, trace.span, False, flags, state)
        parent = None
        if trace.parent:
            parent = SpanContext(trace.trace, trace.parent, True, flags, state)
        self._end(
            f"infer {self._model}",
            server,
            parent,
            (record.began_s, record.ended_s, offset_ns),
            self._request_attributes(record),
            kind=SpanKind.SERVER,
            status=_status(record.reason),
        )
        for name, began_s, ended_s in found:
            kind, status, span = SpanKind.INTERNAL, _OK, 0
            attributes: Attributes = {}
            if name == "compute" and record.batch is not None:
                attributes = _batch_attributes(record.batch)
            elif name == "forward":
                kind, span = SpanKind.CLIENT, trace.forward_span
                attributes["rayprism.version"] = record.forwarded_to
                if record.fallback:
                    attributes["error.type"] = record.fallback
                    status = Status(StatusCode.ERROR, record.fallback)
            context = SpanContext(trace.trace, span or self._new_id(), False, flags, state)
            times = (began_s, ended_s, offset_ns)
            self._end(name, context, server, times, attributes, kind=kind, status=status)

    def add_batch(self, record: BatchRecord, traces: Sequence[Trace], trace_id: int) -> None:
        """The span of a batch, in a trace of its own: it belongs to several requests."""
        if not self._has_room(1):
            return
        ended_s = record.ended_s or max(record.began_s, record.joined_s, record.ran_s)
        links = [
            Link(SpanContext(trace.trace, trace.span, False, TraceFlags(trace.flags)))
            for trace in traces[:_MOST_LINKS]
        ]
        self._end(
            "batch",
            SpanContext(trace_id, self._new_id(), False, TraceFlags(SAMPLED | RANDOM)),
            None,
            (record.began_s, ended_s, self._wall_clock(ended_s)),
            {
                "rayprism.model": self._model,
                "rayprism.version": self._version,
                **_batch_attributes(record),
            },
            status=_OK if record.ended_s else Status(StatusCode.ERROR, "model_failed"),
            links=links,
        )

    def close(self, timeout_s: float) -> None:
        """Sends what is left, as long as the time allows; then gives up."""
        if self._closed:
            return
        self._closed = True
        # The processor's own way to shut down takes up to half a minute.
        thread = threading.Thread(target=self._processor.shutdown, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            self._exporter.shutdown()
            thread.join(0.5)
        if not thread.is_alive():
            self._exporter.unmute()

    def _has_room(self, spans: int) -> bool:
        if self._closed:
            return False
        waiting = self._handed - self._exporter.taken
        if waiting + spans > self._queue_spans:
            self._losses.add(spans, f"{waiting} wait to be sent, which is all that may")
            return False
        self._handed += spans
        return True

    def _end(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times: tuple[float, float, int],
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status = _OK,
        links: Sequence[Link] = (),
    ) -> None:
        began_s, ended_s, offset_ns = times
        self._processor.on_end(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                links=links,
                kind=kind,
                status=status,
                start_time=int(began_s * 1e9) + offset_ns,
                end_time=int(ended_s * 1e9) + offset_ns,
                instrumentation_scope=self._scope,
            )
        )

    def _request_attributes(self, record: RequestRecord) -> Attributes:
        attributes: Attributes = {
            "rayprism.model": self._model,
            "rayprism.version": record.version or self._version,
            "rayprism.protocol": record.protocol,
            "rayprism.source": record.source,
            "rayprism.request_id": shown_id(record.request_id),
            "rayprism.reason": record.reason,
            **_BY_PROTOCOL[record.protocol],
        }
        if record.rows:
            attributes["rayprism.rows"] = record.rows
        if record.forwarded_to:
            attributes["rayprism.forwarded_to"] = record.forwarded_to
        if record.fallback:
            attributes["rayprism.fallback"] = record.fallback
        if outcome_of(record.reason) == "server_error":
            attributes["error.type"] = record.reason
        return attributes

    def _wall_clock(self, now_s: float) -> int:
        """What makes nanoseconds since 1970 of the records' clock."""
        if now_s >= self._offset_until_s:
            self._offset_ns = time.time_ns() - time.monotonic_ns()
            self._offset_until_s = now_s + _OFFSET_S
        return self._offset_ns

    def _new_id(self) -> int:
        return self._bits(64) or 1


def _batch_attributes(batch: BatchRecord) -> Attributes:
    return {
        "rayprism.batch.number": batch.number,
        "rayprism.batch.rows": batch.rows,
        "rayprism.batch.requests": batch.requests,
    }


def _status(reason: str) -> Status:
    """A client's error is no error of a server's span, by OpenTelemetry's conventions."""
    return Status(StatusCode.ERROR, reason) if outcome_of(reason) == "server_error" else _OK


def _resource(model: str, version: str, replica: str, application: str) -> Resource:
    own: Mapping[str, str] = {
        SERVICE_INSTANCE_ID: replica,
        "rayprism.model": model,
        "rayprism.version": version,
        "rayprism.replica": replica,
        "rayprism.application": application,
    }
    resource = Resource.create(dict(own))
    # So the SDK calls what neither OTEL_SERVICE_NAME nor OTEL_RESOURCE_ATTRIBUTES has a name for.
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "rayprism"}))
    return resource
