"""The page that shows the results of a run: one file, nothing loaded from elsewhere, no script.

What plots show stands in tables as well, medians over rounds with their intervals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.comparison import ENOUGH_ROUNDS
from bench.pages.loads import load_section, plot_grid
from bench.pages.markup import items, named, row_class, small, table, text
from bench.pages.plots import plots_across, plots_by_load
from bench.pages.style import STYLE
from bench.samples import Samples, main_measure
from bench.tables import bound_text, is_within_noise, number, ratio_of, span

__all__ = ["render"]

_HOW_TO_READ = (
    "Every figure is the median over rounds. In each round each server is measured in turn, in an "
    "order that changes; below a figure stands the 95 % bootstrap interval of the median.",
    "A ratio is the median of the rounds' own ratios: the two sides of a round ran within seconds "
    "of each other, so what slows the machine for a while leaves it alone. Where its interval has "
    "1 in it, no difference is shown.",
    "A closed loop keeps a number of requests under way and sends the next when one is answered. "
    "An open loop sends at its own times, and latency counts from the time at which a request was "
    "meant to leave: a server that stalls is charged for all that wait, and none is left out.",
    "Latencies are of requests that were answered rightly. Refused ones (429, 503, or their gRPC "
    "codes) and errors are counted apart; goodput is what was answered within the target.",
    "CPU is what the processes of a server used for each request, by role; the load generator is "
    "not in the sum, but it shares the cores with the servers.",
    "A line of a legend, or a row of a table, shows its server alone while it is pointed at.",
)


def render(results: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: See `bench.samples`.
    """
    samples = Samples(results)
    scenario: Mapping[str, Any] = results.get("scenario") or {}
    title = str(scenario.get("title") or scenario.get("name") or "Benchmark")
    plots = plots_by_load(samples)
    body = [
        _head(results, title),
        _bounds(samples),
        _ratios(samples),
        _across(samples),
        *(load_section(samples, load, plots[load]) for load in samples.loads),
        _left_out(samples),
        _setup(results),
        f'<section id="reading"><h2>How to read this</h2>{items(_HOW_TO_READ)}</section>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{STYLE}{_alone(len(samples.servers))}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _alone(servers: int) -> str:
    """Rules that fade the other lines while one server is pointed at."""
    return "".join(
        f"section:has(.k{index}:hover) .l:not(.s{index}){{opacity:.1}}" for index in range(servers)
    )


# The head, what had to be reached, ratios


def _head(results: Mapping[str, Any], title: str) -> str:
    scenario: Mapping[str, Any] = results.get("scenario") or {}
    machine, commit = results.get("machine") or {}, results.get("commit") or {}
    rounds = scenario.get("rounds", 1)
    facts = (
        scenario.get("name", ""),
        str(results.get("date", ""))[:16].replace("T", " "),
        f"{machine.get('cores', '?')} cores, {machine.get('cpu', 'unknown')}",
        f"commit {str(commit.get('hash', '?'))[:12]}"
        + (" with changes" if commit.get("changed_since") else ""),
        "1 round" if rounds == 1 else f"{rounds} interleaved rounds",
    )
    warnings = list(results.get("warnings") or ())
    if results.get("quick"):
        warnings.insert(0, "A shortened run: its figures are for trying out, and for nothing else.")
    loads = "".join(
        f'<a href="#load-{text(load)}">{text(load)}</a>' for load in scenario.get("loads") or ()
    )
    about = "".join(
        f"<p>{text(part)}</p>" for part in str(scenario.get("about", "")).split("\n\n") if part
    )
    warned = f'<div class="warn">{items(warnings)}</div>' if warnings else ""
    return (
        f"<header><h1>{text(title)}</h1>"
        f'<p class="soft">{text(" · ".join(fact for fact in facts if fact))}</p>{about}{warned}'
        f'<nav>{loads}<a href="#setup">setup</a><a href="#reading">how to read this</a></nav>'
        "</header>\n"
    )


def _bounds(samples: Samples) -> str:
    bounds: Sequence[Mapping[str, Any]] = samples.results.get("bounds") or ()
    if not bounds:
        return ""
    rows = []
    for bound in bounds:
        kind, word = ("pass", "✓ pass") if bound.get("met") else ("fail", "✗ fail")
        if bound.get("value") is None:
            word = "✗ not judged"
        doubt = "the bound is within the noise" if is_within_noise(bound) else ""
        against = bound.get("against_server") or bound.get("against")
        about = f"{bound['measure']} of {bound['server']} under {bound['load']}"
        if against or bound.get("against_load"):
            load = bound.get("against_load")
            about += f", against {against or bound['server']}" + (f" under {load}" if load else "")
        rows.append(
            (
                "",
                [
                    f"{text(bound['title'])}{small(text(about))}",
                    bound_text(bound),
                    f"{number(bound.get('value'))}{small(span(bound.get('interval')))}",
                    f'<span class="{kind}">{word}</span>{small(doubt)}'
                    f"{small(text(bound.get('why') or ''))}",
                ],
            )
        )
    met = sum(bool(bound.get("met")) for bound in bounds)
    shown = table(f"{met} of {len(bounds)} met", ["Target", "bound", "measured", "verdict"], rows)
    return f'<section class="bounds"><h2>Targets</h2>{shown}</section>\n'


def _ratios(samples: Samples) -> str:
    reference = samples.reference()
    others = [server for server in samples.servers if server != reference]
    if reference is None or not others:
        return ""
    loads = [load for load in samples.loads if samples.of(load, reference)]
    measures = {load: main_measure(samples.kind(load), samples.load(load)) for load in loads}
    header = [f"{text(samples.title(reference))} divided by"]
    header += [f"{text(load)}{small(text(measures[load].title))}" for load in loads]
    rows = []
    for server in others:
        cells = [named(samples, server)]
        for load in loads:
            measure = measures[load]
            ratio = ratio_of(samples, load, measure.path, reference, server)
            rounds = len(samples.pairs(load, measure.path, reference, server)[0])
            cells.append(
                _ratio_cell(ratio, lower=measure.better == "lower", sure=rounds >= ENOUGH_ROUNDS)
            )
        rows.append((row_class(samples, server), cells))
    caption = (
        "▲ better and ▼ worse than the other by more than the rounds differ; of fewer than "
        f"{ENOUGH_ROUNDS} rounds that is not said"
    )
    return f"<section><h2>Ratios</h2>{table(caption, header, rows)}</section>\n"


def _ratio_cell(ratio: Any, *, lower: bool, sure: bool) -> str:
    if ratio is None:
        return "-"
    value, ends = ratio
    shown = f"{number(value)}x"
    if sure and ends is not None and not ends[0] <= 1 <= ends[1]:
        kind, sign = ("pass", "▲") if (value > 1) != lower else ("fail", "▼")
        shown = f'<span class="{kind}">{sign} {shown}</span>'
    return f"{shown}{small(span(ends))}"


def _across(samples: Samples) -> str:
    plots = plots_across(samples)
    return f"<section><h2>Across loads</h2>{plot_grid(samples, plots)}</section>\n" if plots else ""


# What it ran on


def _left_out(samples: Samples) -> str:
    unavailable: Mapping[str, str] = samples.results.get("unavailable") or {}
    if not unavailable:
        return ""
    items = "".join(
        f"<li><b>{text(samples.title(server))}</b><pre>{text(reason.strip())}</pre></li>"
        for server, reason in unavailable.items()
    )
    return f"<section><h2>Left out</h2><ul>{items}</ul></section>\n"


def _setup(results: Mapping[str, Any]) -> str:
    machine, commit = results.get("machine") or {}, results.get("commit") or {}
    scenario: Mapping[str, Any] = results.get("scenario") or {}
    versions = results.get("versions") or {}
    rows = [
        ("Command", f"<code>{text(results.get('command', ''))}</code>"),
        ("Date", text(results.get("date", ""))),
        (
            "Commit",
            f"<code>{text(commit.get('hash', '?'))}</code>"
            + (" with changes" if commit.get("changed_since") else ""),
        ),
        (
            "Machine",
            text(
                f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, "
                f"{machine.get('memory_gib', '?')} GiB, {machine.get('gpu', 'no GPU')}, "
                f"{machine.get('system', '?')}"
            ),
        ),
        ("Versions", text(", ".join(f"{name} {value}" for name, value in versions.items()))),
        ("Seed", text(f"{scenario.get('seed', '?')}; of each sample: in the results")),
    ]
    facts = results.get("servers") or {}
    listed = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return (
        f'<section id="setup"><h2>Setup</h2><table class="facts">{listed}</table>'
        f"{_document('Servers', facts)}{_document('Scenario', scenario)}</section>\n"
    )


def _document(title: str, document: Any) -> str:
    if not document:
        return ""
    shown = json.dumps(document, indent=1, ensure_ascii=False)
    return f"<details><summary>{title}</summary><pre>{text(shown)}</pre></details>"
