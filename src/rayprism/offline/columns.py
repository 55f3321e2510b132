"""Columns of a table as the inputs of a model, and its outputs as columns.

What can be known from the schema is said before any work (`ColumnMap.plan`); what only a value can
show is a fault of its row. How values are cast is told in `rayprism.offline.casts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from rayprism.core.tensors import Array, TensorSpec, numpy_dtype, suggest
from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.manifest import Manifest
from rayprism.offline.casts import CastFault, cast_values, plain_type, why_not
from rayprism.offline.lists import is_list, read_lists, unnest_type
from rayprism.offline.outputs import inner_shape, output_fields, output_table
from rayprism.offline.rows import Faults, Mask, RaggedRows, RowFault, RowTensors

__all__ = ["ColumnMap", "Mapped"]

_MOST_NAMES = 20


@dataclass(frozen=True, slots=True)
class Mapped:
    """The good rows of a table as tensors.

    Args:
        tensors: The good rows only, in their order. Where the model is not batched, axis 0 is
            still the row. Arrays may be read-only views of the table's memory.
        ok: Which rows of the table are good. Shape: `[rows of the table]`.
        reasons: Of the other rows, by their index in the table.
    """

    tensors: RowTensors
    ok: Mask
    reasons: dict[int, RowFault]


@dataclass(frozen=True, slots=True)
class _Input:
    """Where one input comes from.

    Args:
        spec: The input.
        inner: The shape of a row.
        columns: One, or one for each value of a row.
        stacked: Whether it is made of columns with one value each, even if of one such.
    """

    spec: TensorSpec
    inner: tuple[int, ...]
    columns: tuple[str, ...]
    stacked: bool

    def read(self, table: Any, faults: Faults, as_text: bool) -> Array | RaggedRows:
        """All rows; where one is at fault, any values."""
        if self.stacked:
            return self._stack(table, faults, as_text)
        (column,) = self.columns
        array = _whole(table, column)
        if not is_list(plain_type(array.type)):
            return self._scalars(array, column, faults, as_text).reshape(len(array), *self.inner)
        sizes, _ = unnest_type(array.type)
        where = f"column {column!r}"
        if len(sizes) == len(self.inner):
            return read_lists(array, self.spec, self.inner, faults, where)
        flat = read_lists(array, self.spec, (math.prod(self.inner),), faults, where)
        assert isinstance(flat, np.ndarray), "a fixed size gives rows of one shape"
        return flat.reshape(len(array), *self.inner)

    def _scalars(self, array: Any, column: str, faults: Faults, as_text: bool) -> Array:
        cast = cast_values(array, self.spec, as_text=as_text)
        for fault in cast.faults:
            faults.add(fault.places, fault.code, partial(_told, column, fault))
        return cast.values

    def _stack(self, table: Any, faults: Faults, as_text: bool) -> Array:
        count = len(self.columns)
        out = np.empty((table.num_rows, count), numpy_dtype(self.spec.datatype))
        for index, column in enumerate(self.columns):
            out[:, index] = self._scalars(_whole(table, column), column, faults, as_text)
        inner = (count,) if -1 in self.inner else self.inner
        return out.reshape(table.num_rows, *inner)


def _told(column: str, fault: CastFault, index: int) -> str:
    return f"column {column!r}: {fault.reason(index)}"


def _whole(table: Any, column: str) -> Any:
    chunks = table.column(column)
    return chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Which columns go into a model, and which come out. Made with `ColumnMap.plan`.

    Args:
        manifest: Of the model.
        needed: The columns that have to be read, those to be copied included, each once.
        passthrough: The columns that are copied to the output.
        prefix: Of the names of columns with predictions.
    """

    manifest: Manifest
    needed: tuple[str, ...]
    passthrough: tuple[str, ...]
    prefix: str
    _inputs: tuple[_Input, ...]
    _schema: Any

    @classmethod
    def plan(
        cls,
        schema: Any,
        manifest: Manifest,
        *,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        passthrough: Sequence[str] = (),
        prefix: str = "",
        added: Sequence[str] = (),
        uncopied: Sequence[str] = (),
        source: str = "job",
    ) -> ColumnMap:
        """Maps the columns of a data set.

        Args:
            schema: `pyarrow.Schema` of the input.
            manifest: Of the model.
            columns: Input of the model to column, or to a list of columns that hold one value of
                the row each; by default the column of the same name. A list of one column of lists
                is that column.
            passthrough: Columns to copy; `*`: all.
            prefix: Of the names of columns with predictions.
            added: Columns that the job itself adds to the output.
            uncopied: Columns that are for the model only, as pixels: not among `*`.
            source: What the mapping was read from, for messages.

        Raises:
            ConfigInvalid: Every fault at once: columns that are missing, or of a type or shape
                that cannot be cast; inputs that the model has not; columns that would be twice in
                the output.
        """
        columns = columns or {}
        every = [name for name in schema.names if name not in uncopied]
        copied = tuple(dict.fromkeys(every if "*" in passthrough else passthrough))
        inputs = tuple(_plan_input(spec, manifest, columns, schema) for spec in manifest.inputs)
        faults = [
            *_unknown_inputs(columns, manifest),
            *(
                Fault(f"input.columns.{item.spec.name}", problem)
                for item in inputs
                for problem in _input_problems(item, schema)
            ),
            *(
                Fault("output.passthrough", f"column {name!r} is for the model and is not copied")
                for name in copied
                if name in uncopied
            ),
            *_output_faults(schema, manifest, copied, added, prefix),
        ]
        if faults:
            raise ConfigInvalid(source, faults)
        needed = dict.fromkeys([*(name for item in inputs for name in item.columns), *copied])
        return cls(manifest, tuple(needed), copied, prefix, inputs, schema)

    def tensors(self, table: Any, *, as_text: bool = False) -> Mapped:
        """The good rows of a table as tensors.

        Without a fault, numbers of the right type in columns without nulls, or in lists, are
        views of the table's memory.

        Args:
            table: `pyarrow.Table` or `pyarrow.RecordBatch` with the columns that are needed, of
                the types that were planned, or of others that can be cast as well.
            as_text: Whether columns of text stay `str` where the input is BYTES.

        Raises:
            ConfigInvalid: A column is missing, or of a type that cannot be cast.
        """
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        table = self._with_types(table)
        faults = Faults(table.num_rows)
        tensors: RowTensors = {}
        for item in self._inputs:
            problems = _input_problems(item, table.schema)
            if problems:
                where = f"input.columns.{item.spec.name}"
                raise ConfigInvalid("input", [Fault(where, problem) for problem in problems])
            tensors[item.spec.name] = item.read(table, faults, as_text)
        for name, rows in tensors.items():
            if faults.reasons:
                rows = rows[faults.ok] if isinstance(rows, np.ndarray) else rows.take(faults.ok)
            tensors[name] = rows if isinstance(rows, np.ndarray) else rows.simplify()
        return Mapped(tensors, faults.ok, dict(sorted(faults.reasons.items())))

    def _with_types(self, table: Any) -> Any:
        """Gives columns the planned type that have none, as they hold nothing but nulls."""
        for index, field in enumerate(table.schema):
            planned = self._schema.get_field_index(field.name)
            if pa.types.is_null(field.type) and planned != -1:
                nulls = pa.nulls(table.num_rows, self._schema.field(planned).type)
                table = table.set_column(index, field.name, nulls)
        return table

    def output_table(self, outputs: RowTensors, passthrough: Any) -> Any:
        """See `rayprism.offline.outputs.output_table`."""
        return output_table(outputs, self.manifest, passthrough, self.prefix)


def _plan_input(
    spec: TensorSpec, manifest: Manifest, columns: Mapping[str, str | Sequence[str]], schema: Any
) -> _Input:
    mapped = columns.get(spec.name, spec.name)
    inner = inner_shape(spec, manifest.batching.batched)
    if isinstance(mapped, str):
        return _Input(spec, inner, (mapped,), stacked=False)
    if len(mapped) == 1 and schema.names.count(mapped[0]) == 1:
        stacked = not is_list(plain_type(schema.field(mapped[0]).type))
        return _Input(spec, inner, tuple(mapped), stacked)
    return _Input(spec, inner, tuple(mapped), stacked=True)


def _unknown_inputs(columns: Mapping[str, Any], manifest: Manifest) -> list[Fault]:
    names = [spec.name for spec in manifest.inputs]
    return [
        Fault(
            f"input.columns.{name}",
            f"{manifest.model} {manifest.version} has no input {name!r}.{suggest(name, names)} "
            f"Its inputs: {', '.join(names)}",
        )
        for name in columns
        if name not in names
    ]


def _input_problems(item: _Input, schema: Any) -> list[str]:
    """What keeps an input from being read from columns of these types."""
    if not item.columns:
        return ["no column is named, allowed are a column or a list of columns"]
    problems = []
    for column in item.columns:
        problem = _column_fault(column, schema)
        if problem:
            problems.append(problem)
            continue
        kind = schema.field(column).type
        reason = _type_fault(item, kind)
        if reason:
            problems.append(
                f"column {column!r} is {kind}, the input is {item.spec.datatype} with rows of "
                f"shape {list(item.inner)} (-1: any size): {reason}"
            )
    return list(dict.fromkeys(problems))


def _column_fault(column: str, schema: Any) -> str:
    count = schema.names.count(column)
    if count == 1:
        return ""
    if count:
        return f"column {column!r} is there {count} times: rename all but one of them"
    names = ", ".join(schema.names[:_MOST_NAMES])
    more = len(schema.names) - _MOST_NAMES
    return (
        f"column {column!r} is missing.{suggest(column, schema.names)} There are: {names}"
        f"{f' and {more} more' if more > 0 else ''}"
    )


def _type_fault(item: _Input, kind: Any) -> str:
    sizes, leaf = unnest_type(kind)
    reason = why_not(leaf, item.spec.datatype)
    if reason:
        return reason
    inner = item.inner
    fixed = -1 not in inner
    size = math.prod(inner)
    if item.stacked:
        count = len(item.columns)
        if sizes:
            return "one of several columns for one input holds one number, and no list"
        if not inner or (fixed and size != count) or (not fixed and len(inner) > 1):
            needed = size if fixed else "a single"
            return f"a row cannot be made of {count} columns: name {needed} column(s)"
        return ""
    if not sizes:
        if fixed and size == 1:
            return ""
        return "a row needs a list: map the input to a list column, or to a list of columns"
    if len(sizes) == len(inner):
        pairs = zip(sizes, inner, strict=True)
        wrong = any(have not in (-1, needed) for have, needed in pairs if needed != -1)
    else:
        wrong = len(sizes) != 1 or not fixed or not inner or sizes[0] not in (-1, size)
    return "the lists do not have this shape" if wrong else ""


def _output_faults(
    schema: Any, manifest: Manifest, copied: Sequence[str], added: Sequence[str], prefix: str
) -> list[Fault]:
    where = "output.passthrough"
    missing = [_column_fault(name, schema) for name in copied]
    faults = [Fault(where, problem) for problem in missing if problem]
    made = [field.name for field in output_fields(manifest, prefix)]
    taken = [*added, *made]
    for name in dict.fromkeys([*copied, *added]):
        if name in (taken if name in copied else made):
            faults.append(
                Fault(
                    where,
                    f"column {name!r} would be in the output twice: the job adds "
                    f"{', '.join(taken)}. Mend: leave it out of passthrough, or set output.prefix",
                )
            )
    return faults
