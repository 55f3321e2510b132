"""The plots of a run: what a page shows of each load, and of several together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.loadgen.histogram import decode
from bench.pages.drawing import (
    MARKERS,
    SOFT,
    SPREAD,
    Drawn,
    Floats,
    Margins,
    Plot,
    log_limits,
    log_scale,
    name_axes,
    new_figure,
    rendered,
    server_keys,
    server_look,
    tick_text,
)
from bench.pages.inside import batch_plot, parts_plot, stage_plot
from bench.pages.over_time import cpu_plot, memory_plot, throughput_plot
from bench.samples import Sample, Samples

__all__ = ["plots_across", "plots_by_load"]

_FEWEST_BEYOND = 5
"""A percentile is drawn as long as so many requests took longer."""
_FROM = -math.log10(1 - 0.25)
"""Where the lines of a distribution begin: at its first quarter."""

Distributions = Mapping[str, tuple[Floats, Floats]]
"""For each server -log10(1 - share of requests), and the latency in ms within which they are."""


def plots_across(samples: Samples) -> list[Plot]:
    """What is seen only when several loads, or the steps of a search, are put together."""
    drawn = [
        _search_plot(samples, load) for load in samples.loads if samples.kind(load) == "search"
    ]
    for kind, title, axis in (
        ("closed", "Latency against throughput", "rate"),
        ("open", "Latency against offered rate", "offered_rate"),
    ):
        for loads in _alike(samples, kind):
            drawn.append(_curve_plot(samples, loads, title, axis))
    return rendered([each for each in drawn if each is not None], "across")


def plots_by_load(samples: Samples) -> dict[str, list[Plot]]:
    """Every plot that a load has the numbers for, for each load."""
    lines = {load: _distributions(samples, load) for load in samples.loads}
    limits = log_limits(
        value
        for found in lines.values()
        for _, values in found.values()
        for value in (float(values[0]), float(values[-1]))
    )
    return {load: _plots_of(samples, load, lines[load], limits) for load in samples.loads}


def _plots_of(
    samples: Samples, load: str, lines: Distributions, limits: tuple[float, float] | None
) -> list[Plot]:
    kind = samples.kind(load)
    if kind == "start":
        drawn = [parts_plot(samples, load)]
    elif kind == "job":
        drawn = []
    else:
        drawn = [
            _distribution_plot(samples, lines, limits),
            throughput_plot(samples, load),
            batch_plot(samples, load),
            stage_plot(samples, load),
            cpu_plot(samples, load),
            memory_plot(samples, load),
        ]
    return rendered([each for each in drawn if each is not None], f"l{samples.loads.index(load)}")


# Latency against rate


def _search_plot(samples: Samples, load: str) -> Drawn | None:
    search = samples.load(load)["search"]
    steps = {
        server: sorted(
            (step["rate"], step["p_s"] * 1e3, bool(step["held"]))
            for each in samples.of(load, server)
            for step in each.get("search") or ()
            if step["p_s"]
        )
        for server in samples.servers_of(load)
    }
    steps = {server: found for server, found in steps.items() if found}
    if not steps:
        return None
    target_ms = search["at_most_s"] * 1e3
    percentile = f"p{search['percentile']:g}"

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(4.2, wide=True)
        axes.axhline(target_ms, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for server, found in steps.items():
            look = server_look(samples, server)
            colour, gid = look["color"], look["gid"]
            rates, latencies, held = map(np.asarray, zip(*found, strict=True))
            marker = MARKERS[samples.servers.index(server) % len(MARKERS)]
            for shown, face in ((held, colour), (~held, "none")):
                axes.plot(
                    rates[shown],
                    latencies[shown],
                    linestyle="",
                    marker=marker,
                    ms=4.5,
                    color=colour,
                    markerfacecolor=face,
                    gid=gid,
                )
            if (rate := samples.median(load, server, "found")) is not None:
                axes.plot([rate, rate], [0, target_ms], **{**look, "linewidth": 1.2})
        _rate_axis(axes, [step[0] for found in steps.values() for step in found])
        limits = log_limits([target_ms, *(step[1] for found in steps.values() for step in found)])
        if limits:
            log_scale(axes, "y", *limits)
            axes.set_ylim(*limits)
        axes.annotate(
            f"target {tick_text(target_ms)} ms",
            (0.005, target_ms),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=SOFT,
        )
        axes.set(xlabel="offered, requests/s", ylabel=f"{percentile}, ms")
        return figure

    says = (
        f"Every step of the search in every round: filled held {percentile} of "
        f"{tick_text(target_ms)} ms, hollow did not. The upright line is the median of what was "
        "found."
    )
    return Drawn(
        f"{load}: latency against offered rate", says, server_keys(samples, steps), draw, wide=True
    )


def _alike(samples: Samples, kind: str) -> Iterable[list[str]]:
    """Loads that ask for the same in different amounts: at least two."""
    groups: dict[str, list[str]] = {}
    for load in samples.loads:
        if samples.kind(load) != kind or samples.load(load).get("actions"):
            continue
        said = samples.load(load)
        same = [said.get(key) for key in ("body", "rows", "rows_file", "arrivals", "client")]
        groups.setdefault(repr(same), []).append(load)
    return [loads for loads in groups.values() if len(loads) > 1]


def _curve_plot(samples: Samples, loads: Sequence[str], title: str, axis: str) -> Drawn | None:
    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for server in samples.servers:
        for load in loads:
            figures = [
                samples.median(load, server, path)
                for path in (axis, "latency_s.p50", "latency_s.p99")
            ]
            if all(figures):
                rate, p50, p99 = (float(value or 0) for value in figures)
                points.setdefault(server, []).append((rate, p50 * 1e3, p99 * 1e3, load))
    points = {server: found for server, found in points.items() if len(found) > 1}
    if not points:
        return None

    def draw() -> Figure:
        figure, (row,) = new_figure(
            3.9, 1, 2, wide=True, margins=Margins(top=20.0), sharex=True, sharey=True
        )
        every = [point for found in points.values() for point in found]
        limits = log_limits([value for point in every for value in point[1:3]])
        for axes, column, name in zip(row, (1, 2), ("p50", "p99"), strict=True):
            for server, found in points.items():
                marker = MARKERS[samples.servers.index(server) % len(MARKERS)]
                ordered = sorted(found) if axis == "offered_rate" else found
                rates = [point[0] for point in ordered]
                values = [point[column] for point in ordered]
                axes.plot(rates, values, marker=marker, ms=4.5, **server_look(samples, server))
            _rate_axis(axes, [point[0] for point in every])
            if limits:
                log_scale(axes, "y", *limits)
                axes.set_ylim(*limits)
            name_axes(axes, name)
            axes.set_xlabel("answered, requests/s" if axis == "rate" else "offered, requests/s")
        row[0].set_ylabel("latency, ms")
        return figure

    says = (
        f"One point for each of {', '.join(loads)}, medians of rounds. Down and to the right is "
        "better; both panels have the same axes."
    )
    return Drawn(title, says, server_keys(samples, points), draw, wide=True)


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    if min(rates) > 0 and max(rates) / min(rates) > SPREAD:
        log_scale(axes, "x", min(rates), max(rates))
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(tick_text))


# The distribution of latencies


def _distribution_plot(
    samples: Samples, lines: Distributions, limits: tuple[float, float] | None
) -> Drawn | None:
    if not lines:
        return None
    furthest = max(places[-1] for places, _ in lines.values())

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(3.9)
        for server, (places, values) in lines.items():
            axes.plot(places, values, **server_look(samples, server))
        if limits:
            log_scale(axes, "y", *limits)
            axes.set_ylim(*limits)
        ticks = [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999]
        marks = [-math.log10(1 - share) for share in ticks]
        axes.set_xlim(_FROM, max(furthest * 1.02, 2.0))
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda place, _: f"{100 * (1 - 10**-place):.7g} %")
        )
        axes.set(xlabel="share of requests answered within", ylabel="latency, ms")
        return figure

    says = (
        "All rounds together, up to where fewer than five requests took longer. Each step to the "
        "right is ten times rarer; lower is better. The vertical axis is the same for all loads."
    )
    return Drawn("Latency distribution", says, server_keys(samples, lines), draw)


def _distributions(samples: Samples, load: str) -> Distributions:
    if samples.kind(load) in ("start", "job"):
        return {}
    found = {}
    for server in samples.servers_of(load):
        line = _from_histograms(samples.of(load, server))
        line = line or _from_percentiles(samples, load, server)
        if line is not None:
            found[server] = line
    return found


def _from_histograms(of: Sequence[Sample]) -> tuple[Floats, Floats] | None:
    encoded = [each["histogram"] for each in of if each.get("histogram")]
    if not encoded:
        return None
    merged = decode(encoded[0])
    for other in encoded[1:]:
        merged.decode_and_add(other)
    count = merged.get_total_count()
    if count < 4 * _FEWEST_BEYOND:
        return None
    places = np.arange(_FROM, math.log10(count / _FEWEST_BEYOND), 0.06)
    shares = [100 * (1 - 10.0**-place) for place in places]
    found_us = merged.get_percentile_to_value_dict(shares)
    return places, np.asarray([found_us[share] / 1e3 for share in shares])


def _from_percentiles(samples: Samples, load: str, server: str) -> tuple[Floats, Floats] | None:
    """What there is of a client that gives no histogram."""
    known = {
        "p25": 0.25,
        "p50": 0.5,
        "p75": 0.75,
        "p90": 0.9,
        "p95": 0.95,
        "p99": 0.99,
        "p999": 0.999,
    }
    found = {
        share: value
        for name, share in known.items()
        if (value := samples.median(load, server, f"latency_s.{name}")) is not None
    }
    if len(found) < 2:
        return None
    places = np.asarray([-math.log10(1 - share) for share in found])
    return places, np.asarray(list(found.values())) * 1e3
