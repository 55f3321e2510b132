"""Reads what a batch command is told: a YAML file, and what the command line says instead."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault
from rayprism.offline.spec_parts import SpecPart
from rayprism.offline.yaml_file import read_value, read_yaml

__all__ = ["explain", "load_file"]

_Spec = TypeVar("_Spec")


def load_file(path: Path, changes: Sequence[str], parse: Callable[[Any, str], _Spec]) -> _Spec:
    """Reads a file.

    Args:
        path: The file.
        changes: What the command line says instead, as in `pool.max_actors=4`: a path and YAML.
        parse: Checks what it says, given the file's name.

    Raises:
        ConfigInvalid: It cannot be read, is not YAML, or has faults: all, with path and line.
    """
    file = read_yaml(path)
    faults = list(file.faults)
    if isinstance(file.data, dict):
        for change in changes:
            faults.extend(_apply(file.data, change))
    try:
        spec = parse(file.data, file.source)
    except ConfigInvalid as error:
        known = {fault.path for fault in faults}
        faults += [
            Fault(fault.path, fault.message, file.line_of(fault.path))
            for fault in error.faults
            # Keys that are no strings were found in the file, where they have a name and a line.
            if fault.path not in known and not fault.message.startswith("Keys should be strings")
        ]
    if faults:
        raise ConfigInvalid(file.source, faults)
    return spec


_CLASS_NAME = re.compile(r"Input should be a valid dictionary or instance of \w+")
_BOOLEAN = re.compile(r"got (True|False)$")
_NUMBER_AS_TEXT = re.compile(r"got '([-+]?\d[\d.]*)[eE]([-+]?\d+)'$")


def explain(fault: Fault, root: type[SpecPart]) -> Fault:
    """Adds what the person most likely meant.

    Args:
        fault: As pydantic tells it.
        root: What the file is checked as.
    """
    parent, _, key = fault.path.rpartition(".")
    message = fault.message
    if message == "unknown key":
        known = list(_part_at(parent, root).model_fields)
        message = f"unknown key.{suggest(key, known)} Allowed: {', '.join(known)}"
    elif message == "Field required":
        message = "missing, and has no default"
    elif "instance of" in message:
        message = _CLASS_NAME.sub("a mapping", message)
    elif "string" in message and _BOOLEAN.search(message):
        message += ". YAML reads yes, no, on and off as booleans: quote it"
    elif number := _NUMBER_AS_TEXT.search(message):
        digits = number[1] if "." in number[1] else f"{number[1]}.0"
        sign = "" if number[2][0] in "+-" else "+"
        advice = "write it out" if "integer" in message else f"{digits}e{sign}{number[2]}"
        message += f". YAML reads it as text without a point and a sign: {advice}"
    return Fault(fault.path, message, fault.line)


def _part_at(path: str, root: type[SpecPart]) -> type[SpecPart]:
    """The part that a path names; the whole where there is none."""
    part = root
    for name in filter(None, path.split(".")):
        field = part.model_fields.get(name)
        kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, SpecPart):
                part = kind
    return part


def _apply(data: dict[str, Any], change: str) -> list[Fault]:
    """Puts `limits.batch_rows=64` into what a file says."""
    path, equals, text = change.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        return [Fault("", f"--set {change}: got no path and value, as in pool.max_actors=4")]
    value, fault = read_value(text)
    if fault:
        return [Fault(path, f"--set {change}: {fault}")]
    for name in names[:-1]:
        inner = data.get(name)
        if inner is None:
            inner = data[name] = {}
        if not isinstance(inner, dict):
            return [Fault(path, f"--set {change}: {name} is not a mapping in the file")]
        data = inner
    data[names[-1]] = value
    return []
