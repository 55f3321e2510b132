"""A scenario made smaller, shorter, or aimed at a server that runs already."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bench.bounds import is_peer
from bench.scenario import (
    JobLoad,
    Load,
    RateOf,
    RequestLoad,
    Scenario,
    ScenarioInvalid,
    StartLoad,
    UrlServer,
)

__all__ = ["URL_SERVER", "aimed_at", "only", "quick"]

URL_SERVER = "url"
"""What a server that was given by its address is called."""
_QUICK_S = 1.5
_QUICK_WARM_UP_S = 0.3
_QUICK_PRECISION = 0.25
_QUICK_ROWS = 20_000


def quick(scenario: Scenario) -> Scenario:
    """Two rounds of seconds: to see that it works. The figures are rough."""
    loads = {name: _quick(load) for name, load in scenario.loads.items()}
    return scenario.model_copy(update={"rounds": min(2, scenario.rounds), "loads": loads})


def _quick(load: Load) -> Load:
    if isinstance(load, JobLoad):
        return load.model_copy(update={"rows": min(_QUICK_ROWS, load.rows)})
    if isinstance(load, StartLoad) or load.actions:
        # Promotions take the seconds that they take.
        return load
    search = load.search
    if search is not None:
        precision = max(_QUICK_PRECISION, search.precision)
        search = search.model_copy(update={"precision": precision})
    return load.model_copy(
        update={
            "seconds": min(_QUICK_S, load.seconds),
            "warm_up_s": min(_QUICK_WARM_UP_S, load.warm_up_s),
            "search": search,
        }
    )


def only(
    scenario: Scenario, servers: Sequence[str] | None = None, loads: Sequence[str] | None = None
) -> Scenario:
    """Some of the servers and loads; without the bounds that need the others.

    Args:
        scenario: The whole.
        servers: Their names; None for all.
        loads: Their names; None for all.

    Raises:
        ScenarioInvalid: A name is unknown, or a load needs one that is left out.
    """
    faults = [
        *_unknown("server", servers, scenario.servers),
        *_unknown("load", loads, scenario.loads),
    ]
    if faults:
        raise ScenarioInvalid("\n".join(faults))
    kept_servers = {
        name: server
        for name, server in scenario.servers.items()
        if servers is None or name in servers
    }
    kept_loads: dict[str, Load] = {}
    for name, load in scenario.loads.items():
        if loads is not None and name not in loads:
            continue
        if load.servers is not None:
            left = tuple(item for item in load.servers if item in kept_servers)
            if not left:
                continue
            load = load.model_copy(update={"servers": left})
        kept_loads[name] = load
    small = scenario.model_copy(
        update={
            "servers": kept_servers,
            "loads": kept_loads,
            "bounds": tuple(
                bound
                for bound in scenario.bounds
                if {bound.load, bound.against_load} - {None} <= set(kept_loads)
                and {bound.server, bound.against} - {None, "best-peer"} <= set(kept_servers)
                and (bound.against != "best-peer" or any(map(is_peer, kept_servers.values())))
            ),
        }
    )
    if not kept_loads:
        raise ScenarioInvalid("no load is left: none of them is for these servers")
    if faults := _needs(small):
        raise ScenarioInvalid("\n".join(faults))
    return small


def aimed_at(
    scenario: Scenario, url: str, grpc_url: str | None = None, model: str | None = None
) -> Scenario:
    """The loads of a scenario against one server that runs already.

    Args:
        scenario: Its servers are left out, and its loads that need one of rayprism's own: with
            actions, starts, or jobs. Bounds stay where they compare the first server's figures
            with numbers or with each other.
        url: Without a path.
        grpc_url: host:port.
        model: What the server calls the model; by default as the scenario's first.

    Raises:
        ScenarioInvalid: No load is left.
    """
    first, old = next(iter(scenario.servers.items()))
    server = UrlServer(
        kind="url", title=url, model=model or old.model, url=url.rstrip("/"), grpc_url=grpc_url
    )
    loads: dict[str, Load] = {}
    for name, load in scenario.loads.items():
        if not isinstance(load, RequestLoad) or load.actions:
            continue
        change: dict[str, object] = {"servers": None}
        if isinstance(load.rate, RateOf):
            if load.rate.load not in loads:
                continue
            change["rate"] = load.rate.model_copy(update={"server": "itself"})
        loads[name] = load.model_copy(update=change)
    if not loads:
        raise ScenarioInvalid(
            f"{scenario.name}: every load of it starts, changes or stops servers, which --url "
            "cannot: choose another scenario"
        )
    bounds = tuple(
        bound.model_copy(update={"server": URL_SERVER})
        for bound in scenario.bounds
        if bound.server == first
        and bound.against is None
        and {bound.load, bound.against_load} - {None} <= set(loads)
    )
    return scenario.model_copy(
        update={"servers": {URL_SERVER: server}, "loads": loads, "bounds": bounds}
    )


def _unknown(what: str, given: Sequence[str] | None, known: Collection[str]) -> list[str]:
    return [
        f"no {what} {name!r}: the scenario has {', '.join(known)}"
        for name in given or ()
        if name not in known
    ]


def _needs(scenario: Scenario) -> list[str]:
    """Loads whose rate is that of one that is not there."""
    faults = []
    for name, load in scenario.loads.items():
        rate = load.rate if isinstance(load, RequestLoad) else None
        if not isinstance(rate, RateOf):
            continue
        if rate.load not in scenario.loads:
            faults.append(f"{name} runs at the rate that {rate.load} finds: take both")
        if rate.server == "best-peer" and not any(map(is_peer, scenario.servers.values())):
            faults.append(f"{name} runs at the rate of the best peer: take one at least")
        elif rate.server not in (*scenario.servers, "itself", "best-peer"):
            faults.append(f"{name} runs at the rate of {rate.server}: take that, too")
    return faults
