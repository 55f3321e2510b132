"""Rows on their way through a model: those at fault, and those of different shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from rayprism.core.tensors import Array

__all__ = [
    "FaultCode",
    "Faults",
    "Mask",
    "RaggedRows",
    "RowFault",
    "RowTensors",
    "Rows",
    "merge_faults",
]

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class FaultCode(StrEnum):
    """Why a row never reached the model. Stable: programs may compare it.

    What the model or its pre-processing refused has the code of the error instead
    (`rayprism.errors`): `invalid_input`, `model_failed`.
    """

    MISSING = "missing_value"
    NAN = "nan_value"
    RANGE = "out_of_range"
    VALUE = "wrong_value"
    SHAPE = "wrong_shape"


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why a row has no prediction.

    Args:
        code: Stable.
        reason: For people: what was got, what is allowed.
    """

    code: str
    reason: str


class Faults:
    """The rows at fault among some. The first fault of a row is the one that is told.

    Args:
        rows: How many rows there are.
    """

    def __init__(self, rows: int) -> None:
        self.ok: Mask = np.ones(rows, np.bool_)
        """Which rows have no fault."""
        self.reasons: dict[int, RowFault] = {}
        """By index of the row."""

    def add(self, rows: Iterable[int], code: str, reason: Callable[[int], str]) -> None:
        """Marks rows.

        Args:
            rows: Indices; a row may come more than once.
            code: Of all of them.
            reason: Gets the place in `rows`, counted from 0.
        """
        for place, row in enumerate(rows):
            row = int(row)
            if row not in self.reasons:
                self.reasons[row] = RowFault(code, reason(place))
                self.ok[row] = False

    def update(self, other: Faults) -> None:
        """Takes over the faults of the same rows that something else found."""
        self.reasons = {**other.reasons, **self.reasons}
        self.ok &= other.ok


def merge_faults(
    ok: Mask,
    reasons: Mapping[int, RowFault],
    later_ok: Mask,
    later_reasons: Mapping[int, RowFault],
) -> tuple[Mask, dict[int, RowFault]]:
    """Joins the faults of two steps, where the second one saw only the good rows of the first.

    Args:
        ok: Of the first step, one for each row.
        reasons: By index of the row.
        later_ok: Of the second step, one for each row that was good.
        later_reasons: By index among the rows that were good.

    Returns:
        Both, one for each row of the first step; reasons in the order of the rows.
    """
    good = np.flatnonzero(ok)
    merged = np.zeros(len(ok), np.bool_)
    merged[good[later_ok]] = True
    found = {**reasons, **{int(good[index]): fault for index, fault in later_reasons.items()}}
    return merged, dict(sorted(found.items()))


class RaggedRows:
    """Rows of one tensor whose shapes differ, in one buffer.

    Args:
        values: The elements of all rows, one row after the other, each in row-major order.
            Shape: `[elements]`.
        shapes: The shape of each row without a row axis. Shape: `[rows, axes] int64`.
    """

    __slots__ = ("_starts", "shapes", "values")

    def __init__(self, values: Array, shapes: Rows) -> None:
        self.values = values
        self.shapes = shapes
        self._starts = np.zeros(len(shapes) + 1, np.int64)
        np.cumsum(shapes.prod(axis=1), out=self._starts[1:])

    @classmethod
    def from_arrays(cls, rows: Sequence[Array], dtype: np.dtype[np.generic]) -> RaggedRows:
        """Joins rows, given without a row axis, all with the same number of axes; at least one."""
        shapes = np.array([row.shape for row in rows], np.int64)
        values = np.concatenate([row.ravel() for row in rows]).astype(dtype, copy=False)
        return cls(values, shapes)

    def __len__(self) -> int:
        """Rows."""
        return len(self.shapes)

    def row(self, index: int) -> Array:
        """One row, as a view without a row axis."""
        start, stop = self._starts[index], self._starts[index + 1]
        return self.values[start:stop].reshape(self.shapes[index])

    def take(self, rows: Mask) -> RaggedRows:
        """The rows of a mask, as a copy."""
        return RaggedRows(self.values[np.repeat(rows, np.diff(self._starts))], self.shapes[rows])

    def stack(self, rows: Rows, padding: float = 0) -> Array:
        """Rows in one array, each padded at its ends to the longest.

        Args:
            rows: Which, in this order; at least one.
            padding: What to pad with; needed only where their shapes differ.
        """
        shapes = self.shapes[rows]
        longest = shapes.max(axis=0)
        dtype = self.values.dtype
        if (shapes == longest).all():
            return np.stack([self.row(row) for row in rows])
        out = np.full((len(rows), *longest), dtype.type(padding), dtype)
        for place, row in enumerate(rows):
            corner = tuple(slice(size) for size in self.shapes[row])
            out[place][corner] = self.row(row)
        return out

    def simplify(self) -> Array | RaggedRows:
        """A view as one array where all rows have the same shape."""
        if len(self) and (self.shapes == self.shapes[0]).all():
            return self.values.reshape((len(self), *self.shapes[0]))
        return self


RowTensors = dict[str, Array | RaggedRows]
"""Tensors by name, axis 0 the row, whether or not the model is batched."""
