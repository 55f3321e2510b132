"""CPU and memory over the time of a load, by what processes do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.processes import MARKER, busy_s, role_of

__all__ = ["Meter", "per_request_us", "role_in_sample"]

_STEP_S = 0.25
_NEW_LOOKS = 8
"""A fresh process has its parent's environment and command until it runs its own program."""
_ROLES_EVERY = 4
"""Steps. Ray's idle workers become replicas while they run."""
_GENERATORS = ("bench.loadgen",)


def role_in_sample(command: Sequence[str], rest: str) -> str:
    """What a process does, in the words of a sample.

    Args:
        command: Its command line.
        rest: What it is called where nothing tells: `ray` or `server`.

    Returns:
        `replica`, `proxy`, `load` or that.
    """
    if (command and Path(command[0]).name == "wrk") or any(
        generator in part for part in command for generator in _GENERATORS
    ):
        return "load"
    if rest != "ray":
        return rest
    role = role_of(command)
    if role.startswith("replica:"):
        return "replica"
    return "proxy" if role in ("haproxy", "proxy") else rest


@dataclass
class _Watched:
    process: psutil.Process
    role: str
    cpu_s: float
    """At the last look."""


@dataclass
class _Series:
    """Columns of equal length, by role."""

    steps: int = 0
    cores: dict[str, list[float]] = field(default_factory=dict)
    rss_mib: dict[str, list[float]] = field(default_factory=dict)

    def add(self, cores: dict[str, float], rss_mib: dict[str, float]) -> None:
        for series, values in ((self.cores, cores), (self.rss_mib, rss_mib)):
            for role in {*series, *values}:
                # Before it was there, it used nothing.
                column = series.setdefault(role, [0.0] * self.steps)
                column.append(round(values.get(role, 0.0), 4))
        self.steps += 1


class Meter:
    """Looks at a server's processes and the load generator's, a few times a second.

    Processes may begin and end meanwhile; of one that ends, what it did after the last look is not
    counted.

    Args:
        marker: Of the server; see `bench.processes`. None: it is not ours, and only the load
            generator is seen.
        rest: The role of those of its processes that are neither replica nor proxy.
        step_s: Between two looks.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        marker: str | None,
        *,
        rest: str = "ray",
        step_s: float = _STEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._marker = marker
        self._rest = rest
        self._step_s = step_s
        self._clock = clock
        self._watched: dict[int, _Watched] = {}
        self._others: dict[int, int] = {}
        """How often each other process was looked at."""
        self._series = _Series()
        self._cpu_s: dict[str, float] = {}
        self._looks = 0
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._started_s = 0.0
        self._elapsed_s = 0.0
        self._busy_s = 0.0
        self._own_s = 0.0
        # The first look reads every process of the machine: not while anything is measured.
        self._find(_NEW_LOOKS)

    def start(self, at_s: float | None = None) -> None:
        """Begins.

        Args:
            at_s: When, by the monotonic clock; by default now.
        """
        self._thread = threading.Thread(target=self._run, args=(at_s,), name="meter", daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """Ends, and tells what was used.

        Returns:
            `cpu`: `{"step_s", "cores": {role: [cores busy, a step each]}}`; `rss_mib`:
            `{"step_s", role: [...]}`; `cpu_s`: seconds by role in all; `other_cores`: kept busy by
            anything else on the machine; `seconds` from start to stop.
        """
        if self._thread is None:
            raise RuntimeError("the meter was not started")
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        own_s = time.process_time() - self._own_s
        others_s = busy_s() - self._busy_s - sum(self._cpu_s.values()) - own_s
        return {
            "cpu": {"step_s": self._step_s, "cores": self._series.cores},
            "rss_mib": {"step_s": self._step_s, **self._series.rss_mib},
            "cpu_s": {role: round(seconds, 3) for role, seconds in self._cpu_s.items()},
            "other_cores": round(max(0.0, others_s) / max(self._elapsed_s, 1e-9), 3),
            "seconds": round(self._elapsed_s, 3),
        }

    def _run(self, at_s: float | None) -> None:
        try:
            if at_s is not None:
                self._over.wait(max(0.0, at_s - self._clock()))
            self._begin()
            while not self._over.wait(self._pause_s()):
                self._step()
            self._step()
        except BaseException as error:
            self._failure = error

    def _begin(self) -> None:
        self._find()
        self._name_anew()
        for watched in self._watched.values():
            watched.cpu_s = _cpu_s(watched.process) or watched.cpu_s
        self._busy_s, self._own_s = busy_s(), time.process_time()
        self._started_s = self._clock()

    def _pause_s(self) -> float:
        """Until the next look, so that looks do not fall behind by what they take."""
        return max(0.0, self._started_s + (self._series.steps + 1) * self._step_s - self._clock())

    def _step(self) -> None:
        if self._looks % _ROLES_EVERY == 0:
            self._name_anew()
        self._looks += 1
        self._find()
        used_s, rss_mib = self._look()
        now_s = self._clock() - self._started_s
        span_s, self._elapsed_s = now_s - self._elapsed_s, now_s
        for role, seconds in used_s.items():
            self._cpu_s[role] = self._cpu_s.get(role, 0.0) + seconds
        cores = {role: seconds / max(span_s, 1e-9) for role, seconds in used_s.items()}
        # A look that came late tells of all the steps since the last one; the one at the end may
        # tell of too little to be a figure of its own.
        while self._series.steps < round(now_s / self._step_s):
            self._series.add(cores, rss_mib)

    def _look(self) -> tuple[dict[str, float], dict[str, float]]:
        used_s: dict[str, float] = {}
        rss_mib: dict[str, float] = {}
        for pid, watched in list(self._watched.items()):
            cpu_s = _cpu_s(watched.process)
            if cpu_s is None:
                del self._watched[pid]
                continue
            role = watched.role
            used_s[role] = used_s.get(role, 0.0) + cpu_s - watched.cpu_s
            watched.cpu_s = cpu_s
            rss_mib[role] = rss_mib.get(role, 0.0) + _rss_bytes(watched.process) / 2**20
        return used_s, rss_mib

    def _find(self, looks: int = 1) -> None:
        """Takes in who is new; those that are not ours are looked at a few times, then no more.

        Args:
            looks: So many does this one count as.
        """
        pids = set(psutil.pids()) - {os.getpid()}
        self._others = {pid: times for pid, times in self._others.items() if pid in pids}
        for pid in sorted(pids - self._watched.keys()):
            times = self._others.get(pid, 0)
            if times >= _NEW_LOOKS:
                continue
            role = self._role(pid)
            if role is None:
                self._others[pid] = times + looks
            else:
                self._watched[pid] = _Watched(psutil.Process(pid), role, 0.0)
                self._others.pop(pid, None)

    def _role(self, pid: int) -> str | None:
        try:
            process = psutil.Process(pid)
            command = process.cmdline()
            role = role_in_sample(command, self._rest)
            if role == "load":
                return role if self._is_descendant(process) else None
            return role if self._is_of_server(process) else None
        except (psutil.Error, OSError):
            return None

    def _is_descendant(self, process: psutil.Process) -> bool:
        return any(parent.pid == os.getpid() for parent in process.parents())

    def _is_of_server(self, process: psutil.Process) -> bool:
        if self._marker is None:
            return False
        # Some of Ray's processes write their title over their environment.
        if self._watched.get(process.ppid()) is not None:
            return True
        mark = process.environ().get(MARKER, "")
        return mark == self._marker or mark.startswith(f"{self._marker}/")

    def _name_anew(self) -> None:
        for watched in self._watched.values():
            try:
                command = watched.process.cmdline()
            except (psutil.Error, OSError):
                continue
            if command:  # a process that has ended, but is still listed, has none
                watched.role = role_in_sample(command, self._rest)


def per_request_us(cpu_s: dict[str, float], requests: int) -> dict[str, float]:
    """CPU time for each request by role, in microseconds; roles that did nothing are left out."""
    if requests <= 0:
        return {}
    return {
        role: round(seconds / requests * 1e6, 2) for role, seconds in cpu_s.items() if seconds > 0
    }


def _cpu_s(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except (psutil.Error, OSError):
        return None
    return times.user + times.system


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.Error, OSError):
        return 0
