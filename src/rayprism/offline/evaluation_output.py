"""Which output of a model is judged, and what memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault, SetupError
from rayprism.models.manifest import Manifest
from rayprism.offline.evaluation_spec import PREFIX, EvaluationSpec
from rayprism.offline.lists import unnest_type
from rayprism.offline.outputs import output_fields

__all__ = ["Prediction", "bytes_per_row", "fault_at", "find_prediction", "refuse_too_many"]

_WORKING_BYTES = 120
"""A row on its way through the metrics: sorted copies of scores in double precision."""

Kind = Literal["score", "class", "scores", "number"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The output that is judged.

    Args:
        name: Of the output.
        kind: `score`: of being positive; `class`; `scores`: one for each class; `number`.
        width: Of `scores`: how many; None where the manifest leaves it free.
    """

    name: str
    kind: Kind
    width: int | None = None


def find_prediction(spec: EvaluationSpec, manifest: Manifest) -> Prediction:
    """Which output is judged, and what it is.

    Raises:
        ConfigInvalid: There is no such output, or the task cannot be told of it.
    """
    fields = {
        field.name.removeprefix(PREFIX): field.type
        for field in output_fields(manifest, PREFIX)
        if field.name.startswith(PREFIX)
    }
    names = ", ".join(fields)
    name = spec.prediction or (next(iter(fields)) if len(fields) == 1 else None)
    version = f"{manifest.model} {manifest.version}"
    if name is None:
        raise fault_at("prediction", f"{version} has several outputs, name one of them: {names}")
    if name not in fields:
        hint = suggest(name, fields)
        raise fault_at(
            "prediction", f"{version} has no output {name!r}.{hint} Its outputs: {names}"
        )
    sizes, leaf = unnest_type(fields[name])
    floats, whole = pa.types.is_floating(leaf), pa.types.is_integer(leaf)
    named = whole or pa.types.is_boolean(leaf) or pa.types.is_string(leaf)
    allowed = {
        "binary": "a score a row, a class a row, or the scores of two classes",
        "multiclass": "a class a row (a whole number or text), or a score for each class",
        "regression": "a number a row",
    }[spec.task]
    kind: Kind | None = None
    if not sizes and spec.task == "regression":
        kind = "number" if floats or whole else None
    elif not sizes:
        kind = "class" if named else ("score" if floats and spec.task == "binary" else None)
    elif len(sizes) == 1 and floats and spec.task != "regression":
        kind = "scores"
    if kind is None:
        message = (
            f"output {name!r} of {version} is {fields[name]}; task {spec.task} takes {allowed}"
        )
        raise fault_at("prediction", message)
    width = int(sizes[0]) if sizes and sizes[0] != -1 else None
    classes = len(spec.classes) if spec.classes else 2 if spec.task == "binary" else None
    if kind == "scores" and None not in (width, classes) and width != classes:
        where = "classes" if spec.classes else "prediction"
        message = f"output {name!r} of {version} has {width} scores a row for {classes} classes"
        raise fault_at(where, message)
    return Prediction(name, kind, width)


def fault_at(path: str, message: str) -> ConfigInvalid:
    """One fault of an evaluation."""
    return ConfigInvalid("evaluation", [Fault(path, message)])


def bytes_per_row(spec: EvaluationSpec, prediction: Prediction) -> tuple[int, int]:
    """Memory of one row: what is held, and with what its metrics need while they are computed."""
    versions = len(spec.versions)
    held = {
        "binary": 1 + 4 * versions,
        "multiclass": 4 + (12 if prediction.kind == "scores" else 4) * versions,
        "regression": 8 + 8 * versions,
    }[spec.task] + 2 * len(spec.segments)
    return held, held + _WORKING_BYTES


def refuse_too_many(spec: EvaluationSpec, prediction: Prediction, rows: int) -> None:
    """Refuses rows whose statistics need more memory than is allowed.

    Raises:
        SetupError: They do.
    """
    _, needed = bytes_per_row(spec, prediction)
    if rows * needed > spec.max_evaluation_bytes:
        most = spec.max_evaluation_bytes // needed
        raise SetupError(
            f"{rows:,} rows need about {rows * needed / 2**20:,.0f} MiB for the statistics "
            f"({needed} bytes a row), max_evaluation_bytes allows "
            f"{spec.max_evaluation_bytes / 2**20:,.0f} MiB, which is {most:,} rows. Mend: name "
            "fewer files, or raise max_evaluation_bytes"
        )
