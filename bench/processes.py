"""The processes that a benchmark starts: marked, accounted by role, and ended."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = [
    "MARKER",
    "CpuMeter",
    "CpuUse",
    "busy_s",
    "end_marked",
    "marked",
    "new_marker",
    "role_of",
]

MARKER = "RAYPRISM_BENCH_RUN"
"""Environment variable that every process of a run inherits, so that none is left behind."""

_REPLICA = re.compile(r"ray::ServeReplica:([^:]+):([^.\s]+)")


def new_marker() -> str:
    """A value for MARKER that no other run has."""
    return f"{os.getpid()}-{time.time_ns()}"


def role_of(command: Iterable[str]) -> str:
    """What a marked process does, from its command line.

    Returns:
        `replica:APPLICATION:DEPLOYMENT`, `haproxy`, `proxy` or `ray` for all the rest.
    """
    parts = list(command)
    line = " ".join(parts)
    if match := _REPLICA.search(line):
        return f"replica:{match[1]}:{match[2]}"
    if parts and Path(parts[0]).name == "haproxy":
        return "haproxy"
    if "ray::ProxyActor" in line:
        return "proxy"
    return "ray"


def marked(value: str) -> list[psutil.Process]:
    """Every living process with this marker in its environment, but not this one.

    Args:
        value: A run's marker, or that of a part of it: parts are `RUN/PART`.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARKER, "")
            if mark == value or mark.startswith(f"{value}/"):
                found[process.pid] = process
                # Some of Ray's processes write their title over their environment.
                found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def end_marked(value: str, grace_s: float = 3.0) -> int:
    """Ends every process with this marker, however it was started.

    Returns:
        How many there were.
    """
    processes = marked(value)
    for signal in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, signal)()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=grace_s)
        processes_left = marked(value)
        if not processes_left:
            break
        processes = processes_left
    return len(processes)


@dataclass(frozen=True)
class CpuUse:
    """CPU time that passed between two moments.

    Args:
        by_role: Seconds of each role; `load` is the load generator.
        other_cores: Cores kept busy by anything that is not of the run: how quiet it was.
    """

    by_role: dict[str, float]
    other_cores: float

    def per_request_s(self, requests: int) -> dict[str, float]:
        """CPU seconds for each request, by role; roles that did nothing are left out."""
        return {role: seconds / requests for role, seconds in self.by_role.items() if seconds > 0}


class CpuMeter:
    """Measures the CPU time of a run's processes from its creation to `stop`.

    Only for stretches in which none of them is started or ended.
    """

    def __init__(self, marker: str) -> None:
        self._processes = dict(_roles(marker))
        self._at_start = self._seconds()
        self._busy_at_start = busy_s()
        self._load_at_start = _children_s()
        self._own_at_start = time.process_time()
        self._started = time.monotonic()

    def stop(self) -> CpuUse:
        """What has been used since the meter was made."""
        elapsed_s = time.monotonic() - self._started
        by_role: dict[str, float] = {}
        for process, seconds in self._seconds().items():
            role = self._processes[process]
            used = seconds - self._at_start.get(process, 0.0)
            by_role[role] = by_role.get(role, 0.0) + used
        by_role["load"] = _children_s() - self._load_at_start
        accounted = sum(by_role.values()) + time.process_time() - self._own_at_start
        busy = busy_s() - self._busy_at_start
        return CpuUse(by_role, max(0.0, busy - accounted) / elapsed_s)

    def _seconds(self) -> dict[psutil.Process, float]:
        seconds = {}
        for process in self._processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds[process] = times.user + times.system
        return seconds


def _roles(marker: str) -> Iterable[tuple[psutil.Process, str]]:
    for process in marked(marker):
        try:
            yield process, role_of(process.cmdline())
        except psutil.NoSuchProcess:
            continue


def busy_s() -> float:
    """CPU seconds that this machine's cores have been busy, with anything, since it started."""
    times: Mapping[str, float] = psutil.cpu_times()._asdict()
    # Guest time is counted in user time already; stolen time is another machine's.
    idle = ("idle", "iowait", "guest", "guest_nice", "steal")
    return sum(value for name, value in times.items() if name not in idle)


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
