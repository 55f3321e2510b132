"""What servers did while they were under load, by time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.pages.drawing import (
    INK,
    SOFT,
    SPREAD,
    Drawn,
    Floats,
    Key,
    Margins,
    log_limits,
    log_scale,
    name_axes,
    new_figure,
    part_colour,
    server_keys,
    server_look,
    tick_text,
)
from bench.samples import ROLES, Sample, Samples

__all__ = ["cpu_plot", "memory_plot", "throughput_plot"]

_MOST_POINTS = 60
_SHOW_ROUNDS = 3
"""Up to so many servers, each round is drawn as well as their median."""
_PANELS_IN_A_ROW = 5


def over_time(of: Sequence[Sample], *path: str) -> tuple[float, list[Floats]] | None:
    """The step in seconds, and a series of each round; NaN where there was nothing."""
    step, rounds = 0.0, []
    for each in of:
        series: Any = each
        for part in path[:-1]:
            series = (series or {}).get(part)
        values = (series or {}).get(path[-1])
        if values:
            # The step stands beside the series, or beside what holds all of them.
            step = series.get("step_s") or each[path[0]]["step_s"]
            rounds.append(np.asarray([math.nan if v is None else v for v in values], dtype=float))
    return (step, rounds) if rounds else None


def _middle(rounds: Sequence[Floats]) -> Floats:
    """The median over rounds at each time that most of them reached."""
    length = int(np.median([len(each) for each in rounds]))
    padded = np.full((len(rounds), length), np.nan)
    for row, each in zip(padded, rounds, strict=True):
        row[: len(each[:length])] = each[:length]
    known = ~np.isnan(padded).all(axis=0)
    found: Floats = np.full(length, np.nan)
    found[known] = np.nanmedian(padded[:, known], axis=0)
    return found


def _thinned(step: float, values: Floats) -> tuple[float, Floats]:
    """The step, and means of so many neighbours that a plot can show the points."""
    size = math.ceil(len(values) / _MOST_POINTS)
    if size == 1:
        return step, values
    whole = len(values) // size * size
    means: Floats = values[:whole].reshape(-1, size).mean(axis=1)
    return step * size, means


def throughput_plot(samples: Samples, load: str) -> Drawn | None:
    servers = [
        server
        for server in samples.servers_of(load)
        if over_time(samples.of(load, server), "series", "ok_rate")
    ]
    if not servers:
        return None
    failed = any(
        np.nansum(rounds) > 0
        for server in servers
        for rounds in (over_time(samples.of(load, server), "series", "failed_rate") or (0, []))[1]
    )
    panels = [("ok_rate", "answered/s", 1.0), ("p99_s", "p99, ms", 1e3)]
    if failed:
        panels.insert(1, ("failed_rate", "failed or refused/s", 1.0))
    each_round = len(servers) <= _SHOW_ROUNDS

    def draw() -> Figure:
        figure, rows = new_figure(
            0.75 + 1.5 * len(panels), len(panels), margins=Margins(top=16.0), sharex=True
        )
        for (axes,), (name, label, factor) in zip(rows, panels, strict=True):
            _time_panel(axes, samples, load, servers, name, factor, each_round)
            axes.set_ylabel(label)
        _mark_events(rows[:, 0], [each for server in servers for each in samples.of(load, server)])
        rows[-1, 0].set_xlabel("seconds from the start of measuring")
        return figure

    says = "Medians of rounds in steps of half a second" + (
        "; the thin lines are the rounds." if each_round else "."
    )
    return Drawn("Throughput and latency over time", says, server_keys(samples, servers), draw)


def _time_panel(
    axes: Axes,
    samples: Samples,
    load: str,
    servers: Sequence[str],
    name: str,
    factor: float,
    each_round: bool,
) -> None:
    levels = []
    for server in servers:
        found = over_time(samples.of(load, server), "series", name)
        if found is None:
            continue
        step, rounds = found
        look = server_look(samples, server)
        if each_round and len(rounds) > 1:
            thin = {**look, "linewidth": 0.7, "linestyle": "-", "alpha": 0.4}
            for values in rounds:
                axes.plot(_times(step, values), values * factor, **thin)
        middle = _middle(rounds) * factor
        axes.plot(_times(step, middle), middle, **look)
        levels += [np.nanmedian(middle)] if np.isfinite(middle).any() else []
    known = [level for level in levels if level > 0]
    far = len(known) > 1 and max(known) / min(known) > SPREAD
    if far or name == "p99_s":
        limits = log_limits(value for line in axes.lines for value in _heights(line))
        if limits:
            log_scale(axes, "y", *limits)
            axes.set_ylim(*limits)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))


def _heights(line: Any) -> list[float]:
    return [float(value) for value in np.asarray(line.get_ydata(), dtype=float)]


def _times(step: float, values: Floats) -> Floats:
    """The middle of each step."""
    return np.arange(len(values), dtype=np.float64) * step + step / 2


def _mark_events(column: Sequence[Axes], of: Sequence[Sample]) -> None:
    events = {
        (event["what"], round(event["at_s"])): event["at_s"]
        for each in of
        for event in each.get("events") or ()
    }
    for (what, _), at_s in events.items():
        for axes in column:
            axes.axvline(at_s, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        column[0].annotate(
            what,
            (at_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8.5,
        )


def cpu_plot(samples: Samples, load: str) -> Drawn | None:
    used: dict[str, dict[str, tuple[float, Floats]]] = {}
    for server in samples.servers_of(load):
        for role in _roles(samples.of(load, server)):
            found = over_time(samples.of(load, server), "cpu", "cores", role)
            if found:
                used.setdefault(server, {})[role] = _thinned(found[0], _middle(found[1]))
    if not used:
        return None
    present = dict.fromkeys(role for by_role in used.values() for role in by_role)
    roles = sorted(present, key=lambda role: (role == "load", _rank(role), role))
    rows = math.ceil(len(used) / _PANELS_IN_A_ROW)
    columns = math.ceil(len(used) / rows)
    cores = (samples.results.get("machine") or {}).get("cores")

    def draw() -> Figure:
        figure, grid = new_figure(
            0.6 + 1.5 * rows,
            rows,
            columns,
            wide=True,
            margins=Margins(top=20.0, between=(14.0, 26.0)),
            sharex=True,
            sharey=True,
        )
        panels = list(grid.flat)
        for axes, server in zip(panels, used, strict=False):
            by_role = used[server]
            length = min(len(values) for _, values in by_role.values())
            shown = [role for role in roles if role in by_role]
            step = by_role[shown[0]][0]
            heights = [np.nan_to_num(by_role[role][1][:length]) for role in shown]
            colours = [part_colour(_colour_of_role(role)) for role in shown]
            _stack(axes, _times(step, heights[0]), heights, colours)
            name_axes(axes, _shortened(samples.title(server)))
            if cores:
                axes.axhline(cores, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        for axes in panels[len(used) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
        panels[0].set_ylim(0, None if not cores else cores * 1.08)
        panels[0].yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        panels[0].set_xlim(left=0)
        panels[0].xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        panels[0].xaxis.set_major_formatter(FuncFormatter(tick_text))
        for axes, *_ in grid:
            axes.set_ylabel("cores")
        return figure

    titles: dict[int, list[str]] = {}
    for role in roles:
        titles.setdefault(_colour_of_role(role), []).append(_role_title(role))
    keys = tuple(Key(f"p{colour}", " or ".join(names)) for colour, names in titles.items())
    line = f"; the dashed line is all {cores} cores" if cores else ""
    says = f"Cores that were busy, by what kept them busy; medians of rounds{line}."
    return Drawn("CPU over time", says, keys, draw, wide=True)


def _stack(axes: Axes, times: Floats, heights: Sequence[Floats], colours: Sequence[str]) -> None:
    """Areas above each other. As polygons: matplotlib writes those of `stackplot` twice."""
    low = np.zeros_like(times)
    for height, colour in zip(heights, colours, strict=True):
        high = low + height
        axes.fill(
            np.concatenate([times, times[::-1]]),
            np.concatenate([high, low[::-1]]),
            color=colour,
            linewidth=0,
        )
        low = high


def _roles(of: Sequence[Sample]) -> list[str]:
    return list(
        dict.fromkeys(role for each in of for role in ((each.get("cpu") or {}).get("cores") or ()))
    )


def _rank(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _colour_of_role(role: str) -> int:
    known = {"replica": 0, "server": 0, "proxy": 1, "ray": 2, "load": 3}
    return known.get(role, 4)


def _role_title(role: str) -> str:
    return {"load": "load generator", "ray": "the rest of Ray"}.get(role, role)


def memory_plot(samples: Samples, load: str) -> Drawn | None:
    used: dict[str, tuple[float, Floats]] = {}
    for server in samples.servers_of(load):
        found = [
            over_time(samples.of(load, server), "rss_mib", role)
            for role in _memory_roles(samples.of(load, server))
        ]
        known = [each for each in found if each]
        if known:
            middles = [_middle(rounds) for _, rounds in known]
            length = min(map(len, middles))
            total = np.sum([middle[:length] for middle in middles], axis=0)
            used[server] = _thinned(known[0][0], total)
    if not used:
        return None

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(2.7, wide=True)
        for server, (step, values) in used.items():
            axes.plot(_times(step, values), values, **server_look(samples, server))
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.set(xlabel="seconds from the start of measuring", ylabel="resident, MiB")
        return figure

    says = (
        "Resident memory of all processes of a server together, without the load generator; "
        "pages that they share are counted in each. Medians of rounds."
    )
    return Drawn("Memory over time", says, server_keys(samples, used), draw, wide=True)


def _memory_roles(of: Sequence[Sample]) -> list[str]:
    roles = dict.fromkeys(role for each in of for role in each.get("rss_mib") or ())
    return [role for role in roles if role not in ("step_s", "load")]


def _shortened(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
