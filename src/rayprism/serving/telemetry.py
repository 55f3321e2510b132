"""What one replica tells of itself: metrics, log lines and spans, of its requests and batches."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

from rayprism.telemetry.outcomes import outcome_of
from rayprism.telemetry.recorder import Count, Histogram, Recorder
from rayprism.telemetry.records import BatchRecord, Protocol, RequestRecord, Source
from rayprism.telemetry.request_log import RequestLog
from rayprism.telemetry.tracing import Trace, Tracer

__all__ = ["ReplicaTelemetry"]

_PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")
_Key = tuple[Protocol, Source, str, str]


class ReplicaTelemetry:
    """Takes the record of each request at its end, and of each batch.

    On the path of every request: what is not counted in a microsecond or two is only done for
    those that are logged or traced.

    Args:
        model: The model's name.
        version: Of this replica, as the protocol writes it.
        replica: Serve's id of it.
        is_on: Whether anything is counted.
        log: Where requests are logged; None: nowhere.
        tracer: Where spans go; None: nowhere.
        draw: Uniform from 0 up to, but not including, 1; by default of a generator of its own,
            since models seed the common one.
        clock: Seconds; that of the records.
    """

    def __init__(
        self,
        model: str,
        version: str,
        replica: str = "",
        *,
        is_on: bool = True,
        log: RequestLog | None = None,
        tracer: Tracer | None = None,
        draw: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.recorder = recorder = Recorder(model=model, version=version, replica=replica)
        self.version = version
        self._is_on = is_on
        self.log = log
        self.tracer = tracer
        self.log_share = 0.0
        """Of requests without a failure, 0 to 1."""
        self.trace_share = 1.0
        """Of requests that come without a trace of their own."""
        self._draw = draw or random.Random().random
        self._clock = clock
        self._decode = recorder.histogram("rayprism_decode_seconds")
        self._prepare: Histogram | None = None
        self._queue = recorder.histogram("rayprism_queue_seconds")
        self._compute = recorder.histogram("rayprism_compute_seconds")
        self._encode = recorder.histogram("rayprism_encode_seconds")
        self._rows = recorder.count("rayprism_rows_total")
        self._batch_rows = recorder.histogram("rayprism_batch_rows")
        self._batch_cost = recorder.count("rayprism_batch_cost_total")
        self._batch_padding = recorder.count("rayprism_batch_padding_total")
        self._requests: dict[_Key, Count] = {}
        self._answered: dict[str, Histogram] = {}
        self._forwarded: dict[str, Histogram] = {}
        # From 0, so that the first one is seen as an increase.
        for protocol in _PROTOCOLS:
            for reason in ("ok", "internal", "model_failed", "overloaded", "deadline_exceeded"):
                self._count_of((protocol, "client", version, reason))
        self._answered_by(version)

    def begin(
        self,
        protocol: Protocol,
        source: Source,
        request_id: str,
        began_s: float,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> RequestRecord:
        """The record of a request that has come.

        Args:
            protocol: How.
            source: From whom.
            request_id: For logs.
            began_s: When.
            traceparent: W3C trace context of the client, where it sent one.
            tracestate: Likewise.
        """
        record = RequestRecord(protocol, source, request_id, began_s)
        if self.tracer is not None:
            # Whether a client's request is traced was decided by the version that it came to.
            share = self.trace_share if source == "client" else 0.0
            record.trace = self.tracer.begin(traceparent, tracestate, share, self._draw())
        return record

    def finish(self, record: RequestRecord) -> None:
        """Counts, logs and traces a request that has ended."""
        record.ended_s = ended_s = self._clock()
        if self._is_on:
            self._count(record, ended_s)
        reason = record.reason
        if self.log is not None and (self.log_share or reason != "ok"):
            self.log.offer(record, outcome_of(reason), self.log_share)
        if record.trace is not None and self.tracer is not None:
            self.tracer.finish(record)

    def _count(self, record: RequestRecord, ended_s: float) -> None:
        version = record.version or self.version
        reason = record.reason
        key = (record.protocol, record.source, version, reason)
        (self._requests.get(key) or self._count_of(key)).value += 1.0
        if record.decoded_s:
            self._stages(record, ended_s)
        # Not of a version that a client named and that is not there: that would be a label's value
        # of the client's choice.
        if record.version or record.fallback not in ("", "resting"):
            self._forward(record)
        if reason == "ok":
            self._rows.value += record.rows
            if record.source == "client":
                answered = self._answered.get(version) or self._answered_by(version)
                answered.observe(ended_s - record.began_s)

    def batch(self, record: BatchRecord, cost: int, padding: int, traces: Sequence[Trace]) -> None:
        """Counts and traces a batch that has run.

        Args:
            record: The batch.
            cost: Rows times padded length.
            padding: How much of it is padding.
            traces: Of its requests.
        """
        if self._is_on:
            self._batch_rows.observe(record.rows)
            self._batch_cost.value += cost
            self._batch_padding.value += padding
        if traces and self.tracer is not None:
            self.tracer.batch(record, traces)

    def loaded(self, load_s: Mapping[str, float]) -> None:
        """The model was loaded: by step, how long it took in seconds."""
        self.recorder.count("rayprism_loads_total", outcome="ok").add()
        for step, seconds in load_s.items():
            self.recorder.count("rayprism_load_seconds_total", step=step).add(seconds)

    def close(self) -> None:
        """Writes and sends what is left of logs and traces. Blocks for a few seconds at most."""
        if self.log is not None:
            self.log.close()
        if self.tracer is not None:
            self.tracer.close()

    def _stages(self, record: RequestRecord, ended_s: float) -> None:
        decoded_s, prepared_s = record.decoded_s, record.prepared_s
        self._decode.observe(decoded_s - (record.forward_ended_s or record.began_s))
        if prepared_s:
            if self._prepare is None:
                self._prepare = self.recorder.histogram("rayprism_prepare_seconds")
            self._prepare.observe(prepared_s - decoded_s)
        started_s, computed_s = record.started_s, record.computed_s
        if started_s:
            self._queue.observe(started_s - (prepared_s or decoded_s))
            if computed_s:
                self._compute.observe(computed_s - started_s)
                if record.reason == "ok":
                    self._encode.observe(ended_s - computed_s)
        elif record.reason == "deadline_exceeded":
            self._queue.observe(ended_s - (prepared_s or decoded_s))

    def _forward(self, record: RequestRecord) -> None:
        version = record.forwarded_to
        histogram = self._forwarded.get(version)
        if histogram is None:
            histogram = self.recorder.histogram("rayprism_forward_seconds", version=version)
            self._forwarded[version] = histogram
        histogram.observe(record.forward_ended_s - record.forward_began_s)

    def _answered_by(self, version: str) -> Histogram:
        histogram = self.recorder.histogram("rayprism_request_seconds", version=version)
        self._answered[version] = histogram
        return histogram

    def _count_of(self, key: _Key) -> Count:
        protocol, source, version, reason = key
        self._requests[key] = count = self.recorder.count(
            "rayprism_requests_total",
            version=version,
            protocol=protocol,
            source=source,
            outcome=outcome_of(reason),
            reason=reason,
        )
        return count
