"""A model small enough that everything around it is what gets measured."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from bench import tiny_model
from bench.models.base import OnnxModel
from rayprism.core.tensors import Datatype, Tensors, TensorSpec

__all__ = ["TINY", "Tiny"]

_GROUP_ROWS = 131_072


class Tiny(OnnxModel):
    """A 30-32-1 perceptron: `bench.tiny_model`."""

    inputs = (TensorSpec(tiny_model.INPUT, Datatype.FP32, (-1, tiny_model.FEATURES)),)

    def content(self) -> bytes:
        """The ONNX file."""
        return _content()

    def example(self) -> Tensors:
        """One row."""
        return {tiny_model.INPUT: tiny_model.sample_row()}

    def requests(self, count: int, rows: int, seed: int) -> list[Tensors]:
        """With four decimals, so that JSON is as short as clients write it.

        Shapes: `features` `[rows, 30] float32`.
        """
        random = np.random.default_rng(seed)
        shape = (rows, tiny_model.FEATURES)
        return [
            {tiny_model.INPUT: np.round(random.normal(0.0, 1.0, shape), 4).astype(np.float32)}
            for _ in range(count)
        ]

    def job_input(self, rows: int, folder: Path) -> Path:
        """Writes rows of the kind that requests have, as lists of 30 in the column `features`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{rows}.parquet"
        if path.exists():
            return path
        column = pa.list_(pa.float32(), tiny_model.FEATURES)
        schema = pa.schema([pa.field(tiny_model.INPUT, column)])
        unfinished = path.with_suffix(".unfinished")
        random = np.random.default_rng(rows)
        with pq.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, rows, _GROUP_ROWS):
                size = (min(_GROUP_ROWS, rows - start), tiny_model.FEATURES)
                values = np.round(random.normal(0.0, 1.0, size), 4).astype(np.float32)
                lists = pa.FixedSizeListArray.from_arrays(values.ravel(), tiny_model.FEATURES)
                writer.write_table(pa.Table.from_arrays([lists], schema=schema))
        unfinished.replace(path)
        return path


@cache
def _content() -> bytes:
    with tempfile.TemporaryDirectory(prefix="bench-tiny-") as folder:
        path = Path(folder) / "tiny.onnx"
        tiny_model.write_onnx(path)
        return path.read_bytes()


TINY = Tiny(tiny_model.MODEL)
