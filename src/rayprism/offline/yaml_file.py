"""A YAML file with the line of everything in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayprism.errors import ConfigInvalid, Fault

__all__ = ["YamlFile", "read_value", "read_yaml"]

_MAX_VALUES = 100_000
_MAX_DEPTH = 50


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A parsed file.

    Args:
        source: The file's name.
        data: What it says.
        lines: Line of every path, counted from 1; `""` is the whole file.
        faults: Keys that are given twice, or that are not strings.
    """

    source: str
    data: Any
    lines: Mapping[str, int]
    faults: tuple[Fault, ...] = ()

    def line_of(self, path: str) -> int | None:
        """The line of a path, or of the nearest thing around it that is in the file."""
        while path:
            if path in self.lines:
                return self.lines[path]
            cut = max(path.rfind("."), path.rfind("["))
            path = path[:cut] if cut > 0 else ""
        return self.lines.get("")


def read_yaml(path: Path) -> YamlFile:
    """Reads a file with one document.

    Raises:
        ConfigInvalid: It cannot be read, is not YAML, is empty, or holds several documents.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        if not nodes or nodes[0] is None:
            raise ConfigInvalid(source, [Fault("", "the file is empty", 1)])
        if len(nodes) > 1:
            line = nodes[1].start_mark.line + 1
            message = "a second document starts here (`---`); a job is one"
            raise ConfigInvalid(source, [Fault("", message, line)])
        walk = _Walk()
        walk.visit(nodes[0], "", 0, nodes[0].start_mark.line + 1)
        data = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigInvalid(source, [Fault("", f"not UTF-8: {error}")]) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigInvalid(source, [Fault("", f"cannot be read: {reason}")]) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigInvalid(source, [_not_yaml(error)]) from None
    return YamlFile(source, data, walk.lines, tuple(walk.faults))


def read_value(text: str) -> tuple[Any, str]:
    """A value as YAML reads it, and what is wrong with it: empty where nothing is."""
    try:
        return yaml.safe_load(text), ""
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        return None, _not_yaml(error).message


def _not_yaml(error: Exception) -> Fault:
    if isinstance(error, RecursionError):
        return Fault("", "not YAML: nested too deep")
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    hint = ". Indent with spaces, not tabs" if "\\t" in problem else ""
    message = f"not YAML: {f'{context}, ' if context else ''}{problem}{hint}"
    return Fault("", message, None if mark is None else mark.line + 1)


class _Walk:
    """Collects the line of every path, and what is wrong with keys."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.faults: list[Fault] = []
        self._left = _MAX_VALUES

    def visit(self, node: yaml.Node, path: str, depth: int, line: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise ValueError("too many values, or nested too deep. An alias that holds itself?")
        self.lines.setdefault(path, line)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, f"{path}[{index}]", depth + 1, item.start_mark.line + 1)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                self._visit_key(key, value, path, depth, seen)

    def _visit_key(
        self, key: yaml.Node, value: yaml.Node, path: str, depth: int, seen: dict[str, int]
    ) -> None:
        line = key.start_mark.line + 1
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        here = f"{path}.{name}" if path else name
        if name in seen:
            message = f"given twice, first in line {seen[name]}"
            self.faults.append(Fault(here, message, line))
        elif key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            message = (
                f"the key {name} is not a string. Quote it (YAML reads on, off, yes, no and "
                "numbers as something else)"
            )
            self.faults.append(Fault(here, message, line))
        seen[name] = line
        self.visit(value, here, depth + 1, line)
