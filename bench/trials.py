"""A search against a server: each rate is driven, and judged by the latency it has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.loadgen.histogram import POINTS, decode, percentile_of
from bench.scenario import Search
from bench.search import RateSearch

__all__ = ["Outcome", "judge_trial", "search_rate"]

_KEYS = {point: name for name, point in POINTS.items()}
"""Percentiles that a sample has by themselves."""


@dataclass(frozen=True)
class Outcome:
    """How one rate went.

    Args:
        p_s: The percentile that is looked at; None where nothing was answered.
        why: The rate was not held, in a few words; None where it was.
        sure: That it was no hiccup: half of the answers came too late, or there was none.
        limited: Why it may have been the load generator that did not hold it, or None.
    """

    p_s: float | None
    why: str | None
    sure: bool = False
    limited: str | None = None

    @property
    def held(self) -> bool:
        """Whether the rate was held."""
        return self.why is None


def judge_trial(figures: Mapping[str, Any], search: Search) -> Outcome:
    """Whether the figures of a rate hold the latency that is searched for.

    What was refused or failed counts as too late. A load generator that was late itself makes
    latency, which counts from when requests were meant to leave, no better: what held has held.
    """
    limited = (figures.get("generator") or {}).get("limited")
    ok, requests = figures["ok"], figures["requests"]
    if not ok:
        return Outcome(None, "nothing was answered", True, limited)
    p_s = _percentile(figures, search.percentile)
    if (requests - ok) / requests > 1 - search.percentile / 100:
        why = f"{requests - ok:,} of {requests:,} failed or were refused"
    elif p_s > search.at_most_s:
        why = f"p{search.percentile:g} was {p_s * 1e3:.1f} ms"
    else:
        return Outcome(p_s, None)
    half_late = _percentile(figures, 50.0) > search.at_most_s
    return Outcome(p_s, why, half_late, limited)


def search_rate(
    search: Search,
    drive: Callable[[float, int], dict[str, Any]],
    settle: Callable[[], None],
    say: Callable[[str], None],
    guess: float | None = None,
) -> dict[str, Any]:
    """Finds the highest rate that holds the latency.

    Args:
        search: What is searched.
        drive: Sends so many requests a second, for the so-manieth time; gives a sample's figures.
        settle: Waits until a server that fell behind is ready again.
        say: Is told of each rate.
        guess: What was found before.

    Returns:
        The figures of the rate that was found, and `search`: each rate that was tried. Where none
        held: of the last one.
    """
    steps: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    last: dict[str, Any] = {}
    generator: str | None = None
    rates = RateSearch(search.low, search.high, search.precision, guess)
    for number, rate in enumerate(rates):
        last = drive(rate, number)
        outcome = judge_trial(last, search)
        rates.tell(held=outcome.held, sure=outcome.sure)
        steps.append({"rate": rate, "p_s": outcome.p_s, "held": outcome.held, "why": outcome.why})
        beside = f"; {outcome.limited}" if outcome.limited else ""
        say(f"{rate:,.1f}/s {'held' if outcome.held else f'not held: {outcome.why}{beside}'}")
        if outcome.held:
            best = last
        else:
            generator = outcome.limited or generator
            settle()
    found = {**(best or last), "search": steps}
    if generator and not (found.get("generator") or {}).get("limited"):
        found["generator"] = {
            **(found.get("generator") or {}),
            "limited": f"at a higher rate: {generator}",
        }
    return found


def _percentile(figures: Mapping[str, Any], percentile: float) -> float:
    if (key := _KEYS.get(percentile)) is not None:
        return float(figures["latency_s"][key])
    return percentile_of(decode(figures["histogram"]), percentile)
