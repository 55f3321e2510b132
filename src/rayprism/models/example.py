"""The example that a push takes: requests as people have them lying around.

Three forms are read: an Open Inference Protocol request (`{"inputs": [{"name", "datatype",
"shape", "data"}]}`), `{"inputs": {name: nested lists}}`, and `{name: nested lists}`. The first two
may hold "outputs" in the same form, which are then what the model is expected to give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rayprism.core.tensors import (
    Array,
    Datatype,
    Tensors,
    TensorSpec,
    datatype_of,
    numpy_dtype,
    suggest,
)
from rayprism.core.values import array_from_values
from rayprism.errors import ConfigInvalid, Fault, InvalidInput
from rayprism.models.manifest import TensorValue, faults_of

__all__ = ["Example", "read_example"]


@dataclass(frozen=True)
class Example:
    """An example as it was written, before the model's specs are known.

    Args:
        source: The file's name, for messages.
        inputs: By name: a `TensorValue`, an array, or nested lists.
        outputs: In the same way; empty where none are expected.
    """

    source: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Specs as far as the example tells datatypes; the first axis is taken for the row.

        Empty where an input's datatype is not told.
        """
        specs = []
        for name, value in self.inputs.items():
            if isinstance(value, TensorValue):
                datatype, shape = value.datatype, value.shape
            elif isinstance(value, np.ndarray):
                datatype, shape = _datatype(self.source, name, value), value.shape
            else:
                return ()
            specs.append(TensorSpec(name, datatype, (-1, *shape[1:]) if shape else ()))
        return tuple(specs)

    def input_arrays(self, specs: Sequence[TensorSpec]) -> Tensors:
        """The inputs as arrays of the model's datatypes.

        Raises:
            ConfigInvalid: Names that the model does not have, or values that do not fit.
        """
        return self._arrays("inputs", self.inputs, specs)

    def output_arrays(self, specs: Sequence[TensorSpec]) -> Tensors:
        """The expected outputs; empty where the example holds none."""
        return self._arrays("outputs", self.outputs, specs)

    def _arrays(self, part: str, values: Mapping[str, Any], specs: Sequence[TensorSpec]) -> Tensors:
        known = {spec.name: spec for spec in specs}
        arrays: Tensors = {}
        faults = []
        for name, value in values.items():
            spec = known.get(name)
            if spec is None:
                faults.append(
                    Fault(
                        f"{part}.{name}",
                        f"not one of the model's {part}.{suggest(name, known)} "
                        f"They are: {', '.join(known)}",
                    )
                )
                continue
            try:
                arrays[name] = _array(spec, value)
            except InvalidInput as error:
                faults.append(Fault(f"{part}.{name}", str(error)))
        if part == "inputs":
            faults.extend(
                Fault(
                    f"inputs.{spec.name}",
                    f"missing: the model takes {spec.datatype} {list(spec.shape)}."
                    f"{suggest(spec.name, [name for name in values if name not in known])}",
                )
                for spec in specs
                if spec.name not in values
            )
        if faults:
            raise ConfigInvalid(self.source, faults)
        return {name: arrays[name] for name in known if name in arrays}


def read_example(example: Path | Mapping[str, Any]) -> Example:
    """Reads an example from a file, or from a mapping of the same form (arrays may stand in it).

    Raises:
        ConfigInvalid: The file is missing, is not JSON, or is of none of the forms.
    """
    if isinstance(example, Mapping):
        source, raw = "example", example
    else:
        source, raw = str(example), _read_json(Path(example))
    inputs: Mapping[str, Any] = raw
    outputs: Mapping[str, Any] = {}
    if isinstance(raw.get("inputs"), list | Mapping) and not _is_nested(raw["inputs"]):
        inputs = _named(source, "inputs", raw["inputs"])
        outputs = _named(source, "outputs", raw.get("outputs") or {})
    if not inputs:
        raise ConfigInvalid(source, [Fault("inputs", "empty: an example has every input")])
    return Example(source, inputs, outputs)


def _is_nested(value: Any) -> bool:
    """Whether this is the data of a tensor that happens to be called `inputs`."""
    return isinstance(value, list) and not any(isinstance(item, Mapping) for item in value)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigInvalid(
            str(path),
            [Fault("", f"cannot be read: {error.strerror}. Give a JSON file with one request")],
        ) from None
    except ValueError as error:
        raise ConfigInvalid(str(path), [Fault("", f"not JSON: {error}")]) from None
    if not isinstance(raw, dict):
        raise ConfigInvalid(
            str(path), [Fault("", f"got a {type(raw).__name__}, allowed is an object of inputs")]
        )
    return raw


def _named(source: str, part: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, list):
        raise ConfigInvalid(source, [Fault(part, "allowed is a list of tensors, or an object")])
    named: dict[str, Any] = {}
    faults: list[Fault] = []
    for index, item in enumerate(value):
        where = f"{part}[{index}]"
        # A protocol request may carry parameters; they mean nothing to an example.
        if isinstance(item, Mapping):
            item = {key: entry for key, entry in item.items() if key != "parameters"}
            item["data"] = _flat(item.get("data"))
        try:
            tensor = TensorValue.model_validate(item)
        except ValidationError as error:
            faults.extend(faults_of(error, where))
            continue
        if tensor.name in named:
            faults.append(Fault(where, f"{tensor.name!r} is there twice"))
        named[tensor.name] = tensor
    if faults:
        raise ConfigInvalid(source, faults)
    return named


def _flat(data: Any) -> Any:
    if not isinstance(data, list) or not any(isinstance(item, list) for item in data):
        return data
    return [leaf for item in data for leaf in (_flat(item) if isinstance(item, list) else [item])]


def _array(spec: TensorSpec, value: Any) -> Array:
    if isinstance(value, TensorValue):
        if value.datatype is not spec.datatype:
            raise InvalidInput(f"datatype is {value.datatype}, the model has {spec.datatype}")
        return value.to_array()
    if isinstance(value, np.ndarray):
        if value.dtype == numpy_dtype(spec.datatype) and value.dtype.kind != "O":
            return value
        plain = [
            item.decode() if isinstance(item, bytes) else item for item in value.ravel().tolist()
        ]
        return array_from_values(spec.name, spec.datatype, value.shape, plain)
    if not isinstance(value, list):
        raise InvalidInput(f"got {value!r:.40}, allowed are nested lists, one item for each row")
    return array_from_values(spec.name, spec.datatype, _nested_shape(value), value)


def _nested_shape(value: Any) -> tuple[int, ...]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _datatype(source: str, name: str, array: Array) -> Datatype:
    try:
        return datatype_of(array)
    except ValueError as error:
        raise ConfigInvalid(source, [Fault(f"inputs.{name}", str(error))]) from None
