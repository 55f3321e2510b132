"""What becomes of a request's record when it ends: counts, times, lines, spans."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.serving.telemetry import ReplicaTelemetry
from rayprism.telemetry.catalogue import REASONS, STAGES
from rayprism.telemetry.outcomes import outcome_of
from rayprism.telemetry.records import BatchRecord, Protocol, RequestRecord, Source
from rayprism.telemetry.request_log import RequestLog
from rayprism.telemetry.tracing import Trace, Tracer
from tests.support.recorded import Observed, Recorded

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BEGAN_S = 100.0
NOTHING = Observed(0.0, 0.0)


class At:
    """A replica's telemetry, and its clock."""

    def __init__(self, **options: Any) -> None:
        self.now_s = BEGAN_S
        self.telemetry = ReplicaTelemetry("flights", "3", "r1", clock=lambda: self.now_s, **options)
        self.seen = Recorded(self.telemetry.recorder)

    def end(
        self,
        reason: str = "ok",
        source: Source = "client",
        protocol: Protocol = "http",
        **more: Any,
    ) -> RequestRecord:
        """A request that has ended now, of which nothing else is known than what is given."""
        record = self.telemetry.begin(protocol, source, "id-1", BEGAN_S)
        record.reason = reason
        for name, value in more.items():
            setattr(record, name, value)
        self.telemetry.finish(record)
        return record

    def stage(self, name: str) -> Observed:
        return self.seen.histogram(f"rayprism_{name}_seconds", "4" if name == "forward" else "3")

    def stages(self) -> set[str]:
        return {name for name in STAGES if self.stage(name).number}


class Spy:
    """Stands for a tracer: what it was asked and told."""

    def __init__(self) -> None:
        self.began: list[tuple[str | None, str | None, float, float]] = []
        self.finished: list[RequestRecord] = []
        self.batches: list[tuple[BatchRecord, Sequence[Trace]]] = []
        self.trace: Any = None
        self.closed = 0

    def begin(self, parent: str | None, state: str | None, share: float, draw: float) -> Any:
        self.began.append((parent, state, share, draw))
        return self.trace

    def finish(self, record: RequestRecord) -> None:
        self.finished.append(record)

    def batch(self, record: BatchRecord, traces: Sequence[Trace]) -> None:
        self.batches.append((record, traces))

    def close(self) -> None:
        self.closed += 1


def spied(**options: Any) -> tuple[At, Spy]:
    spy = Spy()
    return At(tracer=cast(Tracer, spy), **options), spy


def request_log(path: Path, draw: Callable[[], float] | None = None) -> RequestLog:
    return RequestLog(
        path, model="flights", version="3", replica="r1", application="app", draw=draw
    )


def lines(log: RequestLog, path: Path) -> list[dict[str, Any]]:
    log.flush()
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Counts


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("source", ["client", "split", "shadow"])
@pytest.mark.parametrize("reason", [*REASONS, "a_code_that_is_new"])
@pytest.mark.parametrize("version", ["", "4"])
def test_every_ending_is_one_count(
    protocol: Protocol, source: Source, reason: str, version: str
) -> None:
    at = At()
    at.end(reason, source, protocol, version=version)
    labels = (version or "3", protocol, source, outcome_of(reason), reason)
    assert at.seen.requests() == {labels: 1}
    at.end(reason, source, protocol, version=version)
    assert at.seen.requests() == {labels: 2}


def test_what_alerts_ask_for_is_there_from_the_start() -> None:
    """A first failure is an increase then, and not a series that is new."""
    at = At()
    found = at.seen.series("rayprism_requests_total", "version", "protocol", "source", "reason")
    reasons = ("ok", "internal", "model_failed", "overloaded", "deadline_exceeded")
    assert found == {("3", p, "client", r): 0 for p in ("http", "grpc") for r in reasons}
    assert at.seen.series("rayprism_request_seconds_count", "version") == {("3",): 0}


@pytest.mark.parametrize("source", ["client", "split", "shadow"])
@pytest.mark.parametrize("reason", ["ok", "invalid_input", "cancelled", "overloaded"])
def test_only_successes_of_clients_have_a_time(source: Source, reason: str) -> None:
    at = At()
    at.now_s += 0.25
    at.end(reason, source, rows=7)
    answered = source == "client" and reason == "ok"
    found = at.seen.histogram("rayprism_request_seconds", "3")
    assert found == (Observed(1, 0.25) if answered else NOTHING)
    rows = {("3",): 7.0} if reason == "ok" else {}
    assert at.seen.counts("rayprism_rows_total", "version") == rows, "whoever asked"


def test_a_candidates_answer_is_the_candidates() -> None:
    at = At()
    at.now_s += 0.5
    times: dict[str, Any] = {"forward_began_s": BEGAN_S + 0.125, "forward_ended_s": BEGAN_S + 0.375}
    at.end(version="4", forwarded_to="4", **times)
    assert at.seen.requests() == {("4", "http", "client", "ok", "ok"): 1}
    assert at.seen.histogram("rayprism_request_seconds", "4") == (1, 0.5)
    assert at.seen.histogram("rayprism_request_seconds", "3") == NOTHING
    assert at.stages() == {"forward"}
    assert at.stage("forward") == (1, 0.25)


# Stages


steps = st.lists(st.integers(1, 10**6), min_size=6, max_size=6)


@given(steps, st.booleans(), st.booleans())
def test_stages_add_up_to_the_whole(micros: list[int], prepares: bool, falls_back: bool) -> None:
    at = At()
    ends = [BEGAN_S]
    for index, micro in enumerate(micros):
        is_there = (index > 0 or falls_back) and (index != 2 or prepares)
        ends.append(ends[-1] + micro * 1e-6 * is_there)
    _, forwarded_s, decoded_s, prepared_s, started_s, computed_s, at.now_s = ends
    sent_on: dict[str, Any] = {
        "forward_began_s": BEGAN_S,
        "forward_ended_s": forwarded_s,
        "forwarded_to": "4",
    }
    at.end(
        decoded_s=decoded_s,
        prepared_s=prepared_s if prepares else 0.0,
        started_s=started_s,
        computed_s=computed_s,
        **({**sent_on, "fallback": "late"} if falls_back else {}),
    )
    absent = {
        name for name, is_there in (("prepare", prepares), ("forward", falls_back)) if not is_there
    }
    assert at.stages() == set(STAGES) - absent
    total = sum(at.stage(name).sum for name in STAGES)
    whole = at.seen.histogram("rayprism_request_seconds", "3")
    assert whole == (1, pytest.approx(total, abs=1e-9))
    assert at.stage("decode").sum == pytest.approx(micros[1] * 1e-6, abs=1e-9), "no forwarding"


DECODED: dict[str, Any] = {"decoded_s": BEGAN_S + 0.125}
STARTED = {**DECODED, "started_s": BEGAN_S + 0.25}
COMPUTED = {**STARTED, "computed_s": BEGAN_S + 0.375}


@pytest.mark.parametrize(
    ("reason", "times", "stages"),
    [
        ("invalid_input", {}, set()),
        ("overloaded", DECODED, {"decode"}),
        ("cancelled", DECODED, {"decode"}),
        ("deadline_exceeded", {}, set()),
        ("deadline_exceeded", DECODED, {"decode", "queue"}),
        ("deadline_exceeded", STARTED, {"decode", "queue"}),
        ("model_failed", STARTED, {"decode", "queue"}),
        ("cancelled", STARTED, {"decode", "queue"}),
        ("internal", COMPUTED, {"decode", "queue", "compute"}),
        ("cancelled", COMPUTED, {"decode", "queue", "compute"}),
        ("ok", COMPUTED, {"decode", "queue", "compute", "encode"}),
    ],
)
def test_a_failure_has_the_stages_that_it_came_through(
    reason: str, times: dict[str, float], stages: set[str]
) -> None:
    at = At()
    at.now_s += 0.5
    at.end(reason, **times)
    assert at.stages() == stages
    assert all(at.stage(name) == (1, 0.125) for name in stages - {"queue"})
    if "queue" in stages:
        until_the_end = "started_s" not in times
        assert at.stage("queue") == (1, 0.375 if until_the_end else 0.125)


def test_what_expires_after_its_preparation_waited_from_there() -> None:
    at = At()
    at.now_s += 1.0
    at.end("deadline_exceeded", decoded_s=BEGAN_S + 0.125, prepared_s=BEGAN_S + 0.5)
    assert at.stages() == {"decode", "prepare", "queue"}
    assert at.stage("queue") == (1, 0.5)


FORWARDED: dict[str, Any] = {
    "forward_began_s": BEGAN_S,
    "forward_ended_s": BEGAN_S + 1,
    "forwarded_to": "4",
}


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"version": "4"}, True),
        ({"version": "4", "reason": "model_failed"}, True),  # the one that the client named
        ({"fallback": "late"}, True),
        ({"fallback": "resting"}, False),
        ({"reason": "not_found"}, False),
        ({"reason": "cancelled"}, False),
    ],
)
def test_a_version_that_may_not_exist_is_no_label(changes: dict[str, Any], counted: bool) -> None:
    """Clients may name any: each would be a series for ever."""
    at = At()
    at.end(**{**FORWARDED, **changes})
    found = at.seen.series("rayprism_forward_seconds_count", "version")
    assert found == ({("4",): 1} if counted else {})


# On and off


def test_without_metrics_nothing_is_counted_and_all_else_is_done(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = request_log(path)
    at, spy = spied(is_on=False, log=log)
    spy.trace = Trace(1, 1, 0, "", lambda: 7)
    at.telemetry.log_share = 1.0
    before = at.seen.requests()
    record = at.end(rows=3, **COMPUTED)
    at.end("model_failed")
    at.telemetry.batch(BatchRecord(1, 3, 1, 0.0), 3, 1, [spy.trace])
    assert (at.seen.requests(), before) == ({}, {})
    assert at.stages() == set()
    assert at.seen.counts("rayprism_rows_total", "version") == {}
    assert at.seen.histogram("rayprism_batch_rows", "3") == NOTHING
    assert [line["reason"] for line in lines(log, path)] == ["ok", "model_failed"]
    assert spy.finished[0] is record
    assert len(spy.batches) == 1


# The log


@pytest.mark.parametrize(
    ("share", "logged"), [(0.0, 0), (0.001, 1), (0.25, 2), (0.5, 3), (0.999, 3), (1.0, 4)]
)
def test_a_share_of_the_successes_is_logged(tmp_path: Path, share: float, logged: int) -> None:
    path = tmp_path / "log.jsonl"
    drawn = iter([0.0, 0.249, 0.499, 0.999])
    log = request_log(path, lambda: next(drawn))
    at = At(log=log)
    at.telemetry.log_share = share
    for _ in range(4):
        at.end()
    assert [line["outcome"] for line in lines(log, path)] == ["ok"] * logged
    assert at.seen.requests() == {("3", "http", "client", "ok", "ok"): 4}, "all are counted"


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason != "ok"])
def test_every_failure_is_logged(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "log.jsonl"
    log = request_log(path, lambda: pytest.fail("nothing is drawn for a failure"))
    at = At(log=log)
    at.now_s += 0.5
    at.end(reason, "split", "grpc", **DECODED)
    (line,) = lines(log, path)
    told = {name: line[name] for name in ("source", "protocol", "reason", "outcome", "total_s")}
    assert told == {
        "source": "split",
        "protocol": "grpc",
        "reason": reason,
        "outcome": outcome_of(reason),
        "total_s": 0.5,
    }


def test_a_models_seed_does_not_choose_who_is_logged(tmp_path: Path) -> None:
    """A model's code may seed the common generator at each request."""
    path = tmp_path / "log.jsonl"
    log = request_log(path)
    at = At(log=log)
    at.telemetry.log_share = 0.5
    for _ in range(200):
        random.seed(1)  # the first draw of which is 0.13
        at.end()
    assert 0 < len(lines(log, path)) < 200


# Traces


@pytest.mark.parametrize(("source", "share"), [("client", 0.375), ("split", 0.0), ("shadow", 0.0)])
def test_only_what_clients_send_is_drawn(source: Source, share: float) -> None:
    at, spy = spied(draw=lambda: 0.75)
    at.telemetry.trace_share = 0.375
    record = at.telemetry.begin("http", source, "id-1", BEGAN_S, PARENT, "a=1")
    assert spy.began == [(PARENT, "a=1", share, 0.75)]
    assert record.trace is None
    at.telemetry.finish(record)
    assert spy.finished == [], "it is not traced"
    spy.trace = Trace(1, 1, 0, "", lambda: 7)
    record = at.telemetry.begin("grpc", source, "id-2", BEGAN_S)
    assert spy.began[1] == (None, None, share, 0.75)
    assert record.trace is spy.trace
    at.telemetry.finish(record)
    assert spy.finished == [record]


def test_without_a_tracer_nothing_is_drawn() -> None:
    at = At(draw=lambda: pytest.fail("for nothing"))
    assert at.telemetry.begin("http", "client", "id-1", BEGAN_S, PARENT).trace is None


def test_a_models_seed_does_not_choose_who_is_traced() -> None:
    drawn = set()
    for _ in range(2):
        random.seed(1)
        at, spy = spied()
        at.end()
        drawn.add(spy.began[0][3])
    assert len(drawn) == 2


def test_a_record_is_whole_when_it_is_told_of() -> None:
    at, spy = spied()
    spy.trace = Trace(1, 1, 0, "", lambda: 7)
    at.now_s += 2
    record = at.end("model_failed")
    assert (record.began_s, record.ended_s) == (BEGAN_S, BEGAN_S + 2)
    assert spy.finished[0].ended_s == BEGAN_S + 2


# Batches, loading, the end


def test_batches_are_counted_and_traced_where_a_request_is() -> None:
    at, spy = spied()
    first, second = BatchRecord(1, 5, 2, 0.0), BatchRecord(2, 1, 1, 0.0)
    trace = Trace(1, 1, 0, "", lambda: 7)
    at.telemetry.batch(first, 40, 12, [])
    at.telemetry.batch(second, 8, 0, [trace])
    assert at.seen.histogram("rayprism_batch_rows", "3") == (2, 6)
    assert at.seen.counts("rayprism_batch_cost_total", "version") == {("3",): 48}
    assert at.seen.counts("rayprism_batch_padding_total", "version") == {("3",): 12}
    assert spy.batches == [(second, [trace])]


def test_loading_is_counted_by_step() -> None:
    at = At()
    at.telemetry.loaded({"imports": 0.5, "golden": 0.25})
    assert at.seen.counts("rayprism_loads_total", "version", "outcome") == {("3", "ok"): 1}
    found = at.seen.counts("rayprism_load_seconds_total", "step")
    assert found == {("imports",): 0.5, ("golden",): 0.25}


def test_the_end_writes_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    at, spy = spied(log=request_log(path))
    at.end("model_failed")
    at.telemetry.close()
    assert len(path.read_text().splitlines()) == 1
    assert spy.closed == 1
    At().telemetry.close()
