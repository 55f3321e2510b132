"""Servers and a load generator that only say what was done with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.loadgen.histogram import encode, figures
from bench.loadgen.plan import Plan
from bench.models.bodies import Body
from bench.progress import Progress
from bench.rounds import Rounds, Tools
from bench.scenario import Action, JobLoad, RequestLoad, Scenario, Server
from bench.servers import RunContext, RunningServer
from bench.servers.replica_metrics import Counts
from rayprism.telemetry.catalogue import find_metric

__all__ = ["FakeServer", "World", "fake_figures"]

_BATCH_ROWS = find_metric("rayprism_batch_rows").exported


def fake_figures(
    rate: float, latency_s: float = 0.01, failed: int = 0, seconds: float = 1.0
) -> dict[str, Any]:
    """As `bench.loadgen.generator.summarise` gives them."""
    ok = max(1, round(rate * seconds))
    latencies = figures([latency_s] * ok)
    return {
        "client": "python",
        "requests": ok + failed,
        "ok": ok,
        "duration_s": seconds,
        "rate": rate,
        "offered_rate": None,
        "goodput": rate,
        "latency_s": latencies,
        "service_s": latencies,
        "histogram": encode([latency_s] * ok),
        "refused": {"count": 0, "rate": 0.0, "with_retry_after": 0, "latency_s": figures([])},
        "errors": {"status_500": failed} if failed else {},
        "example_error": None,
        "series": None,
        "generator": {"limited": None, "cpu_share": [0.1]},
    }


class _Meter:
    def start(self, at_s: float | None = None) -> None:
        pass

    def stop(self) -> dict[str, Any]:
        return {
            "cpu": {"step_s": 0.25, "cores": {"server": [0.5]}},
            "rss_mib": {"step_s": 0.25, "server": [100.0]},
            "cpu_s": {"server": 0.5, "load": 0.25},
            "other_cores": 0.0,
            "seconds": 1.0,
        }


class _Reader:
    """Says that there were ten batches of one row more each time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def read(self) -> Counts:
        self._world.readings += 1
        count = 10.0 * self._world.readings
        return Counts({_BATCH_ROWS: {1.0: count}}, {_BATCH_ROWS: count})


class FakeServer:
    """A server that does nothing.

    Args:
        name: Of the scenario.
        server: As the scenario says.
        world: Is told what is done.
    """

    grpc_address: str | None = None
    headers: Mapping[str, str] = {}

    def __init__(self, name: str, server: Server, world: World) -> None:
        self.name = name
        self.server = server
        self.marker = f"run/{name}"
        self.url = f"http://{name}"
        self.metadata_url = f"http://{name}/metadata"
        self._world = world
        if server.kind == "rayprism":
            self.grpc_address, self.headers = f"{name}:9000", {"application": "m"}

    def _do(self, what: str) -> None:
        self._world.done.append(f"{what} {self.name}")
        if (error := self._world.failing.get(f"{what} {self.name}")) is not None:
            raise error

    def start(self) -> dict[str, float]:
        self._do("start")
        return {"deploy_s": 1.0, "ready_s": 1.5}

    def restart_model(self) -> float:
        self._do("restart")
        return 2.5

    def pause(self) -> None:
        self._do("pause")

    def resume(self) -> None:
        self._do("resume")

    def act(self, action: Action) -> str:
        self._do(action.do)
        return "done"

    def reader(self) -> _Reader | None:
        return _Reader(self._world) if self.server.kind == "rayprism" else None

    def meter(self) -> _Meter:
        return _Meter()

    def facts(self) -> dict[str, Any]:
        return {"versions": {}}

    def stop(self) -> None:
        self._do("stop")


@dataclass
class World:
    """What is there, and what was done.

    Args:
        best: The requests/s that each server can do.
        failing: What raises an error: `start ours`, `drive theirs`.
    """

    best: Mapping[str, float] = field(default_factory=dict)
    failing: dict[str, BaseException] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    bodies_made: list[str] = field(default_factory=list)
    readings: int = 0

    @property
    def tools(self) -> Tools:
        """For `Rounds`."""
        return Tools(
            make_server=self._make, bodies=self._bodies, measure=self._measure, run_job=self._job
        )

    def rounds(self, scenario: Scenario) -> Rounds:
        """Rounds of this world."""
        context = RunContext("run", Path("/nowhere"))
        return Rounds(scenario, context, Progress(scenario, self.lines.append), self.tools)

    def run(self, scenario: Scenario) -> Rounds:
        """All rounds, from start to stop."""
        rounds = self.rounds(scenario)
        rounds.start()
        for number in range(scenario.rounds):
            rounds.run(number)
        rounds.stop()
        return rounds

    def _make(self, name: str, server: Server, context: RunContext) -> RunningServer:
        if (error := self.failing.get(f"make {name}")) is not None:
            raise error
        return FakeServer(name, server, self)  # type: ignore[return-value]

    def _bodies(self, running: RunningServer, load: RequestLoad, seed: int) -> Sequence[Body]:
        self.bodies_made.append(f"{running.server.model} {load.body} {load.rows}")
        return [Body(b"{}")]

    def _measure(
        self,
        plan: Plan,
        marker: str,
        on_start: Callable[[float], None],
        target_s: float | None,
    ) -> dict[str, Any]:
        name = plan.url.removeprefix("http://").partition(":")[0]
        self.done.append(f"drive {name}")
        self.plans.append(plan)
        if (error := self.failing.get(f"drive {name}")) is not None:
            raise error
        on_start(time.monotonic())
        best = self.best.get(name, 100.0)
        if plan.rate is None:
            return fake_figures(best)
        return fake_figures(min(plan.rate, best), 0.01 if plan.rate <= best else 1.0)

    def _job(self, running: RunningServer, load: JobLoad, context: RunContext) -> dict[str, Any]:
        self.done.append(f"job {running.name}")
        return {"seconds": 2.0, "rows": load.rows, "rate": load.rows / 2}
