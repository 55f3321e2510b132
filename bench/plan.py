"""What one run measures, and what its parts share."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import drive

__all__ = ["AnswerWrong", "Plan", "Server", "measure_rounds", "post", "wait_for_answer"]


class AnswerWrong(Exception):
    """A server did not give the right answer: its speed would mean nothing."""


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    Args:
        marker: Of its processes; see `bench.processes`.
        folder: For models and other files of the run.
        seconds: Of one measurement.
        rounds: Of every comparison.
        connections: That the tiny model is measured with.
        repeats: Of every cold start.
        batch_sizes: That the yardstick of the sentence model chooses from.
    """

    marker: str
    folder: Path
    seconds: float
    rounds: int
    connections: tuple[int, ...]
    repeats: int
    batch_sizes: tuple[int, ...]
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Prints progress, with the minutes since the start."""
        elapsed = time.monotonic() - self.started
        print(f"[{int(elapsed) // 60}:{int(elapsed) % 60:02d}] {text}", flush=True)

    @property
    def repository(self) -> Path:
        """The model repository of the run."""
        return self.folder / "repository"


@dataclass(frozen=True)
class Server:
    """One server under load.

    Args:
        name: In the results.
        url: Where its requests go.
    """

    name: str
    url: str


def post(url: str, body: bytes) -> bytes:
    """Sends one request.

    Raises:
        AnswerWrong: Another status than 200.
        OSError: No answer at all.
    """
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        raise AnswerWrong(f"{url}: {error.code} {error.read().decode()[:500]}") from None


def wait_for_answer(
    server: Server, body: bytes, check: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0
) -> bytes:
    """Asks until the answer is the right one: a proxy may learn of a route a moment late.

    Raises:
        AnswerWrong: It is not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = post(server.url, body)
            problem = "" if check(json.loads(answer)) else answer.decode()[:500]
        except (OSError, AnswerWrong, ValueError) as error:
            problem = str(error)
        if not problem:
            return answer
        if time.monotonic() > deadline:
            raise AnswerWrong(f"{server.name} does not give the right answer: {problem}")
        time.sleep(0.2)


def measure_rounds(
    plan: Plan,
    phase: str,
    servers: Sequence[Server],
    bodies: Sequence[bytes],
    connections: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Loads the servers in turn, round after round; each round begins with another one."""
    for server in servers:
        # Fills caches and lets what the deployment left to do finish.
        drive(server.url, bodies, connections=16, seconds=1, marker=plan.marker)
    samples = []
    for number in range(rounds):
        first = number % len(servers)
        for count in connections:
            for server in (*servers[first:], *servers[:first]):
                sample = drive(
                    server.url,
                    bodies,
                    connections=count,
                    seconds=plan.seconds,
                    marker=plan.marker,
                )
                samples.append({"phase": phase, "server": server.name, "round": number, **sample})
                plan.say(
                    f"{phase} round {number + 1}/{rounds}: {server.name}, {count} connections: "
                    f"{sample['rate']:,.0f}/s, p50 {sample['latency_s']['p50'] * 1e3:.2f} ms, "
                    f"p99 {sample['latency_s']['p99'] * 1e3:.2f} ms"
                    f"{_warnings(sample)}"
                )
    return samples


def _warnings(sample: dict[str, Any]) -> str:
    errors = {kind: count for kind, count in sample["errors"].items() if count}
    text = f", ERRORS {errors}" if errors else ""
    if sample["other_cores"] > 0.2:
        text += f", {sample['other_cores']:.1f} cores busy with something else"
    return text
