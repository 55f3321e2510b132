"""Checks of single fields of a request or an answer, the same for JSON and for gRPC."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from rayprism.core.tensors import Datatype, suggest
from rayprism.core.values import describe_value
from rayprism.errors import InvalidInput, RequestError, Unsupported
from rayprism.protocol.messages import InferRequest

__all__ = [
    "MAX_TENSORS",
    "about_output",
    "apply_parameters",
    "check_count",
    "check_id",
    "check_model_name",
    "check_name",
    "check_output_parameters",
    "check_shape",
    "check_version",
    "parse_datatype",
    "refuse_shared_memory",
    "timeout_s_or_none",
]

MAX_TENSORS = 1024
"""Inputs, and outputs, that one request may name; outputs that one answer may hold."""

_MAX_NAME = 256
_MAX_ID = 1024
_MAX_AXES = 32
_MAX_SIZE = 2**63 - 1
_DATATYPES = {datatype.value: datatype for datatype in Datatype}
_SHARED_MEMORY = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


def check_id(value: Any) -> str:
    """The request's id; null means none.

    Source: Open Inference Protocol v2: a string. JSON can write half a surrogate pair, which no
    answer could echo.

    Raises:
        InvalidInput: Not a string, over 1024 characters, or not valid Unicode.
    """
    if value is None:
        return ""
    if type(value) is not str:
        raise InvalidInput(f"id is {describe_value(value)}, allowed is a string")
    if len(value) > _MAX_ID:
        raise InvalidInput(f"id has {len(value)} characters, allowed are at most {_MAX_ID}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInput("id holds half of a surrogate pair, allowed is Unicode") from None
    return value


def check_model_name(value: Any) -> str:
    """The name of the model that an answer says it is from.

    Raises:
        InvalidInput: Missing, empty, or not a string.
    """
    if type(value) is not str or not value:
        given = _given(None if value == "" else value)
        raise InvalidInput(f"model_name is {given}, allowed is a model's name")
    return value


def check_version(value: Any) -> str:
    """The version that an answer says it is from; null means that it does not say.

    Raises:
        InvalidInput: Not a string.
    """
    if value is None:
        return ""
    if type(value) is not str:
        raise InvalidInput(f"model_version is {describe_value(value)}, allowed is a string")
    return value


def check_name(where: str, value: Any, taken: Collection[str]) -> str:
    """A tensor's name.

    Args:
        where: As in `inputs[0]`.
        value: What came as the name.
        taken: Names that came before.

    Raises:
        InvalidInput: No string, empty, over 256 characters, or taken.
    """
    if type(value) is not str:
        raise InvalidInput(f"{where}.name is {_given(value)}, allowed is a string")
    if not value or len(value) > _MAX_NAME:
        raise InvalidInput(
            f"{where}.name has {len(value)} characters, allowed are 1 to {_MAX_NAME}"
        )
    if value in taken:
        raise InvalidInput(f"{where}.name is {value!r} again, allowed is each name once")
    return value


def parse_datatype(where: str, value: Any) -> Datatype:
    """A datatype from its name.

    Raises:
        InvalidInput: Not one of the protocol's; names a near miss.
    """
    found = _DATATYPES.get(value) if type(value) is str else None
    if found is None:
        near = suggest(value[:16].upper(), _DATATYPES) if type(value) is str else ""
        raise InvalidInput(
            f"{where}.datatype is {_given(value)}.{near} Allowed: {', '.join(_DATATYPES)}"
        )
    return found


def check_shape(where: str, value: Any) -> tuple[int, ...]:
    """A shape from a list of sizes; nothing is allocated for it.

    Raises:
        InvalidInput: Not a list, too many axes, a size that is not a whole number from 0 (true
            is none) or that no array can have.
    """
    if type(value) is not list:
        raise InvalidInput(f"{where}.shape is {_given(value)}, allowed is a list of whole numbers")
    if len(value) > _MAX_AXES:
        raise InvalidInput(f"{where}.shape has {len(value)} axes, allowed are at most {_MAX_AXES}")
    for axis, size in enumerate(value):
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise InvalidInput(
                f"{where}.shape[{axis}] is {describe_value(size)}, "
                f"allowed is a whole number from 0 to {_MAX_SIZE}"
            )
    return tuple(value)


def check_count(where: str, shape: tuple[int, ...]) -> int:
    """The number of elements that a checked shape stands for.

    Raises:
        InvalidInput: More than any array has, also along the other axes where one is 0.
    """
    count = math.prod(shape)
    whole = count or math.prod(size for size in shape if size)
    # Half of the range: numpy counts bytes, and none of the datatypes is wider than 8.
    if whole > _MAX_SIZE >> 3:
        raise InvalidInput(
            f"{where}.shape {list(shape)} stands for more elements than an array can have"
        )
    return count


def refuse_shared_memory(where: str, parameters: Collection[str]) -> None:
    """Refuses a tensor that lies in shared memory.

    Raises:
        Unsupported: It does.
    """
    for name in _SHARED_MEMORY:
        if name in parameters:
            raise Unsupported(
                f"{where}.parameters.{name}: rayprism does not offer shared memory; "
                "send the tensor itself"
            )


def check_output_parameters(where: str, parameters: Mapping[str, Any], default: bool) -> bool:
    """The parameters of a requested output.

    Args:
        where: As in `outputs[0]`.
        parameters: As they came.
        default: Whether outputs are binary that do not say.

    Returns:
        Whether it is wanted as binary tensor data.

    Raises:
        InvalidInput: `binary_data` is not true or false.
        Unsupported: Shared memory or classification.
    """
    refuse_shared_memory(where, parameters)
    if "classification" in parameters:
        raise Unsupported(
            f"{where}.parameters.classification: rayprism does not offer classification; "
            "ask for the output itself and take its largest values"
        )
    binary = parameters.get("binary_data", default)
    if type(binary) is not bool:
        raise InvalidInput(
            f"{where}.parameters.binary_data is {describe_value(binary)}, "
            "allowed are true and false"
        )
    return binary


def apply_parameters(request: InferRequest, parameters: Mapping[str, Any]) -> None:
    """Reads the parameters of a request into it.

    Source: Triton's schedule-policy and sequence extensions. `timeout` is in microseconds, 0 means
    none; `priority` runs from 1, 0 means the default.

    Raises:
        InvalidInput: One has a value that it cannot have.
        Unsupported: The request belongs to a sequence.
    """
    for name, value in parameters.items():
        if name == "binary_data_output":
            if type(value) is not bool:
                raise _wrong_parameter(name, value, "true or false")
            request.binary_by_default = value
        elif name == "timeout":
            request.timeout_s = _timeout_s(value)
        elif name == "priority":
            request.priority = _whole_number(name, value, "from 0")
        elif name in ("sequence_id", "sequence_start", "sequence_end"):
            if value not in (0, ""):  # 0 is also false
                raise Unsupported(
                    f"parameters.{name}: rayprism does not offer sequences; send every request "
                    "with all that the model needs"
                )
        elif type(value) in (str, int, float, bool):
            request.parameters[name] = value
        else:
            raise _wrong_parameter(name, value, "a string, a number, true or false")


def timeout_s_or_none(value: Any) -> float | None:
    """The parameter `timeout` of a request in seconds; None where it means none, or is faulty."""
    try:
        return _timeout_s(value)
    except InvalidInput:
        return None


def about_output(error: RequestError) -> InvalidInput:
    """What is wrong with an answer, from what the decoders that it shares with requests say.

    Those speak of inputs, and some faults are a request's own kind, which no answer has.
    """
    message = str(error)
    if message.startswith("input "):
        message = f"output {message.removeprefix('input ')}"
    return InvalidInput(message)


def _timeout_s(value: Any) -> float | None:
    timeout_us = _whole_number("timeout", value, "microseconds from 0")
    return timeout_us / 1e6 if timeout_us else None


def _whole_number(name: str, value: Any, allowed: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise _wrong_parameter(name, value, f"a whole number {allowed}")
    return value


def _wrong_parameter(name: str, value: Any, allowed: str) -> InvalidInput:
    return InvalidInput(f"parameters.{name[:64]} is {describe_value(value)}, allowed is {allowed}")


def _given(value: Any) -> str:
    return "missing" if value is None else describe_value(value)
