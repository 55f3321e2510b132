"""The two estimators, and their export to ONNX with one signature.

Both versions take the same inputs and give the same output, so that clients need not change when
version 2 takes over from version 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from flights_data import NUMBERS, SEED, STRINGS
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import Int64TensorType, StringTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

OUTPUT = "delayed_probability"

LOGISTIC = {"max_iter": 200, "random_state": SEED}
BOOSTING = {
    "max_iter": 100,
    "learning_rate": 0.1,
    "max_leaf_nodes": 63,
    "min_samples_leaf": 500,
    "l2_regularization": 10.0,
    "random_state": SEED,
}


def logistic_regression() -> Pipeline:
    """Version 1: one weight for every month, carrier and airport; linear in the rest."""
    columns = ColumnTransformer(
        [
            ("categories", OneHotEncoder(handle_unknown="ignore"), ["month", *STRINGS]),
            ("numbers", StandardScaler(), ["hour", "minute", "distance"]),
        ]
    )
    return make_pipeline(columns, LogisticRegression(**LOGISTIC))


def gradient_boosting() -> Pipeline:
    """Version 2: trees, which find out what depends on what."""
    columns = ColumnTransformer(
        [
            (
                "categories",
                OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
                list(STRINGS),
            ),
            ("numbers", "passthrough", list(NUMBERS)),
        ]
    )
    return make_pipeline(columns, HistGradientBoostingClassifier(**BOOSTING))


@dataclass(frozen=True)
class Candidate:
    """What becomes a version.

    Args:
        title: For people.
        build: Makes the estimator, not yet fitted.
        parameters: The estimator's, for the manifest.
    """

    title: str
    build: Callable[[], Pipeline]
    parameters: Mapping[str, Any]


CANDIDATES = (
    Candidate("logistic regression", logistic_regression, LOGISTIC),
    Candidate("gradient boosting", gradient_boosting, BOOSTING),
)


def export_onnx(pipeline: Pipeline) -> bytes:
    """A fitted pipeline as ONNX: one input a column, and the probability of a delay.

    Shapes:
        Every input and the output are `[rows]`, as a column of a table is.
    """
    columns: list[tuple[str, Any]] = [
        *((name, Int64TensorType([None, 1])) for name in NUMBERS),
        *((name, StringTensorType([None, 1])) for name in STRINGS),
    ]
    model = to_onnx(
        pipeline,
        initial_types=columns,
        options={"zipmap": False},
        target_opset={"": 18, "ai.onnx.ml": 3},
    )
    _take_columns(model.graph)
    _give_probability(model.graph)
    onnx.checker.check_model(model, full_check=True)
    serialized: bytes = model.SerializeToString()
    return serialized


def _take_columns(graph: onnx.GraphProto) -> None:
    """Turns the `[rows, 1]` inputs that skl2onnx makes into `[rows]`."""
    axis = helper.make_tensor("column_axis", TensorProto.INT64, [1], [1])
    graph.initializer.append(axis)
    names = {entry.name for entry in graph.input}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = f"{name}_column"
    for entry in graph.input:
        shape = entry.type.tensor_type.shape
        del shape.dim[1:]
        shape.dim[0].dim_param = "rows"
        graph.node.insert(
            0, helper.make_node("Unsqueeze", [entry.name, axis.name], [f"{entry.name}_column"])
        )


def _give_probability(graph: onnx.GraphProto) -> None:
    """Leaves one output: the second column of scikit-learn's class probabilities."""
    probabilities = graph.output[1].name
    graph.initializer.append(helper.make_tensor("delayed_class", TensorProto.INT64, [], [1]))
    graph.node.append(
        helper.make_node("Gather", [probabilities, "delayed_class"], [OUTPUT], axis=1)
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows"]))
