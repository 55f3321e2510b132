"""What a dashboard is made of, as data: the look is given to it in `render`.

Charts of several clusters add their rates up and show the worst of their percentiles; a row of a
table is of one cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "ALERTS_LINK",
    "DOCS",
    "RED_AT_ONE",
    "TARGET",
    "Color",
    "Column",
    "Dashboard",
    "Kind",
    "Link",
    "Panel",
    "Query",
    "Row",
    "Variable",
    "cluster_variable",
    "docs_link",
    "page_link",
    "series_link",
    "stat",
]

Kind = Literal["timeseries", "stat", "table", "heatmap", "bargauge", "state-timeline"]

Color = tuple[str, str]
"""The name of a series, or what a value is called, and its colour."""

DOCS = "https://github.com/rayprism/rayprism/blob/main/docs"
TARGET = "target"
"""`ref_id` of a query for what was promised. It is drawn dashed; a model may have none."""

RED_AT_ONE = ((1.0, "red"),)

_CARRIED = "${datasource:queryparam}&${cluster:queryparam}&${__url_time_range}"


@dataclass(frozen=True, slots=True)
class Link:
    """Where to look further.

    Args:
        title: Shown.
        url: Grafana's own variables are replaced in it.
    """

    title: str
    url: str


ALERTS_LINK = Link("What to do about an alert", f"{DOCS}/alerts.md")


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel.

    Args:
        expr: In PromQL.
        legend: A name for each series; `{{label}}` only of labels that the expression gives.
        ref_id: Given by place where it is empty: A, B, C, ...
    """

    expr: str
    legend: str
    ref_id: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, in the order in which they are shown.

    Args:
        field: A label, or the `ref_id` of the query whose value it is.
        title: Its head.
        unit: Of values.
        thresholds: As a panel's; the cell is coloured.
    """

    field: str
    title: str
    unit: str = "string"
    thresholds: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Args:
        title: Short; unique in its dashboard.
        description: What it means, and what to look at, in a sentence or two.
        unit: Grafana's name of it.
        queries: At least one.
        links: At least one.
        kind: How it is drawn.
        width: Of 24 columns.
        height: In grid rows.
        minimum: Where the axis begins; None: where the data does.
        maximum: Where it ends.
        decimals: Digits behind the point.
        thresholds: From which value on which colour; green or the series' own below.
        stacked: The parts make a whole.
        bars: Counts of something rare, of `events`; a bar is of a minute at least.
        no_value: What it says where there is no data, if that is a good answer.
        series_link: Followed from a series, or from a row of a table.
        colors: Of series whose names are known. Of a `state-timeline`: names of 0, 1, 2, ...
        columns: Of a table.
        names_series: A `stat` shows the series' name in place of its value.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    links: tuple[Link, ...]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 9
    minimum: float | None = 0.0
    maximum: float | None = None
    decimals: int | None = None
    thresholds: tuple[tuple[float, str], ...] = ()
    stacked: bool = False
    bars: bool = False
    no_value: str = ""
    series_link: Link | None = None
    colors: tuple[Color, ...] = ()
    columns: tuple[Column, ...] = ()
    names_series: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one head.

    Args:
        title: The head.
        panels: Set from left to right, and on the next line where they do not fit.
        repeat: A variable: the row is shown once for each of its values.
    """

    title: str
    panels: tuple[Panel, ...]
    repeat: str = ""


@dataclass(frozen=True, slots=True)
class Variable:
    """What the reader of a dashboard chooses.

    Args:
        name: Queries have it as `$name`.
        label: Shown.
        query: In Grafana's words, as in `label_values(up, cluster)`.
        many: Any number can be chosen, and at first all are; else one.
    """

    name: str
    label: str
    query: str
    many: bool = True


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page.

    Args:
        name: Of its file; its uid is `rayprism-<name>`.
        title: Shown.
        description: For whom it is, and how to read it.
        variables: In the order in which they depend on each other.
        rows: From top to bottom.
    """

    name: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def docs_link(section: str) -> Link:
    """To a section of docs/metrics.md, by its anchor."""
    return Link("What these metrics are", f"{DOCS}/metrics.md#{section}")


def page_link(name: str, title: str, more: str = "") -> Link:
    """To another of these dashboards, with the clusters and the time that are chosen."""
    return Link(title, f"/d/rayprism-{name}?{more}{_CARRIED}")


def series_link(cluster: str = "") -> Link:
    """From a series, or a row of a table, to its model's dashboard.

    Args:
        cluster: Grafana's expression for its cluster; the ones that are chosen where it is empty.
    """
    if cluster:
        chosen = f"var-cluster={cluster}&var-model=${{__data.fields.model}}"
        url = f"/d/rayprism-model?{chosen}&${{datasource:queryparam}}&${{__url_time_range}}"
        return Link("Open the model ${__data.fields.model}", url)
    model = "${__field.labels.model}"
    return replace(page_link("model", f"Open the model {model}", f"var-model={model}&"))


def cluster_variable(metric: str) -> Variable:
    """The clusters that have some metric."""
    return Variable("cluster", "Cluster", f"label_values({metric}, cluster)")


def stat(
    title: str,
    description: str,
    unit: str,
    expr: str,
    links: tuple[Link, ...],
    thresholds: tuple[tuple[float, str], ...] = (),
    no_value: str = "",
) -> Panel:
    """A number at the head of a page; six fill a line."""
    return Panel(
        title=title,
        description=description,
        unit=unit,
        queries=(Query(expr, title),),
        links=links,
        kind="stat",
        width=4,
        height=4,
        thresholds=thresholds,
        no_value=no_value,
    )
