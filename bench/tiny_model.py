"""A model small enough that everything around it is what gets measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEATURES",
    "INPUT",
    "LANE_ANSWER",
    "MODEL",
    "OUTPUT",
    "expected",
    "infer_body",
    "infer_path",
    "push",
    "sample_row",
    "session_of",
    "write_onnx",
]

MODEL = "tiny"
INPUT, OUTPUT = "features", "score"
FEATURES, HIDDEN = 30, 32
LANE_ANSWER = "RAYPRISM_BENCH_ANSWER"
"""Environment variable of a replica: what `bench.peers.ray_serve.noop_lane` answers."""
_SEED = 20


def write_onnx(path: Path) -> None:
    """Writes a 30-32-1 perceptron: ReLU inside, sigmoid at the end, weights from a fixed seed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(_SEED)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        values = random.normal(0.0, 0.3, shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", [INPUT, "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], [OUTPUT]),
        ],
        MODEL,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["rows", FEATURES])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", 1])],
        [
            weights("w1", FEATURES, HIDDEN),
            weights("b1", HIDDEN),
            weights("w2", HIDDEN, 1),
            weights("b2", 1),
        ],
    )
    # The oldest versions that have all this: any runtime in use reads them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def session_of(path: Path | str) -> Any:
    """An ONNX Runtime session on one thread: what every server here runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sample_row() -> NDArray[np.float32]:
    """The row that every request holds. Shape: [1, 30] float32, four decimals."""
    values = np.random.default_rng(_SEED + 1).normal(0.0, 1.0, (1, FEATURES))
    return np.round(values, 4).astype(np.float32)


def infer_path(model: str) -> str:
    """Where the Open Inference Protocol takes requests for a model."""
    return f"/v2/models/{model}/infer"


def infer_body() -> bytes:
    """The Open Inference Protocol request that every server gets."""
    data = [round(float(value), 4) for value in sample_row()[0]]
    tensor = {"name": INPUT, "shape": [1, FEATURES], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def expected(path: Path) -> float:
    """The right answer to `infer_body`, from ONNX Runtime itself."""
    return float(session_of(path).run([OUTPUT], {INPUT: sample_row()})[0][0, 0])


def push(model_file: Path, repository: Path, *, versions: int = 1) -> None:
    """Pushes the model as versions 1, 2, ... of a repository; those that are there stay."""
    from rayprism.models.push import push_model
    from rayprism.models.repository import Repository

    for version in range(1, versions + 1):
        if not (repository / MODEL / str(version)).exists():
            push_model(Repository(repository), MODEL, model_file, example={INPUT: sample_row()})
