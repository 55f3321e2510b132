"""How each kind of panel is drawn. Needs `rayprism[grafana]`."""

from __future__ import annotations

from grafana_foundation_sdk.models import (
    bargauge,
    common,
    heatmap,
    stat,
    statetimeline,
    table,
    timeseries,
)

from rayprism.telemetry.dashboards.panels import Panel

__all__ = ["draw"]


def draw(panel: Panel) -> tuple[object, object]:
    """Options of the kind of panel, and of how its fields are drawn."""
    match panel.kind:
        case "timeseries":
            return _chart_options(panel), _chart_fields(panel)
        case "stat":
            return _stat_options(panel), None
        case "heatmap":
            return _heatmap_options(panel), heatmap.FieldConfig()
        case "bargauge":
            return _bar_options(), None
        case "state-timeline":
            return _state_options(), statetimeline.FieldConfig()
        case "table":
            return table.Options(footer=common.TableFooterOptions()), _table_fields()


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions(
        mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING
    )


_WIDE = 12
"""From so many columns on a legend has room at the side, where all of it is seen: below a chart
Grafana shows about three series, and the rest has to be scrolled to."""


def _legend(*calcs: str, beside: bool = False) -> common.VizLegendOptions:
    mode = common.LegendDisplayMode.TABLE if calcs else common.LegendDisplayMode.LIST
    return common.VizLegendOptions(
        display_mode=mode,
        placement=common.LegendPlacement.RIGHT if beside else common.LegendPlacement.BOTTOM,
        show_legend=True,
        calcs=list(calcs),
    )


def _chart_options(panel: Panel) -> timeseries.Options:
    calcs = ("sum",) if panel.bars else ("lastNotNull", "max")
    return timeseries.Options(
        legend=_legend(*calcs, beside=panel.width >= _WIDE), tooltip=_tooltip()
    )


def _chart_fields(panel: Panel) -> common.GraphFieldConfig:
    steps = common.GraphThresholdsStyleMode.DASHED
    off = common.GraphThresholdsStyleMode.OFF
    stacked = panel.stacked or panel.bars
    stacking = common.StackingMode.NORMAL if stacked else common.StackingMode.NONE
    return common.GraphFieldConfig(
        draw_style=common.GraphDrawStyle.BARS if panel.bars else common.GraphDrawStyle.LINE,
        line_width=1,
        fill_opacity=60 if panel.bars else 30 if panel.stacked else 8,
        show_points=common.VisibilityMode.NEVER,
        # A gap is news: nobody was asked, or nothing was scraped.
        span_nulls=False,
        stacking=common.StackingConfig(mode=stacking, group="A"),
        thresholds_style=common.GraphThresholdsStyleConfig(mode=steps if panel.thresholds else off),
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions(values=False, calcs=["lastNotNull"], fields="")


def _stat_options(panel: Panel) -> stat.Options:
    named = panel.names_series
    return stat.Options(
        graph_mode=common.BigValueGraphMode.NONE if named else common.BigValueGraphMode.AREA,
        color_mode=common.BigValueColorMode.VALUE,
        justify_mode=common.BigValueJustifyMode.AUTO,
        text_mode=common.BigValueTextMode.NAME if named else common.BigValueTextMode.VALUE,
        reduce_options=_last(),
        orientation=common.VizOrientation.AUTO,
        percent_change_color_mode=common.PercentChangeColorMode.STANDARD,
    )


def _heatmap_options(panel: Panel) -> heatmap.Options:
    return heatmap.Options(
        calculate=False,
        color=heatmap.HeatmapColorOptions(
            mode=heatmap.HeatmapColorMode.SCHEME,
            scheme="Oranges",
            fill="dark-orange",
            scale=heatmap.HeatmapColorScale.EXPONENTIAL,
            exponent=0.5,
            steps=64,
        ),
        # The unit of the panel is the cells'; the axis has the bounds of the buckets.
        y_axis=heatmap.YAxisConfig(
            unit="s", axis_placement=common.AxisPlacement.LEFT, reverse=False
        ),
        cell_values=heatmap.CellValues(unit=panel.unit),
        tooltip=heatmap.HeatmapTooltip(
            mode=common.TooltipDisplayMode.SINGLE, y_histogram=True, show_color_scale=True
        ),
    )


def _bar_options() -> bargauge.Options:
    return bargauge.Options(
        display_mode=common.BarGaugeDisplayMode.BASIC,
        value_mode=common.BarGaugeValueMode.COLOR,
        name_placement=common.BarGaugeNamePlacement.LEFT,
        sizing=common.BarGaugeSizing.MANUAL,
        max_viz_height=32,
        legend=_legend(),
        reduce_options=_last(),
        orientation=common.VizOrientation.HORIZONTAL,
    )


def _state_options() -> statetimeline.Options:
    return statetimeline.Options(
        show_value=common.VisibilityMode.AUTO,
        align_value=common.TimelineValueAlignment.LEFT,
        legend=_legend(),
        tooltip=_tooltip(),
    )


def _table_fields() -> common.TableFieldOptions:
    return common.TableFieldOptions(align=common.FieldTextAlignment.AUTO, inspect=False)
