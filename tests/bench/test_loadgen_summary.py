from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from bench.loadgen.histogram import FIGURES, decode
from bench.loadgen.records import (
    BROKEN,
    CONNECT,
    GRPC,
    NOT_SENT,
    OK,
    STATUS,
    TIMEOUT,
    Recorder,
    Records,
)
from bench.loadgen.summary import (
    GeneratorFacts,
    limited_by_connections,
    limited_by_generator,
    summarise,
)

NAN = float("nan")
Row = tuple[float, float, float, int, int, bool]


def records_of(
    *rows: Row,
    loop: Literal["open", "closed"] = "open",
    late_s: float = 0.0,
    samples: tuple[tuple[int, int, str], ...] = (),
) -> Records:
    """Rows of intended, sent, done, status, reason, retry_after."""
    recorder = Recorder()
    for intended, sent, done, status, reason, retry_after in rows:
        recorder.add(
            1000 + intended, late_s, 1000 + sent, 1000 + done, status, reason, retry_after, False
        )
    for sample in samples:
        recorder.sample(*sample)
    return recorder.finish(loop, 1000.0, 0.5)


def right(intended: float, done: float, sent: float | None = None) -> Row:
    return (intended, intended if sent is None else sent, done, 200, OK, False)


def test_latency_counts_from_the_intended_time_and_service_from_the_sending() -> None:
    found = summarise(records_of(right(0.0, 0.5, sent=0.25), right(0.5, 2.0, sent=1.0)), 2.0, None)
    assert found["latency_s"]["min"] == pytest.approx(0.5)
    assert found["latency_s"]["max"] == pytest.approx(1.5)
    assert found["latency_s"]["mean"] == pytest.approx(1.0)
    assert found["service_s"]["min"] == pytest.approx(0.25)
    assert found["service_s"]["max"] == pytest.approx(1.0)
    assert decode(found["histogram"]).get_total_count() == 2


def test_the_rate_counts_right_answers_within_the_time() -> None:
    records = records_of(
        right(-0.1, 0.1),  # of the warm-up: it took the server's time here
        right(0.1, 0.2),
        right(1.0, 1.9),
        right(1.9, 2.1),  # after the end: as the first, of the next stretch
        (1.0, 1.0, 1.1, 500, STATUS, False),
    )
    found = summarise(records, 2.0, None)
    assert found["rate"] == 1.5
    assert found["requests"] == 4
    assert found["ok"] == 3
    assert found["offered_rate"] == 2.0
    assert found["duration_s"] == 2.0
    assert found["goodput"] == found["rate"]
    assert found["latency_s"]["max"] == pytest.approx(0.9)


def test_goodput_counts_what_came_within_the_target() -> None:
    records = records_of(
        right(0.0, 0.1),
        right(0.5, 0.7),
        right(1.0, 1.5, sent=1.4),  # sent too late is late
        right(1.9, 2.1),
    )
    assert summarise(records, 2.0, 0.25)["goodput"] == 1.5


def test_a_server_that_cannot_keep_up_has_its_own_rate() -> None:
    # 100 requests/s offered for 2 s, 50/s answered: all of them in the end.
    rows = [right(index / 100, (index + 1) / 50) for index in range(200)]
    found = summarise(records_of(*rows), 2.0, 0.5)
    assert found["offered_rate"] == 100
    assert found["ok"] == 200
    assert found["rate"] == pytest.approx(50, abs=0.5)
    assert found["goodput"] == pytest.approx(24.5, abs=1)


def test_failures_are_counted_by_kind_and_refusals_apart() -> None:
    records = records_of(
        right(0.0, 0.1),
        (0.1, 0.2, 0.21, 429, STATUS, True),
        (0.1, 0.2, 0.23, 503, STATUS, False),
        (0.1, 0.1, 0.2, GRPC + 8, STATUS, True),
        (0.1, 0.1, 0.2, GRPC + 14, STATUS, False),
        (0.1, 0.1, 0.2, GRPC + 13, STATUS, False),
        (0.1, 0.1, 0.2, 500, STATUS, False),
        (0.1, 0.1, 0.2, 500, STATUS, False),
        (0.1, NAN, 0.2, 0, CONNECT, False),
        (0.1, 0.1, 0.2, 0, BROKEN, False),
        (0.1, 0.1, 0.2, 0, TIMEOUT, False),
        (0.1, NAN, 0.2, 0, NOT_SENT, False),
        samples=((429, STATUS, "too many"), (500, STATUS, "it broke"), (0, TIMEOUT, "late")),
    )
    found = summarise(records, 2.0, None)
    assert found["errors"] == {
        "status_500": 2,
        "grpc_INTERNAL": 1,
        "connect": 1,
        "broken": 1,
        "timeout": 1,
        "not_sent": 1,
    }
    assert found["example_error"] == "status_500: it broke"
    refused = found["refused"]
    assert (refused["count"], refused["rate"], refused["with_retry_after"]) == (4, 2.0, 2)
    # From when they were sent.
    assert refused["latency_s"]["min"] == pytest.approx(0.01)
    assert refused["latency_s"]["max"] == pytest.approx(0.1)
    assert found["requests"] == 12
    assert found["ok"] == 1


def test_the_series_show_when() -> None:
    records = records_of(
        right(-0.2, 0.1),
        right(0.0, 0.1),
        right(0.4, 0.7),
        right(1.0, 1.1),
        (0.6, 0.6, 0.7, 500, STATUS, False),
    )
    series = summarise(records, 1.25, None)["series"]
    assert series["step_s"] == 0.5
    assert series["ok_rate"] == [4.0, 2.0, 4.0]  # the last step has a quarter of a second
    assert series["failed_rate"] == [0.0, 2.0, 0.0]
    assert series["p50_s"] == [pytest.approx(0.1), None, pytest.approx(0.1)]
    assert series["p99_s"] == [pytest.approx(0.3), None, pytest.approx(0.1)]


def test_without_any_right_answer_there_are_no_figures_but_counts() -> None:
    for records in (records_of(), records_of((0.0, NAN, 0.1, 0, CONNECT, False))):
        found = summarise(records, 1.0, 0.1)
        assert found["latency_s"] == dict.fromkeys(FIGURES)
        assert found["rate"] == found["goodput"] == 0
        json.dumps(found, allow_nan=False)


def test_a_sample_is_json() -> None:
    found = summarise(records_of(right(0.0, 0.1), loop="closed"), 1.0, None)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["offered_rate"] is None


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    records = records_of(
        right(0.0, 0.1),
        (0.1, NAN, 0.2, 0, CONNECT, True),
        samples=((0, CONNECT, "näh"),),
    )
    records.save(tmp_path / "records.npz")
    loaded = Records.load(tmp_path / "records.npz")
    assert loaded.loop == "open"
    assert loaded.samples == ((0, CONNECT, "näh"),)
    assert loaded.cpu_share == (0.5,)
    for name in ("intended_s", "late_s", "sent_s", "done_s", "status", "reason", "retry_after"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(records, name))
        assert getattr(loaded, name).dtype == getattr(records, name).dtype
    merged = Records.merge([loaded, records])
    assert len(merged.done_s) == 4
    assert merged.cpu_share == (0.5, 0.5)


def test_records_without_requests_come_back_too(tmp_path: Path) -> None:
    records_of().save(tmp_path / "records.npz")
    assert len(Records.load(tmp_path / "records.npz").done_s) == 0


def test_within_keeps_what_began_or_ended_there() -> None:
    records = records_of(right(-1.0, -0.5), right(-0.5, 0.1), right(0.5, 3.0), right(2.0, 2.1))
    assert records.within(1.0).intended_s.tolist() == [-0.5, 0.5]
    assert records.within(1.0).measured().intended_s.tolist() == [0.5]


def facts(**given: Any) -> GeneratorFacts:
    late_s = {"p50": 0.0, "p99": given.pop("late_p99_s", 0.0), "max": 0.1}
    return GeneratorFacts(
        **{"cpu_share": (0.5,), "latency_p99_s": 0.01, "waited_share": 0.0, **given}, late_s=late_s
    )


def test_a_generator_with_room_is_no_limit() -> None:
    assert limited_by_generator(facts()) is None
    assert limited_by_connections(facts()) is None


def test_a_busy_worker_is_a_limit() -> None:
    assert "97% of a core" in str(limited_by_generator(facts(cpu_share=(0.2, 0.97))))


@pytest.mark.parametrize(
    ("late_p99_s", "latency_p99_s", "limited"),
    [
        (0.0009, 0.001, False),  # as exact as the system is
        (0.002, 0.5, False),  # nothing beside the latency
        (0.002, 0.01, True),
        (0.002, None, True),
        (None, 0.01, False),
    ],
)
def test_lateness_is_a_limit_where_it_shows_in_the_latency(
    late_p99_s: float | None, latency_p99_s: float | None, limited: bool
) -> None:
    said = limited_by_generator(facts(late_p99_s=late_p99_s, latency_p99_s=latency_p99_s))
    assert (said is not None) == limited
    if said is not None:
        assert "2.0 ms" in said


def test_connections_in_use_are_not_the_generators_fault() -> None:
    found = facts(waited_share=0.25)
    assert limited_by_generator(found) is None
    assert "25% of the requests" in str(limited_by_connections(found))
