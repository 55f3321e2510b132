"""Large requests, little work: what it costs to bring 600 KB to a model."""

from __future__ import annotations

from functools import cache

import numpy as np

from bench.models.base import PictureModel, checked_model, constant, float_weights
from rayprism.core.tensors import Datatype, Tensors, TensorSpec
from rayprism.models.manifest import Batching

__all__ = ["IMAGES", "Images"]

_INPUT, _OUTPUT = "image", "scores"
_CHANNELS, _SIDE, _CLASSES = 3, 448, 10
_STEP = 16
_PIXELS = _CHANNELS * (_SIDE // _STEP) ** 2
_SEED = 21


class Images(PictureModel):
    """Ten scores, linear in every 16th pixel of every 16th line: 20 microseconds an image."""

    inputs = (TensorSpec(_INPUT, Datatype.UINT8, (-1, _CHANNELS, _SIDE, _SIDE)),)
    batching = Batching(max_rows=32)

    def content(self) -> bytes:
        """The ONNX file."""
        return _content()

    def example(self) -> Tensors:
        """One image, as a manifest takes 9 MB to write it down."""
        return self.requests(1, 1, _SEED)[0]


@cache
def _content() -> bytes:
    from onnx import TensorProto, helper

    random = np.random.default_rng(_SEED)
    graph = helper.make_graph(
        [
            helper.make_node("Slice", [_INPUT, "starts", "ends", "axes", "steps"], ["few"]),
            helper.make_node("Cast", ["few"], ["values"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["values"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "b"], [_OUTPUT]),
        ],
        "images",
        [
            helper.make_tensor_value_info(
                _INPUT, TensorProto.UINT8, ["rows", _CHANNELS, _SIDE, _SIDE]
            )
        ],
        [helper.make_tensor_value_info(_OUTPUT, TensorProto.FLOAT, ["rows", _CLASSES])],
        [
            constant("starts", _STEP // 2, _STEP // 2, kind=np.int64),
            constant("ends", _SIDE, _SIDE, kind=np.int64),
            constant("axes", 2, 3, kind=np.int64),
            constant("steps", _STEP, _STEP, kind=np.int64),
            # Scores of about 1: a pixel is 128 in the middle.
            float_weights(random, "w", _PIXELS, _CLASSES, scale=_PIXELS**-0.5 / 128),
            float_weights(random, "b", _CLASSES, scale=1.0),
        ],
    )
    return checked_model(graph)


IMAGES = Images("images")
