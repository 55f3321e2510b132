"""One driver at a time, and none that is dead keeps others out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pa_fs
import pytest

from rayprism.errors import SetupError
from rayprism.offline import lease as lease_module
from rayprism.offline.commits import OutputBusy, OutputFolder
from rayprism.offline.lease import FRESH_S, LEASE_FILE, LeaseNote
from rayprism.offline.sinks import Store

NOW_S = 1_800_000_000.0
IDENTITY: dict[str, Any] = {"spec": {}}


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)


def output(folder: Path, now_s: float | None = None) -> OutputFolder:
    clock = time.time if now_s is None else lambda: now_s
    return OutputFolder(pa_fs.LocalFileSystem(), str(folder), clock=clock)


def leave(folder: Path, **said: Any) -> None:
    """The lease of another driver."""
    note = {"id": "other", "host": "elsewhere", "pid": 7, "began": 1.0, "time": NOW_S, **said}
    (folder / LEASE_FILE).write_text(json.dumps(note))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("age_s", "host", "alive", "held"),
    [
        (0, "here", True, True),
        (0, "here", False, False),
        (0, "there", False, True),
        (FRESH_S - 1, "there", False, True),
        (FRESH_S, "there", False, False),
        (FRESH_S, "here", True, False),
        (-5, "there", True, True),
        (-FRESH_S, "there", True, False),
    ],
)
def test_when_a_driver_is_taken_for_alive(age_s: float, host: str, alive: bool, held: bool) -> None:
    note = LeaseNote("x", host, 7, 1.0, NOW_S)
    assert note.is_held(NOW_S + age_s, "here", lambda pid, began: alive) is held


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with output(tmp_path).lease():
        said = json.loads((tmp_path / LEASE_FILE).read_text())
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        for restart in (False, True):
            with pytest.raises(OutputBusy, match=f"process {os.getpid()} on ") as caught:
                output(tmp_path).begin(IDENTITY, 1, restart)
        assert "Wait until it ends, or stop it" in str(caught.value)
        with pytest.raises(OutputBusy), output(tmp_path).lease():
            pass
        # Refusing somebody takes nothing from who has it.
        assert json.loads((tmp_path / LEASE_FILE).read_text())["id"] == said["id"]
    assert not (tmp_path / LEASE_FILE).exists()
    with output(tmp_path).lease():
        output(tmp_path)


def test_the_holder_may_begin_and_restart(tmp_path: Path) -> None:
    mine = output(tmp_path)
    with mine.lease():
        mine.begin(IDENTITY, 1)
        mine.begin({"spec": {"other": 1}}, 1, restart=True)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"time": NOW_S - FRESH_S}, id="not seen for a while"),
        pytest.param({"host": socket.gethostname(), "pid": dead_pid()}, id="its process is gone"),
        pytest.param(
            {"host": socket.gethostname(), "pid": os.getpid()}, id="its number is another's now"
        ),
        pytest.param({"pid": "many"}, id="a note that is none"),
    ],
)
def test_a_dead_driver_keeps_nobody_out(tmp_path: Path, said: dict[str, Any]) -> None:
    leave(tmp_path, **said)
    mine = output(tmp_path, NOW_S)
    with mine.lease() as lease:
        lease.check()
        mine.begin(IDENTITY, 1)


def test_a_driver_elsewhere_is_waited_for(tmp_path: Path) -> None:
    leave(tmp_path, time=NOW_S - 30)
    with pytest.raises(OutputBusy, match="process 7 on elsewhere, last seen 30 s ago"):
        output(tmp_path, NOW_S).begin(IDENTITY, 1)


def test_a_process_of_this_host_that_lives(tmp_path: Path) -> None:
    began = psutil.Process().create_time()
    leave(tmp_path, host=socket.gethostname(), pid=os.getpid(), began=began)
    with pytest.raises(OutputBusy):
        output(tmp_path, NOW_S).begin(IDENTITY, 1)


def test_a_lease_is_refreshed(tmp_path: Path) -> None:
    ticks = iter(range(10**9))
    ticking = OutputFolder(
        pa_fs.LocalFileSystem(), str(tmp_path), clock=lambda: NOW_S + next(ticks)
    )
    with ticking.lease(refresh_s=0.01):
        first = json.loads((tmp_path / LEASE_FILE).read_text())["time"]
        wait_for(lambda: json.loads((tmp_path / LEASE_FILE).read_text())["time"] > first + 2)
    assert "rayprism-lease" not in {thread.name for thread in threading.enumerate()}


def test_a_lease_that_was_taken_is_not_taken_back(tmp_path: Path) -> None:
    """This process was asleep for longer than a lease is fresh, and another one went on."""
    with output(tmp_path).lease(refresh_s=0.01) as lease:
        lease.check()
        leave(tmp_path, time=time.time())

        def is_lost() -> bool:
            try:
                lease.check()
            except OutputBusy:
                return True
            return False

        # The refresh that was under way may have been the last to write.
        wait_for(lambda: leave(tmp_path, time=time.time()) or is_lost())
    assert json.loads((tmp_path / LEASE_FILE).read_text())["id"] == "other"


def test_of_two_that_start_at_once_the_last_to_write_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_writes(seconds: float) -> None:
        leave(tmp_path, time=time.time())

    monkeypatch.setattr(lease_module.time, "sleep", other_writes)
    with pytest.raises(OutputBusy, match="elsewhere"), output(tmp_path).lease():
        pass
    assert json.loads((tmp_path / LEASE_FILE).read_text())["id"] == "other"


def test_a_full_disk_does_not_end_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def full(self: LeaseNote, store: Store) -> None:
        failed.set()
        raise SetupError("no space left")

    with output(tmp_path).lease(refresh_s=0.01) as lease:
        first = json.loads((tmp_path / LEASE_FILE).read_text())["time"]
        with monkeypatch.context() as patched:
            patched.setattr(LeaseNote, "write", full)
            assert failed.wait(30)
        wait_for(lambda: json.loads((tmp_path / LEASE_FILE).read_text())["time"] > first)
        lease.check()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
