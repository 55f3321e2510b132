"""How good a version is, and whether its export does what the estimator does."""

from __future__ import annotations

import time
from typing import Any

import flights_data as data
import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
from estimators import OUTPUT, Candidate
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.pipeline import Pipeline

AGREEMENT = 1e-5
"""Largest difference in probability that the export may make: scikit-learn computes in float64,
ONNX in float32."""

LAST_TRAINING_MONTH = 10

Probabilities = npt.NDArray[np.float32]


def fit(candidate: Candidate, flights: pd.DataFrame) -> Pipeline:
    """A fitted estimator."""
    return candidate.build().fit(flights[list(data.COLUMNS)], data.was_delayed(flights))


def describe_part(flights: pd.DataFrame, weeks: str) -> dict[str, Any]:
    """Which flights a number was computed on."""
    dates = pd.to_datetime(flights[["year", "month", "day"]])
    return {
        "rows": len(flights),
        "weeks": weeks,
        "from": dates.min().date().isoformat(),
        "to": dates.max().date().isoformat(),
        "base_rate": round(float(data.was_delayed(flights).mean()), 4),
    }


def measure(delayed: npt.NDArray[np.bool_], predicted: npt.NDArray[Any]) -> dict[str, float]:
    """Ranking (AUC) and calibration (log loss, Brier), beside a model that says one number.

    That number is the base rate of the very flights that are tested: no constant does better.
    """
    constant = np.full(len(delayed), delayed.mean())
    scores = {
        "auc": roc_auc_score(delayed, predicted),
        "log_loss": log_loss(delayed, predicted),
        "brier": brier_score_loss(delayed, predicted),
        "base_rate_log_loss": log_loss(delayed, constant),
        "base_rate_brier": brier_score_loss(delayed, constant),
    }
    return {name: round(float(score), 4) for name, score in scores.items()}


def look_ahead(candidate: Candidate, flights: pd.DataFrame) -> dict[str, Any]:
    """The same estimator trained on January to October only, tested on November and December.

    Harder than held-out weeks, and closer to what happens in production: the model has not seen
    the season that it predicts.
    """
    early = (flights["month"] <= LAST_TRAINING_MONTH).to_numpy()
    pipeline = fit(candidate, flights[early])
    late = flights[~early]
    predicted = pipeline.predict_proba(late[list(data.COLUMNS)])[:, 1]
    return {
        **describe_part(late, "November and December, trained on January to October"),
        **measure(data.was_delayed(late), predicted),
    }


def predict_onnx(model: bytes, flights: pd.DataFrame) -> Probabilities:
    """The model's answers as a replica computes them.

    Shapes:
        Returns `[rows] float32`.
    """
    (probabilities,) = _session(model).run([OUTPUT], _feed(flights))
    return np.asarray(probabilities)


def check_agreement(pipeline: Pipeline, flights: pd.DataFrame, served: Probabilities) -> float:
    """The largest difference between the estimator and its export.

    Raises:
        SystemExit: It is too large, or a probability is none.
    """
    if not ((served >= 0) & (served <= 1)).all():
        raise SystemExit("the export gives probabilities outside 0 to 1: it is not pushed")
    expected = pipeline.predict_proba(flights[list(data.COLUMNS)])[:, 1]
    difference = float(np.abs(served - expected).max())
    if difference > AGREEMENT:
        raise SystemExit(
            f"the export differs from scikit-learn by {difference:.2g}, allowed is {AGREEMENT:g}: "
            "it is not pushed"
        )
    return difference


def measure_latency_s(model: bytes, flights: pd.DataFrame, repeats: int = 300) -> float:
    """Median time of one run on one thread."""
    session, feed = _session(model), _feed(flights)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        session.run([OUTPUT], feed)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _feed(flights: pd.DataFrame) -> dict[str, npt.NDArray[Any]]:
    columns = {name: flights[name].to_numpy(np.int64) for name in data.NUMBERS}
    return columns | {name: flights[name].to_numpy(object) for name in data.STRINGS}
