"""Whether what was measured reaches what a scenario asks for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.bootstrap import interval
from bench.samples import FAILED, Sample, value_at
from bench.scenario import Bound, PeerServer, RayServeServer, Scenario, Server

__all__ = ["best_peer", "is_peer", "judge"]

_IDLE = ("noop", "noop-lane")
"""Patterns that run no model: a yardstick, and no peer."""


def is_peer(server: Server) -> bool:
    """Whether it is one of those that `best-peer` chooses from."""
    if isinstance(server, RayServeServer):
        return server.pattern not in _IDLE
    return isinstance(server, PeerServer)


def judge(scenario: Scenario, samples: Sequence[Sample], seed: int = 1) -> list[dict[str, Any]]:
    """Every bound of a scenario, in its order.

    What counts is the median over the rounds of each round's own figure, or ratio. A bound that
    cannot be judged is not met; neither is one whose server answered with errors, as a fast error
    would be a good figure.

    Args:
        scenario: Whose bounds.
        samples: Of all its rounds.
        seed: Of the intervals.

    Returns:
        For each what the scenario says, and `against_server` (who it was, where `against` is
        `best-peer`), `value`, `interval` of 95 %, `rounds` (their figures), `met`, and `why`: what
        is to be known about it, or None.
    """
    return [_judge(bound, scenario, samples, seed) for bound in scenario.bounds]


def best_peer(
    scenario: Scenario,
    samples: Sequence[Sample],
    *,
    load: str,
    measure: str,
    highest: bool = True,
) -> str | None:
    """The peer whose median figure is best: the one that is hardest to beat.

    A peer that failed or refused requests is not in question, as long as another did not.

    Args:
        scenario: Says who is a peer.
        samples: Of the rounds that count.
        load: Whose figures.
        measure: Which.
        highest: Whether higher is better.

    Returns:
        None where no peer has the figure.
    """
    clean: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, server in scenario.servers.items():
        mine = _of(samples, name, load) if is_peer(server) else []
        figures = _known([value_at(item, measure) for item in mine])
        if figures:
            failed = any(value_at(item, FAILED) or value_at(item, "refused_share") for item in mine)
            (others if failed else clean)[name] = statistics.median(figures)
    found = clean or others
    return (max if highest else min)(found, key=found.__getitem__) if found else None


def _judge(
    bound: Bound, scenario: Scenario, samples: Sequence[Sample], seed: int
) -> dict[str, Any]:
    sides = _sides(bound, scenario, samples)
    figures = _figures(bound, sides, samples)
    value = statistics.median(figures) if figures else None
    met = value is not None and _reaches(bound, value)
    if bound.measure != FAILED and _errors(samples, bound.server, bound.load):
        met = False
    return {
        **bound.model_dump(mode="json"),
        "against_server": sides[1][0] if len(sides) > 1 else None,
        "value": value,
        "interval": list(interval(figures, seed)) if figures else None,
        "rounds": figures,
        "met": met,
        "why": _notes(bound, sides, samples) if figures else _why_not(sides, samples),
    }


Side = tuple[str | None, str, str]
"""Server, load and measure; no server where there is no best peer."""


def _sides(bound: Bound, scenario: Scenario, samples: Sequence[Sample]) -> list[Side]:
    sides: list[Side] = [(bound.server, bound.load, bound.measure)]
    if bound.against or bound.against_load or bound.against_measure:
        load = bound.against_load or bound.load
        measure = bound.against_measure or bound.measure
        server: str | None = bound.against or bound.server
        if server == "best-peer":
            highest = bound.at_least is not None
            server = best_peer(scenario, samples, load=load, measure=measure, highest=highest)
        sides.append((server, load, measure))
    return sides


def _figures(bound: Bound, sides: Sequence[Side], samples: Sequence[Sample]) -> list[float]:
    divisor = bound.against_value or 1.0
    above, *below = (_by_round(side, samples) for side in sides)
    if not below:
        return [above[number] / divisor for number in sorted(above)]
    return [
        above[number] / below[0][number] / divisor
        for number in sorted(above)
        if below[0].get(number)
    ]


def _reaches(bound: Bound, value: float) -> bool:
    if bound.at_least is not None:
        return value >= bound.at_least
    return bound.at_most is not None and value <= bound.at_most


def _by_round(side: Side, samples: Sequence[Sample]) -> dict[int, float]:
    server, load, measure = side
    found = ((item["round"], value_at(item, measure)) for item in _of(samples, server, load))
    return {number: value for number, value in found if value is not None}


def _of(samples: Sequence[Sample], server: str | None, load: str) -> list[Sample]:
    return [item for item in samples if item["server"] == server and item["load"] == load]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _errors(samples: Sequence[Sample], server: str | None, load: str) -> int:
    return int(sum(_known([value_at(item, FAILED) for item in _of(samples, server, load)])))


def _notes(bound: Bound, sides: Sequence[Side], samples: Sequence[Sample]) -> str | None:
    notes = []
    for server, load, _ in sides:
        if bound.measure != FAILED and (count := _errors(samples, server, load)):
            notes.append(f"{server} answered {count:,} requests of {load} with errors")
        for item in _of(samples, server, load):
            if limited := (item.get("generator") or {}).get("limited"):
                notes.append(f"{server}, {load}: {limited}")
                break
    return "; ".join(dict.fromkeys(notes)) or None


def _why_not(sides: Sequence[Side], samples: Sequence[Sample]) -> str:
    for server, load, measure in sides:
        if server is None:
            return f"not judged: no peer has a {measure} under {load}"
        if not _of(samples, server, load):
            return f"not judged: no sample of {server} under {load}"
        if not _by_round((server, load, measure), samples):
            return f"not judged: {server} has no {measure} under {load}"
    return "not judged: no round has both sides, or what is divided by is 0 in all"
