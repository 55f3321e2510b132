"""A YAML file as `serve deploy` reads it, with the line of everything in it.

Serve reads its files with PyYAML, which speaks YAML 1.1: `on` is a boolean there and `1e3` a
string. So PyYAML reads them here too; another parser would check another document.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayprism.errors import ConfigInvalid, Fault

__all__ = ["Document", "join_path", "load_document"]

_MAX_NODES = 100_000
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Args:
        source: The file's name.
        data: What it says.
        lines: Line of every path, counted from 1; `""` is the whole file.
        faults: What is wrong with it as YAML although it could be read: keys that are given
            twice, values that JSON cannot carry.
    """

    source: str
    data: Any
    lines: Mapping[str, int]
    faults: tuple[Fault, ...] = field(default=())

    def line_of(self, path: str) -> int | None:
        """The line of a path, or of the nearest thing around it that is in the file."""
        while path:
            if path in self.lines:
                return self.lines[path]
            cut = max(path.rfind("."), path.rfind("["))
            path = path[:cut] if cut > 0 else ""
        return self.lines.get("")

    def fault(self, path: str, message: str) -> Fault:
        """A fault with its line."""
        return Fault(path, message, self.line_of(path))


def join_path(path: str, part: str | int) -> str:
    """`applications` and 0 give `applications[0]`; `a` and `b` give `a.b`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{part}" if path else part


def load_document(path: Path) -> Document:
    """Reads a YAML file.

    Raises:
        ConfigInvalid: It cannot be read, is not YAML, is empty, or holds several documents.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigInvalid(source, [Fault("", f"not UTF-8: {error}")]) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigInvalid(source, [Fault("", f"cannot be read: {reason}")]) from None
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigInvalid(source, [_not_yaml(error)]) from None
    except RecursionError:
        raise ConfigInvalid(source, [Fault("", "not YAML: nested too deep")]) from None
    if not nodes or nodes[0] is None:
        raise ConfigInvalid(source, [Fault("", "the file is empty. It needs `applications:`", 1)])
    if len(nodes) > 1:
        line = nodes[1].start_mark.line + 1
        message = "a second document starts here (`---`); Serve reads files with one"
        raise ConfigInvalid(source, [Fault("", message, line)])
    walk = _Walk()
    try:
        walk.visit(nodes[0], "", 0)
        data = yaml.safe_load(text)
    except _TooMuch as error:
        raise ConfigInvalid(source, [Fault("", str(error), 1)]) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigInvalid(source, [_not_yaml(error)]) from None
    document = Document(source, data, walk.lines)
    faults = [*walk.faults, *(document.fault(*found) for found in _not_json(data, ""))]
    return Document(source, data, walk.lines, tuple(faults))


def _not_yaml(error: Exception) -> Fault:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    hint = ""
    if "\\t" in problem:
        hint = ". Indent with spaces, not tabs"
    message = f"not YAML: {f'{context}, ' if context else ''}{problem}{hint}"
    return Fault("", message, None if mark is None else mark.line + 1)


class _TooMuch(Exception):
    """The aliases of a file expand to more than any Serve file needs, or into themselves."""


class _Walk:
    """Collects the line of every path, and keys that are given twice."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.faults: list[Fault] = []
        self._left = _MAX_NODES

    def visit(self, node: yaml.Node, path: str, depth: int, *, line: int | None = None) -> None:
        """Walks a node and everything in it.

        Args:
            node: A composed node.
            path: Where it is.
            depth: How deep.
            line: Of its key, where it has one: that is where people look.
        """
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise _TooMuch(
                f"nested deeper than {_MAX_DEPTH}, or more than {_MAX_NODES:,} values: an alias "
                "(`*name`) that holds itself?"
            )
        self.lines.setdefault(path, line or node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, join_path(path, index), depth + 1)
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path, depth)

    def _visit_mapping(self, node: yaml.MappingNode, path: str, depth: int) -> None:
        seen: dict[str, int] = {}
        merged = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                merged.append(value)
                continue
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            here = join_path(path, name)
            if name in seen:
                message = f"given twice, first in line {seen[name]}; Serve takes the last"
                self.faults.append(Fault(here, message, line))
            seen[name] = line
            self.visit(value, here, depth + 1, line=line)
        for value in merged:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in parts:
                # Explicit keys came first, and `setdefault` keeps their lines.
                if isinstance(part, yaml.MappingNode):
                    self._visit_mapping(part, path, depth + 1)


def _not_json(data: Any, path: str) -> Iterator[tuple[str, str]]:
    """What the file holds that cannot be sent to Serve, which speaks JSON."""
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                yield (
                    join_path(path, str(key)),
                    f"the key {key!r} is not a string. Quote it (YAML reads on, off, yes, no and "
                    "numbers as something else)",
                )
            yield from _not_json(value, join_path(path, str(key)))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _not_json(value, join_path(path, index))
    elif isinstance(data, datetime.date):
        yield path, f"YAML reads {data} as a date. Quote it to have a string"
    elif isinstance(data, (bytes, set)):
        yield path, f"a {type(data).__name__}, which Serve's JSON API cannot carry"
    elif isinstance(data, float) and not math.isfinite(data):
        yield path, f"{data} is not a number that Serve's JSON API can carry"
