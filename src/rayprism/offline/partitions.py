"""Columns that come from the folders `name=value` that a file lies in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast
from urllib.parse import unquote

import pyarrow as pa

from rayprism.errors import Fault

__all__ = ["partition_types", "partition_values"]

# Source: Hive; Spark and Arrow write it too.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def partition_values(path: str) -> dict[str, str | None]:
    """What the folders `name=value` of a path say, as text."""
    pairs = [part.partition("=") for part in path.split("/")[:-1] if "=" in part]
    return {
        unquote(name): None if value == _NULL_PARTITION else unquote(value)
        for name, _, value in pairs
    }


def partition_types(paths: Sequence[str]) -> tuple[dict[str, pa.DataType], list[Fault]]:
    """The partition columns of an input: whole numbers where all values are, else text.

    `007` is text: as a number it would lose its zeros.
    """
    found = [partition_values(path) for path in paths]
    names, count = Counter(tuple(values) for values in found).most_common(1)[0]
    faults = [
        Fault(
            path,
            f"its folders give the columns {_names(values)}; {count} of {len(paths)} files have "
            f"{_names(names)}",
        )
        for path, values in zip(paths, found, strict=True)
        if tuple(values) != names
    ]
    types = {}
    for name in names:
        texts = {values.get(name) for values in found} - {None}
        whole = texts and all(_WHOLE_NUMBER.fullmatch(cast("str", text)) for text in texts)
        types[name] = pa.int64() if whole else pa.string()
    return types, faults


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"
