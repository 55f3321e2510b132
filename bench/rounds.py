"""Servers of a scenario, loaded in turn, round after round."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.bounds import best_peer
from bench.cluster import ClusterFailed
from bench.conduct import Conductor
from bench.loadgen.arrivals import TraceInvalid, read_trace
from bench.loadgen.generator import drive, summarise
from bench.loadgen.plan import LoadFailed, Plan
from bench.models import MODELS, ModelUnavailable
from bench.models.bodies import (
    Body,
    RowsInvalid,
    SignatureInvalid,
    encode,
    from_rows_file,
    from_signature,
)
from bench.progress import Progress, describe_sample
from bench.samples import value_at
from bench.scenario import (
    JobLoad,
    Load,
    PeerServer,
    RateOf,
    RayServeServer,
    RequestLoad,
    Scenario,
    Server,
    StartLoad,
    UrlServer,
)
from bench.servers import (
    JobFailed,
    NeverRight,
    RunContext,
    RunningServer,
    Unavailable,
    difference,
    make_server,
    per_request_us,
    run_job,
)
from bench.servers.replica_metrics import Counts
from bench.trials import search_rate
from rayprism.errors import RayprismError

__all__ = ["Rounds", "RunFailed", "Tools", "request_bodies"]

_FAULTS = (
    Unavailable,
    NeverRight,
    ClusterFailed,
    LoadFailed,
    JobFailed,
    ModelUnavailable,
    RayprismError,
    OSError,
)
"""What may befall a server, and says what it was."""
_MISTAKES = (TraceInvalid, RowsInvalid, SignatureInvalid)
"""Of the scenario: no server is at fault."""
_BODIES = 256
_BODIES_BYTES = 8 * 2**20
"""Of all bodies of a load together: the generator's workers hold them."""
_TRIAL_TIMEOUT_S = 2.0
_TRIAL_TIMEOUT_LATENCIES = 20.0


class RunFailed(Exception):
    """What is measured, and not what it is compared with, could not be."""


class _Measure(Protocol):
    def __call__(
        self, plan: Plan, marker: str, on_start: Callable[[float], None], target_s: float | None
    ) -> dict[str, Any]: ...


def _measure(
    plan: Plan, marker: str, on_start: Callable[[float], None], target_s: float | None
) -> dict[str, Any]:
    return summarise(drive(plan, marker, on_start), plan.seconds, target_s)


def request_bodies(running: RunningServer, load: RequestLoad, seed: int) -> Sequence[Body]:
    """The bodies that a load sends to a server: the same for all servers of one model.

    Args:
        running: Where its model is none of `bench.models`, it is asked for the signature.
        load: What kind, and how many rows in each.
        seed: Of what is in them.
    """
    model = MODELS.get(running.server.model)
    if model is None:
        with urllib.request.urlopen(running.metadata_url, timeout=10) as answer:
            signature = json.load(answer)
    else:
        signature = model.signature()
    if load.rows_file is not None:
        name = running.server.model
        return from_rows_file(name, signature, load.rows_file, load.rows, load.body)

    def make(count: int) -> list[Body]:
        if model is None:
            return from_signature(signature, count, load.rows, load.body, seed)
        requests = model.requests(count, load.rows, seed)
        return [encode(model.name, tensors, load.body) for tensors in requests]

    return make(_fitting(make(1)[0]))


def _fitting(body: Body) -> int:
    return max(4, min(_BODIES, _BODIES_BYTES // max(1, len(body.content))))


@dataclass(frozen=True)
class Tools:
    """What rounds are made with; tests put others in their place."""

    make_server: Callable[[str, Server, RunContext], RunningServer] = make_server
    bodies: Callable[[RunningServer, RequestLoad, int], Sequence[Body]] = request_bodies
    measure: _Measure = _measure
    run_job: Callable[[RunningServer, JobLoad, RunContext], dict[str, Any]] = run_job


@dataclass
class Rounds:
    """A scenario under way.

    A server that others are compared with is left out, with its reason, where it fails. Any other
    that fails ends the run.

    Args:
        scenario: What is run.
        context: What its servers share.
        progress: Is told of everything.
        tools: What it is made with.
    """

    scenario: Scenario
    context: RunContext
    progress: Progress
    tools: Tools = field(default_factory=Tools)

    def __post_init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self.unavailable: dict[str, str] = {}
        self.warnings: list[str] = []
        self._servers: dict[str, RunningServer] = {}
        self._bodies: dict[tuple[object, ...], Sequence[Body]] = {}
        self._counts: dict[str, Counts] = {}
        """What replicas had counted after the last load, where nothing came since."""

    def start(self) -> None:
        """Starts the servers, one at a time, and pauses each.

        Raises:
            RunFailed: One could not be started, and is not there to compare with; or a file that
                the scenario names cannot be used.
        """
        self._check_files()
        for name, server in self.scenario.servers.items():
            try:
                running = self.tools.make_server(name, server, self.context)
                self._servers[name] = running
                if not self._is_asked(name):
                    continue
                self.progress.say(f"starting {name}")
                parts = running.start()
                self.facts[name] = {**running.facts(), "start_s": parts}
                running.pause()
            except _FAULTS as error:
                self._lose(name, error)
                continue
            self.progress.say(f"{name} answers rightly after {parts['ready_s']:.1f} s")
        self.progress.begin_measuring()

    def run(self, number: int) -> None:
        """One round: every load, and under each every server, beginning with another each time.

        Raises:
            RunFailed: A server failed that is not there to compare with.
        """
        for load_name, load in self.scenario.loads.items():
            names = list(load.servers or self.scenario.servers)
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                if name not in self.unavailable:
                    self._one(number, load_name, load, name)
                self.progress.done(load)

    def stop(self) -> None:
        """Ends all servers, whatever state they are in."""
        for name in reversed(list(self._servers)):
            self._end(name)

    def _check_files(self) -> None:
        for name, load in self.scenario.loads.items():
            if not isinstance(load, RequestLoad):
                continue
            if load.arrivals.file is not None:
                try:
                    read_trace(load.arrivals.file)
                except TraceInvalid as error:
                    raise RunFailed(f"loads.{name}.arrivals: {error}") from None
            if load.rows_file is not None and not load.rows_file.is_file():
                raise RunFailed(f"loads.{name}.rows_file: {load.rows_file} is not there")

    def _is_asked(self, server: str) -> bool:
        """Whether any load needs it to run: jobs start what they need themselves."""
        return any(
            not isinstance(load, JobLoad)
            for load in self.scenario.loads.values()
            if load.servers is None or server in load.servers
        )

    def _one(self, number: int, load_name: str, load: Load, name: str) -> None:
        title = f"round {number + 1}/{self.scenario.rounds}, {load_name}, {name}"
        try:
            running = self._servers[name]
            if isinstance(load, JobLoad):
                figures: dict[str, Any] | None = self.tools.run_job(running, load, self.context)
            else:
                running.resume()
                if isinstance(load, StartLoad):
                    figures = {"ready_s": running.restart_model(), "parts_s": {}}
                    self._counts.pop(name, None)
                else:
                    figures = self._requests(number, load_name, load, running, title)
                running.pause()
        except _MISTAKES as error:
            raise RunFailed(f"{title}: {error}") from error
        except _FAULTS as error:
            self._lose(name, error, f"in {title}")
            return
        if figures is not None:
            sample = {"server": name, "load": load_name, "round": number, **figures}
            self.samples.append(sample)
            self.progress.say(f"{title}: {describe_sample(sample)}")

    def _requests(
        self, number: int, load_name: str, load: RequestLoad, running: RunningServer, title: str
    ) -> dict[str, Any] | None:
        rate = self._rate(number, load, running.name)
        if load.loop == "open" and load.search is None and rate is None:
            self._warn(f"{title}: left out, as no rate was found to run at")
            return None
        bodies = self._bodies_of(running, load)
        seed = self.scenario.seed + 1_000 * number + list(self.scenario.loads).index(load_name)
        if load.search is not None:
            figures = self._search(number, load_name, load, running, bodies, seed, title)
        else:
            figures = self._counted(running, self._plan(load, running, bodies, rate, seed), load)
        return {"seed": seed, "client": load.client, "search": None, **figures}

    def _counted(self, running: RunningServer, plan: Plan, load: RequestLoad) -> dict[str, Any]:
        """Figures with what the replicas counted meanwhile."""
        before = self._counts.pop(running.name, None) or self._read(running)
        figures = self._drive(running, plan, load)
        after = self._read(running)
        if before is None or after is None:
            return {**figures, "replica": None}
        self._counts[running.name] = after
        return {**figures, "replica": difference(before, after)}

    def _read(self, running: RunningServer) -> Counts | None:
        """What its replicas have counted; None where they do not, or nobody could be asked."""
        reader = running.reader()
        if reader is None:
            return None
        try:
            return reader.read()
        except (RayprismError, OSError) as error:
            self._warn(f"{running.name}: what its replicas count is not known: {error}")
            return None

    def _search(
        self,
        number: int,
        load_name: str,
        load: RequestLoad,
        running: RunningServer,
        bodies: Sequence[Body],
        seed: int,
        title: str,
    ) -> dict[str, Any]:
        search = load.search
        assert search is not None  # asked before
        self._counts.pop(running.name, None)
        timeout_s = max(_TRIAL_TIMEOUT_S, _TRIAL_TIMEOUT_LATENCIES * search.at_most_s)
        patient = load.model_copy(update={"timeout_s": min(load.timeout_s, timeout_s)})
        before = [
            value_at(sample, "found")
            for sample in self.samples
            if (sample["server"], sample["load"]) == (running.name, load_name)
        ]

        def drive_rate(rate: float, trial: int) -> dict[str, Any]:
            plan = self._plan(patient, running, bodies, rate, seed + 100_000 * (trial + 1))
            return self._drive(running, plan, load)

        found = search_rate(
            search,
            drive_rate,
            settle=running.resume,
            say=lambda text: self.progress.say(f"{title}: {text}"),
            guess=before[-1] if before else None,
        )
        if value_at(found, "found") == search.high:
            self._warn(f"{title}: even {search.high:g}/s held; search with a higher `high`")
        return {**found, "replica": None}

    def _drive(self, running: RunningServer, plan: Plan, load: RequestLoad) -> dict[str, Any]:
        conductor = Conductor(running.meter(), running.act, load.actions, plan.seconds)
        marker = f"{self.context.marker}/load-generator"
        try:
            figures = self.tools.measure(plan, marker, conductor.begin, load.target_s)
        except BaseException:
            conductor.give_up()
            raise
        used, events = conductor.finish()
        cpu_s = used.pop("cpu_s", {})
        used.pop("seconds", None)
        return {
            **figures,
            **used,
            "cpu_us_per_request": per_request_us(cpu_s, figures["requests"]),
            "events": events,
        }

    def _plan(
        self,
        load: RequestLoad,
        running: RunningServer,
        bodies: Sequence[Body],
        rate: float | None,
        seed: int,
    ) -> Plan:
        grpc = load.body == "grpc"
        if grpc and running.grpc_address is None:
            raise LoadFailed(f"{running.name} has no gRPC: choose `body: json`, or leave it out")
        return Plan(
            url=running.grpc_address if grpc and running.grpc_address else running.url,
            bodies=bodies,
            body_kind=load.body,
            headers=running.headers if grpc else {},
            loop=load.loop,
            connections=load.connections,
            seconds=load.seconds,
            warm_up_s=load.warm_up_s,
            rate=rate,
            arrivals=load.arrivals,
            seed=seed,
            processes=load.processes,
            timeout_s=load.timeout_s,
            client=load.client,
        )

    def _bodies_of(self, running: RunningServer, load: RequestLoad) -> Sequence[Body]:
        # Of a server that is given by its address, the model is what it says itself.
        whose = running.name if isinstance(running.server, UrlServer) else running.server.model
        key = (whose, load.body, load.rows, load.rows_file)
        if key not in self._bodies:
            self._bodies[key] = self.tools.bodies(running, load, self.scenario.seed)
        return self._bodies[key]

    def _rate(self, number: int, load: RequestLoad, name: str) -> float | None:
        """Requests/s; None of a closed loop, and where the load to go by found nothing."""
        rate = load.rate
        if not isinstance(rate, RateOf):
            return rate
        source = self.scenario.loads[rate.load]
        searched = isinstance(source, RequestLoad) and source.search is not None
        measure = "found" if searched else "rate"
        mine = [sample for sample in self.samples if sample["round"] == number]
        whose: str | None = name if rate.server == "itself" else rate.server
        if whose == "best-peer":
            whose = best_peer(self.scenario, mine, load=rate.load, measure=measure)
        for sample in mine:
            if (sample["server"], sample["load"]) == (whose, rate.load):
                value = value_at(sample, measure)
                return value * rate.share if value else None
        return None

    def _lose(self, name: str, error: Exception, when: str = "at its start") -> None:
        server = self.scenario.servers[name]
        if not isinstance(server, PeerServer | RayServeServer):
            raise RunFailed(f"{name}, {when}: {error}") from error
        self.unavailable[name] = f"{when}: {error}"
        self.progress.say(f"{name} is left out, {self.unavailable[name]}")
        self._end(name)

    def _end(self, name: str) -> None:
        running = self._servers.pop(name, None)
        if running is None:
            return
        try:
            running.stop()
        except _FAULTS as error:
            self._warn(f"{name} did not end in order: {error}")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.say(text)
