"""The figures of one load, from what became of its requests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.loadgen import histogram
from bench.loadgen.records import GRPC, OK, REASONS, STATUS, Records
from bench.loadgen.wrk import WrkRecords

__all__ = ["GeneratorFacts", "limited_by_connections", "limited_by_generator", "summarise"]

SERIES_STEP_S = 0.5

_GRPC_CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""Source: https://grpc.io/docs/guides/status-codes."""
_REFUSED = (
    429,
    503,
    GRPC + _GRPC_CODES.index("RESOURCE_EXHAUSTED"),
    GRPC + _GRPC_CODES.index("UNAVAILABLE"),
)
_MOST_CPU_SHARE = 0.9
_LATE_SHARE, _LATE_S = 0.1, 1e-3
_WAITED_SHARE = 0.01


@dataclass(frozen=True)
class GeneratorFacts:
    """How the load generator itself did.

    Args:
        cpu_share: Of each worker: cores.
        late_s: How long after its time it turned to a request: `p50`, `p99`, `max`; None where
            there were no requests, or where nothing is known of it.
        latency_p99_s: Of right answers; None where there are none.
        waited_share: Of the requests: those for which all connections were in use.
    """

    cpu_share: tuple[float, ...]
    late_s: Mapping[str, float | None]
    latency_p99_s: float | None
    waited_share: float


def limited_by_generator(facts: GeneratorFacts) -> str | None:
    """Why the figures are the load generator's and not the server's; None where they are not."""
    busiest = max(facts.cpu_share, default=0.0)
    if busiest > _MOST_CPU_SHARE:
        return (
            f"a worker of the load generator used {busiest:.0%} of a core: give the load more "
            "processes, or more of the machine"
        )
    late_s, latency_s = facts.late_s["p99"], facts.latency_p99_s
    if late_s is not None and late_s > _LATE_S and late_s > _LATE_SHARE * (latency_s or 0.0):
        beside = "" if latency_s is None else f", and that of latency is {latency_s * 1e3:.1f} ms"
        return (
            f"the load generator was late itself: the p99 of that is {late_s * 1e3:.1f} ms"
            f"{beside}: give the load more processes, or more of the machine"
        )
    return None


def limited_by_connections(facts: GeneratorFacts) -> str | None:
    """That requests of an open loop waited in the client; None where next to none did.

    This is no fault of the load generator: the server had as many requests as it may have, and
    what waited counts in the latency.
    """
    if facts.waited_share <= _WAITED_SHARE:
        return None
    return (
        f"all connections were in use for {facts.waited_share:.0%} of the requests, which waited "
        "in the client: the server, or how many connections the load may open, was the limit"
    )


def summarise(
    records: Records | WrkRecords, seconds: float, target_s: float | None
) -> dict[str, Any]:
    """The figures of a sample.

    Latency counts from when a request was meant to leave, in an open loop, and from when it left,
    in a closed one; `service_s` always from when it left. Requests of the warm-up are in no figure
    but `rate` and the series of rates, where they were answered after it: what an answer belongs to
    is then its end, and not its beginning.

    Args:
        records: What `drive` gave.
        seconds: That were measured.
        target_s: What is answered later is no goodput.

    Returns:
        `requests`, `ok`, `duration_s`, `rate` (right answers within the time, per second),
        `offered_rate` (None in a closed loop), `goodput`, `latency_s`, `service_s`, `histogram`,
        `refused`, `errors`, `example_error`, `series`, `generator`, `client`.
    """
    if isinstance(records, WrkRecords):
        return _summarise_wrk(records, target_s)
    measured = records.measured()
    ok = measured.reason == OK
    refused = (measured.reason == STATUS) & np.isin(measured.status, _REFUSED)
    latency_s = measured.done_s - measured.intended_s
    service_s = measured.done_s - measured.sent_s
    in_time = (records.done_s >= 0) & (records.done_s < seconds)
    rate = int(np.count_nonzero((records.reason == OK) & in_time)) / seconds
    good = ok & (latency_s <= (math.inf if target_s is None else target_s))
    figures = histogram.figures(latency_s[ok])
    return {
        "client": "python",
        "requests": len(ok),
        "ok": int(np.count_nonzero(ok)),
        "duration_s": seconds,
        "rate": rate,
        "offered_rate": len(ok) / seconds if records.loop == "open" else None,
        "goodput": rate if target_s is None else int(np.count_nonzero(good)) / seconds,
        "latency_s": figures,
        "service_s": histogram.figures(service_s[ok]),
        "histogram": histogram.encode(latency_s[ok]),
        "refused": {
            "count": int(np.count_nonzero(refused)),
            "rate": int(np.count_nonzero(refused)) / seconds,
            "with_retry_after": int(np.count_nonzero(measured.retry_after[refused])),
            "latency_s": histogram.figures(service_s[refused]),
        },
        "errors": _errors(measured, ~ok & ~refused),
        "example_error": _example_error(records),
        "series": _series(records, seconds),
        "generator": _generator(_facts(measured, figures["p99"])),
    }


def _summarise_wrk(records: WrkRecords, target_s: float | None) -> dict[str, Any]:
    errors = {
        "status": records.errors["status"],
        "connect": records.errors["connect"],
        "broken": records.errors["read"] + records.errors["write"],
        "timeout": records.errors["timeout"],
    }
    ok = max(0, records.answered - errors["status"] - errors["timeout"])
    rate = ok / records.duration_s
    in_time = records.values_s <= (math.inf if target_s is None else target_s)
    # wrk does not know the latency of right answers from that of others.
    share = float(records.counts[in_time].sum() / max(1, records.counts.sum()))
    figures = histogram.figures(records.values_s, records.counts)
    unknown = dict.fromkeys(("p50", "p99", "max"))
    return {
        "client": "wrk",
        "requests": records.answered + errors["connect"] + errors["broken"],
        "ok": ok,
        "duration_s": records.duration_s,
        "rate": rate,
        "offered_rate": None,
        "goodput": rate * share,
        "latency_s": figures,
        "service_s": figures,
        "histogram": histogram.encode(records.values_s, records.counts),
        "refused": {
            "count": 0,
            "rate": 0.0,
            "with_retry_after": 0,
            "latency_s": histogram.figures([]),
        },
        "errors": {name: count for name, count in errors.items() if count},
        "example_error": None,
        "series": None,
        "generator": _generator(GeneratorFacts(records.cpu_share, unknown, figures["p99"], 0.0)),
    }


def _errors(measured: Records, failed: NDArray[np.bool_]) -> dict[str, int]:
    kinds = zip(measured.status[failed].tolist(), measured.reason[failed].tolist(), strict=True)
    return dict(Counter(_kind(status, reason) for status, reason in kinds).most_common())


def _kind(status: int, reason: int) -> str:
    if reason != STATUS:
        return REASONS[reason]
    if status < GRPC:
        return f"status_{status}"
    code = status - GRPC
    return f"grpc_{_GRPC_CODES[code]}" if code < len(_GRPC_CODES) else f"grpc_{code}"


def _example_error(records: Records) -> str | None:
    for status, reason, text in records.samples:
        if status not in _REFUSED:
            return f"{_kind(status, reason)}: {text}"
    return None


def _series(records: Records, seconds: float) -> dict[str, Any]:
    """Rates by when answers came; latencies by when their requests were meant to leave."""
    edges = np.append(np.arange(0.0, seconds - 1e-9, SERIES_STEP_S), seconds)
    widths = np.diff(edges)
    ok = records.reason == OK
    begun = records.intended_s[ok]
    latency_s = records.done_s[ok] - begun
    figures = [
        histogram.figures(latency_s[(begun >= low) & (begun < high)])
        for low, high in pairwise(edges.tolist())
    ]
    return {
        "step_s": SERIES_STEP_S,
        "ok_rate": (np.histogram(records.done_s[ok], edges)[0] / widths).tolist(),
        "failed_rate": (np.histogram(records.done_s[~ok], edges)[0] / widths).tolist(),
        "p50_s": [each["p50"] for each in figures],
        "p99_s": [each["p99"] for each in figures],
    }


def _facts(measured: Records, latency_p99_s: float | None) -> GeneratorFacts:
    late = histogram.figures(measured.late_s)
    return GeneratorFacts(
        cpu_share=measured.cpu_share,
        late_s={name: late[name] for name in ("p50", "p99", "max")},
        latency_p99_s=latency_p99_s,
        waited_share=float(np.mean(measured.waited)) if len(measured.waited) else 0.0,
    )


def _generator(facts: GeneratorFacts) -> dict[str, Any]:
    return {
        "limited": limited_by_generator(facts),
        "note": limited_by_connections(facts),
        "late_s": dict(facts.late_s),
        "cpu_share": [round(share, 3) for share in facts.cpu_share],
        "waited_share": facts.waited_share,
    }
