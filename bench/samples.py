"""The samples of a results file: which there are, and the figures in them.

A results file is one JSON document:

    date, commit, machine, versions   as `bench.machine.describe` gives them
    command                           what was typed
    quick                             whether it ran shortened
    scenario                          the whole scenario: name, title, about, servers, loads,
                                      rounds, seed, bounds
    servers {name: facts}             what was running: versions, options
    unavailable {name: reason}        servers that are left out
    samples[]                         one for each round, load and server
    bounds[]                          those of the scenario, with value, interval, met, why
    warnings[]                        sentences

A sample has `server`, `load`, `round` (from 0), and of a load of requests what
`bench.loadgen.summary.summarise` gives.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FAILED", "ROLES", "Kind", "Measure", "Sample", "Samples", "main_measure", "value_at"]

Sample = Mapping[str, Any]
Kind = Literal["closed", "open", "search", "start", "job"]

FAILED = "failed"
"""A path that is no key: all errors of a sample, without what was refused."""
ROLES = ("replica", "server", "proxy", "ray")
"""Of processes, as they follow each other in tables and plots; `load` is the load generator."""
_COMPUTED = {"found", FAILED, "refused_share", "rss_peak_mib"}


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of samples.

    Args:
        path: Where it stands in a sample: `rate`, `latency_s.p99`.
        title: For people.
        better: Which way is better.
    """

    path: str
    title: str
    better: Literal["higher", "lower"]


def value_at(sample: Sample, path: str) -> float | None:
    """A figure of a sample.

    Args:
        sample: A sample.
        path: Keys with dots between; or `found`, the highest rate that a search saw held;
            `failed`, the requests that ended in an error; `refused_share` of the requests that
            were refused; `rss_peak_mib` of all processes of the server together.

    Returns:
        None where there is none, or it is no finite number.
    """
    value: Any = sample
    if path in _COMPUTED:
        value = _computed(sample, path)
    else:
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _computed(sample: Sample, path: str) -> float | None:
    if path == "found":
        steps = sample.get("search") or ()
        return max((step["rate"] for step in steps if step["held"]), default=None)
    if path == "failed":
        return float(sum((sample.get("errors") or {}).values()))
    if path == "refused_share":
        requests = sample.get("requests")
        return sample["refused"]["count"] / requests if requests and "refused" in sample else None
    roles = {
        role: series
        for role, series in (sample.get("rss_mib") or {}).items()
        if role not in ("step_s", "load")
    }
    totals = [sum(at) for at in zip(*roles.values(), strict=False)]
    return max(totals, default=None)


class Samples:
    """The samples of a results file, by load and server, in the order of the scenario.

    Args:
        results: The document.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        scenario: Mapping[str, Any] = results.get("scenario") or {}
        self._loads: Mapping[str, Any] = scenario.get("loads") or {}
        self._servers: Mapping[str, Any] = scenario.get("servers") or {}
        self._found: dict[tuple[str, str], list[Sample]] = {}
        for sample in sorted(results.get("samples") or (), key=lambda each: each["round"]):
            self._found.setdefault((sample["load"], sample["server"]), []).append(sample)
        self.loads = _ordered(self._loads, [load for load, _ in self._found])
        """Those that have samples."""
        self.servers = _ordered(self._servers, [server for _, server in self._found])
        """Those that have samples."""

    def of(self, load: str, server: str) -> list[Sample]:
        """The samples of a load and server, by round."""
        return self._found.get((load, server), [])

    def servers_of(self, load: str) -> list[str]:
        """The servers that were under a load."""
        return [server for server in self.servers if (load, server) in self._found]

    def title(self, server: str) -> str:
        """What to call a server."""
        return (self._servers.get(server) or {}).get("title") or server

    def load(self, name: str) -> Mapping[str, Any]:
        """What the scenario says of a load."""
        return self._loads.get(name) or {}

    def kind(self, load: str) -> Kind:
        """Which figures a load gives."""
        found: Kind = self.load(load).get("loop") or "closed"
        return "search" if found == "open" and self.load(load).get("search") else found

    def values(self, load: str, server: str, path: str) -> dict[int, float]:
        """A figure by round; rounds that have none are left out."""
        found = ((each["round"], value_at(each, path)) for each in self.of(load, server))
        return {number: value for number, value in found if value is not None}

    def median(self, load: str, server: str, path: str) -> float | None:
        """The median over rounds; None where there is none."""
        values = self.values(load, server, path)
        return statistics.median(values.values()) if values else None

    def total(self, load: str, server: str, path: str) -> float:
        """The sum over rounds."""
        return sum(self.values(load, server, path).values())

    def pairs(self, load: str, path: str, above: str, below: str) -> tuple[list[float], ...]:
        """A figure of two servers in the rounds that have both, the second's greater than 0."""
        upper, lower = self.values(load, above, path), self.values(load, below, path)
        rounds = [number for number in upper if lower.get(number, 0) > 0]
        return [upper[number] for number in rounds], [lower[number] for number in rounds]

    def reference(self) -> str | None:
        """The server that the others are held against: the first of rayprism, or the first."""
        kinds = {name: (self._servers.get(name) or {}).get("kind") for name in self.servers}
        ours = [name for name in self.servers if kinds[name] == "rayprism"]
        return next(iter(ours or self.servers), None)

    def limited(self, load: str, server: str) -> list[str]:
        """Why figures are the load generator's, and not the server's; one for each such round."""
        reasons = ((each.get("generator") or {}).get("limited") for each in self.of(load, server))
        return [reason for reason in reasons if reason]


def main_measure(kind: Kind, load: Mapping[str, Any]) -> Measure:
    """The one figure that a load is about."""
    if kind == "search":
        search = load["search"]
        held = f"p{search['percentile']:g} of {search['at_most_s'] * 1e3:g} ms"
        return Measure("found", f"highest rate that holds {held}", "higher")
    if kind == "open":
        if load.get("target_s"):
            return Measure("goodput", "goodput", "higher")
        return Measure("latency_s.p99", "p99", "lower")
    if kind == "start":
        return Measure("ready_s", "time until ready", "lower")
    return Measure("rate", "rows/s" if kind == "job" else "requests/s", "higher")


def _ordered(known: Mapping[str, Any], seen: Sequence[str]) -> list[str]:
    present = dict.fromkeys(seen)
    return [name for name in known if name in present] + [
        name for name in present if name not in known
    ]
