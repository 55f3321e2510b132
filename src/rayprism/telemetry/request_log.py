"""The request log: a line of JSON for each failure, and for a share of all other requests.

Lines are kept in memory until `flush`, so that no request waits for a disk, and a disk that is full
costs lines and nothing else.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from rayprism.telemetry.losses import Losses
from rayprism.telemetry.outcomes import Outcome
from rayprism.telemetry.readings import shown_id, stages
from rayprism.telemetry.records import RequestRecord

__all__ = ["RequestLog"]

MOST_FAILURES_PER_S = 200
"""Lines of failures; how many more there were is said in one line."""

MOST_WAITING_LINES = 20_000
"""Lines in memory, of some 400 bytes each."""

_MOST_WRITE_BYTES = 1 << 20


class RequestLog:
    """The log of one replica.

    `offer` belongs to one thread; `flush` may run in another.

    Args:
        path: The file. Its folder is made where it is missing.
        model: The model's name.
        version: Of this replica.
        replica: Serve's id of it.
        application: Serve's name of the application.
        draw: Uniform from 0 up to, but not including, 1; by default of a generator of its own,
            since models seed the common one.
        clock: Seconds, for what happens once a second or once a minute.
        wall_clock: Seconds since 1970.
        most_bytes: Of a file, before it is put aside.
        backups: Files that are kept aside, as `<path>.1` (the newest) and so on.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        model: str,
        version: str,
        replica: str,
        application: str,
        draw: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        most_bytes: int = 100_000_000,
        backups: int = 3,
    ) -> None:
        self._version = version
        self._identity = {"replica": replica, "application": application}
        self._model = model
        self._draw = draw or random.Random().random
        self._clock = clock
        self._wall_clock = wall_clock
        self._file = _File(Path(path), most_bytes, backups)
        self._write_bytes = min(most_bytes, _MOST_WRITE_BYTES)
        self._losses = Losses("lines of the request log", clock)
        self._lines: deque[bytes] = deque()
        self._flushing = threading.Lock()
        self._counting = threading.Lock()
        self._second = -1
        self._failures = 0
        self._left_out: Counter[str] = Counter()

    @property
    def lost_lines(self) -> int:
        """Lines that could not be kept or written, since the start."""
        return self._losses.total

    def offer(self, record: RequestRecord, outcome: Outcome, share: float) -> None:
        """Keeps a line of a request that has ended, or not. Never raises.

        Args:
            record: The request.
            outcome: Of it. Whatever is not `ok` is a failure.
            share: Of the requests that did not fail, how many get a line; 0 to 1.
        """
        if outcome == "ok":
            if self._draw() >= share:
                return
        elif self._is_left_out(record.reason):
            return
        self._keep(self._line(record, outcome))

    def flush(self) -> None:
        """Writes what is kept. To be called every second. Never raises."""
        with self._flushing:
            if int(self._clock()) != self._second:
                self._turn_second()
            self._write_all()

    def close(self) -> None:
        """Writes all that there is to say at the end. Never raises."""
        with self._flushing:
            self._turn_second()
            self._write_all()

    def _write_all(self) -> None:
        while self._lines:
            lines = [self._lines.popleft()]
            size = len(lines[0])
            while self._lines and size + len(self._lines[0]) <= self._write_bytes:
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            try:
                self._file.append(b"".join(lines))
            except OSError as error:
                lost = len(lines) + len(self._lines)
                self._lines.clear()
                self._losses.add(lost, f"{self._file.path}: {error.strerror or error}")

    def _keep(self, line: dict[str, Any]) -> None:
        if len(self._lines) >= MOST_WAITING_LINES:
            self._losses.add(1, f"{MOST_WAITING_LINES} wait to be written")
            return
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def _is_left_out(self, reason: str) -> bool:
        if int(self._clock()) != self._second:
            self._turn_second()
        with self._counting:
            self._failures += 1
            if self._failures <= MOST_FAILURES_PER_S:
                return False
            self._left_out[reason] += 1
            return True

    def _turn_second(self) -> None:
        """Counts failures anew, and tells how many were left out."""
        with self._counting:
            self._second = int(self._clock())
            self._failures = 0
            left_out, self._left_out = self._left_out, Counter()
        if left_out:
            self._keep(
                {
                    "time": self._time(),
                    "model": self._model,
                    **self._identity,
                    "left_out": left_out.total(),
                    "left_out_by_reason": dict(left_out),
                }
            )

    def _time(self) -> str:
        now = datetime.fromtimestamp(self._wall_clock(), UTC)
        return now.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"

    def _line(self, record: RequestRecord, outcome: Outcome) -> dict[str, Any]:
        line: dict[str, Any] = {"time": self._time(), "request_id": shown_id(record.request_id)}
        if record.trace is not None:
            line["trace_id"] = record.trace.trace_id
        line["model"] = self._model
        line["version"] = record.version or self._version
        line |= self._identity
        line["protocol"] = record.protocol
        line["source"] = record.source
        line["outcome"] = outcome
        line["reason"] = record.reason
        if record.rows:
            line["rows"] = record.rows
        batch = record.batch
        if batch is not None:
            line["batch"] = {
                "number": batch.number,
                "rows": batch.rows,
                "requests": batch.requests,
            }
        line["total_s"] = round(record.ended_s - record.began_s, 6)
        for name, began_s, ended_s in stages(record):
            line[f"{name}_s"] = round(ended_s - began_s, 6)
        if record.forwarded_to:
            line["forwarded_to"] = record.forwarded_to
        if record.fallback:
            line["fallback"] = record.fallback
        return line


class _File:
    """A file that is put aside when it is large.

    It is opened for each write, which comes once a second: so it may be moved or deleted, and there
    is nothing to close. Not the standard library's handler: that loses what it cannot write without
    a word to its caller, and leaves half a line where a disk is full.
    """

    def __init__(self, path: Path, most_bytes: int, backups: int) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._backups = backups

    def append(self, data: bytes) -> None:
        """Writes all of it, or nothing.

        Raises:
            OSError: It cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as file:
            size = file.tell()
            is_full = size > 0 and size + len(data) > self._most_bytes
            if not is_full:
                _write(file, data, size)
        if is_full:
            self._put_aside()
            with self._open() as file:
                _write(file, data, 0)

    def _open(self) -> FileIO:
        return self.path.open("ab", buffering=0)

    def _put_aside(self) -> None:
        if not self._backups:
            self.path.unlink(missing_ok=True)
            return
        for number in range(self._backups, 0, -1):
            source = self._named(number - 1)
            if source.exists():
                source.replace(self._named(number))

    def _named(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


def _write(file: FileIO, data: bytes, size: int) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise
