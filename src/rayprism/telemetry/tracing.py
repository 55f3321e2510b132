"""Traces: which requests have one, and what is passed on with a request that is sent further.

At its beginning a request is only asked whether it is traced. Its spans are made from its record
when it has ended (`rayprism.telemetry.spans`), so one that is not traced costs nothing but that
question. The libraries are loaded when a place for traces is configured, and not before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rayprism.errors import ConfigInvalid, Fault, SetupError
from rayprism.telemetry.records import BatchRecord, RequestRecord
from rayprism.telemetry.trace_context import (
    RANDOM,
    SAMPLED,
    format_traceparent,
    parse_traceparent,
    tracestate_of,
)

if TYPE_CHECKING:
    from rayprism.telemetry.spans import Spans

__all__ = ["Target", "Trace", "Tracer", "make_tracer", "trace_target"]

MOST_NEW_PER_S = 100.0
"""Traces that begin here, a second and replica. A span costs 35 microseconds of its process to
encode, and a request has six: a fast model that is traced whole would be half as fast."""

_EXTRA = "pip install 'rayprism[traces]'"


class Trace:
    """A request that is traced: the ids that its spans will have.

    Args:
        trace: The trace's id.
        flags: Of W3C trace context, for what is passed on.
        parent: The client's span; 0 where the trace begins here.
        tracestate: As it is passed on with `traceparent`; empty where there is none.
        new_id: Makes span ids.
    """

    __slots__ = ("_forward", "_new_id", "flags", "parent", "span", "trace", "tracestate")

    def __init__(
        self, trace: int, flags: int, parent: int, tracestate: str, new_id: Callable[[], int]
    ) -> None:
        self.trace = trace
        self.flags = flags
        self.parent = parent
        self.tracestate = tracestate
        self.span = new_id()
        self._new_id = new_id
        self._forward = 0

    @property
    def trace_id(self) -> str:
        """The trace's id, as it is written."""
        return f"{self.trace:032x}"

    @property
    def traceparent(self) -> str:
        """The header that makes something a child of this request: a shadow's copy."""
        return format_traceparent(self.trace, self.span, self.flags)

    @property
    def forward_traceparent(self) -> str:
        """The header that makes something a child of this request's being sent on."""
        return format_traceparent(self.trace, self.forward_span, self.flags)

    def headers(self, traceparent: str) -> tuple[tuple[str, str], ...]:
        """What is sent in the place of the client's own trace context.

        Args:
            traceparent: This trace's `traceparent`, or its `forward_traceparent`.
        """
        parent = ("traceparent", traceparent)
        return (parent, ("tracestate", self.tracestate)) if self.tracestate else (parent,)

    @property
    def forward_span(self) -> int:
        """The id of the span `forward`, made when it is first asked for."""
        if not self._forward:
            self._forward = self._new_id()
        return self._forward


class Tracer:
    """Decides which requests are traced, and has their spans made and sent.

    Belongs to one thread.

    Args:
        spans: Makes and sends them.
        most_new_per_s: Traces that begin here; as many may come at once. Those that clients began
            are not counted.
        clock: Seconds.
    """

    def __init__(
        self,
        spans: Spans,
        *,
        most_new_per_s: float = MOST_NEW_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spans = spans
        self._rate = most_new_per_s
        self._clock = clock
        self._allowed = most_new_per_s
        self._allowed_s = clock()
        # Not the module's own generator, which a model's code may have given a fixed seed: then
        # all replicas would make the same ids.
        self._bits = random.Random().getrandbits

    def begin(
        self, traceparent: str | None, tracestate: str | None, share: float, draw: float
    ) -> Trace | None:
        """Whether a request is traced, and if so, the ids for it.

        A client that began a trace has decided; else it is drawn.

        Args:
            traceparent: The client's, if it sent one. One that is not valid counts for nothing.
            tracestate: Likewise; several headers are to be joined by commas.
            share: Of the requests without a parent that are traced, 0 to 1. What another version
                sent on takes 0: that version has decided.
            draw: Uniform from 0 up to, but not including, 1.
        """
        if traceparent:
            parent = parse_traceparent(traceparent)
            if parent is not None:
                if not parent.flags & SAMPLED:
                    return None
                state = tracestate_of(tracestate) if tracestate else ""
                return Trace(parent.trace, parent.flags, parent.span, state, self._new_id)
        if draw >= share or not self._allow():
            return None
        return Trace(self._bits(128) or 1, SAMPLED | RANDOM, 0, "", self._new_id)

    def finish(self, record: RequestRecord) -> None:
        """Makes the spans of a request that has ended, where it is traced. Never raises."""
        if record.trace is not None:
            self._spans.add_request(record, record.trace)

    def batch(self, record: BatchRecord, traces: Sequence[Trace]) -> None:
        """Makes the span of a batch, with links to those of its requests that are traced."""
        if traces:
            self._spans.add_batch(record, traces, self._bits(128) or 1)

    def close(self, timeout_s: float = 3.0) -> None:
        """Sends what is left; gives up when the time is over. It waits, so not on an event loop.

        Args:
            timeout_s: Most that it takes, roughly.
        """
        self._spans.close(timeout_s)

    def _new_id(self) -> int:
        return self._bits(64) or 1

    def _allow(self) -> bool:
        now_s = self._clock()
        more = (now_s - self._allowed_s) * self._rate
        self._allowed = min(self._rate, self._allowed + more)
        self._allowed_s = now_s
        if self._allowed < 1.0:
            return False
        self._allowed -= 1.0
        return True


@dataclass(frozen=True, slots=True)
class Target:
    """Where traces go.

    Args:
        protocol: Of OTLP.
        endpoint: A URL; with HTTP the whole one.
        queue_spans: Most that wait to be sent.
    """

    protocol: Literal["grpc", "http/protobuf"]
    endpoint: str
    queue_spans: int


def trace_target(environment: Mapping[str, str]) -> Target | None:
    """Where OpenTelemetry's variables say that traces go; None where they say nowhere.

    Raises:
        ConfigInvalid: A variable has a value that cannot be.

    Source: https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
    """
    exporters = [part.strip() for part in environment.get("OTEL_TRACES_EXPORTER", "").split(",")]
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if exporters != [""] and "otlp" not in exporters:
        return None
    own, base = _value(environment, "ENDPOINT")
    if not own and not base:
        return None
    faults: list[Fault] = []
    own_protocol, base_protocol = _value(environment, "PROTOCOL")
    protocol = own_protocol or base_protocol or "http/protobuf"
    endpoint = own or base
    if protocol == "http/protobuf":
        endpoint = own or base.rstrip("/") + "/v1/traces"
        if not endpoint.startswith(("http://", "https://")):
            name = _name("TRACES_ENDPOINT" if own else "ENDPOINT")
            faults.append(Fault(name, f"has to begin with http:// or https://; got {own or base}"))
    elif protocol != "grpc":
        name = _name("TRACES_PROTOCOL" if own_protocol else "PROTOCOL")
        faults.append(Fault(name, f"grpc or http/protobuf; got {protocol}"))
    queue = environment.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or "2048"
    if not queue.isdecimal() or int(queue) < 1:
        faults.append(Fault("OTEL_BSP_MAX_QUEUE_SIZE", f"a number of spans; got {queue}"))
    if faults:
        raise ConfigInvalid("environment", faults)
    return Target("grpc" if protocol == "grpc" else "http/protobuf", endpoint, int(queue))


def _name(ending: str) -> str:
    return f"OTEL_EXPORTER_OTLP_{ending}"


def _value(environment: Mapping[str, str], ending: str) -> tuple[str, str]:
    """The value for traces alone and the one for everything; empty counts as not set."""
    own = environment.get(_name(f"TRACES_{ending}"), "").strip()
    return own, environment.get(_name(ending), "").strip()


def make_tracer(
    environment: Mapping[str, str], *, model: str, version: str, replica: str, application: str
) -> Tracer | None:
    """A tracer, where OpenTelemetry's variables say where traces go; else None.

    Global providers stay as they are: Ray has its own.

    Args:
        environment: Says whether, where to and how. The exporter reads the rest (headers,
            certificates, time-outs, names of resources) from the environment of the process.
        model: The model's name.
        version: Of this replica.
        replica: Serve's id of it.
        application: Serve's name of the application.

    Raises:
        SetupError: The libraries are not installed, or refuse what is configured.
    """
    target = trace_target(environment)
    if target is None:
        return None
    try:
        from rayprism.telemetry.spans import Spans, make_exporter

        spans = Spans(
            make_exporter(target),
            queue_spans=target.queue_spans,
            model=model,
            version=version,
            replica=replica,
            application=application,
        )
    except ImportError as error:
        raise SetupError(
            f"traces are configured to go to {target.endpoint} by {target.protocol}, and what "
            f"sends them is not installed ({error}): {_EXTRA}, or unset "
            f"{_name('ENDPOINT')}, or set OTEL_TRACES_EXPORTER=none"
        ) from None
    except Exception as error:
        raise SetupError(
            f"OpenTelemetry's exporter refuses its settings: {error}. Mend the variables that "
            "begin with OTEL_EXPORTER_OTLP_ or OTEL_BSP_"
        ) from error
    return Tracer(spans)
