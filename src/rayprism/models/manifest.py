"""The manifest of a model version: everything that is true of it, in one file.

`manifest.json` lies beside the files of the version, is written once by a push, and never changes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import (
    Array,
    Datatype,
    RaggedAxis,
    Tensors,
    TensorSpec,
    check_inputs,
    datatype_of,
    numpy_dtype,
)
from rayprism.core.values import array_from_values, values_from_array
from rayprism.errors import ConfigInvalid, Fault, InvalidInput

__all__ = [
    "MANIFEST_FILE",
    "Batching",
    "Code",
    "FileEntry",
    "Golden",
    "Manifest",
    "RuntimeKind",
    "TensorValue",
    "faults_of",
    "is_model_name",
]

MANIFEST_FILE = "manifest.json"
RuntimeKind = Literal["onnx", "torch", "python"]

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_model_name(name: str) -> bool:
    """Whether a name may be a model's: safe as a folder and as a part of a URL."""
    return bool(_MODEL_NAME.fullmatch(name)) and ".." not in name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Frozen):
    """One file of a version."""

    sha256: str
    size_bytes: Annotated[int, Field(ge=0)]

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        if not _SHA256.fullmatch(value):
            raise ValueError("64 lower-case hexadecimal digits")
        return value


class Code(_Frozen):
    """A Python class in the version's folder. It runs only where the operator allows code.

    Args:
        file: A `.py` file of the version.
        class_name: The class in it; see `rayprism.models.python` for its methods.
    """

    file: str
    class_name: str

    @field_validator("class_name")
    @classmethod
    def _is_identifier(cls, value: str) -> str:
        if not value.isidentifier():
            raise ValueError(f"{value!r} is not a Python identifier")
        return value


class Batching(_Frozen):
    """Hints for the scheduler; a deployment's `user_config` may tighten or loosen the bounds.

    Args:
        batched: Whether axis 0 of every input and output is the row.
        max_rows: Most rows in one batch.
        max_cost: Most `rows * padded length` in one batch, for ragged models.
        max_padding_share: Most of that cost that may be padding, from 0 to 1; 1: no bound. Where
            computing time grows with the padded cost, as on a CPU, a low share serves more.
        max_delay_s: How long a batch that is not full may wait for more rows. 0: never.
        ragged: Axes that the framework pads, by the name of the runtime's input.
        ragged_outputs: Outputs that come as long as the padded inputs, and the axis at which they
            are cut back to the request's own length.
        execution: Where batches run. `inline`: on the event loop, for models that take less than
            about a millisecond; `thread`: off it; `auto`: measured while warming up.
    """

    batched: bool = True
    max_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    max_cost: Annotated[int, Field(ge=1)] | None = None
    max_padding_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_delay_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    ragged: dict[str, RaggedAxis] = Field(default_factory=dict)
    ragged_outputs: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    execution: Literal["auto", "inline", "thread"] = "auto"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.batched and (self.max_rows != 1 or self.ragged):
            raise ValueError("a model that is not batched has max_rows 1 and no ragged axes")
        if self.max_cost is not None and not self.ragged:
            raise ValueError("max_cost bounds rows * padded length: it needs a ragged axis")
        return self


class TensorValue(_Frozen):
    """A tensor written out, as in an Open Inference Protocol JSON request.

    `data` is flat. NaN is null, infinities are the strings "Infinity" and "-Infinity", BYTES are
    strings.
    """

    name: str
    datatype: Datatype
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    data: list[Any]

    @classmethod
    def from_array(cls, name: str, array: Array) -> TensorValue:
        """Writes an array out.

        Raises:
            ValueError: A BYTES element is not UTF-8, or the dtype has no counterpart.
        """
        values = values_from_array(array)
        if array.dtype.kind not in "OSUbiu":
            values = [_plain_float(value) for value in values]
        return cls(name=name, datatype=datatype_of(array), shape=array.shape, data=values)

    def to_array(self) -> Array:
        """The array.

        Raises:
            InvalidInput: The values do not fit the datatype or the shape.
        """
        data = self.data
        if self.datatype.is_float:
            data = [
                _INFINITIES.get(value, value) if type(value) is str else value for value in data
            ]
        return array_from_values(self.name, self.datatype, self.shape, data)


_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def _plain_float(value: float) -> float | str | None:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return None
    return "Infinity" if value > 0 else "-Infinity"


class Golden(_Frozen):
    """An example that a healthy replica reproduces before it takes traffic."""

    inputs: tuple[TensorValue, ...]
    outputs: tuple[TensorValue, ...]
    tolerance: Tolerance = Tolerance()

    def input_arrays(self) -> Tensors:
        """The example's inputs. Raises InvalidInput where a value does not fit its datatype."""
        return {value.name: value.to_array() for value in self.inputs}

    def output_arrays(self) -> Tensors:
        """The outputs that are expected."""
        return {value.name: value.to_array() for value in self.outputs}


class Manifest(_Frozen):
    """Everything that is true of one version of a model.

    Args:
        manifest_version: Of this format.
        model: The model's name.
        version: From 1; each push takes the next.
        created: When it was pushed, ISO 8601 with an offset.
        runtime: What runs `file`.
        file: The model file, relative to the version's folder. For `python`: the code file.
        code: A Python class around the runtime (pre- and post-processing) or, for the `python`
            runtime, the model itself.
        inputs: What clients send.
        outputs: What clients get.
        runtime_inputs: What the runtime takes, where pre-processing makes something else of the
            clients' inputs; empty where it is the same.
        batching: Hints for the scheduler.
        warmup: Shapes that a replica runs once before it is ready: the runtime's input name to
            its whole shape.
        golden: The golden example.
        files: Every file of the version but the manifest, by its relative POSIX path.
        options: For the runtime; see the runtime's module.
        metadata: Free: training data, metrics, git commit.
    """

    manifest_version: Literal[1] = 1
    model: str
    version: Annotated[int, Field(ge=1)]
    created: str
    runtime: RuntimeKind
    file: str
    code: Code | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runtime_inputs: tuple[TensorSpec, ...] = ()
    batching: Batching = Batching()
    warmup: tuple[dict[str, tuple[Annotated[int, Field(ge=1)], ...]], ...] = ()
    golden: Golden
    files: dict[str, FileEntry]
    options: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("model")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not is_model_name(value):
            raise ValueError(
                f"{value!r}: letters, digits, '.', '_' and '-', at most 128, starting with a "
                "letter or digit, no '..'"
            )
        return value

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in value:
            parts = PurePosixPath(path).parts
            if not parts or path.startswith("/") or "\\" in path or ".." in parts:
                raise ValueError(f"{path!r}: a relative path inside the version's folder")
            if path == MANIFEST_FILE:
                raise ValueError(f"{MANIFEST_FILE} does not list itself")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [
            *_duplicates("inputs", self.inputs),
            *_duplicates("outputs", self.outputs),
            *_duplicates("runtime_inputs", self.runtime_inputs),
        ]
        if self.file not in self.files:
            problems.append(f"file {self.file!r} is not among files: {', '.join(self.files)}")
        if self.code is not None and self.code.file not in self.files:
            problems.append(f"code.file {self.code.file!r} is not among files")
        if self.runtime == "python" and self.code is None:
            problems.append("runtime python needs code: {file, class_name}")
        if self.runtime_inputs and self.code is None:
            problems.append("runtime_inputs needs code that makes them out of inputs")
        problems.extend(self._spec_problems())
        if not problems:
            problems.extend(self._golden_problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _spec_problems(self) -> list[str]:
        problems = [
            f"{where} is empty: a model has at least one"
            for where, specs in (("inputs", self.inputs), ("outputs", self.outputs))
            if not specs
        ]
        inner = {spec.name: spec for spec in self.inner_inputs}
        for name, rule in self.batching.ragged.items():
            spec = inner.get(name)
            if spec is None:
                problems.append(f"batching.ragged names {name!r}, the runtime takes {list(inner)}")
            elif rule.axis >= len(spec.shape) or spec.shape[rule.axis] != -1:
                problems.append(
                    f"batching.ragged: axis {rule.axis} of {name!r} is not a free axis "
                    f"of {list(spec.shape)}"
                )
            elif spec.datatype in (Datatype.BYTES, Datatype.BOOL):
                problems.append(f"batching.ragged: {name!r} is {spec.datatype}; pad numbers only")
            elif not _holds(spec.datatype, rule.value):
                problems.append(
                    f"batching.ragged: {spec.datatype} of {name!r} cannot hold the padding "
                    f"{rule.value:g}"
                )
        outer = {spec.name: spec for spec in self.outputs}
        for name, axis in self.batching.ragged_outputs.items():
            if not self.batching.ragged:
                problems.append("batching.ragged_outputs needs batching.ragged")
            elif name not in outer or axis >= len(outer[name].shape):
                problems.append(
                    f"batching.ragged_outputs: {name!r} with an axis {axis} is not among the "
                    "outputs"
                )
        for index, shapes in enumerate(self.warmup):
            if shapes.keys() != inner.keys():
                problems.append(f"warmup[{index}] names {list(shapes)}, needs {list(inner)}")
        if self.batching.batched:
            problems.extend(
                f"{spec.name!r} has no axis: a batched model's tensors have rows as axis 0"
                for spec in (*self.inputs, *self.inner_inputs, *self.outputs)
                if not spec.shape
            )
        return problems

    def _golden_problems(self) -> list[str]:
        try:
            check_inputs(self.inputs, self.golden.input_arrays(), batched=self.batching.batched)
            expected = self.golden.output_arrays()
        except InvalidInput as error:
            return [f"golden: {error}"]
        if expected.keys() != {spec.name for spec in self.outputs}:
            return [f"golden.outputs names {list(expected)}, the model gives {self.output_names}"]
        return []

    @property
    def inner_inputs(self) -> tuple[TensorSpec, ...]:
        """What the runtime takes: `runtime_inputs` where given, else `inputs`."""
        return self.runtime_inputs or self.inputs

    @property
    def output_names(self) -> list[str]:
        """In the order of the manifest."""
        return [spec.name for spec in self.outputs]

    @property
    def runs_code(self) -> bool:
        """Whether loading this version executes code that came with it."""
        return self.code is not None or self.runtime == "python"

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over the canonical manifest, which holds the digest of every file."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"

    def to_json(self) -> str:
        """As it is written to `manifest.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Manifest:
        """Reads a manifest.

        Raises:
            ConfigInvalid: Not JSON, or any number of faults, each with its path.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ConfigInvalid(source, [Fault("", f"not JSON: {error}")]) from None
        try:
            # Strings become enums and lists become tuples only in lax mode, which JSON needs.
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigInvalid(source, faults_of(error)) from None


def _holds(datatype: Datatype, value: float) -> bool:
    if datatype.is_float:
        return True
    limits = np.iinfo(numpy_dtype(datatype))
    return float(value).is_integer() and limits.min <= value <= limits.max


def _duplicates(where: str, specs: tuple[TensorSpec, ...]) -> list[str]:
    names = [spec.name for spec in specs]
    return [
        f"{where} names {name!r} twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]


def faults_of(error: ValidationError, prefix: str = "") -> list[Fault]:
    """The faults in a pydantic error, with paths as people write them: `inputs[0].shape`."""
    faults = []
    for item in error.errors(include_url=False):
        path = prefix
        for part in item["loc"]:
            path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
        message = item["msg"].removeprefix("Value error, ")
        given = item.get("input")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key"
        elif item["type"] != "missing" and not isinstance(given, (Mapping, BaseModel, np.ndarray)):
            message = f"{message}; got {given!r:.80}"
        faults.append(Fault(path, message))
    return faults
