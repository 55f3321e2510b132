"""Small real models for tests: built in milliseconds, run in microseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FEATURES = 4
OUTPUTS = 3


def mlp_weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights of a two-layer perceptron: FEATURES -> 8 -> OUTPUTS."""
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((FEATURES, 8)).astype(np.float32),
        random.standard_normal(8).astype(np.float32),
        random.standard_normal((8, OUTPUTS)).astype(np.float32),
        random.standard_normal(OUTPUTS).astype(np.float32),
    )


def mlp_reference(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """What every MLP of this module answers."""
    w1, b1, w2, b2 = mlp_weights(seed)
    return np.maximum(x @ w1 + b1, 0) @ w2 + b2


def example_rows(rows: int = 3) -> np.ndarray:
    """Different rows for the MLP. Shapes: `[rows, FEATURES] float32`."""
    return np.random.default_rng(1).standard_normal((rows, FEATURES)).astype(np.float32)


def mlp_example(rows: int = 3) -> dict[str, Any]:
    """The rows as a protocol request."""
    x = example_rows(rows)
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
        ]
    }


def save_onnx(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    initializers: list[Any] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: list[Any] | None = None,
    imports: list[Any] | None = None,
) -> Path:
    """Writes an ONNX model of the given nodes."""
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers or [])
    model = helper.make_model(
        graph,
        opset_imports=imports or [helper.make_opsetid("", opset)],
        ir_version=ir_version,
        functions=functions or [],
    )
    onnx.save(model, str(path))
    return path


def save_mlp(path: Path, *, seed: int = 0, batch: int | str = "batch") -> Path:
    """The MLP as ONNX: input `x`, output `y`."""
    from onnx import TensorProto, helper, numpy_helper

    w1, b1, w2, b2 = mlp_weights(seed)
    return save_onnx(
        path,
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, OUTPUTS])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
        ],
    )
