"""Dashboards as Grafana reads them, all with one look. Needs `rayprism[grafana]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, cast

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as sdk
from grafana_foundation_sdk.models import prometheus

from rayprism.telemetry.dashboards.looks import draw
from rayprism.telemetry.dashboards.panels import (
    DOCS,
    TARGET,
    Dashboard,
    Link,
    Panel,
    Query,
    Row,
    Variable,
)

__all__ = ["ALL", "TAG", "render"]

TAG = "rayprism"
ALL = ".+"
"""What `All` of a variable is in a matcher. Series without the label do not match it."""

_COLUMNS = 24
_SOURCE = sdk.DataSourceRef(type_val="prometheus", uid="${datasource}")
_NO_COLOR = "text"
_BAR = "1m"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The JSON of a dashboard, as plain values."""
    built = sdk.Dashboard(
        uid=f"{TAG}-{dashboard.name}",
        title=dashboard.title,
        description=dashboard.description,
        tags=[TAG],
        timezone="browser",
        editable=True,
        graph_tooltip=sdk.DashboardCursorSync.CROSSHAIR,
        time=sdk.DashboardDashboardTime(from_val="now-30m", to="now"),
        refresh="10s",
        annotations=sdk.AnnotationContainer(list_val=[]),
        templating=sdk.DashboardDashboardTemplating(
            list_val=[_source_variable(), *map(_variable, dashboard.variables)]
        ),
        links=[
            sdk.DashboardLink(
                title="Dashboards",
                type_val=sdk.DashboardLinkType.DASHBOARDS,
                icon="external link",
                tooltip="The other dashboards, with the same clusters and time",
                tags=[TAG],
                include_vars=True,
                keep_time=True,
            ),
            _link(Link("Metrics", f"{DOCS}/metrics.md"), icon="doc"),
        ],
        panels=list(_place(dashboard.rows)),
    )
    # What the SDK's models hold becomes plain only by writing it out.
    return cast(dict[str, Any], json.loads(json.dumps(built, cls=JSONEncoder)))


# --- variables


def _source_variable() -> sdk.VariableModel:
    return sdk.VariableModel(
        type_val=sdk.VariableType.DATASOURCE,
        name="datasource",
        label="Prometheus",
        query="prometheus",
        multi=False,
        include_all=False,
    )


def _variable(variable: Variable) -> sdk.VariableModel:
    everything = sdk.VariableOption(selected=True, text=["All"], value=["$__all"])
    return sdk.VariableModel(
        type_val=sdk.VariableType.QUERY,
        name=variable.name,
        label=variable.label,
        query=variable.query,
        datasource=_SOURCE,
        # Versions come and go: those of the time shown, not only those of now.
        refresh=sdk.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=sdk.VariableSort.NATURAL_ASC,
        multi=variable.many,
        include_all=variable.many,
        all_value=ALL if variable.many else None,
        current=everything if variable.many else None,
    )


# --- layout


def _place(rows: Iterable[Row]) -> Iterator[sdk.Panel | sdk.RowPanel]:
    number = y = 0
    for row in rows:
        number += 1
        yield sdk.RowPanel(
            title=row.title,
            id_val=number,
            grid_pos=sdk.GridPos(h=1, w=_COLUMNS, x=0, y=y),
            repeat=row.repeat or None,
        )
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield _panel(panel, number, sdk.GridPos(h=panel.height, w=panel.width, x=x, y=y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel, number: int, position: sdk.GridPos) -> sdk.Panel:
    options, custom = draw(panel)
    return sdk.Panel(
        type_val=panel.kind,
        id_val=number,
        title=panel.title,
        description=panel.description,
        datasource=_SOURCE,
        grid_pos=position,
        links=[_link(link) for link in panel.links],
        targets=[_target(panel, place, query) for place, query in enumerate(panel.queries)],
        interval=_BAR if panel.bars else None,
        transformations=_transformations(panel) if panel.columns else None,
        options=options,
        field_config=sdk.FieldConfigSource(
            defaults=sdk.FieldConfig(
                unit=panel.unit,
                decimals=panel.decimals,
                min_val=panel.minimum,
                max_val=panel.maximum,
                no_value=panel.no_value or None,
                thresholds=_thresholds(panel.thresholds, _base_color(panel)),
                color=sdk.FieldColor(mode=_color_mode(panel)),
                mappings=_mappings(panel),
                links=[_link(panel.series_link)] if panel.series_link else None,
                custom=custom,
            ),
            overrides=_overrides(panel),
        ),
    )


def _ref_id(place: int, query: Query) -> str:
    return query.ref_id or chr(ord("A") + place)


def _target(panel: Panel, place: int, query: Query) -> prometheus.Dataquery:
    formats = {
        "table": prometheus.PromQueryFormat.TABLE,
        "heatmap": prometheus.PromQueryFormat.HEATMAP,
    }
    instant = panel.kind in ("table", "bargauge")
    return prometheus.Dataquery(
        expr=query.expr,
        legend_format=query.legend,
        ref_id=_ref_id(place, query),
        instant=instant,
        range_val=not instant,
        format_val=formats.get(panel.kind, prometheus.PromQueryFormat.TIME_SERIES),
        editor_mode=prometheus.QueryEditorMode.CODE,
        datasource=_SOURCE,
    )


def _link(link: Link, icon: str = "") -> sdk.DashboardLink:
    outside = link.url.startswith("https://")
    return sdk.DashboardLink(title=link.title, url=link.url, icon=icon, target_blank=outside)


# --- colours and values


def _thresholds(steps: Iterable[tuple[float, str]], base: str) -> sdk.ThresholdsConfig:
    return sdk.ThresholdsConfig(
        mode=sdk.ThresholdsMode.ABSOLUTE,
        steps=[
            sdk.Threshold(value=None, color=base),
            *(sdk.Threshold(value=value, color=color) for value, color in steps),
        ],
    )


def _base_color(panel: Panel) -> str:
    """Green is for what could be otherwise."""
    judged = panel.kind in ("stat", "bargauge", "state-timeline") and panel.thresholds
    return "green" if judged else _NO_COLOR


def _color_mode(panel: Panel) -> sdk.FieldColorModeId:
    if panel.kind in ("timeseries", "bargauge"):
        return sdk.FieldColorModeId.PALETTE_CLASSIC
    return sdk.FieldColorModeId.THRESHOLDS


def _mappings(panel: Panel) -> list[sdk.ValueMapping] | None:
    if panel.kind != "state-timeline":
        return None
    names = {
        str(value): sdk.ValueMappingResult(text=name, color=color, index=value)
        for value, (name, color) in enumerate(panel.colors)
    }
    return [sdk.ValueMap(options=names)]


def _overrides(panel: Panel) -> list[sdk.DashboardFieldConfigSourceOverrides]:
    found = [
        _override("byFrameRefID", query.ref_id, _dashed())
        for query in panel.queries
        if query.ref_id == TARGET
    ]
    if panel.kind != "state-timeline":
        found += [
            _override("byName", name, {"color": {"mode": "fixed", "fixedColor": color}})
            for name, color in panel.colors
        ]
    for column in panel.columns:
        looks: dict[str, object] = {"unit": column.unit}
        if column.thresholds:
            looks["thresholds"] = _thresholds(column.thresholds, _NO_COLOR)
            looks["custom.cellOptions"] = {"type": "color-text"}
        found.append(_override("byName", column.title, looks))
    return found


def _dashed() -> dict[str, object]:
    return {
        "custom.lineStyle": {"fill": "dash", "dash": [8, 8]},
        "custom.fillOpacity": 0,
        "color": {"mode": "fixed", "fixedColor": "red"},
    }


def _override(
    matcher: str, matched: str, looks: dict[str, object]
) -> sdk.DashboardFieldConfigSourceOverrides:
    return sdk.DashboardFieldConfigSourceOverrides(
        matcher=sdk.MatcherConfig(id_val=matcher, options=matched),
        properties=[sdk.DynamicConfigValue(id_val=key, value=look) for key, look in looks.items()],
    )


# --- tables


def _transformations(panel: Panel) -> list[sdk.DataTransformerConfig]:
    """One row for each set of labels, the columns in their order, and no others."""
    alone = len(panel.queries) == 1
    refs = {_ref_id(place, query) for place, query in enumerate(panel.queries)}
    names = {
        column.field: ("Value" if alone else f"Value #{column.field}")
        if column.field in refs
        else column.field
        for column in panel.columns
    }
    shown = [names[column.field] for column in panel.columns]
    organize: dict[str, object] = {
        "excludeByName": {"Time": True},
        "indexByName": {name: place for place, name in enumerate(shown)},
        "renameByName": {names[column.field]: column.title for column in panel.columns},
    }
    return [
        sdk.DataTransformerConfig(id_val="merge", options={}),
        sdk.DataTransformerConfig(id_val="organize", options=organize),
    ]
