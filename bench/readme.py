"""Puts the newest results into the documents, so that no figure there is typed by hand."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.tables import all_targets

__all__ = ["insert", "main"]

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"
_DOCUMENTS = [_ROOT / "README.md", _ROOT / "docs" / "performance.md"]
_TARGETS = "targets"
"""The table of all bounds, which no file has."""
_BLOCK = re.compile(
    r"(?P<begin><!-- bench:(?P<name>[a-z0-9_-]+) -->)\n(?P<body>.*?)(?P<end><!-- /bench -->)",
    re.DOTALL,
)


def insert(text: str, tables: dict[str, str]) -> str:
    """Replaces what is between each `<!-- bench:NAME -->` and `<!-- /bench -->`.

    Args:
        text: A Markdown document.
        tables: What goes there, by name.

    Raises:
        KeyError: The document asks for a table that is not among them.
        ValueError: A mark has no end, or there is none at all.
    """
    if text.count("<!-- bench:") != len(_BLOCK.findall(text)):
        raise ValueError("a `<!-- bench:NAME -->` has no `<!-- /bench -->`")
    if "<!-- bench:" not in text:
        raise ValueError("no `<!-- bench:NAME -->` in the document")

    def replaced(match: re.Match[str]) -> str:
        return f"{match['begin']}\n{tables[match['name']].strip()}\n{match['end']}"

    return _BLOCK.sub(replaced, text)


def main(arguments: list[str] | None = None) -> int:
    """Writes the documents, or with --check says whether they are current.

    Returns:
        0 where all is well, 1 where --check found one out of date.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if not current")
    parser.add_argument("--readme", type=Path, nargs="+", default=_DOCUMENTS)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    given = parser.parse_args(arguments)
    tables = {path.stem: path.read_text() for path in sorted(given.results.glob("*.md"))}
    tables[_TARGETS] = all_targets(dict(_scenario_results(given.results)))
    return max([_update(document, tables, check=given.check) for document in given.readme])


def _scenario_results(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if "scenario" in results:
            yield path.stem, results


def _update(document: Path, tables: dict[str, str], *, check: bool) -> int:
    if not document.is_file():
        print(f"{document.name} is not there")
        return 1
    text = document.read_text()
    try:
        wanted = insert(text, tables)
    except KeyError as error:
        print(f"{document.name} asks for {error}: bench/results/ has {sorted(tables)}")
        return 1
    except ValueError as error:
        print(f"{document.name}: {error}")
        return 1
    if wanted == text:
        return 0
    if check:
        print(f"{document.name} is not what bench/results/ says: run `python -m bench.readme`")
        return 1
    document.write_text(wanted)
    print(f"{document.name} now has the tables that bench/results/ has")
    return 0


if __name__ == "__main__":
    sys.exit(main())
