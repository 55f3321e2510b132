"""One process of the load generator: `python -m bench.loadgen.worker SPEC.json OUT.npz`.

It says `ready` when its first connections are open, is told on its standard input when measuring
starts (seconds of the clock that all processes share), and writes its records when every request
has come to its end. `Spec` says what is in SPEC.json.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import uvloop

from bench.loadgen.connections import Client
from bench.loadgen.http_client import HttpClient
from bench.loadgen.loops import ClosedLoop, Loop, OpenLoop

__all__ = ["Spec", "main"]

_OPENED_BEFORE = 16
"""Of an open loop; more are opened when they are needed."""
_COLLECT_AFTER = 50_000
"""Objects: what is collected rarely stops the clock rarely."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one worker does.

    Args:
        protocol: What is spoken.
        url: See `Plan`.
        headers: Of every request.
        bodies_file: All contents, one behind the other.
        bodies: Headers and length of each, in their order.
        loop: Which.
        connections: Of this worker.
        warm_up_s: Closed loop: before measuring.
        seconds: That are measured.
        times_file: Open loop: .npy of seconds relative to the start of measuring.
        first: Index of the first request; it says which body is sent.
        step: From one request's index to the next.
        timeout_s: See `Plan`.
    """

    protocol: Literal["http", "grpc"]
    url: str
    headers: dict[str, str]
    bodies_file: str
    bodies: list[tuple[list[tuple[str, str]], int]]
    loop: Literal["closed", "open"]
    connections: int
    warm_up_s: float
    seconds: float
    times_file: str | None
    first: int
    step: int
    timeout_s: float

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))


def main(arguments: list[str]) -> int:
    """Runs a worker.

    Returns:
        0, or 1 where nobody said when to start.
    """
    spec, output = Spec.read(Path(arguments[0])), Path(arguments[1])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(spec, output))


async def _run(spec: Spec, output: Path) -> int:
    loop = _loop(spec, _client(spec))
    await loop.prepare(spec.connections if spec.loop == "closed" else _OPENED_BEFORE)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)
    print("ready", flush=True)
    told = await asyncio.to_thread(sys.stdin.readline)
    if not told:
        return 1
    start = float(told)
    cpu_share = asyncio.create_task(_cpu_share(start, spec.seconds))
    await loop.run(start)
    records = loop.recorder.finish(loop.kind, start, await cpu_share)
    records.within(spec.seconds).save(output)
    return 0


def _client(spec: Spec) -> Client:
    bodies, at = [], 0
    content = Path(spec.bodies_file).read_bytes()
    for headers, length in spec.bodies:
        bodies.append((headers, content[at : at + length]))
        at += length
    if spec.protocol == "http":
        return HttpClient(spec.url, spec.headers, bodies)
    # It takes long to import, and most loads do not need it.
    from bench.loadgen.grpc_client import GrpcClient

    return GrpcClient(spec.url, spec.headers, [content for _, content in bodies])


def _loop(spec: Spec, client: Client) -> Loop:
    if spec.loop == "closed":
        return ClosedLoop(
            client,
            spec.connections,
            spec.timeout_s,
            begin_s=-spec.warm_up_s,
            end_s=spec.seconds,
            first=spec.first,
            step=spec.step,
        )
    times_s = np.load(str(spec.times_file), allow_pickle=False)
    return OpenLoop(
        client,
        spec.connections,
        spec.timeout_s,
        times_s=times_s.tolist(),
        first=spec.first,
        step=spec.step,
    )


async def _cpu_share(start: float, seconds: float) -> float:
    await asyncio.sleep(max(0.0, start - time.monotonic()))
    used, begun = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - begun)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
