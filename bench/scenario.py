"""What a scenario says: which servers, which loads, how often, and what has to be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "Action",
    "Arrivals",
    "Bound",
    "JobLoad",
    "Load",
    "PeerServer",
    "RateOf",
    "RayServeServer",
    "RayprismServer",
    "RequestLoad",
    "Scenario",
    "ScenarioInvalid",
    "Search",
    "Server",
    "StartLoad",
    "UrlServer",
    "load_scenario",
]

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ScenarioInvalid(Exception):
    """The file is no scenario: every fault, with where it is."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Server(_Strict):
    title: str = ""
    """In tables; by default its name."""
    model: str
    """Of `bench.models`."""


class RayprismServer(_Server):
    """rayprism, in a cluster as `rayprism up` starts it."""

    kind: Literal["rayprism"]
    replicas: Count = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """Of each replica; a part of 1 shares a GPU. The cluster has those of the machine."""
    options: dict[str, Any] = {}
    """`args.options`: of the runtime, laid over those of the model."""
    versions: Count = 1
    """So many stand beside each other: 1 is stable, the others are at their own addresses."""
    user_config: dict[str, Any] = {}
    """Of version 1."""
    autoscaling: dict[str, Any] | None = None
    """Serve's `autoscaling_config`, instead of `replicas`."""
    environment: dict[str, str] = {}
    """Of the cluster, beside what `rayprism up` sets."""


class RayServeServer(_Server):
    """Ray Serve without rayprism, in a cluster of its own."""

    kind: Literal["ray-serve"]
    pattern: Literal["documented", "adjusted", "tuned", "noop", "noop-lane"]
    environment: dict[str, str] = {}


class PeerServer(_Server):
    """A server in an environment of its own that `bench/peers/` makes."""

    kind: Literal["peer"]
    peer: str
    options: dict[str, Any] = {}
    """Of the peer: batch size, workers, threads."""


class UrlServer(_Server):
    """A server that runs already."""

    kind: Literal["url"]
    url: str
    """Without a path: http://127.0.0.1:8000."""
    grpc_url: str | None = None
    """host:port."""


Server = Annotated[
    RayprismServer | RayServeServer | PeerServer | UrlServer, Field(discriminator="kind")
]


class Arrivals(_Strict):
    """When requests of an open loop are meant to leave."""

    kind: Literal["constant", "poisson", "bursts", "trace"] = "poisson"
    burst_factor: Positive = 5.0
    """`bursts`: so many times the rate for `burst_s` out of every `every_s`; less in between, so
    that the mean is the rate."""
    burst_s: Positive = 0.5
    every_s: Positive = 5.0
    file: Path | None = None
    """`trace`: seconds from the start, one a line; stretched so that the mean is the rate."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "bursts" and self.burst_factor * self.burst_s >= self.every_s:
            raise ValueError("burst_factor * burst_s has to be less than every_s")
        if (self.file is not None) != (self.kind == "trace"):
            raise ValueError("file belongs to kind: trace, and to no other")
        return self


class RateOf(_Strict):
    """A rate that another load of the same round found."""

    load: str
    """A load with `search`, or of a closed loop: its rate."""
    share: Positive
    """Times that: 0.7, or 3 for three times what was found."""
    server: str | Literal["itself", "best-peer"] = "itself"
    """Whose; `best-peer`: of kind peer or ray-serve, the one with the highest."""


class Search(_Strict):
    """Looks for the highest rate that holds a latency."""

    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0
    at_most_s: Positive
    low: Positive
    """Requests/s; where even this does not hold, nothing is found."""
    high: Positive
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The answer is known to this share of itself."""


class Action(_Strict):
    """Something that happens to a rayprism server while it is under load."""

    at_s: Annotated[float, Field(ge=0)]
    do: Literal["promote", "rollback", "traffic", "scale", "kill-replica"]
    """`promote`: version 2 takes the address of version 1; `traffic`: see `value`."""
    value: Any = None
    """`traffic`: what stands in `user_config.traffic`; `scale`: how many replicas."""


class RequestLoad(_Strict):
    """Requests, in a closed loop or an open one."""

    loop: Literal["closed", "open"]
    seconds: Positive = 5.0
    warm_up_s: Annotated[float, Field(ge=0)] = 1.0
    """Before it, at the same load, and in no figure."""
    connections: Count = 64
    """Closed loop: how many ask at once. Open loop: the most that are opened."""
    rate: Positive | RateOf | None = None
    """Open loop: requests/s."""
    search: Search | None = None
    """Open loop: instead of a rate."""
    arrivals: Arrivals = Arrivals()
    body: Literal["json", "binary", "grpc"] = "json"
    rows: Count = 1
    """In each request."""
    rows_file: Path | None = None
    """JSON Lines of real rows, {input name: value}, instead of what the model's signature gives."""
    client: Literal["python", "wrk"] = "python"
    """wrk costs less of the machine, but knows closed loops of JSON only."""
    processes: Count = 1
    """Of the load generator."""
    timeout_s: Positive = 30.0
    target_s: Positive | None = None
    """What is answered later is no goodput."""
    actions: tuple[Action, ...] = ()
    servers: tuple[str, ...] | None = None
    """Which of them; by default all."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loop == "closed" and (self.rate is not None or self.search is not None):
            raise ValueError("a closed loop has no rate and no search")
        if self.loop == "open" and (self.rate is None) == (self.search is None):
            raise ValueError("an open loop needs either a rate or a search")
        if self.client == "wrk" and (self.loop != "closed" or self.body != "json"):
            raise ValueError("client: wrk is for a closed loop of JSON bodies")
        return self


class StartLoad(_Strict):
    """No requests but one: how long from the command to start until it is answered rightly."""

    loop: Literal["start"]
    servers: tuple[str, ...] | None = None


class JobLoad(_Strict):
    """No requests: a batch job of the server's model, from its command to its `_SUCCESS`."""

    loop: Literal["job"]
    rows: Count
    config: dict[str, Any] = {}
    """What its config has beside input, output and model."""
    servers: tuple[str, ...] | None = None


Load = Annotated[RequestLoad | StartLoad | JobLoad, Field(discriminator="loop")]


class Bound(_Strict):
    """What a figure, or a ratio of two, has to reach.

    The figure of a round is `measure` of the sample; where `against` is given, it is divided by
    that of the other server, or other load, in the same round. What counts is the median of rounds.
    """

    title: str
    measure: str = "rate"
    """A path into a sample: `rate`, `goodput`, `latency_s.p99`, `refused.latency_s.max`."""
    load: str
    server: str
    against: str | None = None
    """Another server; `best-peer`: the one whose own figure is best."""
    against_load: str | None = None
    """Another load; by default the same."""
    against_measure: str | None = None
    """Another figure; by default the same."""
    against_value: Positive | None = None
    """A number, to divide by: a target."""
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self


class Scenario(_Strict):
    """A scenario file."""

    name: str = ""
    """The file's."""
    title: str
    about: str = ""
    """For the page: what is compared, and how to read it."""
    servers: Annotated[dict[str, Server], Field(min_length=1)]
    loads: Annotated[dict[str, Load], Field(min_length=1)]
    """In their order, in every round."""
    rounds: Count = 5
    seed: int = 1
    bounds: tuple[Bound, ...] = ()

    @model_validator(mode="after")
    def _names(self) -> Self:
        faults = []
        for name, load in self.loads.items():
            for server in load.servers or ():
                if server not in self.servers:
                    faults.append(f"loads.{name}.servers: no server {server!r}")
            faults += self._not_for(name, load)
            rate = load.rate if isinstance(load, RequestLoad) else None
            if isinstance(rate, RateOf):
                earlier = list(self.loads)[: list(self.loads).index(name)]
                if rate.load not in earlier:
                    faults.append(f"loads.{name}.rate.load: {rate.load!r} is no earlier load")
                if rate.server not in (*self.servers, "itself", "best-peer"):
                    faults.append(f"loads.{name}.rate.server: no server {rate.server!r}")
        for index, bound in enumerate(self.bounds):
            loads = {bound.load, bound.against_load} - {None}
            servers = {bound.server, bound.against} - {None, "best-peer"}
            faults += [f"bounds.{index}: no load {item!r}" for item in loads - set(self.loads)]
            faults += [
                f"bounds.{index}: no server {item!r}" for item in servers - set(self.servers)
            ]
            faults += self._never_measured(index, bound)
        if faults:
            raise ValueError("; ".join(sorted(map(str, faults))))
        return self

    def _not_for(self, name: str, load: Load) -> list[str]:
        """What servers of some kinds cannot do."""
        if isinstance(load, JobLoad):
            what, kinds = "jobs are for rayprism", ["rayprism"]
        elif isinstance(load, RequestLoad) and load.actions:
            what, kinds = "actions are for rayprism", ["rayprism"]
        elif isinstance(load, RequestLoad) and load.body == "grpc":
            what, kinds = "it has no gRPC", ["rayprism", "url"]
        else:
            return []
        return [
            f"loads.{name}: {server!r} is of kind {self.servers[server].kind}, and {what}: name "
            "the servers"
            for server in load.servers or self.servers
            if server in self.servers and self.servers[server].kind not in kinds
        ]

    def _never_measured(self, index: int, bound: Bound) -> list[str]:
        sides = (
            (bound.server, bound.load),
            (bound.against or bound.server, bound.against_load or bound.load),
        )
        return [
            f"bounds.{index}: load {name!r} is not for server {server!r}"
            for server, name in dict.fromkeys(sides)
            if server in self.servers
            and (load := self.loads.get(name))
            and load.servers is not None
            and server not in load.servers
        ]


def load_scenario(path: Path) -> Scenario:
    """Reads a scenario; paths in it are taken from its folder.

    Raises:
        ScenarioInvalid: The file cannot be read, or has faults.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScenarioInvalid(f"{path}: {error}") from None
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise ScenarioInvalid("\n".join(faults)) from None
    loads = {name: _absolute(load, path.parent) for name, load in scenario.loads.items()}
    return scenario.model_copy(update={"name": scenario.name or path.stem, "loads": loads})


def _absolute(load: Load, folder: Path) -> Load:
    if not isinstance(load, RequestLoad):
        return load
    arrivals = load.arrivals
    if arrivals.file is not None:
        arrivals = arrivals.model_copy(update={"file": folder / arrivals.file})
    rows_file = None if load.rows_file is None else folder / load.rows_file
    return load.model_copy(update={"arrivals": arrivals, "rows_file": rows_file})
