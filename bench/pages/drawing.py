"""How plots look, and how they become SVG that takes its colours from the page around it.

matplotlib knows no colours but numbers: what is drawn in the stand-ins below is what the page
defines as `--ink`, `--s0` and so on, once for light and once for dark. A server has the same
colour and dash in every plot, and its lines have the class `sN`, so that a page can show one of
them alone. Text stays text, for whoever searches or copies; legends are the page's.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.samples import Samples

__all__ = [
    "DASHES",
    "INK",
    "MARKERS",
    "PARTS",
    "SERIES",
    "SOFT",
    "SPREAD",
    "Drawn",
    "Floats",
    "Key",
    "Margins",
    "Plot",
    "log_limits",
    "log_scale",
    "name_axes",
    "new_figure",
    "part_colour",
    "rendered",
    "server_keys",
    "server_look",
    "text_width",
    "tick_text",
]

SERIES = 10
"""Colours of servers that the page has to define: `--s0` to `--s9`."""
PARTS = 6
"""Colours of roles and other parts of a whole: `--p0` to `--p5`."""

DASHES: Sequence[tuple[float, ...]] = ((), (), (), (5, 2), (5, 2), (2, 1.4), (2, 1.4), (7, 2, 2, 2))
"""Of lines, by server: colour alone does not tell them apart for everybody. Units: line widths."""

INK, SOFT, _LINE = "#010101", "#020202", "#030303"
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    _LINE: "--line",
    **{f"#0a0b0{index}": f"--s{index}" for index in range(SERIES)},
    **{f"#0a0c0{index}": f"--p{index}" for index in range(PARTS)},
}
MARKERS = "osD^vPX*<>"
SPREAD = 12.0
"""Where figures lie so many times apart, the axis is logarithmic."""
_WIDTH, _WIDE = 6.4, 13.0

_STYLE: Any = {
    "svg.fonttype": "none",
    # Ids that are drawn by lot would make every page of the same results another one.
    "svg.hashsalt": "bench",
    "path.simplify": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    # The grid is enough; marks are a third of such a file.
    "xtick.bottom": False,
    "ytick.left": False,
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Key:
    """A line of a legend.

    Args:
        colour: `s3` of a server, `p1` of a part.
        label: What it stands for.
    """

    colour: str
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot.

    Args:
        title: Above it.
        says: What is seen, for who cannot see it, and how to read it.
        keys: Its legend.
        svg: An `svg` element.
        wide: Whether it needs the whole width of the page.
    """

    title: str
    says: str
    keys: tuple[Key, ...]
    svg: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """A plot before it is drawn, as the style has to be set around the drawing."""

    title: str
    says: str
    keys: tuple[Key, ...]
    draw: Callable[[], Figure]
    wide: bool = False


def rendered(drawn: Iterable[Drawn], prefix: str) -> list[Plot]:
    """Draws, in the style of all plots.

    Args:
        drawn: What is to be drawn.
        prefix: Of the ids in these plots: another one for each call whose plots share a page.
    """
    with mpl.rc_context(_STYLE):
        return [
            Plot(
                each.title,
                each.says,
                each.keys,
                _svg(each.draw(), f"{each.title}. {each.says}", f"{prefix}-{number}"),
                each.wide,
            )
            for number, each in enumerate(drawn)
        ]


_WASTE = re.compile(
    r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>|<defs/>"
    # Grounds that are not filled, and what is said of fonts: the page says that.
    r"|<path d=\"[^\"]*\" style=\"fill: none\"/>"
    r"| font-family: [^;\"]*;"
    r"| xmlns:xlink=\"[^\"]*\"| transform=\"rotate\(-0 [^\"]*\"",
    re.DOTALL,
)
_CLASSES = {
    f"fill: none; stroke: {_LINE}; stroke-width: 0.6; stroke-linecap: square": "grid",
    f"fill: none; stroke: {_LINE}; stroke-width: 0.8; stroke-linejoin: miter; "
    "stroke-linecap: square": "spine",
    f"font-size: 9.5px; text-anchor: middle; fill: {SOFT}": "tick below",
    f"font-size: 9.5px; text-anchor: end; fill: {SOFT}": "tick",
}
"""What the page styles, as it is in every plot many times."""


def _svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an element of a page: small, and with no ids that another plot has as well."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = _WASTE.sub("", text[text.index("<svg") :])
    text = re.sub(r"<g id=\"(s\d+)[^\"]*\"", r'<g class="l \1"', text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    text = re.sub(r"<[^>]+>", _compact, text)
    text = re.sub(r">\s+<", "><", text)
    for style, name in _CLASSES.items():
        text = text.replace(f'style="{style}"', f'class="{name}"')
    text = re.sub(r' clip-path="[^"]*" (class="grid")', r" \1", text)
    while "<g></g>" in text or re.search(r"<g>(<g[^>]*>(?:(?!<g|</g>).)*</g>)</g>", text):
        text = text.replace("<g></g>", "")
        text = re.sub(r"<g>(<g[^>]*>(?:(?!<g|</g>).)*</g>)</g>", r"\1", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    said = html.escape(label, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{said}"', 1).strip()


def _compact(tag: re.Match[str]) -> str:
    """A tag without line breaks, and with coordinates to a tenth of a point."""
    text = re.sub(r"\s+", " ", tag[0])
    text = re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r" ?([MLCQzZ]) ?(?=[-\d\"LM])", r"\1", text) if ' d="' in text else text


def _look(index: int, *, first: bool = False) -> dict[str, Any]:
    """Of a server's line."""
    dashes = DASHES[index % len(DASHES)]
    return {
        "color": f"#0a0b0{index % SERIES}",
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 2.3 if first else 1.5,
        "gid": f"s{index}",
        "solid_capstyle": "round",
    }


def server_look(samples: Samples, server: str) -> dict[str, Any]:
    """Of a server's line: its colour and dash, and the class that the page knows it by."""
    index = samples.servers.index(server)
    return _look(index, first=server == samples.reference())


def server_keys(samples: Samples, servers: Iterable[str]) -> tuple[Key, ...]:
    """A legend of servers."""
    return tuple(
        Key(f"s{samples.servers.index(server)}", samples.title(server)) for server in servers
    )


def part_colour(index: int) -> str:
    """Of a part of a whole."""
    return f"#0a0c0{index % PARTS}"


@dataclass(frozen=True, slots=True)
class Margins:
    """Around the axes of a figure, and between them; the same wherever plots are to be compared.

    Units: points.
    """

    left: float = 54.0
    right: float = 14.0
    top: float = 9.0
    bottom: float = 35.0
    between: tuple[float, float] = (14.0, 12.0)


def new_figure(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    wide: bool = False,
    margins: Margins = Margins(),
    **more: Any,
) -> tuple[Figure, Any]:
    """A figure and its axes. Units: inches.

    With fixed margins: to find out how much room texts take is half of the time of drawing.
    """
    width = _WIDE if wide else _WIDTH
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    points = 72 * width, 72 * height
    inside = (
        points[0] - margins.left - margins.right - margins.between[0] * (columns - 1),
        points[1] - margins.top - margins.bottom - margins.between[1] * (rows - 1),
    )
    figure.subplots_adjust(
        left=margins.left / points[0],
        right=1 - margins.right / points[0],
        top=1 - margins.top / points[1],
        bottom=margins.bottom / points[1],
        wspace=margins.between[0] * columns / inside[0],
        hspace=margins.between[1] * rows / inside[1],
    )
    for one in axes.flat:
        one.yaxis.set_label_coords(-(margins.left - 17) * columns / inside[0], 0.5)
        one.xaxis.set_label_coords(0.5, -(margins.bottom - 15) * rows / inside[1])
    return figure, axes


def name_axes(axes: Axes, title: str) -> None:
    """A name above the left end of axes."""
    axes.annotate(
        title,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9.5,
    )


def text_width(text: str) -> float:
    """About how wide a text is. Units: points."""
    return 5.6 * len(text)


def tick_text(value: float, _: Any = None) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:g}"


def log_scale(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """A logarithmic axis, labelled often enough to be read where it spans little."""
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 3 else (1.0,)
    if which == "x":
        axes.set_xscale("log", subs=[])
    else:
        axes.set_yscale("log", subs=[])
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(tick_text))


def log_limits(values: Iterable[float]) -> tuple[float, float] | None:
    """Of a logarithmic axis, around values that can be on it; None where there are none."""
    known = [value for value in values if value > 0 and math.isfinite(value)]
    return (min(known) / 1.25, max(known) * 1.25) if known else None
