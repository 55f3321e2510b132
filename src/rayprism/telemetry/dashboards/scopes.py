"""What queries have in common, and colours that stay the same."""

from __future__ import annotations

from rayprism.telemetry.catalogue import STAGES

__all__ = ["CLUSTER", "MODEL", "OUTCOME_COLORS", "STAGE_COLORS", "VERSIONS"]

CLUSTER = ('cluster=~"$cluster"',)

MODEL = (*CLUSTER, 'model="$model"')
"""All versions of the model."""

VERSIONS = (*MODEL, 'version=~"$version"')
"""The versions that are chosen."""

OUTCOME_COLORS = (
    ("ok", "green"),
    ("client_error", "yellow"),
    ("server_error", "red"),
    ("cancelled", "text"),
)

STAGE_COLORS = tuple(
    zip(STAGES, ("blue", "purple", "orange", "green", "super-light-blue", "yellow"), strict=True)
)
"""A stage has one colour in every chart."""
