"""What is kept of one request while it is answered, for metrics, the request log and traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BatchRecord", "Protocol", "RequestRecord", "Source"]

Protocol = Literal["http", "grpc"]
Source = Literal["client", "split", "shadow"]


@dataclass(slots=True)
class BatchRecord:
    """One batch.

    Units: times are seconds of `time.monotonic`.

    Args:
        number: Counted from 1 in this replica.
        rows: In it.
        requests: In it.
        began_s: When the model was free for it.
        joined_s: When its tensors were put together.
        ran_s: When the model had run.
        ended_s: When its outputs were taken apart; 0 where it failed.
    """

    number: int
    rows: int
    requests: int
    began_s: float
    joined_s: float = 0.0
    ran_s: float = 0.0
    ended_s: float = 0.0


@dataclass(slots=True)
class RequestRecord:
    """One request, from its arrival to its end. Whoever does a step writes it in.

    Units: times are seconds of `time.monotonic`; 0 for a step that it did not come to.

    Args:
        protocol: How it came.
        source: Who asks.
        request_id: For logs.
        began_s: When its whole body was there.
        version: That answered; empty for the one of this replica.
        reason: `ok`, or the code of its error.
        rows: 0 where it was not decoded.
        decoded_s: When it was understood and checked.
        prepared_s: When pre-processing had ended.
        started_s: When the batch with its first row began.
        batch: The one with its last row.
        computed_s: When its outputs were there.
        forward_began_s: When it was sent on to another version.
        forward_ended_s: When that had answered, or had failed to.
        forwarded_to: The version that it was sent on to; empty where it was not.
        fallback: Why that did not answer, where it was answered here instead.
        ended_s: When its answer was sent.
        trace: Of `rayprism.telemetry.tracing`; None where it is not traced.
    """

    protocol: Protocol
    source: Source
    request_id: str
    began_s: float
    version: str = ""
    reason: str = "ok"
    rows: int = 0
    decoded_s: float = 0.0
    prepared_s: float = 0.0
    started_s: float = 0.0
    batch: BatchRecord | None = None
    computed_s: float = 0.0
    forward_began_s: float = 0.0
    forward_ended_s: float = 0.0
    forwarded_to: str = ""
    fallback: str = ""
    ended_s: float = 0.0
    trace: Any = None
