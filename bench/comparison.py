"""What differs between two runs of a scenario: every figure of both, and whether it is noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.bootstrap import ratio_interval
from bench.samples import FAILED, Samples
from bench.tables import number

__all__ = [
    "CPU",
    "ENOUGH_ROUNDS",
    "FLOOR",
    "LEVEL",
    "SEED",
    "Comparison",
    "Pair",
    "ServerUnknown",
    "Verdict",
    "compare",
]

FEWEST_ROUNDS = 3
"""Of fewer nothing is said: two rounds of each differ in order by luck one time in three."""
ENOUGH_ROUNDS = 5
"""So many that are all better than as many others are so by luck one time in a hundred."""

SEED = 1
LEVEL = 0.99
FLOOR = 0.03
_MEASURES: Mapping[str, Literal["higher", "lower"]] = {
    "rate": "higher",
    "goodput": "higher",
    "found": "higher",
    "latency_s.p50": "lower",
    "latency_s.p99": "lower",
    "ready_s": "lower",
    "rss_peak_mib": "lower",
}
CPU = "cpu_us_per_request"
_MACHINE = ("cpu", "cores", "memory_gib")

Verdict = Literal["better", "worse", "differs", "same", "unknown"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure that both runs have.

    Args:
        load: Under which load.
        server: Of which server.
        measure: Where it stands in a sample.
        before: Median over the rounds of the first run.
        after: Median over the rounds of the second run.
        rounds: How many each of them has.
        ratio: `after / before`; None where `before` is 0.
        interval: Of the ratio.
        verdict: Whether they differ by more than the noise, and which way, where it is known which
            is better; `unknown` where rounds are too few, or there is no ratio.
    """

    load: str
    server: str
    measure: str
    before: float
    after: float
    rounds: tuple[int, int]
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: Verdict

    @property
    def name(self) -> str:
        """LOAD/SERVER/MEASURE."""
        return f"{self.load}/{self.server}/{self.measure}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, beside each other.

    Args:
        scenario: The name of what was run.
        pairs: By load, server and measure.
        alone: Figures that only one of them has: LOAD/SERVER/MEASURE, and `first` or `second`.
        new_errors: Requests that failed in the second run, by LOAD/SERVER, where in the first
            none did.
        objections: Why they should not be compared at all: another scenario, another machine.
        notes: What is to be known to read it.
        relative_to: The server by whose figures all are divided.
    """

    scenario: str
    pairs: tuple[Pair, ...]
    alone: Mapping[str, Literal["first", "second"]]
    new_errors: Mapping[str, int]
    objections: tuple[str, ...]
    notes: tuple[str, ...]
    relative_to: str | None = None


class ServerUnknown(Exception):
    """A run has no such server."""


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    more: Sequence[str] = (),
    relative_to: str | None = None,
    floor: float = FLOOR,
    level: float = LEVEL,
    seed: int = SEED,
) -> Comparison:
    """Every figure of both runs, with the ratio second / first and its interval.

    A pair differs where the interval leaves out 1 and the ratio is more than `floor` away from it.

    Args:
        first: Results, see `bench.samples`.
        second: Those that are held against them.
        more: Measures beside the usual: paths into a sample.
        relative_to: A server by whose figures all others are divided, round by round, before they
            are compared: what made one whole run slower is then in no ratio.
        floor: The smallest difference that counts, as a share.
        level: Of the intervals. By default 99 %: there are many pairs, and of twenty that are equal
            one would seem to differ at 95 %.
        seed: Of the resampling.

    Raises:
        ServerUnknown: A run does not have the server `relative_to`.
        ValueError: The level is no share.
    """
    sides = Samples(first), Samples(second)
    figures = [_figures(side, more, relative_to) for side in sides]
    pairs = [
        _pair(name, figures[0][name], figures[1][name], floor, level, seed)
        for name in figures[0]
        if name in figures[1]
    ]
    alone: dict[str, Literal["first", "second"]] = {
        "/".join(name): "first" if name in figures[0] else "second"
        for name in (*figures[0], *figures[1])
        if (name in figures[0]) != (name in figures[1])
    }
    return Comparison(
        scenario=str(_scenario(first).get("name", "")),
        pairs=tuple(pairs),
        alone=alone,
        new_errors=_new_errors(*sides),
        objections=tuple(_objections(first, second)),
        notes=tuple(_notes(sides, pairs, level)),
        relative_to=relative_to,
    )


Name = tuple[str, str, str]
"""Load, server, measure."""


def _figures(
    samples: Samples, more: Sequence[str], relative_to: str | None
) -> dict[Name, list[float]]:
    """Every measured figure, one value for each round that has it."""
    if relative_to is not None and relative_to not in samples.servers:
        raise ServerUnknown(
            f"no server {relative_to!r} to compare with in each file; there are: "
            f"{', '.join(samples.servers)}"
        )
    found: dict[Name, list[float]] = {}
    for load in samples.loads:
        for server in samples.servers_of(load):
            if server == relative_to:
                continue
            for measure in dict.fromkeys((*_measures(samples, load, server), *more)):
                values = list(samples.values(load, server, measure).values())
                if relative_to is not None:
                    above, below = samples.pairs(load, measure, server, relative_to)
                    values = [one / other for one, other in zip(above, below, strict=True)]
                if values:
                    found[load, server, measure] = values
    return found


def _measures(samples: Samples, load: str, server: str) -> list[str]:
    """The usual ones that a load has; those that say nothing of it are left out."""
    left_out = set() if samples.load(load).get("target_s") else {"goodput"}
    if samples.kind(load) == "search":
        # At whatever rate was found: another in each run.
        left_out |= {"rate", "goodput", "latency_s.p50", "latency_s.p99"}
    roles = {role for each in samples.of(load, server) for role in each.get(CPU) or ()}
    return [
        *(path for path in _MEASURES if path not in left_out),
        *(f"{CPU}.{role}" for role in sorted(roles - {"load"})),
    ]


def _pair(
    name: Name,
    before: Sequence[float],
    after: Sequence[float],
    floor: float,
    level: float,
    seed: int,
) -> Pair:
    middles = statistics.median(before), statistics.median(after)
    ratio, ends = None, None
    verdict: Verdict = "unknown"
    if min(before) > 0:
        ratio = middles[1] / middles[0]
        ends = ratio_interval(after, before, seed, paired=False, level=level)
        if min(len(before), len(after)) >= FEWEST_ROUNDS:
            verdict = _verdict(name[2], ratio, ends, floor)
    return Pair(*name, *middles, (len(before), len(after)), ratio, ends, verdict)


def _verdict(measure: str, ratio: float, ends: tuple[float, float], floor: float) -> Verdict:
    if ends[0] <= 1 <= ends[1] or abs(ratio - 1) <= floor:
        return "same"
    better = "lower" if measure.startswith(CPU) else _MEASURES.get(measure)
    if better is None:
        return "differs"
    return "better" if (ratio > 1) == (better == "higher") else "worse"


def _objections(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterable[str]:
    one, other = _scenario(first), _scenario(second)
    if one.get("name") != other.get("name"):
        yield f"They are of different scenarios: {one.get('name')!r} and {other.get('name')!r}."
    machines = (first.get("machine") or {}, second.get("machine") or {})
    for key in _MACHINE:
        values = [machine.get(key) for machine in machines]
        if values[0] != values[1]:
            yield f"They ran on different machines: {key} was {values[0]}, and is {values[1]}."
    for part in ("loads", "servers"):
        specs = (one.get(part) or {}, other.get(part) or {})
        for name in specs[0]:
            if name in specs[1] and specs[0][name] != specs[1][name]:
                yield f"{part}.{name} is not the same: {_changed(specs[0][name], specs[1][name])}."


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} was {one.get(key)}, and is {other.get(key)}"
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    )


def _new_errors(first: Samples, second: Samples) -> dict[str, int]:
    found = {}
    for load in second.loads:
        for server in second.servers_of(load):
            failed = int(second.total(load, server, FAILED))
            if failed and first.of(load, server) and not first.total(load, server, FAILED):
                found[f"{load}/{server}"] = failed
    return found


def _notes(sides: Sequence[Samples], pairs: Sequence[Pair], level: float) -> Iterable[str]:
    rounds = min((min(pair.rounds) for pair in pairs), default=ENOUGH_ROUNDS)
    if rounds < FEWEST_ROUNDS:
        yield f"{rounds} rounds are too few to know the noise: {FEWEST_ROUNDS} are needed."
    elif rounds < ENOUGH_ROUNDS:
        yield (
            f"Of {rounds} rounds, up to one in ten figures that are equal seem to differ; "
            f"{ENOUGH_ROUNDS} tell more."
        )
    elif (chance := round(len(pairs) * (1 - level))) > 0:
        yield f"Of {len(pairs)} equal figures, about {chance} would seem to differ by luck."
    yield from _other_rates(*sides)
    for word, samples in zip(("first", "second"), sides, strict=True):
        if samples.results.get("quick"):
            yield f"The {word} is a shortened run."
        for load in samples.loads:
            for server in samples.servers_of(load):
                if failed := samples.total(load, server, FAILED):
                    yield f"{load}/{server} had {failed:,.0f} errors in the {word}."
                if limited := samples.limited(load, server):
                    yield (
                        f"{load}/{server}: the load generator was the limit in {len(limited)} "
                        f"rounds of the {word}."
                    )


def _other_rates(first: Samples, second: Samples) -> Iterable[str]:
    for load in first.loads:
        for server in first.servers_of(load):
            was, now = (side.median(load, server, "offered_rate") for side in (first, second))
            if first.kind(load) == "open" and was and now and abs(now / was - 1) > FLOOR:
                yield (
                    f"{load}/{server} was offered {number(was, '/s')} in the first and "
                    f"{number(now, '/s')} in the second: their latencies are at different rates."
                )


def _scenario(results: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = results.get("scenario") or {}
    return found
