"""Whether two answers of a model agree, by the rule that its manifest names.

Used for golden examples, for shadow traffic and for online/offline parity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayprism.core.tensors import Array

__all__ = ["Difference", "Tolerance", "compare_outputs"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """When two outputs count as equal.

    Args:
        rule: `close` (within `absolute + relative * |expected|`, element by element), `exact`,
            `top1` (the same index of the largest value along the last axis), or `cosine` (cosine
            similarity along the last axis at least `cosine`). Outputs that are not floats are
            always compared exactly, except under `top1`.
        absolute: For `close`.
        relative: For `close`, as a share of the expected value.
        cosine: For `cosine`, from 0 to 1.

    Source: `close` is the rule of `numpy.isclose`.
    """

    rule: Literal["close", "exact", "top1", "cosine"] = "close"
    absolute: float = 1e-5
    relative: float = 1e-4
    cosine: float = 0.999

    def __post_init__(self) -> None:
        if self.absolute < 0 or self.relative < 0:
            raise ValueError("absolute and relative tolerance: 0 or more")
        if not 0 <= self.cosine <= 1:
            raise ValueError(f"cosine {self.cosine}: from 0 to 1")


@dataclass(frozen=True, slots=True)
class Difference:
    """How one output differs.

    Args:
        output: Its name.
        message: What was expected, what was got.
    """

    output: str
    message: str

    def __str__(self) -> str:
        return f"output {self.output!r}: {self.message}"


def compare_outputs(
    expected: Mapping[str, Array], actual: Mapping[str, Array], tolerance: Tolerance
) -> list[Difference]:
    """The outputs that disagree; empty where all agree. Extra outputs in `actual` are ignored."""
    differences = []
    for name, want in expected.items():
        got = actual.get(name)
        if got is None:
            differences.append(Difference(name, "it is missing"))
            continue
        message = _disagreement(want, got, tolerance)
        if message:
            differences.append(Difference(name, message))
    return differences


def _disagreement(want: Array, got: Array, tolerance: Tolerance) -> str:
    if want.shape != got.shape:
        return f"shape is {list(got.shape)}, expected {list(want.shape)}"
    if want.dtype != got.dtype:
        return f"datatype is {got.dtype}, expected {want.dtype}"
    if want.size == 0:
        return ""
    # ml_dtypes register bfloat16 as kind "V" in numpy's eyes, so floats are told by conversion.
    floats = want.dtype.kind not in "biuOSU"
    if tolerance.rule == "top1" and want.dtype.kind != "O":
        return _top1_disagreement(want, got)
    if not floats or tolerance.rule == "exact":
        return _exact_disagreement(want, got)
    wide_want, wide_got = want.astype(np.float64), got.astype(np.float64)
    if tolerance.rule == "cosine":
        return _cosine_disagreement(wide_want, wide_got, tolerance.cosine)
    close = np.isclose(
        wide_got, wide_want, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=True
    )
    if close.all():
        return ""
    worst = int(np.argmax(np.where(close, -1.0, np.nan_to_num(np.abs(wide_got - wide_want)))))
    return (
        f"{int((~close).sum())} of {close.size} values are off; the worst, at "
        f"{_position(worst, want.shape)}, is {wide_got.flat[worst]:.8g}, expected "
        f"{wide_want.flat[worst]:.8g} (absolute {tolerance.absolute:g}, "
        f"relative {tolerance.relative:g})"
    )


def _exact_disagreement(want: Array, got: Array) -> str:
    equal = np.asarray(want == got)
    if want.dtype.kind not in "biuOSU":
        equal |= np.isnan(want.astype(np.float64)) & np.isnan(got.astype(np.float64))
    if equal.all():
        return ""
    first = int(np.argmax(~equal))
    return (
        f"{int((~equal).sum())} of {equal.size} values differ; the first, at "
        f"{_position(first, want.shape)}, is {got.flat[first]!r}, expected {want.flat[first]!r}"
    )


def _top1_disagreement(want: Array, got: Array) -> str:
    differs = np.atleast_1d(np.argmax(want, axis=-1) != np.argmax(got, axis=-1))
    if not differs.any():
        return ""
    return f"the largest value is at another index in {int(differs.sum())} of {differs.size} rows"


def _cosine_disagreement(want: Array, got: Array, least: float) -> str:
    # Rows that are the same agree, also where they hold NaN, infinities, or nothing but zeros.
    same = np.all((want == got) | (np.isnan(want) & np.isnan(got)), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(want, axis=-1) * np.linalg.norm(got, axis=-1)
        similarity = np.sum(want * got, axis=-1) / norms
    # What has no direction (a zero vector, NaN, infinity) agrees with nothing else.
    similarity = np.where(same, 1.0, np.nan_to_num(similarity, nan=0.0, posinf=0.0, neginf=0.0))
    worst = float(np.min(similarity))
    if worst >= least:
        return ""
    return f"cosine similarity is {worst:.6f}, allowed is at least {least:g}"


def _position(flat: int, shape: tuple[int, ...]) -> list[int]:
    return [int(index) for index in np.unravel_index(flat, shape)]
