"""What a column of labels, or of values to group by, says of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayprism.core.tensors import Array
from rayprism.errors import ConfigInvalid, Fault
from rayprism.offline.evaluation_spec import EvaluationSpec, class_text
from rayprism.offline.rows import Mask

__all__ = ["ClassTable", "SegmentTable", "read_numbers"]

_MOST_CLASSES = 10_000
_MOST_NAMED = 5
_TRUE, _FALSE = ("true", "1"), ("false", "0")


class ClassTable:
    """Which value is which class, as a number from 0.

    Args:
        column: With the labels.
        codes: What is known of the values.
        texts: The name of each class.
        room: Classes that may still be found in the rows; None: any number.
        positive_place: Of scores of two classes: that of the positive one.
    """

    def __init__(
        self,
        column: str,
        codes: dict[str, int],
        texts: list[str],
        room: int | None,
        positive_place: int = 1,
    ) -> None:
        self.texts = texts
        self.positive_place = positive_place
        self._column = column
        self._codes = codes
        self._room = _MOST_CLASSES if room is None else room
        self._pending = False

    @classmethod
    def of(cls, spec: EvaluationSpec, kind: str, width: int | None) -> ClassTable:
        """What the evaluation says of classes.

        Args:
            spec: The evaluation.
            kind: Of the prediction.
            width: Of scores, where it is known.
        """
        classes = [class_text(value) for value in spec.classes or ()]
        if spec.task == "binary":
            return _binary(spec, classes)
        if classes:
            return cls(spec.label, {text: n for n, text in enumerate(classes)}, classes, 0)
        table = cls(spec.label, {}, [], None)
        if kind == "scores":
            table._pending = True
            if width is not None:
                table.settle(width)
        return table

    def settle(self, width: int) -> None:
        """Says how many classes there are, where nothing else did: they are 0, 1, 2 and so on."""
        if self._pending:
            self.texts = [str(number) for number in range(width)]
            self._codes = {text: number for number, text in enumerate(self.texts)}
            self._room, self._pending = 0, False

    def codes(self, column: pa.ChunkedArray, *, predicted: bool = False) -> Array:
        """The class of each row; -1 where it is null. Shapes: returns `[rows] int32`.

        Args:
            column: Labels, or classes that a version predicted.
            predicted: Whether the latter.

        Raises:
            ConfigInvalid: Values that are no class.
        """
        indices, values = _encode(column)
        table = np.full(len(values) + 1, -1, np.int32)
        odd = []
        for place, value in enumerate(values):
            if value is None or value != value:
                continue
            text = class_text(value)
            code = self._codes.get(text)
            if code is None and self._room > 0:
                code = self._codes[text] = len(self.texts)
                self.texts.append(text)
                self._room -= 1
            if code is None:
                odd.append(value)
            else:
                table[place] = code
        if odd:
            raise self._fits_none(odd, predicted)
        return np.asarray(table[indices])

    def _fits_none(self, odd: Sequence[Any], predicted: bool) -> ConfigInvalid:
        shown = ", ".join(repr(value) for value in odd[:_MOST_NAMED])
        more = f" and {len(odd) - _MOST_NAMED} more values" if len(odd) > _MOST_NAMED else ""
        what = "a version predicted" if predicted else f"column {self._column!r} holds"
        allowed = ", ".join(list(self._codes)[:_MOST_NAMED])
        if len(self._codes) > _MOST_NAMED:
            allowed += f" and {len(self._codes) - _MOST_NAMED} more"
        message = (
            f"{what} {shown}{more}: no class. Allowed: {allowed}. Mend: name the label of positive "
            "rows with positive, or the classes with classes, or leave these rows out of the "
            "input. What is predicted already is kept"
        )
        return ConfigInvalid("evaluation", [Fault("label", message)])


def _binary(spec: EvaluationSpec, classes: list[str]) -> ClassTable:
    positive = class_text(spec.positive) if spec.positive is not None else None
    if positive in (None, *_TRUE, *_FALSE) and not classes:
        true = positive not in _FALSE
        codes = {**dict.fromkeys(_TRUE, int(true)), **dict.fromkeys(_FALSE, int(not true))}
        return ClassTable(
            spec.label, codes, ["false", "true"] if true else ["true", "false"], 0, int(true)
        )
    if not classes:
        # The other value is the one that comes; a third one fits nothing.
        assert positive is not None
        return _OneOther(spec.label, {positive: 1}, ["(other)", positive], 1)
    if positive is None:
        positive = next((text for text in classes if text in _TRUE), classes[1])
    negative = next(text for text in classes if text != positive)
    codes = {negative: 0, positive: 1}
    return ClassTable(spec.label, codes, [negative, positive], 0, classes.index(positive))


class _OneOther(ClassTable):
    """One class is known; the other one is any other value, as long as it is always the same."""

    def codes(self, column: pa.ChunkedArray, *, predicted: bool = False) -> Array:
        """See `ClassTable.codes`."""
        if len(self._codes) == 1:
            for value in _encode(column)[1]:
                missing = value is None or value != value
                if not missing and class_text(value) not in self._codes:
                    self.texts[0] = class_text(value)
                    self._codes[self.texts[0]] = 0
                    break
        self._room = 0
        return super().codes(column, predicted=predicted)


class SegmentTable:
    """The values of a column that rows are grouped by.

    Args:
        column: Its name.
        path: Where it was named.
    """

    def __init__(self, column: str, path: str) -> None:
        self.column = column
        self.values: list[str | None] = []
        self._path = path
        self._codes: dict[str | None, int] = {}

    def codes(self, column: pa.ChunkedArray) -> Array:
        """The value of each row as a number. Shapes: returns `[rows] int16`.

        Raises:
            ConfigInvalid: Too many values.
        """
        indices, values = _encode(column)
        table = np.empty(len(values) + 1, np.int16)
        for place, value in enumerate([*values, None]):
            text = None if value is None or value != value else class_text(value)
            code = self._codes.get(text)
            if code is None:
                if len(self.values) == _MOST_CLASSES:
                    message = (
                        f"column {self.column!r} has more than {_MOST_CLASSES:,} values. Mend: "
                        "take one with fewer, as a month instead of a time"
                    )
                    raise ConfigInvalid("evaluation", [Fault(self._path, message)])
                code = self._codes[text] = len(self.values)
                self.values.append(text)
            table[place] = code
        return np.asarray(table[indices])


def read_numbers(column: pa.ChunkedArray, name: str) -> tuple[Array, Mask]:
    """Labels that are numbers, and which rows have one: not null, NaN or infinite.

    Raises:
        ConfigInvalid: Values that are no numbers.
    """
    try:
        values = column.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowException as error:
        message = f"column {name!r} is {column.type}, needed are numbers: {error}"
        raise ConfigInvalid("evaluation", [Fault("label", message)]) from None
    known = np.isfinite(values)
    return np.where(known, values, 0.0), known


def _encode(column: pa.ChunkedArray) -> tuple[Array, list[Any]]:
    """Indices into the different values, -1 for null: the place after the last one."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return indices, array.dictionary.to_pylist()
