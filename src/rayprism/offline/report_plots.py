"""The plots of a report, as SVG that takes its colours from the page around it.

matplotlib knows no colours but numbers: what is drawn in the stand-ins below is what the page
defines as `--ink`, `--s0` and so on, once for light and once for dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["SERIES", "Plot", "plots_of"]

SERIES = 8
"""Colours of versions that the page has to define: `--s0` to `--s7`."""

_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_VERDICT = {
    "better": "#0c0c01",
    "worse": "#0c0c02",
    "no difference shown": _INK,
    "not known": _SOFT,
}
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    "#0c0c01": "--good",
    "#0c0c02": "--bad",
    **{f"#0a0b0{index}": f"--s{index}" for index in range(SERIES)},
}
_DASHES: Sequence[Any] = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
_MARKERS = "osD^vPX*"
_WIDTH = 6.4
_MOST_LABEL = 24

_STYLE: Any = {
    "svg.fonttype": "none",
    # Ids that are drawn by lot would make every report of the same rows another one.
    "svg.hashsalt": "rayprism",
    "font.size": 10,
    "text.color": _INK,
    # Values of columns are drawn; one with two dollar signs is no formula.
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot.

    Args:
        title: Above it.
        says: What is seen, for who cannot see it, and how to read it.
        svg: An `svg` element.
    """

    title: str
    says: str
    svg: str


def plots_of(report: Mapping[str, Any]) -> list[Plot]:
    """Every plot that a report has the numbers for.

    Args:
        report: See `rayprism.offline.evaluation`.
    """
    import matplotlib as mpl

    names = [f"version {each['version']}" for each in report["versions"]]
    found = report["plots"]
    drawn: list[tuple[str, str, Callable[[], Any]]] = []
    if len(names) > 1:
        says = (
            f"Each line is the difference to {names[0]}, with its interval. Where it crosses 0, no "
            "difference is shown. Each row has its own scale."
        )
        drawn.append(("Differences", says, lambda: _differences(report, names)))
    if "roc" in found:
        says = "Up and to the left is better; the diagonal is chance."
        drawn.append(("ROC curve", says, lambda: _roc(found["roc"], names)))
        says = "Up and to the right is better."
        drawn.append(
            ("Precision and recall", says, lambda: _recall(found["precision_recall"], names))
        )
    if "calibration" in found:
        says = "On the diagonal a score is the share of rows that are positive. Bars: 95 %."
        drawn.append(("Calibration", says, lambda: _calibration(found["calibration"], names)))
    if "histogram" in found:
        says = "How many rows get which score, positive and negative ones apart."
        drawn.append(("Scores", says, lambda: _histogram(found["histogram"], names)))
    if "residuals" in found:
        residuals = found["residuals"]
        says = "Prediction less label. The outer hundredth of all is not drawn."
        drawn.append(("Residuals", says, lambda: _residuals(residuals, names)))
        says = "The mean residual of as many rows each, from low to high predictions; 0 is right."
        drawn.append(("Residuals by prediction", says, lambda: _by_prediction(residuals, names)))
    if len(names) > 1:
        for segment in report["segments"]:
            drawn += _segment(segment, names)
    with mpl.rc_context(_STYLE):
        return [
            Plot(title, says, _svg(draw(), title, says, f"p{number}"))
            for number, (title, says, draw) in enumerate(drawn)
        ]


def _svg(figure: Any, title: str, says: str, prefix: str) -> str:
    """The figure as an element of a page: no header, no ids that another plot has as well."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    label = html.escape(f"{title}. {says}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _figure(height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _look(version: int) -> dict[str, Any]:
    """Of a line: colour alone does not tell versions apart for everybody."""
    return {"color": f"#0a0b0{version}", "linestyle": _DASHES[version], "linewidth": 1.8}


def _differences(report: Mapping[str, Any], names: Sequence[str]) -> Any:
    metrics = report["metrics"]
    height = 0.35 + len(metrics) * (0.42 + 0.16 * (len(names) - 2))
    figure, rows = _figure(height, len(metrics))
    for axes, metric in zip(rows, metrics, strict=True):
        known = [each for each in metric["differences"] if each["value"] is not None]
        ends = [abs(end) for each in known for end in (each["interval"] or [each["value"]])]
        limit = max([*ends, 0.0]) * 1.2 or 1.0
        _intervals(axes, metric["differences"])
        axes.set_xlim(-limit, limit)
        axes.set_ylim(len(metric["differences"]) - 0.4, -0.6)
        axes.set_xticks([-limit / 1.2, 0, limit / 1.2])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}" if value else "0")
        axes.set_yticks([])
        axes.set_ylabel(metric["title"], rotation=0, ha="right", va="center")
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=8)
    if len(names) > 2:
        _name_markers(figure, names)
    return figure


def _intervals(axes: Any, differences: Sequence[Mapping[str, Any]], places: Any = None) -> None:
    """Points with their intervals, one below the other."""
    axes.axvline(0, color=_SOFT, linewidth=1)
    for index, each in enumerate(differences):
        if each["value"] is None:
            continue
        place = index if places is None else places[index]
        colour = _VERDICT[each["verdict"]]
        if each["interval"] is not None:
            axes.plot(each["interval"], [place, place], color=colour, linewidth=2)
        axes.plot(each["value"], place, color=colour, marker=_MARKERS[index % SERIES], ms=5)


def _name_markers(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_INK, marker=_MARKERS[index], linestyle="", label=name)
        for index, name in enumerate(names[1:])
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _roc(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    figure, (axes,) = _figure(4.2)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8)
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        axes.plot(
            curve["false_positive_rate"], curve["true_positive_rate"], label=name, **_look(index)
        )
    axes.set(xlabel="False positive rate", ylabel="True positive rate (recall)")
    axes.legend(loc="lower right")
    return figure


def _recall(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    figure, (axes,) = _figure(4.2)
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        axes.plot(curve["recall"], curve["precision"], label=name, **_look(index))
    axes.set(xlabel="Recall", ylabel="Precision", ylim=(0, 1.02))
    axes.legend(loc="upper right")
    return figure


def _calibration(bins: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> Any:
    figure, (axes,) = _figure(4.2)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8)
    for index, (each, name) in enumerate(zip(bins, names, strict=True)):
        scores = [one["mean_score"] for one in each]
        shares = np.array([one["positive_share"] for one in each])
        ends = np.array([one["interval"] for one in each]).reshape(-1, 2)
        # Rounding puts the share of a bin without positives a hair outside its interval.
        bars = np.maximum([shares - ends[:, 0], ends[:, 1] - shares], 0)
        look = _look(index)
        axes.errorbar(
            scores, shares, yerr=bars, label=name, marker=_MARKERS[index], ms=4, capsize=2, **look
        )
    axes.set(xlabel="Mean score of the bin", ylabel="Share of positive rows")
    axes.legend(loc="upper left")
    return figure


def _histogram(histogram: Mapping[str, Any], names: Sequence[str]) -> Any:
    figure, rows = _figure(0.6 + 1.7 * len(names), len(names))
    for index, (axes, name) in enumerate(zip(rows, names, strict=True)):
        look = _look(index)
        axes.stairs(
            histogram["negative"][index],
            histogram["edges"],
            label="negative",
            color=look["color"],
            linestyle=":",
        )
        axes.stairs(
            histogram["positive"][index],
            histogram["edges"],
            label="positive",
            color=look["color"],
            linewidth=1.8,
        )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("Rows")
        axes.legend(loc="upper right")
    rows[-1].set_xlabel("Score")
    return figure


def _residuals(residuals: Mapping[str, Any], names: Sequence[str]) -> Any:
    figure, (axes,) = _figure(3.6)
    axes.axvline(0, color=_SOFT, linewidth=1)
    for index, name in enumerate(names):
        axes.stairs(residuals["rows"][index], residuals["edges"], label=name, **_look(index))
    axes.set(xlabel="Prediction - label", ylabel="Rows")
    axes.legend(loc="upper right")
    return figure


def _by_prediction(residuals: Mapping[str, Any], names: Sequence[str]) -> Any:
    figure, (axes,) = _figure(3.6)
    axes.axhline(0, color=_SOFT, linewidth=1)
    for index, (each, name) in enumerate(zip(residuals["by_prediction"], names, strict=True)):
        predictions = [one["prediction"] for one in each]
        means = [one["residual"] for one in each]
        axes.plot(predictions, means, label=name, marker=_MARKERS[index], ms=4, **_look(index))
    axes.set(xlabel="Mean prediction", ylabel="Mean of prediction - label")
    axes.legend(loc="best")
    return figure


def _segment(
    segment: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[str, str, Callable[[], Any]]]:
    """The difference by value of a column, by the first metric that is a mean."""
    if not segment["values"] or not segment["values"][0]["metrics"]:
        return []
    metric = segment["values"][0]["metrics"][0]
    title = f"{metric['title']} by {segment['column']}"
    better = "left" if metric["better"] == "lower" else "right"
    says = f"Difference to {names[0]} within each value, the most rows first. Better: {better}."
    return [(title, says, lambda: _draw_segment(segment, metric["title"], names))]


def _draw_segment(segment: Mapping[str, Any], title: str, names: Sequence[str]) -> Any:
    values = segment["values"]
    candidates = len(names) - 1
    figure, (axes,) = _figure(0.9 + len(values) * (0.22 + 0.12 * (candidates - 1)))
    for row, value in enumerate(values):
        offsets = [row + 0.6 * (index + 0.5) / candidates - 0.3 for index in range(candidates)]
        _intervals(axes, value["metrics"][0]["differences"], offsets)
    labels = [
        f"{_shortened('(none)' if value['value'] is None else value['value'])}  ({value['rows']:,})"
        for value in values
    ]
    axes.set_yticks(range(len(values)), labels)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(f"Difference of {title.lower()}")
    if candidates > 1:
        _name_markers(figure, names)
    return figure


def _shortened(text: str) -> str:
    """Text that has room beside a plot."""
    return text if len(text) <= _MOST_LABEL else text[: _MOST_LABEL - 1] + "…"
