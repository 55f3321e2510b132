"""The lines of a run."""

from __future__ import annotations

from typing import Any

from bench.progress import Progress, describe_sample, expected_s
from bench.scenario import JobLoad, RequestLoad, Scenario, Search
from tests.bench.fake_servers import fake_figures


def test_what_is_left_is_what_was_planned_at_the_speed_so_far() -> None:
    now = 0.0
    lines: list[str] = []
    load = RequestLoad(loop="closed", seconds=6, warm_up_s=1)
    scenario = Scenario.model_validate(
        {
            "title": "t",
            "servers": {"a": {"kind": "rayprism", "model": "tiny"}},
            "loads": {"l": load.model_dump()},
            "rounds": 3,
        }
    )
    progress = Progress(scenario, lines.append, lambda: now)
    assert progress.left_s() == 3 * expected_s(load)
    now = 65.0
    progress.begin_measuring()
    now = 125.0
    progress.done(load)
    # A third took a minute.
    assert progress.left_s() == 120
    progress.say("text")
    assert lines == ["[2:05, about 2:00 left] text"]


def test_a_search_takes_longer_than_a_rate_and_rows_take_time() -> None:
    rate = RequestLoad(loop="open", rate=5)
    search = RequestLoad(loop="open", search=Search(at_most_s=1, low=1, high=2))
    assert expected_s(search) > 2 * expected_s(rate)
    assert expected_s(JobLoad(loop="job", rows=10**7)) > expected_s(JobLoad(loop="job", rows=1))


def test_lines_of_samples() -> None:
    assert describe_sample({"ready_s": 1.234}) == "ready in 1.23 s"
    assert describe_sample({"rows": 10, "seconds": 2.0, "rate": 5.0}) == "2.0 s, 5 rows/s"
    plain = fake_figures(100)
    assert describe_sample(plain) == "100/s, p50 10.00 ms, p99 10.00 ms"


def test_what_is_wrong_with_a_sample_is_in_its_line() -> None:
    sample: dict[str, Any] = fake_figures(100, failed=3) | {
        "offered_rate": 200.0,
        "generator": {"limited": "a worker was busy"},
        "events": [
            {"what": "promote", "error": None},
            {"what": "scale 2", "error": "no room"},
        ],
        "other_cores": 0.7,
    }
    sample["refused"]["count"] = 4
    line = describe_sample(sample)
    for part in (
        "100/s of 200/s",
        "4 refused",
        "ERRORS {'status_500': 3}",
        "LIMITED: a worker was busy",
        "FAILED scale 2: no room",
        "0.7 cores busy with something else",
    ):
        assert part in line
    assert "promote" not in line


def test_a_sample_without_answers_has_a_line() -> None:
    empty = dict.fromkeys(("p50", "p99"))
    sample = fake_figures(1) | {"rate": 0.0, "ok": 0, "latency_s": empty}
    assert describe_sample(sample) == "0/s"
