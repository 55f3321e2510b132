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


def save_mlp(
    path: Path,
    *,
    seed: int = 0,
    batch: int | str = "batch",
    x: str = "x",
    y: str = "y",
) -> Path:
    """The MLP as ONNX."""
    from onnx import TensorProto, helper, numpy_helper

    w1, b1, w2, b2 = mlp_weights(seed)
    return save_onnx(
        path,
        [
            helper.make_node("Gemm", [x, "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], [y]),
        ],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [batch, OUTPUTS])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
        ],
    )


def save_channel_means(path: Path, height: int, width: int) -> Path:
    """Images to the mean of each channel, as ONNX: `pixels` [-1, 3, H, W] to `means` [-1, 3]."""
    from onnx import TensorProto, helper

    return save_onnx(
        path,
        [helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[2, 3], keepdims=0)],
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("means", TensorProto.FLOAT, ["batch", 3])],
    )


def save_mlp_export(path: Path, *, seed: int = 0) -> Path:
    """The MLP as a torch.export archive, with a free batch."""
    import torch

    module = torch_mlp(seed)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        module, (torch.zeros(3, FEATURES),), dynamic_shapes={"x": {0: batch}}
    )
    torch.export.save(program, str(path))
    return path


def save_mlp_script(path: Path, *, seed: int = 0) -> Path:
    """The MLP as TorchScript."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(torch_mlp(seed), (torch.zeros(3, FEATURES),)).save(str(path))
    return path


def torch_mlp(seed: int = 0) -> Any:
    """The MLP as a torch module."""
    import torch

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in zip(("w1", "b1", "w2", "b2"), mlp_weights(seed), strict=True):
                self.register_buffer(name, torch.from_numpy(array))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2

    return Mlp().eval()


PYTHON_MLP = '''
"""The MLP in numpy, its weights in a file beside it."""

import numpy as np

from .layers import dense


class Model:
    def __init__(self, folder, options):
        with np.load(folder / "weights.npz") as weights:
            self.weights = dict(weights)
        self.options = options

    def predict(self, inputs):
        hidden = np.maximum(dense(inputs["x"], self.weights, 1), 0)
        return {"y": dense(hidden, self.weights, 2)}
'''

PYTHON_LAYERS = """
def dense(x, weights, number):
    return x @ weights[f"w{number}"] + weights[f"b{number}"]
"""

PROCESSOR = """
class Processor:
    def __init__(self, folder, options):
        self.folder = folder

    def preprocess(self, inputs):
        return {"features": inputs["x"]}

    def postprocess(self, inputs, outputs):
        assert inputs.keys() == {"features"}
        return {"y": outputs["scores"]}
"""


def save_python_mlp(folder: Path, *, seed: int = 0) -> Path:
    """The MLP as a folder with Python code and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(PYTHON_MLP)
    (folder / "layers.py").write_text(PYTHON_LAYERS)
    w1, b1, w2, b2 = mlp_weights(seed)
    np.savez(folder / "weights.npz", w1=w1, b1=b1, w2=w2, b2=b2)
    return folder
