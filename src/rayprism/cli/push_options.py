"""What the options of `rayprism models push` mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec, suggest
from rayprism.errors import ConfigInvalid
from rayprism.models.manifest import Batching, faults_of

__all__ = ["batching_of", "mapping_of", "specs_of", "tolerance_of"]


def batching_of(options: Mapping[str, Any]) -> Batching | None:
    """Hints for the scheduler, or None where no option asks for any.

    Raises:
        BadParameter: A --ragged is malformed.
        ConfigInvalid: They do not fit together.
    """
    values = {
        name: options[name]
        for name in ("max_rows", "max_cost", "max_delay_s", "execution")
        if options[name] is not None
    }
    ragged = dict(_ragged(text) for text in options["ragged"])
    if ragged:
        values["ragged"] = ragged
    if options["not_batched"]:
        values = {"max_rows": 1} | values | {"batched": False}
    if not values:
        return None
    try:
        return Batching(**values)
    except ValidationError as error:
        raise ConfigInvalid("the options for batching", faults_of(error)) from None


def _ragged(text: str) -> tuple[str, RaggedAxis]:
    name, axis, value = _three(text, "--ragged", "NAME:AXIS:VALUE, as in input_ids:1:0")
    try:
        return name, RaggedAxis(int(axis), float(value))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint="--ragged") from None


def tolerance_of(options: Mapping[str, Any]) -> Tolerance | None:
    """When the golden example counts as reproduced, or None where no option says so.

    Raises:
        BadParameter: A number is out of range.
    """
    values = {
        name: options[f"tolerance_{name}"]
        for name in ("rule", "absolute", "relative", "cosine")
        if options[f"tolerance_{name}"] is not None
    }
    try:
        return Tolerance(**values) if values else None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tolerance-...") from None


def specs_of(option: str, texts: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Tensor specs, as `NAME:DATATYPE:SHAPE`.

    Raises:
        BadParameter: One is malformed.
    """
    return tuple(_spec(option, text) for text in texts)


def _spec(option: str, text: str) -> TensorSpec:
    name, datatype, shape = _three(text, option, "NAME:DATATYPE:SHAPE, as in x:FP32:-1,30")
    if datatype not in list(Datatype):
        raise click.BadParameter(
            f"{text!r}: {datatype!r} is no datatype.{suggest(datatype.upper(), list(Datatype))} "
            f"Allowed: {', '.join(Datatype)}",
            param_hint=option,
        )
    try:
        sizes = tuple(int(size) for size in shape.strip("[]").split(",") if size.strip())
        return TensorSpec(name, Datatype(datatype), sizes)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint=option) from None


def _three(text: str, option: str, form: str) -> tuple[str, str, str]:
    # From the right: names of tensors may hold colons.
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not parts[0]:
        raise click.BadParameter(f"got {text!r}, allowed is {form}", param_hint=option)
    return parts[0], parts[1], parts[2]


def mapping_of(option: str, pairs: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """`KEY=VALUE` pairs over a JSON object from a file.

    Raises:
        BadParameter: A pair or the file is malformed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{file}: {error}", param_hint=f"{option}-file") from None
        if not isinstance(values, dict):
            raise click.BadParameter(f"{file}: not a JSON object", param_hint=f"{option}-file")
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"got {pair!r}, allowed is KEY=VALUE", param_hint=option)
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
