"""Small images, much work: what a GPU is for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from bench.models.base import PictureModel, checked_model, constant, float_weights
from rayprism.core.tensors import Datatype, Tensors, TensorSpec
from rayprism.models.manifest import Batching

__all__ = ["VISION", "Vision"]

_INPUT, _OUTPUT = "image", "scores"
_CHANNELS, _SIDE, _CLASSES = 3, 64, 10
_LAYERS = ((64, 1), (128, 2), (256, 2), (256, 1))
"""Channels and stride of each convolution, all of them 3 x 3."""
_SEED = 23


class Vision(PictureModel):
    """Four convolutions over 12 KB of image: 0.6 billion multiplications and additions a row."""

    inputs = (TensorSpec(_INPUT, Datatype.UINT8, (-1, _CHANNELS, _SIDE, _SIDE)),)
    batching = Batching(max_rows=64)

    def content(self) -> bytes:
        """The ONNX file."""
        return _content()

    def example(self) -> Tensors:
        """Two images."""
        return self.requests(1, 2, _SEED)[0]


@cache
def _content() -> bytes:
    from onnx import TensorProto, helper

    random = np.random.default_rng(_SEED)
    node = helper.make_node
    nodes = [
        node("Cast", [_INPUT], ["bytes"], to=TensorProto.FLOAT),
        node("Mul", ["bytes", "scale"], ["layer0"]),
    ]
    weights: list[Any] = [constant("scale", 1 / 128, kind=np.float32)]
    before = _CHANNELS
    for number, (channels, stride) in enumerate(_LAYERS, 1):
        inputs = [f"layer{number - 1}", f"w{number}", f"b{number}"]
        sizes = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [stride] * 2}
        nodes += [
            node("Conv", inputs, [f"sums{number}"], **sizes),
            node("Relu", [f"sums{number}"], [f"layer{number}"]),
        ]
        weights += [
            float_weights(random, f"w{number}", channels, before, 3, 3, scale=(before * 9) ** -0.5),
            float_weights(random, f"b{number}", channels, scale=0.1),
        ]
        before = channels
    nodes += [
        node("GlobalAveragePool", [f"layer{len(_LAYERS)}"], ["means"]),
        node("Flatten", ["means"], ["flat"]),
        node("Gemm", ["flat", "w", "b"], [_OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        "vision",
        [
            helper.make_tensor_value_info(
                _INPUT, TensorProto.UINT8, ["rows", _CHANNELS, _SIDE, _SIDE]
            )
        ],
        [helper.make_tensor_value_info(_OUTPUT, TensorProto.FLOAT, ["rows", _CLASSES])],
        [
            *weights,
            float_weights(random, "w", before, _CLASSES, scale=before**-0.5),
            float_weights(random, "b", _CLASSES, scale=1.0),
        ],
    )
    return checked_model(graph)


VISION = Vision("vision")
