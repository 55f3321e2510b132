"""Grafana dashboards as code: dashboards/*.json are made from this.

`python -m rayprism.telemetry.dashboards.build` writes them. Building needs `rayprism[grafana]`;
reading what they ask (`panel_queries`) does not.
"""

from __future__ import annotations

from typing import Any

from rayprism.errors import SetupError
from rayprism.telemetry.dashboards.batch import batch_dashboard
from rayprism.telemetry.dashboards.cluster import cluster_dashboard
from rayprism.telemetry.dashboards.fleet import fleet_dashboard
from rayprism.telemetry.dashboards.model import model_dashboard
from rayprism.telemetry.dashboards.queries import (
    PanelQuery,
    default_variables,
    panel_queries,
    substitute,
)

__all__ = ["PanelQuery", "build_dashboards", "default_variables", "panel_queries", "substitute"]


def build_dashboards() -> dict[str, dict[str, Any]]:
    """All dashboards, by the stem of their file, as plain values; the same each time.

    Raises:
        SetupError: The SDK that they are built with cannot be imported.
    """
    try:
        from rayprism.telemetry.dashboards.render import render
    except ImportError as error:
        raise SetupError(
            f"dashboards are built with grafana-foundation-sdk, which cannot be imported ({error})."
            " Mend: pip install 'rayprism[grafana]'"
        ) from None
    made = (fleet_dashboard(), model_dashboard(), batch_dashboard(), cluster_dashboard())
    return {dashboard.name: render(dashboard) for dashboard in made}
