"""How commands print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["print_json", "print_table", "repository_option", "say", "shown_path"]

repository_option = click.option(
    "--repository",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="RAYPRISM_REPOSITORY",
    default=Path("models"),
    show_default="$RAYPRISM_REPOSITORY, else ./models",
    help="The model repository.",
)


def say(message: str) -> None:
    """Progress, on stderr: stdout is for what was asked for."""
    click.echo(message, err=True)


def print_json(value: Any) -> None:
    """A value, as other programs read it."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Columns, as wide as what is in them."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo(indent + "  ".join(cells).rstrip())


def shown_path(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
