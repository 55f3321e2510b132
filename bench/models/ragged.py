"""Requests of very different lengths, and work that grows with the padded length."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from bench.models.base import OnnxModel, checked_model, constant, float_weights
from rayprism.core.tensors import Datatype, RaggedAxis, Tensors, TensorSpec
from rayprism.models.manifest import Batching

__all__ = ["RAGGED", "Ragged"]

_INPUT, _OUTPUT = "tokens", "scores"
_SHORTEST, _LONGEST = 8, 512
_VOCABULARY, _WIDTH, _CLASSES = 4096, 128, 8
_SEED = 22


class Ragged(OnnxModel):
    """Embedding, a layer for each token, the mean over tokens that are not 0, and two layers."""

    inputs = (TensorSpec(_INPUT, Datatype.INT64, (-1, -1)),)
    batching = Batching(
        max_rows=32,
        # From a few hundred tokens on, a run costs the same for each. Of more than some
        # thousand, rows only wait.
        max_cost=4096,
        max_padding_share=0.25,
        ragged={_INPUT: RaggedAxis(axis=1, value=0)},
    )

    def content(self) -> bytes:
        """The ONNX file."""
        return _content()

    def example(self) -> Tensors:
        """Three rows of a common length, from which a replica learns how long its runs take.

        Two are shorter, as a client pads them.
        """
        random = np.random.default_rng(_SEED)
        tokens = random.integers(1, _VOCABULARY, (3, _LONGEST // 2))
        tokens[1, _LONGEST // 3 :] = 0
        tokens[2, _SHORTEST:] = 0
        return {_INPUT: tokens}

    def requests(self, count: int, rows: int, seed: int) -> list[Tensors]:
        """Of a length from 8 to 512 for each request, each as likely as another.

        Shapes: `tokens` `[rows, length] int64`, 1 to 4095.
        """
        random = np.random.default_rng(seed)
        lengths = random.integers(_SHORTEST, _LONGEST + 1, count)
        return [
            {_INPUT: random.integers(1, _VOCABULARY, (rows, int(length)))} for length in lengths
        ]


@cache
def _content() -> bytes:
    from onnx import TensorProto, helper

    random = np.random.default_rng(_SEED)

    def layer(number: int, before: int, after: int) -> list[Any]:
        return [
            float_weights(random, f"w{number}", before, after, scale=before**-0.5),
            float_weights(random, f"b{number}", after, scale=0.1),
        ]

    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Gather", ["embedding", _INPUT], ["embedded"]),
            node("MatMul", ["embedded", "w1"], ["product"]),
            node("Add", ["product", "b1"], ["sum"]),
            node("Relu", ["sum"], ["hidden"]),
            node("Greater", [_INPUT, "padding"], ["is_token"]),
            node("Cast", ["is_token"], ["mask"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["mask", "axis"], ["mask_row"]),
            # A product of matrices sums without a masked copy of the hidden state.
            node("MatMul", ["mask_row", "hidden"], ["summed_row"]),
            node("Squeeze", ["summed_row", "axis"], ["summed"]),
            node("ReduceSum", ["mask", "axis"], ["count"]),
            node("Max", ["count", "one"], ["count_or_one"]),
            node("Div", ["summed", "count_or_one"], ["mean"]),
            node("Gemm", ["mean", "w2", "b2"], ["second"]),
            node("Relu", ["second"], ["active"]),
            node("Gemm", ["active", "w3", "b3"], [_OUTPUT]),
        ],
        "ragged",
        [helper.make_tensor_value_info(_INPUT, TensorProto.INT64, ["rows", "length"])],
        [helper.make_tensor_value_info(_OUTPUT, TensorProto.FLOAT, ["rows", _CLASSES])],
        [
            float_weights(random, "embedding", _VOCABULARY, _WIDTH, scale=1.0),
            *layer(1, _WIDTH, _WIDTH),
            *layer(2, _WIDTH, _WIDTH),
            *layer(3, _WIDTH, _CLASSES),
            constant("padding", 0, kind=np.int64),
            constant("axis", 1, kind=np.int64),
            constant("one", 1, kind=np.float32),
        ],
    )
    return checked_model(graph)


RAGGED = Ragged("ragged")
