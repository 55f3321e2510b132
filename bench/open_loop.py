"""Sends requests at random times, whether or not answers come: `python -m bench.open_loop`.

Latency is counted from the time at which a request was due, so that a server that stalls cannot
make the load wait for it. Runs as a process of its own and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop

from bench.cluster import clean_environment
from bench.load import LoadFailed
from rayprism.serving.forward import Busy, HttpForwarder, Unreachable

__all__ = ["drive_open", "main"]

_TIMEOUT_S = 30.0
_CONNECTIONS = 256
_JSON = [(b"content-type", b"application/json")]


def drive_open(
    url: str,
    body: bytes,
    *,
    rate: float,
    seconds: float,
    seed: int,
    marker: str,
    folder: Path,
    copies: tuple[str, float] | None = None,
) -> dict[str, Any]:
    """Loads a server in an open loop from another process.

    Args:
        url: Where to POST.
        body: Of every request.
        rate: Requests a second, at the times of a Poisson process.
        seconds: How long.
        seed: Of the times: equal seeds give equal times.
        marker: Of the run.
        folder: For the body.
        copies: Another path, and the share of the requests that is sent there as well. Their
            latency is not counted.

    Returns:
        `requests`, `errors`, `latency_s` by percentile, `late_s`: how late the generator itself
        was, in the median.

    Raises:
        LoadFailed: It did not finish.
    """
    body_file = folder / "open-loop-body"
    body_file.write_bytes(body)
    command = [sys.executable, "-m", "bench.open_loop", url, str(body_file)]
    command += [str(rate), str(seconds), str(seed), *map(str, copies or ())]
    done = subprocess.run(
        command,
        env=clean_environment(marker),
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    if done.returncode != 0:
        raise LoadFailed(f"the open loop ended with {done.returncode}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


async def _run(given: argparse.Namespace) -> dict[str, Any]:
    url, body, seconds = given.url, given.body_file.read_bytes(), given.seconds
    address = urlsplit(url)
    client = HttpForwarder(
        str(address.hostname), int(address.port or 80), max_connections=_CONNECTIONS
    )
    path = address.path.encode()
    loop = asyncio.get_running_loop()
    draw, draw_copy = random.Random(given.seed), random.Random(given.seed)
    latencies: list[float] = []
    lates: list[float] = []
    errors: dict[str, int] = {}
    running: set[asyncio.Task[None]] = set()

    def start(job: Coroutine[Any, Any, None]) -> None:
        task = loop.create_task(job)
        running.add(task)
        task.add_done_callback(running.discard)

    async def send_copy() -> None:
        with contextlib.suppress(Unreachable, TimeoutError, Busy):
            await client.post(given.copies_path.encode(), _JSON, body, _TIMEOUT_S)

    async def send(due_s: float) -> None:
        try:
            answer = await client.post(path, _JSON, body, _TIMEOUT_S)
        except (Unreachable, TimeoutError, Busy) as error:
            errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
            return
        if answer.status == 200:
            latencies.append(loop.time() - due_s)
        else:
            errors[str(answer.status)] = errors.get(str(answer.status), 0) + 1

    due_s = loop.time()
    end_s = due_s + seconds
    while due_s < end_s:
        wait_s = due_s - loop.time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        lates.append(loop.time() - due_s)
        start(send(due_s))
        if draw_copy.random() < given.copies_share:
            start(send_copy())
        due_s += draw.expovariate(given.rate)
    await asyncio.gather(*running)
    client.close()
    points = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {
        "requests": len(latencies),
        "errors": errors,
        "latency_s": {
            name: float(np.percentile(latencies, point)) for name, point in points.items()
        },
        "late_s": statistics.median(lates),
    }


def main(arguments: list[str]) -> int:
    """Runs it; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("body_file", type=Path)
    parser.add_argument("rate", type=float)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("copies_path", nargs="?", default="")
    parser.add_argument("copies_share", nargs="?", type=float, default=0.0)
    given = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_run(given))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
