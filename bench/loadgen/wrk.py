"""wrk as the load generator: cheaper than any client in Python, for closed loops of JSON bodies."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.loadgen.plan import LoadFailed, Plan
from bench.processes import MARKER

__all__ = ["WrkRecords", "drive", "read_output", "uncorrected"]

_SCRIPT = Path(__file__).with_name("wrk.lua")
_GRACE_S = 60.0
_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True)
class WrkRecords:
    """What wrk counted.

    Of a connection that the server closes before it answers, wrk says nothing.

    Args:
        answered: Requests that were answered, whatever the status.
        duration_s: How long it took, as wrk measured it.
        errors: By kind: `status` (answered with 400 or more), `timeout` (answered later than that),
            `connect`, `read`, `write`.
        values_s: Latencies of everything that was answered in time, in order.
        counts: How often each was measured.
        cpu_share: Of each thread, in the mean: cores.

    Shapes:
        `values_s` and `counts` are [different latencies].
    """

    answered: int
    duration_s: float
    errors: Mapping[str, int]
    values_s: NDArray[np.float64]
    counts: NDArray[np.int64]
    cpu_share: tuple[float, ...] = ()


def drive(plan: Plan, marker: str, on_start: Callable[[float], None] | None = None) -> WrkRecords:
    """Drives a closed loop; see `bench.loadgen.generator.drive`.

    wrk knows whole seconds only: durations are rounded, and are 1 s at least.

    Raises:
        LoadFailed: wrk is missing, or did not finish, or nothing was answered.
    """
    contents = [body.content for body in plan.bodies]
    if any(b"\n" in content for content in contents):
        raise LoadFailed("wrk takes bodies of one line each, and one of these has several")
    with tempfile.TemporaryDirectory(prefix="bench-wrk-") as name:
        folder = Path(name)
        (folder / "bodies").write_bytes(b"\n".join(contents) + b"\n")
        if plan.warm_up_s:
            _run(plan, plan.warm_up_s, marker, folder, None)
        records = _run(plan, plan.seconds, marker, folder, on_start)
    if not records.answered:
        raise LoadFailed(f"no request was answered: {dict(records.errors)}")
    return records


def read_output(
    printed: str, latencies: str, connections: int, cpu_share: tuple[float, ...] = ()
) -> WrkRecords:
    """What the script printed, and what it wrote to its file.

    Args:
        printed: Has one line of the script.
        latencies: Microseconds and a count in each line, as wrk counts them: see `uncorrected`.
        connections: That wrk was told.
        cpu_share: Of each thread.

    Raises:
        LoadFailed: The line is not there, or the counts are not those of wrk.
    """
    for line in printed.splitlines():
        if line.startswith("BENCH "):
            counted = json.loads(line.removeprefix("BENCH "))
            break
    else:
        raise LoadFailed(f"wrk printed no result: {printed}")
    answered, duration_us = counted["answered"], counted["duration_us"]
    table = np.array(latencies.split(), np.int64).reshape(-1, 2)
    rounds = answered // connections
    if rounds:
        table = uncorrected(table, duration_us // rounds)
    if table[:, 1].sum() > answered or (table[:, 1] < 0).any():
        raise LoadFailed(
            f"wrk counted {answered} answers, and its latencies are not those: what it is known to "
            "add to them is what wrk 4.1.0 and 4.2.0 add; take client: python"
        )
    return WrkRecords(
        answered=answered,
        duration_s=duration_us / 1e6,
        errors=counted["errors"],
        values_s=table[:, 0] / 1e6,
        counts=table[:, 1],
        cpu_share=cpu_share,
    )


def uncorrected(table: NDArray[np.int64], interval_us: int) -> NDArray[np.int64]:
    """What wrk measured, from what it makes of it before its script sees it.

    wrk adds to each latency of more than two intervals further ones, an interval apart: what a
    client would have seen that had asked on in equal steps. That is no closed loop any more. What
    it adds to a value comes from greater ones alone, so it can be taken away from the top down.

    Args:
        table: Latencies in microseconds, ascending, and counts.
        interval_us: Between two requests of a connection, in the mean.

    Shapes:
        [latencies, 2], of both.

    Source: `stats_correct` in wrk's src/stats.c, called at the end of src/wrk.c.
    """
    counts = dict(table.tolist())
    for value in reversed(table[:, 0].tolist()):
        count = counts[value]
        if value < 2 * interval_us or not count:
            continue
        lesser = value - interval_us
        while lesser > interval_us:
            counts[lesser] = counts.get(lesser, 0) - count
            lesser -= interval_us
    left = sorted((value, count) for value, count in counts.items() if count)
    return np.array(left, np.int64).reshape(-1, 2)


def _run(
    plan: Plan,
    seconds: float,
    marker: str,
    folder: Path,
    on_start: Callable[[float], None] | None,
) -> WrkRecords:
    latencies, printed = folder / "latencies", folder / "printed"
    with printed.open("wb") as output:
        try:
            process = subprocess.Popen(
                _command(plan, seconds),
                env={
                    **os.environ,
                    MARKER: marker,
                    "BENCH_BODIES": str(folder / "bodies"),
                    "BENCH_LATENCIES": str(latencies),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise LoadFailed("wrk is not installed: on Debian, `apt-get install wrk`") from None
    started = time.monotonic()
    try:
        if on_start is not None:
            on_start(started)
        cpu_s = _wait(process, started + seconds + plan.timeout_s + _GRACE_S)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    text = printed.read_text(errors="replace")
    if process.returncode != 0:
        raise LoadFailed(f"wrk ended with {process.returncode}: {text}")
    share = cpu_s / (time.monotonic() - started) / plan.processes
    shares = (share,) * plan.processes
    return read_output(text, latencies.read_text(), plan.connections, shares)


def _command(plan: Plan, seconds: float) -> list[str]:
    headers = {**dict(plan.bodies[0].headers), **plan.headers}
    return [
        "wrk",
        f"--threads={plan.processes}",
        f"--connections={plan.connections}",
        f"--duration={max(1, round(seconds))}s",
        f"--timeout={max(1, math.ceil(plan.timeout_s))}s",
        "--latency",
        f"--script={_SCRIPT}",
        *(f"--header={name}: {value}" for name, value in headers.items()),
        plan.url,
    ]


def _wait(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Until it has ended; the CPU seconds that it used."""
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        time.sleep(_LOOK_EVERY_S)
    raise LoadFailed("wrk did not come to its end")
