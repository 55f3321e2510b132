"""What a dashboard asks Prometheus, read from its JSON: for tests and for tools.

Needs nothing but the JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayprism.errors import SetupError

__all__ = ["INTERVALS", "PanelQuery", "default_variables", "panel_queries", "substitute"]

INTERVALS: Mapping[str, str] = {
    "__interval": "1m",
    "__interval_ms": "60000",
    "__rate_interval": "1m",
    "__range": "30m",
    "__range_s": "1800",
    "__range_ms": "1800000",
}
"""What Grafana sets itself, for scrapes every 10 s, the last 30 minutes, and bars of a minute."""

_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)|\[\[(\w+)(?::\w+)?\]\]")
_LABEL_VALUES = re.compile(r"label_values\((?:(?P<series>.+),)?\s*(?P<label>\w+)\s*\)", re.DOTALL)
_LEGEND_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One expression of a dashboard.

    Args:
        dashboard: Its uid.
        panel: The panel's title; `variable NAME` of a variable's query.
        expr: With Grafana's variables in it; see `substitute`.
        legend: As in `{{model}} {{version}}`; of a variable, the label whose values it takes.
        format: `time_series`, `table`, `heatmap`, or `variable`.
        ref_id: Of the query in its panel.
        optional: That it gives nothing may be as it should: the panel says what that means, or it
            is a target, which a model need not have.
    """

    dashboard: str
    panel: str
    expr: str
    legend: str
    format: str
    ref_id: str = "A"
    optional: bool = False

    @property
    def labels(self) -> frozenset[str]:
        """Labels that the legend takes from a series; all of them have to be there."""
        return frozenset(_LEGEND_LABEL.findall(self.legend))


def panel_queries(dashboard: Mapping[str, Any]) -> list[PanelQuery]:
    """Every query of a dashboard: of its variables, then of its panels, also those in rows."""
    uid = str(dashboard["uid"])
    return [*_variable_queries(uid, dashboard), *_queries_of(uid, dashboard.get("panels", []))]


def default_variables(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """What a dashboard's variables are at first, where that is `All`. The others are not in it."""
    variables = dashboard.get("templating", {}).get("list", [])
    return {
        variable["name"]: variable["allValue"]
        for variable in variables
        if variable.get("includeAll") and "allValue" in variable
    }


def substitute(expr: str, variables: Mapping[str, str | Sequence[str]]) -> str:
    """An expression as Grafana would send it.

    Args:
        expr: With `$name`, `${name}`, `${name:format}` or `[[name]]`.
        variables: By name; several values become alternatives of a pattern. Intervals have
            defaults, `INTERVALS`.

    Raises:
        SetupError: A variable has no value.
    """

    def value_of(match: re.Match[str]) -> str:
        name = next(group for group in match.groups() if group is not None)
        value = variables.get(name, INTERVALS.get(name))
        if value is None:
            raise SetupError(
                f"the variable {name} has no value in: {expr}. Given are: "
                f"{', '.join(sorted(variables)) or 'none'}"
            )
        return value if isinstance(value, str) else _alternatives(value)

    return _VARIABLE.sub(value_of, expr)


def _alternatives(values: Sequence[str]) -> str:
    # Backslashes twice: once for the pattern, once for the string that it stands in.
    escaped = [re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\\\1", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _variable_queries(uid: str, dashboard: Mapping[str, Any]) -> Iterator[PanelQuery]:
    for variable in dashboard.get("templating", {}).get("list", []):
        if variable["type"] != "query":
            continue
        found = _LABEL_VALUES.fullmatch(variable["query"].strip())
        if found is None or found["series"] is None:
            raise SetupError(
                f"{uid}: the variable {variable['name']} asks {variable['query']!r}; it should "
                "have the form label_values(series, label)"
            )
        title, legend = f"variable {variable['name']}", f"{{{{{found['label']}}}}}"
        yield PanelQuery(uid, title, found["series"].strip(), legend, "variable")


def _queries_of(uid: str, panels: Sequence[Mapping[str, Any]]) -> Iterator[PanelQuery]:
    for panel in panels:
        yield from _queries_of(uid, panel.get("panels") or [])
        said = panel.get("fieldConfig", {}).get("defaults", {}).get("noValue", "")
        for target in panel.get("targets") or []:
            yield PanelQuery(
                dashboard=uid,
                panel=panel["title"],
                expr=target["expr"],
                legend=target.get("legendFormat", ""),
                format=target.get("format", "time_series"),
                ref_id=target["refId"],
                optional=bool(said) or target["refId"] == "target",
            )
