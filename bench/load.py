"""The load generator: wrk in a closed loop, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.processes import CpuMeter

__all__ = ["LoadFailed", "drive", "parse_output"]

_SCRIPT = Path(__file__).parent / "wrk" / "post.lua"


class LoadFailed(Exception):
    """The load generator gave no figures."""


def drive(
    url: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    seconds: float,
    marker: str,
    other: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Loads a server from one thread for a while.

    Args:
        url: Where to POST.
        bodies: Sent in turn; each a line of JSON.
        connections: Kept open; on each, the next request leaves when the answer is there.
        seconds: How long; wrk takes whole ones.
        marker: Of the run whose processes' CPU time is counted.
        other: Another path, and which percentage of the requests goes there.

    Returns:
        `requests`, `duration_s`, `rate` (requests/s), `latency_s` by percentile, `errors` by
        kind, `cpu_s` by role, and `other_cores`.

    Raises:
        LoadFailed: wrk is missing, or did not finish.
    """
    with tempfile.TemporaryDirectory(prefix="bench-bodies-") as folder:
        bodies_file = Path(folder) / "bodies"
        bodies_file.write_bytes(b"\n".join(bodies) + b"\n")
        command = [
            "wrk",
            "--threads=1",
            f"--connections={connections}",
            f"--duration={max(1, round(seconds))}s",
            "--timeout=30s",
            "--latency",
            f"--script={_SCRIPT}",
            url,
        ]
        environment = {**os.environ, "BENCH_BODIES": str(bodies_file)}
        if other is not None:
            environment |= {"BENCH_OTHER_PATH": other[0], "BENCH_OTHER_PERCENT": str(other[1])}
        meter = CpuMeter(marker)
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds + 60,
                check=False,
            )
        except FileNotFoundError:
            raise LoadFailed("wrk is not installed: on Debian, `apt-get install wrk`") from None
        used = meter.stop()
    if done.returncode != 0:
        raise LoadFailed(f"wrk ended with {done.returncode}: {done.stdout}{done.stderr}")
    return {
        **parse_output(done.stdout),
        "connections": connections,
        "cpu_s": {role: round(value, 3) for role, value in used.by_role.items()},
        "other_cores": round(used.other_cores, 3),
    }


def parse_output(text: str) -> dict[str, Any]:
    """What wrk's script printed, with the rate worked out.

    Raises:
        LoadFailed: The line is not there, or no request was answered.
    """
    for line in text.splitlines():
        if line.startswith("BENCH "):
            result: dict[str, Any] = json.loads(line.removeprefix("BENCH "))
            break
    else:
        raise LoadFailed(f"wrk printed no result: {text}")
    if not result["requests"]:
        raise LoadFailed(f"no request was answered: {result['errors']}")
    result["rate"] = result["requests"] / result["duration_s"]
    return result
