"""Drives a load with worker processes, and gathers what became of it."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import numpy as np

from bench.loadgen import wrk
from bench.loadgen.arrivals import schedule
from bench.loadgen.plan import LoadFailed, Plan
from bench.loadgen.records import Records
from bench.loadgen.summary import limited_by_generator, summarise
from bench.loadgen.worker import Spec
from bench.processes import MARKER

__all__ = ["LoadFailed", "Plan", "drive", "limited_by_generator", "summarise"]

_ROOT = Path(__file__).resolve().parents[2]
_READY_TIMEOUT_S = 60.0
_START_AFTER_S = 0.05
_GRACE_S = 30.0
_LOOK_EVERY_S = 0.02


def drive(
    plan: Plan, marker: str, on_start: Callable[[float], None] | None = None
) -> Records | wrk.WrkRecords:
    """Drives a load until every request has come to its end.

    Args:
        plan: Which load.
        marker: That the processes of the load generator carry.
        on_start: Called at the moment at which measuring starts, after the warm-up, with that
            moment on the clock of `time.monotonic`. What it does must not take long: workers that
            fail meanwhile are only seen afterwards.

    Returns:
        For `summarise`.

    Raises:
        LoadFailed: A worker did not start or did not finish: it says why.
        TraceInvalid: The plan's trace cannot be read, or is none.
    """
    if plan.client == "wrk":
        return wrk.drive(plan, marker, on_start)
    with tempfile.TemporaryDirectory(prefix="bench-load-") as name:
        folder = Path(name)
        workers: list[_Worker] = []
        try:
            for spec in _specs(plan, folder):
                workers.append(_Worker(spec, folder, marker))
            for worker in workers:
                worker.wait_until_ready()
            begin = time.monotonic() + _START_AFTER_S
            start = begin + plan.warm_up_s
            for worker in workers:
                worker.tell(start)
            _sleep_until(start, workers)
            if on_start is not None:
                on_start(start)
            deadline = start + plan.seconds + plan.timeout_s + _GRACE_S
            for worker in workers:
                worker.wait(deadline)
            return Records.merge([Records.load(worker.output) for worker in workers])
        finally:
            for worker in workers:
                worker.end()


def _specs(plan: Plan, folder: Path) -> list[Spec]:
    """One for each worker: connections and requests are dealt to them in turn."""
    bodies_file = folder / "bodies"
    bodies_file.write_bytes(b"".join(body.content for body in plan.bodies))
    whole = Spec(
        protocol="grpc" if plan.body_kind == "grpc" else "http",
        url=plan.url,
        headers=dict(plan.headers),
        bodies_file=str(bodies_file),
        bodies=[(list(body.headers), len(body.content)) for body in plan.bodies],
        loop=plan.loop,
        connections=plan.connections,
        warm_up_s=plan.warm_up_s,
        seconds=plan.seconds,
        times_file=None,
        first=0,
        step=plan.processes,
        timeout_s=plan.timeout_s,
    )
    numbers = range(plan.processes)
    specs = [
        replace(whole, first=number, connections=len(range(number, plan.connections, len(numbers))))
        for number in numbers
    ]
    if plan.rate is None:
        return specs
    times_s = schedule(plan.arrivals, plan.rate, plan.seconds, plan.warm_up_s, plan.seed)
    for number in numbers:
        np.save(folder / f"times-{number}.npy", times_s[number :: plan.processes])
    return [
        replace(spec, times_file=str(folder / f"times-{number}.npy"))
        for number, spec in enumerate(specs)
    ]


class _Worker:
    """A worker process."""

    def __init__(self, spec: Spec, folder: Path, marker: str) -> None:
        self.output = folder / f"records-{spec.first}.npz"
        self._errors = folder / f"errors-{spec.first}"
        spec_file = folder / f"spec-{spec.first}.json"
        spec.write(spec_file)
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.loadgen.worker", str(spec_file), str(self.output)],
                env={**os.environ, MARKER: marker, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._told = cast(IO[bytes], self._process.stdin)
        self._said = cast(IO[bytes], self._process.stdout)

    def wait_until_ready(self) -> None:
        """Until its connections are open."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._said, selectors.EVENT_READ)
            if not selector.select(_READY_TIMEOUT_S):
                raise LoadFailed(
                    f"a load worker was not ready within {_READY_TIMEOUT_S:g} s: {self._why()}"
                )
        if not self._said.readline():
            self._process.wait()
            raise self._failed()

    def tell(self, start: float) -> None:
        """When measuring starts."""
        try:
            self._told.write(f"{start!r}\n".encode())
            self._told.close()
        except BrokenPipeError:
            self._process.wait()
            raise self._failed() from None

    def check(self) -> None:
        """That it has not failed."""
        if self._process.poll():
            raise self._failed()

    def wait(self, deadline: float) -> None:
        """Until it has written its records."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"a load worker did not come to its end: {self._why()}") from None
        self.check()

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()
        self._said.close()
        with contextlib.suppress(BrokenPipeError):
            self._told.close()

    def _failed(self) -> LoadFailed:
        return LoadFailed(f"a load worker ended with {self._process.returncode}: {self._why()}")

    def _why(self) -> str:
        return self._errors.read_text(errors="replace")[-2000:].strip() or "it said nothing"


def _sleep_until(moment: float, workers: Sequence[_Worker]) -> None:
    while (left_s := moment - time.monotonic()) > 0:
        for worker in workers:
            worker.check()
        time.sleep(min(left_s, _LOOK_EVERY_S))
