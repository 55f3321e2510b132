"""The request log: what is in it, what is thinned, and what a full disk does."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from rayprism.telemetry import request_log
from rayprism.telemetry.outcomes import outcome_of
from rayprism.telemetry.records import BatchRecord, RequestRecord
from rayprism.telemetry.request_log import MOST_FAILURES_PER_S, RequestLog

NOON = datetime.fromisoformat("2030-01-02T12:00:00.123456+00:00").timestamp()


class Fixture:
    """A log, its clock and its draws."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.path = path
        self.now_s = 1000.0
        self.drawn = 0.0
        self.log = RequestLog(
            path,
            model="flights",
            version="3",
            replica="r1",
            application="flights-app",
            draw=lambda: self.drawn,
            clock=lambda: self.now_s,
            wall_clock=lambda: NOON,
            **more,
        )

    def offer(self, reason: str = "ok", share: float = 1.0, **changes: Any) -> None:
        record = RequestRecord("http", "client", "id-1", 50.0, reason=reason, ended_s=50.25)
        for name, value in changes.items():
            setattr(record, name, value)
        self.log.offer(record, outcome_of(reason), share)

    def lines(self) -> list[dict[str, Any]]:
        self.log.flush()
        return read(self.path) if self.path.exists() else []


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [orjson.loads(line) for line in data.splitlines()]


@pytest.fixture
def at(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path / "serve" / "requests.jsonl")


# --- what is in a line


def test_a_line_has_all_that_is_there(at: Fixture) -> None:
    at.offer(
        rows=4,
        batch=BatchRecord(7, 12, 3, 50.05),
        forward_began_s=50.0,
        forward_ended_s=50.01,
        forwarded_to="4",
        fallback="late",
        decoded_s=50.02,
        prepared_s=50.04,
        started_s=50.05,
        computed_s=50.15,
        trace=SimpleNamespace(trace_id="ab" * 16),
    )
    (line,) = at.lines()
    assert line == {
        "time": "2030-01-02T12:00:00.123Z",
        "request_id": "id-1",
        "trace_id": "ab" * 16,
        "model": "flights",
        "version": "3",
        "replica": "r1",
        "application": "flights-app",
        "protocol": "http",
        "source": "client",
        "outcome": "ok",
        "reason": "ok",
        "rows": 4,
        "batch": {"number": 7, "rows": 12, "requests": 3},
        "total_s": 0.25,
        "forward_s": 0.01,
        "decode_s": 0.01,
        "prepare_s": 0.02,
        "queue_s": 0.01,
        "compute_s": 0.1,
        "encode_s": 0.1,
        "forwarded_to": "4",
        "fallback": "late",
    }


def test_a_line_has_nothing_that_is_not_there(at: Fixture) -> None:
    at.offer("invalid_input", version="4")
    (line,) = at.lines()
    assert line["version"] == "4"
    assert line["outcome"] == "client_error"
    assert line["reason"] == "invalid_input"
    assert [key for key in line if key.endswith("_s")] == ["total_s"]
    assert {"trace_id", "rows", "batch", "forwarded_to", "fallback"}.isdisjoint(line)


@pytest.mark.parametrize(
    ("request_id", "written"),
    [
        ("a\nb\r\x00", "a\nb\r\x00"),
        ('"}\n{"', '"}\n{"'),
        ("é\u2028\u2029\x85", "é\ufffd\ufffd\ufffd"),
        ("\ud800", "\ufffd"),
        ("x" * 500, "x" * 128),
    ],
)
def test_an_id_cannot_break_a_line(at: Fixture, request_id: str, written: str) -> None:
    at.offer("internal", request_id=request_id)
    at.offer("internal")
    at.log.flush()
    text = at.path.read_text()
    assert len(text.splitlines()) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert [line["request_id"] for line in read(at.path)] == [written, "id-1"]


# --- which requests


def test_successes_are_drawn(at: Fixture) -> None:
    for drawn, share in ((0.0, 0.0), (0.099, 0.1), (0.1, 0.1), (0.999, 1.0)):
        at.drawn = drawn
        at.offer(share=share, request_id=f"{drawn}/{share}")
    assert [line["request_id"] for line in at.lines()] == ["0.099/0.1", "0.999/1.0"]


def test_every_failure_is_written(at: Fixture) -> None:
    reasons = ["invalid_input", "cancelled", "overloaded", "model_failed"]
    at.drawn = 0.999
    for reason in reasons:
        at.offer(reason, share=0.0)
    lines = at.lines()
    assert [line["reason"] for line in lines] == reasons
    outcomes = ["client_error", "cancelled", "server_error", "server_error"]
    assert [line["outcome"] for line in lines] == outcomes


def test_a_flood_of_failures_is_thinned_and_counted(at: Fixture) -> None:
    for _ in range(MOST_FAILURES_PER_S + 50):
        at.offer("overloaded", share=0.0)
    at.offer("invalid_input", share=0.0)
    at.offer("ok")  # is not a failure
    assert len(at.lines()) == MOST_FAILURES_PER_S + 1
    at.now_s += 1
    at.offer("overloaded", share=0.0)
    at.now_s += 1
    assert len(at.lines()) == MOST_FAILURES_PER_S + 3
    summary, failure = at.lines()[-2:]
    assert summary == {
        "time": "2030-01-02T12:00:00.123Z",
        "model": "flights",
        "replica": "r1",
        "application": "flights-app",
        "left_out": 51,
        "left_out_by_reason": {"overloaded": 50, "invalid_input": 1},
    }
    assert failure["reason"] == "overloaded"


def test_the_end_of_a_flood_is_told_without_another_failure(at: Fixture) -> None:
    for _ in range(MOST_FAILURES_PER_S + 1):
        at.offer("internal")
    at.log.flush()
    at.now_s += 1
    assert at.lines()[-1]["left_out"] == 1
    assert len(at.lines()) == MOST_FAILURES_PER_S + 1


def test_the_end_of_the_log_tells_of_its_last_second(at: Fixture) -> None:
    for _ in range(MOST_FAILURES_PER_S + 3):
        at.offer("internal")
    at.log.close()
    assert read(at.path)[-1]["left_out"] == 3


# --- files


def test_nothing_is_written_before_a_flush_and_no_file_without_a_line(at: Fixture) -> None:
    at.log.flush()
    at.offer()
    assert not at.path.exists()
    at.log.flush()
    assert len(read(at.path)) == 1


def test_it_goes_on_where_it_was(at: Fixture) -> None:
    at.offer()
    at.log.flush()
    at.offer()
    at.log.flush()
    other = Fixture(at.path)
    other.offer()
    other.log.flush()
    assert len(read(at.path)) == 3


def test_files_are_put_aside_by_size(tmp_path: Path) -> None:
    at = Fixture(tmp_path / "requests.jsonl", most_bytes=1000, backups=2)
    for number in range(30):
        at.offer(request_id=f"n{number}")
        if number % 7 == 0:
            at.log.flush()
    at.log.flush()
    files = [at.path.with_name("requests.jsonl.2"), at.path.with_name("requests.jsonl.1"), at.path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = [line["request_id"] for file in files for line in read(file)]
    assert kept == [f"n{number}" for number in range(30 - len(kept), 30)]
    assert len(kept) >= 6


def test_a_file_that_was_taken_away_is_made_anew(at: Fixture, tmp_path: Path) -> None:
    at.offer(request_id="before")
    at.log.flush()
    at.path.rename(tmp_path / "elsewhere")
    at.path.parent.rmdir()
    at.offer(request_id="after")
    assert [line["request_id"] for line in at.lines()] == ["after"]


def test_without_backups_it_begins_anew(tmp_path: Path) -> None:
    at = Fixture(tmp_path / "requests.jsonl", most_bytes=400, backups=0)
    for number in range(5):
        at.offer(request_id=f"n{number}")
    at.log.flush()
    assert list(tmp_path.iterdir()) == [at.path]
    assert read(at.path)[-1]["request_id"] == "n4"


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    at = Fixture(tmp_path / "file" / "requests.jsonl")
    for _ in range(3):
        at.offer()
        at.offer()
        at.log.flush()
    assert at.log.lost_lines == 6
    (line,) = lost(caplog)
    assert line.startswith("2 lines of the request log are lost, 2 so far: ")
    at.now_s += 61
    at.offer()
    at.log.flush()
    assert lost(caplog)[1].startswith("5 lines of the request log are lost, 7 so far: ")


def test_a_full_disk_costs_whole_lines_only(at: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    at.offer(request_id="before")
    at.log.flush()
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file
            self._written = False

        def write(self, data: memoryview) -> int:
            if self._written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._written = True
            return int(self._file.write(data[:20]))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *given, **more: Full(opened(*given, **more)))
        at.offer(request_id="lost")
        at.log.flush()
    at.offer(request_id="after")
    assert [line["request_id"] for line in at.lines()] == ["before", "after"]
    assert at.log.lost_lines == 1


def test_memory_is_bounded(
    at: Fixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "MOST_WAITING_LINES", 10)
    for _ in range(15):
        at.offer()
    assert len(at.lines()) == 10
    assert at.log.lost_lines == 5
    assert len(lost(caplog)) == 1


def test_writing_and_offering_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    at = Fixture(tmp_path / "requests.jsonl", most_bytes=50_000, backups=1000)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            at.log.flush()

    thread = threading.Thread(target=write)
    thread.start()
    for number in range(5000):
        at.offer(request_id=f"n{number}")
    over.set()
    thread.join()
    at.log.flush()
    older = sorted(tmp_path.glob("*.jsonl.*"), key=lambda file: -int(file.suffix[1:]))
    files = [*older, at.path]
    assert len(older) > 5
    found = [line["request_id"] for file in files for line in read(file)]
    assert at.log.lost_lines == 0
    assert found == [f"n{number}" for number in range(5000)]


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
