"""A model's outputs as columns. Types follow from the manifest alone: all parts have one schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rayprism.core.tensors import Array, Datatype, TensorSpec, numpy_dtype
from rayprism.models.manifest import Manifest
from rayprism.offline.rows import RaggedRows, Rows, RowTensors

__all__ = ["MODEL_COLUMNS", "inner_shape", "output_fields", "output_table"]

MODEL_COLUMNS = ("model", "model_version", "model_digest")
"""Columns that say what a row was predicted with."""

_NAME = pa.dictionary(pa.int32(), pa.string())
# Many readers of Parquet do not know narrower floats; these lose nothing on the way.
_WIDENED = (Datatype.FP16, Datatype.BF16)


def inner_shape(spec: TensorSpec, batched: bool) -> tuple[int, ...]:
    """The shape of one row of a tensor; -1: free."""
    return spec.shape[1:] if batched else spec.shape


def output_fields(manifest: Manifest, prefix: str = "") -> list[Any]:
    """The columns that the output has beside those that are copied: `pyarrow.Field`s.

    An output of one value a row is a column of it; others are lists, of a fixed size where the
    manifest tells it. FP16 and BF16 become float, BYTES become text.

    Args:
        manifest: Of the model.
        prefix: Of the names of columns with predictions.
    """
    fields = [
        pa.field(prefix + spec.name, _column_type(_dims(spec, manifest), spec.datatype))
        for spec in manifest.outputs
    ]
    return [*fields, *(pa.field(name, _NAME) for name in MODEL_COLUMNS)]


def output_table(
    outputs: RowTensors, manifest: Manifest, passthrough: Any, prefix: str = ""
) -> Any:
    """Predictions beside the columns that are copied.

    Args:
        outputs: The rows that have a prediction. NaN stays NaN, and is not null.
        manifest: Of the model; `outputs` has what it names.
        passthrough: `pyarrow.Table` of the same rows, maybe without columns.
        prefix: Of the names of columns with predictions.

    Returns:
        `pyarrow.Table`.

    Raises:
        ValueError: Numbers of rows that differ.
    """
    rows = len(outputs[manifest.outputs[0].name])
    if passthrough.num_columns and passthrough.num_rows != rows:
        raise ValueError(f"{passthrough.num_rows} rows to copy, {rows} predictions")
    fields = [field.remove_metadata() for field in passthrough.schema]
    arrays = list(passthrough.columns)
    for spec in manifest.outputs:
        arrays.append(_column(outputs[spec.name], spec.datatype, _dims(spec, manifest)))
    for value in (manifest.model, str(manifest.version), manifest.digest):
        indices = pa.array(np.zeros(rows, np.int32))
        arrays.append(pa.DictionaryArray.from_arrays(indices, pa.array([value])))
    # What a schema says beside its fields (pandas' index) would be wrong of other columns.
    return pa.Table.from_arrays(
        arrays, schema=pa.schema([*fields, *output_fields(manifest, prefix)])
    )


def _dims(spec: TensorSpec, manifest: Manifest) -> tuple[int, ...]:
    batching = manifest.batching
    dims = list(inner_shape(spec, batching.batched))
    cut = batching.ragged_outputs.get(spec.name)
    if cut is not None:
        dims[cut - 1] = -1
    return () if dims == [1] else tuple(dims)


def _column_type(dims: tuple[int, ...], datatype: Datatype) -> Any:
    kind = _value_type(datatype)
    for size in reversed(dims):
        kind = pa.list_(kind, size)
    return kind


def _value_type(datatype: Datatype) -> Any:
    if datatype is Datatype.BYTES:
        return pa.string()
    if datatype in _WIDENED:
        return pa.float32()
    return pa.from_numpy_dtype(numpy_dtype(datatype))


def _column(output: Array | RaggedRows, datatype: Datatype, dims: tuple[int, ...]) -> Any:
    if isinstance(output, RaggedRows):
        values, shapes = output.values, output.shapes
    else:
        values = output.ravel()
        shapes = np.broadcast_to(
            np.array(output.shape[1:], np.int64), (len(output), output.ndim - 1)
        )
    if datatype is Datatype.BYTES:
        array = pa.array(values, pa.binary()).cast(pa.string())
    elif datatype in _WIDENED:
        array = pa.array(values.astype(np.float32))
    else:
        array = pa.array(values)
    for axis in reversed(range(len(dims))):
        if dims[axis] != -1:
            array = pa.FixedSizeListArray.from_arrays(array, dims[axis])
        else:
            array = pa.ListArray.from_arrays(_offsets(shapes, axis), array)
    return array


def _offsets(shapes: Rows, axis: int) -> Any:
    """Where the lists of one axis begin and end."""
    lengths = np.repeat(shapes[:, axis], shapes[:, :axis].prod(axis=1))
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)
