"""A search against a server: each rate is driven, and judged by the latency it has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.scenario import Search
from bench.search import RateSearch

__all__ = ["Outcome", "judge_trial", "search_rate"]

_KEYS = {25.0: "p25", 50.0: "p50", 75.0: "p75", 90.0: "p90", 95.0: "p95", 99.0: "p99"} | {
    99.9: "p999",
    99.99: "p9999",
}
"""Percentiles that a sample has by themselves."""


@dataclass(frozen=True)
class Outcome:
    """How one rate went.

    Args:
        p_s: The percentile that is looked at; None where nothing was answered.
        held: Whether the rate was held.
        why: Not, in a few words; None where it was.
        sure: That it was no hiccup: half of the answers came too late, or there was none.
        limited: Why it was the load generator that did not hold it, or None.
    """

    p_s: float | None
    held: bool
    why: str | None
    sure: bool
    limited: str | None


def judge_trial(figures: Mapping[str, Any], search: Search) -> Outcome:
    """Whether the figures of a rate hold the latency that is searched for.

    What was refused or failed counts as too late. Its share is taken off what may be late.
    """
    limited = (figures.get("generator") or {}).get("limited")
    ok, requests = figures["ok"], figures["requests"]
    if not ok:
        return Outcome(None, False, "nothing was answered", True, limited)
    p_s = _percentile(figures, search.percentile)
    half_late = _percentile(figures, 50.0) > search.at_most_s
    why = None
    if (requests - ok) / requests > 1 - search.percentile / 100:
        why = f"{requests - ok:,} of {requests:,} failed or were refused"
    elif p_s > search.at_most_s:
        why = f"p{search.percentile:g} was {p_s * 1e3:.1f} ms"
    elif limited:
        why = limited
    return Outcome(p_s, why is None, why, half_late, limited)


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
        steps.append(
            {"rate": rate, "p_s": outcome.p_s, "held": outcome.held, "why": outcome.why}
        )
        say(f"{rate:,.1f}/s {'held' if outcome.held else f'not held: {outcome.why}'}")
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
    if (key := _KEYS.get(percentile)) in figures["latency_s"]:
        return float(figures["latency_s"][key])
    from bench.loadgen import histogram

    return histogram.percentile(figures["histogram"], percentile)
