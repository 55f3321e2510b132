"""Writes the dashboards' JSON, or says which files are not current."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayprism.errors import RayprismError, SetupError
from rayprism.telemetry.dashboards import build_dashboards

__all__ = ["dashboard_text", "main", "stale_dashboards", "write_dashboards"]

_COMMAND = "python -m rayprism.telemetry.dashboards.build"
_DEFAULT_FOLDER = Path("dashboards")
_EXAMPLES = f"""examples:
  {_COMMAND}                  write dashboards/*.json
  {_COMMAND} --check          exit 1 if one of them is not current
  {_COMMAND} --out DIRECTORY  write them elsewhere
"""


def dashboard_text(dashboard: dict[str, Any]) -> str:
    """What a dashboard's file holds: keys in order, so that a change is seen in a diff."""
    return json.dumps(dashboard, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_dashboards(folder: Path) -> list[Path]:
    """Writes all of them, and says where.

    Raises:
        SetupError: The SDK is not there, or the folder cannot be written.
    """
    written = []
    for path, text in _files(folder).items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SetupError(f"{path} cannot be written: {error.strerror}") from error
        written.append(path)
    return written


def stale_dashboards(folder: Path) -> list[Path]:
    """Files that are missing, or are not what would be written now.

    Raises:
        SetupError: The SDK is not there, or a file cannot be read.
    """
    return [path for path, text in _files(folder).items() if _read(path) != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        Exit status: 1 where a file is not current, or for what has to be mended.
    """
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Write the Grafana dashboards as JSON.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument(
        "--out", type=Path, default=_DEFAULT_FOLDER, help="the folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        return _check(options.out) if options.check else _write(options.out)
    except RayprismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _write(folder: Path) -> int:
    for path in write_dashboards(folder):
        print(path)
    return 0


def _check(folder: Path) -> int:
    stale = stale_dashboards(folder)
    for path in stale:
        print(f"{path} is not current", file=sys.stderr)
    if stale:
        elsewhere = f" --out {folder}" if folder != _DEFAULT_FOLDER else ""
        print(f"Mend: {_COMMAND}{elsewhere}", file=sys.stderr)
    return 1 if stale else 0


def _files(folder: Path) -> dict[Path, str]:
    made = build_dashboards()
    return {folder / f"{name}.json": dashboard_text(made[name]) for name in made}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
