"""Reads from an ONNX file which other files hold its weights, without the onnx package.

Source: onnx.proto of ONNX 1.x: ModelProto.graph = 7; GraphProto.node = 1, initializer = 5,
sparse_initializer = 15; NodeProto.attribute = 5; AttributeProto.t = 5, g = 6, tensors = 10,
graphs = 11; TensorProto.external_data = 13 of StringStringEntryProto (key = 1, value = 2); and
the protobuf wire format.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rayprism.errors import LoadFailed

__all__ = ["external_files"]

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "external"},
}


def external_files(path: Path) -> list[str]:
    """The files, relative to the model's folder, that hold its external data; sorted.

    Raises:
        LoadFailed: One lies outside the model's folder, or the file is cut short.
    """
    found: set[str] = set()
    with path.open("rb") as stream:
        if path.stat().st_size == 0:
            raise LoadFailed(f"{path.name} is empty: export or copy the model again")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _visit(data, 0, len(data), "model", found)
            except (IndexError, ValueError):
                raise LoadFailed(
                    f"{path.name} is not an ONNX model, or was cut short: export or copy it again"
                ) from None
    for location in found:
        if PurePosixPath(location).is_absolute() or ".." in PurePosixPath(location).parts:
            raise LoadFailed(
                f"{path.name}: its weights are in {location!r}, outside the model's folder. Mend: "
                "save the model with its external data beside it"
            )
    return sorted(found)


def _visit(data: mmap.mmap, start: int, stop: int, kind: str, found: set[str]) -> None:
    children = _CHILDREN[kind]
    for field, begin, end in _fields(data, start, stop):
        child = children.get(field)
        if child == "external":
            pair = {key: data[a:b] for key, a, b in _fields(data, begin, end)}
            if pair.get(1) == b"location":
                found.add(pair.get(2, b"").decode())
        elif child is not None:
            _visit(data, begin, end, child, found)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each length-delimited field; the others are stepped over."""
    while start < stop:
        key, start = _varint(data, start)
        wire = key & 7
        if wire == 2:
            size, start = _varint(data, start)
            if start + size > stop:
                raise ValueError("a field runs over its end")
            yield key >> 3, start, start + size
            start += size
        elif wire == 0:
            _, start = _varint(data, start)
        elif wire in (1, 5):
            start += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("a number of more than ten bytes")
