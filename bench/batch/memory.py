"""How much memory the processes of a command take, sampled from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

__all__ = ["MemoryWatch", "Peaks", "role_of"]

_INTERVAL_S = 0.1


def role_of(title: str, *, is_root: bool) -> str:
    """What a process of a batch job does, from its title.

    Returns:
        `driver`, `actor` (one that Ray Data maps with), or `ray` for all the rest.
    """
    if is_root:
        return "driver"
    return "actor" if title.startswith("ray::") and "MapWorker" in title else "ray"


@dataclass
class Peaks:
    """The most resident memory of each process, and of all of them at one time."""

    by_process: dict[int, tuple[str, int]] = field(default_factory=dict)
    all_bytes: int = 0
    samples: int = 0

    def add(self, sample: Mapping[int, tuple[str, int]]) -> None:
        """Takes a sample: role and bytes by process id.

        What a process once was, it stays: an actor's title is another one while it starts.
        """
        for pid, (role, rss_bytes) in sample.items():
            before_role, before_bytes = self.by_process.get(pid, (role, 0))
            kept = before_role if role == "ray" else role
            self.by_process[pid] = (kept, max(before_bytes, rss_bytes))
        self.all_bytes = max(self.all_bytes, sum(rss_bytes for _, rss_bytes in sample.values()))
        self.samples += 1

    def of_role(self, role: str) -> list[int]:
        """Peaks of the processes with a role, the largest first. Units: bytes."""
        return sorted(
            (size for kind, size in self.by_process.values() if kind == role), reverse=True
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results. `actor_bytes` and `driver_bytes` are None where none was."""
        actors, drivers = self.of_role("actor"), self.of_role("driver")
        return {
            "actor_bytes": actors[0] if actors else None,
            "driver_bytes": drivers[0] if drivers else None,
            "all_bytes": self.all_bytes,
            "actors_bytes": actors,
            "processes": len(self.by_process),
            "samples": self.samples,
        }


class MemoryWatch:
    """Samples a process and all its descendants ten times a second, until `stop`.

    Resident memory: what processes share, as Ray's object store, is counted for each of them.

    Args:
        pid: Of the first process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        # Kept when the process between it and the root has ended.
        self._known: dict[int, psutil.Process] = {pid: self._root}
        self._peaks = Peaks()
        self._stopped = threading.Event()
        self._sampled = threading.Condition()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> Peaks:
        """What there was so far."""
        self._stopped.set()
        self._thread.join()
        return self._peaks

    def wait_for_samples(self, count: int, timeout_s: float) -> bool:
        """Waits until so many more samples have been taken; False where they were not in time."""
        with self._sampled:
            wanted = self._peaks.samples + count
            return self._sampled.wait_for(lambda: self._peaks.samples >= wanted, timeout_s)

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            sample = self._sample()
            if sample:
                with self._sampled:
                    self._peaks.add(sample)
                    self._sampled.notify_all()

    def _sample(self) -> dict[int, tuple[str, int]]:
        with contextlib.suppress(psutil.Error):
            for child in self._root.children(recursive=True):
                self._known.setdefault(child.pid, child)
        sample = {}
        for pid, process in list(self._known.items()):
            try:
                with process.oneshot():
                    title = " ".join(process.cmdline())
                    rss_bytes = process.memory_info().rss
            except psutil.NoSuchProcess:
                del self._known[pid]
                continue
            except psutil.Error:
                continue
            role = role_of(title, is_root=process == self._root)
            sample[pid] = (role, rss_bytes)
        return sample
