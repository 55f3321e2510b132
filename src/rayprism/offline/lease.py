"""One driver at a time for an output folder.

A lease is a file with a time in it, which every filesystem can hold, and no lock: two drivers that
start in the same instant are told apart by who wrote last. The output does not depend on it, as a
shard is committed once whoever does it; a lease saves the work of doing everything twice, and
keeps `--restart` from emptying the folder under a driver that writes to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import psutil

from rayprism.errors import SetupError
from rayprism.offline.sinks import Store

__all__ = ["FRESH_S", "LEASE_FILE", "REFRESH_S", "Lease", "LeaseNote", "OutputBusy", "hold_lease"]

LEASE_FILE = "_driver.json"
REFRESH_S = 10.0
FRESH_S = 60.0
_SETTLE_S = 0.1


class OutputBusy(SetupError):
    """Another driver writes to the output."""

    code = "output_busy"


@dataclass(frozen=True, slots=True)
class LeaseNote:
    """What is written of a driver.

    Args:
        id: Of the lease.
        host: Where the driver runs.
        pid: Its process there.
        began: When that process was started, Unix time: numbers of processes are used again.
        time: Of the last refresh, Unix time.
    """

    id: str
    host: str
    pid: int
    began: float
    time: float

    @classmethod
    def of_this_process(cls, now_s: float) -> LeaseNote:
        """A new lease of this process."""
        pid = os.getpid()
        began = psutil.Process(pid).create_time()
        return cls(secrets.token_hex(8), socket.gethostname(), pid, began, now_s)

    @classmethod
    def read(cls, store: Store) -> LeaseNote | None:
        """Who holds the lease of a folder; None where nobody does, or where it is not known."""
        data = store.read(LEASE_FILE)
        if data is None:
            return None
        try:
            said = json.loads(data)
            return cls(
                str(said["id"]),
                str(said["host"]),
                int(said["pid"]),
                float(said["began"]),
                float(said["time"]),
            )
        except (ValueError, TypeError, KeyError):
            return None

    def write(self, store: Store) -> None:
        """Puts it into the folder."""
        store.write(LEASE_FILE, json.dumps(asdict(self)).encode() + b"\n")

    def is_held(self, now_s: float, here: str, is_alive: Callable[[int, float], bool]) -> bool:
        """Whether its driver is to be taken for alive.

        Args:
            now_s: Unix time.
            here: The name of this host.
            is_alive: Whether a process of this host is, by number and time of its start.
        """
        # A time to come is that of a host whose clock is ahead.
        if abs(now_s - self.time) >= FRESH_S:
            return False
        return self.host != here or is_alive(self.pid, self.began)

    def refusal(self, now_s: float) -> OutputBusy:
        """What others are told."""
        age_s = max(0.0, now_s - self.time)
        return OutputBusy(
            f"another driver writes to this output: process {self.pid} on {self.host}, last seen "
            f"{age_s:.0f} s ago. Nothing was changed. Wait until it ends, or stop it; one that is "
            f"gone is forgotten after {FRESH_S:.0f} s"
        )


def _is_alive(pid: int, began: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - began) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def refuse_other_driver(store: Store, now_s: float, own_id: str | None = None) -> None:
    """Raises OutputBusy where another driver holds the lease."""
    note = LeaseNote.read(store)
    if (
        note is not None
        and note.id != own_id
        and note.is_held(now_s, socket.gethostname(), _is_alive)
    ):
        raise note.refusal(now_s)


class Lease:
    """A lease that is held, and refreshed by a thread."""

    def __init__(self, store: Store, note: LeaseNote, clock: Callable[[], float]) -> None:
        self.note = note
        self._store = store
        self._clock = clock
        self._taken_by: LeaseNote | None = None
        self._over = threading.Event()

    @property
    def id(self) -> str:
        """Of this lease."""
        return self.note.id

    def check(self) -> None:
        """Raises OutputBusy where another driver has taken the lease meanwhile."""
        if self._taken_by is not None:
            raise self._taken_by.refusal(self._clock())

    def refresh(self) -> None:
        """Writes the time, unless another driver has taken the lease."""
        found = LeaseNote.read(self._store)
        if found is not None and found.id != self.id:
            self._taken_by = found
            return
        note = LeaseNote(
            self.note.id, self.note.host, self.note.pid, self.note.began, self._clock()
        )
        note.write(self._store)
        self.note = note

    def keep(self, refresh_s: float) -> None:
        """Refreshes until it is over or lost."""
        while not self._over.wait(refresh_s) and self._taken_by is None:
            # A full disk or a store that is away for a while does not end a job: it is tried
            # again, and others are kept out for as long as the last note is fresh.
            with contextlib.suppress(OSError, SetupError):
                self.refresh()

    def end(self) -> None:
        """No more refreshes."""
        self._over.set()


@contextlib.contextmanager
def hold_lease(
    store: Store, *, refresh_s: float = REFRESH_S, clock: Callable[[], float] = time.time
) -> Iterator[Lease]:
    """Holds the lease of a folder.

    Raises:
        OutputBusy: Another driver holds it (says which).
    """
    refuse_other_driver(store, clock())
    lease = Lease(store, LeaseNote.of_this_process(clock()), clock)
    lease.note.write(store)
    # Whoever looked before this was written has written by now; the last one has it.
    time.sleep(_SETTLE_S)
    found = LeaseNote.read(store)
    if found is not None and found.id != lease.id:
        raise found.refusal(clock())
    thread = threading.Thread(
        target=lease.keep, args=(refresh_s,), name="rayprism-lease", daemon=True
    )
    thread.start()
    try:
        yield lease
    finally:
        lease.end()
        thread.join()
        with contextlib.suppress(OSError, SetupError):
            found = LeaseNote.read(store)
            if found is not None and found.id == lease.id:
                store.delete(LEASE_FILE)
