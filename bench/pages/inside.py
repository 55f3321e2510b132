"""What went on in the replicas, and what a start consists of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from bench.pages.drawing import (
    INK,
    PARTS,
    SERIES,
    SOFT,
    Drawn,
    Key,
    Margins,
    log_limits,
    log_scale,
    new_figure,
    part_colour,
    server_keys,
    server_look,
    text_width,
    tick_text,
)
from bench.samples import Samples

__all__ = ["batch_plot", "parts_plot", "stage_plot"]


def batch_plot(samples: Samples, load: str) -> Drawn | None:
    counts: dict[str, dict[float, float]] = {}
    for server in samples.servers_of(load):
        for each in samples.of(load, server):
            for bound, count in ((each.get("replica") or {}).get("batch_rows") or {}).items():
                mine = counts.setdefault(server, {})
                mine[_bound(bound)] = mine.get(_bound(bound), 0.0) + count
    counts = {server: found for server, found in counts.items() if sum(found.values())}
    if not counts:
        return None
    bounds = sorted({bound for found in counts.values() for bound in found})

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(3.0)
        width = 0.8 / len(counts)
        for place, (server, found) in enumerate(counts.items()):
            total = sum(found.values())
            at = np.arange(len(bounds)) - 0.4 + (place + 0.5) * width
            index = samples.servers.index(server)
            bars = axes.bar(
                at,
                [100 * found.get(bound, 0) / total for bound in bounds],
                width=width * 0.92,
                color=f"#0a0b0{index % SERIES}",
            )
            for number, bar in enumerate(bars):
                bar.set_gid(f"s{index}-{number}")
        axes.set_xlim(-0.6, max(len(bounds), 4) - 0.4)
        axes.set_xticks(range(len(bounds)), _bucket_labels(bounds))
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 100)
        axes.set(xlabel="rows in a batch", ylabel="% of batches")
        return figure

    says = "How many rows the replicas ran at once, over all rounds."
    return Drawn("Batch sizes", says, server_keys(samples, counts), draw)


def _bound(text: str) -> float:
    """The most rows of a bucket; there is one for all above the last."""
    return math.inf if text == "more" else float(text)


def _bucket_labels(bounds: Sequence[float]) -> list[str]:
    labels, last = [], 0
    for bound in bounds:
        if math.isinf(bound):
            labels.append(f"> {last}")
        else:
            labels.append(f"{bound:g}" if bound == last + 1 else f"{last + 1}-{bound:g}")
            last = int(bound)
    return labels


def stage_plot(samples: Samples, load: str) -> Drawn | None:
    stages: dict[str, dict[str, tuple[float, float, float]]] = {}
    for server in samples.servers_of(load):
        names = dict.fromkeys(
            name
            for each in samples.of(load, server)
            for name in (each.get("replica") or {}).get("stages_s") or ()
        )
        for name in names:
            found = [
                samples.median(load, server, f"replica.stages_s.{name}.{figure}")
                for figure in ("p50", "mean", "p99")
            ]
            if all(value is not None for value in found):
                low, mean, high = (1e3 * float(value or 0) for value in found)
                stages.setdefault(name, {})[server] = (low, mean, high)
    if not stages:
        return None
    servers = [
        server
        for server in samples.servers_of(load)
        if any(server in found for found in stages.values())
    ]

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(
            0.8 + len(stages) * (0.24 + 0.14 * len(servers)), margins=_room_for(stages)
        )
        for row, found in enumerate(stages.values()):
            for server, (low, mean, high) in found.items():
                at = row + 0.7 * ((servers.index(server) + 0.5) / len(servers) - 0.5)
                look = server_look(samples, server)
                colour, gid = look["color"], look["gid"]
                axes.plot([low, high], [at, at], color=colour, linewidth=2, gid=gid)
                axes.plot(mean, at, marker="o", ms=5, color=colour, gid=gid)
                axes.annotate(
                    tick_text(float(f"{mean:.3g}")),
                    (max(high, mean), at),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color=SOFT,
                )
        values = [value for found in stages.values() for three in found.values() for value in three]
        if limits := log_limits(values):
            log_scale(axes, "x", *limits)
            axes.set_xlim(limits[0], limits[1] * 1.5)
        axes.set_yticks(range(len(stages)), list(stages))
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.set_xlabel("ms for each request or batch")
        return figure

    says = (
        "From the median to p99 of each stage in the replica; the dot and the number are the mean. "
        "Medians of rounds."
    )
    return Drawn("Time by stage", says, server_keys(samples, servers), draw)


def _room_for(labels: Iterable[str]) -> Margins:
    """Margins with the labels on the left."""
    return Margins(left=14.0 + max(map(text_width, labels)))


def parts_plot(samples: Samples, load: str) -> Drawn | None:
    parts = list(
        dict.fromkeys(
            part
            for server in samples.servers_of(load)
            for each in samples.of(load, server)
            for part in each.get("parts_s") or ()
        )
    )
    servers = samples.servers_of(load)
    if not parts:
        return None

    def draw() -> Figure:
        figure, ((axes,),) = new_figure(
            0.8 + 0.36 * len(servers),
            wide=True,
            margins=_room_for(map(samples.title, servers)),
        )
        for row, server in enumerate(servers):
            left = 0.0
            for index, part in enumerate(parts):
                width = samples.median(load, server, f"parts_s.{part}") or 0.0
                axes.barh(row, width, left=left, height=0.62, color=part_colour(index))
                left += width
            whole = samples.median(load, server, "ready_s")
            if whole is not None:
                axes.plot([whole, whole], [row - 0.4, row + 0.4], color=INK, linewidth=1.6)
        axes.set_yticks(range(len(servers)), [samples.title(server) for server in servers])
        axes.set_ylim(len(servers) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        return figure

    says = "From the command to the first right answer, by part; the mark is the whole. Medians."
    keys = tuple(Key(f"p{index % PARTS}", part) for index, part in enumerate(parts))
    return Drawn("Time until ready", says, keys, draw, wide=True)
