"""What is plotted of predictions on labelled rows, as JSON. Pure.

Source: calibration in equal bins: Guo et al., "On Calibration of Modern Neural Networks" (2017).
Intervals of shares: Wilson (1927), as in scipy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rayprism.core.tensors import Array
from rayprism.offline.rows import Mask, Rows

__all__ = [
    "CALIBRATION_BINS",
    "calibration_bins",
    "calibration_error",
    "calibration_of",
    "precision_recall_of",
    "residuals_of",
    "roc_of",
    "score_histogram",
]

CALIBRATION_BINS = 15
_HISTOGRAM_BINS = 40
_CURVE_POINTS = 201
_RESIDUAL_BINS = 20


def calibration_bins(scores: Array) -> Rows:
    """The bin of each probability."""
    return np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def calibration_error(bins: Rows, gaps: Array, weights: Array) -> float:
    """How far mean score and share of positives are apart, over the bins (ECE).

    Args:
        bins: See `calibration_bins`. Shape: `[rows]`, as of all others.
        gaps: Score less label.
        weights: Of the rows.
    """
    sums = np.bincount(bins, weights * gaps, CALIBRATION_BINS)
    return float(np.abs(sums).sum() / weights.sum())


def calibration_of(labels: Mask, scores: Array) -> list[dict[str, Any]]:
    """Each bin with rows: its bounds, rows, mean score, share of positives and 95 % interval."""
    from scipy import stats

    bins = calibration_bins(scores)
    rows = np.bincount(bins, minlength=CALIBRATION_BINS)
    means = np.bincount(bins, scores, CALIBRATION_BINS)
    positives = np.bincount(bins[labels], minlength=CALIBRATION_BINS)
    found = []
    for index in np.flatnonzero(rows):
        count, hits = int(rows[index]), int(positives[index])
        share = stats.binomtest(hits, count).proportion_ci(method="wilson")
        found.append(
            {
                "from": index / CALIBRATION_BINS,
                "to": (index + 1) / CALIBRATION_BINS,
                "rows": count,
                "mean_score": float(means[index] / count),
                "positive_share": hits / count,
                "interval": [float(share.low), float(share.high)],
            }
        )
    return found


def roc_of(labels: Mask, scores: Array) -> dict[str, Any]:
    """The ROC curve, thinned to what can be seen. Both classes are needed."""
    from sklearn import metrics

    false, true, _ = metrics.roc_curve(labels, scores)
    kept = np.union1d(_thin(false), _thin(true))
    return {"false_positive_rate": _short(false[kept]), "true_positive_rate": _short(true[kept])}


def precision_recall_of(labels: Mask, scores: Array) -> dict[str, Any]:
    """Precision by rising recall, thinned to what can be seen. A positive row is needed."""
    from sklearn import metrics

    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    # The last point of scikit-learn is a convention, and of no threshold.
    precision, recall = precision[-2::-1], recall[-2::-1]
    # Before the first hit precision is 0, which says nothing of what comes after.
    precision, recall = precision[recall > 0], recall[recall > 0]
    kept = _thin(recall)
    return {"recall": _short(recall[kept]), "precision": _short(precision[kept])}


def _thin(rising: Array) -> Rows:
    """Indices of as many points of a curve as can be seen."""
    grid = np.linspace(0, 1, _CURVE_POINTS)
    return np.unique(np.searchsorted(rising, grid).clip(max=len(rising) - 1))


def _short(values: Array) -> list[float]:
    return [round(float(value), 5) for value in values]


def score_histogram(labels: Mask, scores: Array, probabilities: bool) -> dict[str, Any]:
    """Rows by score, of each version and label, in bins that all share.

    Args:
        labels: Shape: `[rows] bool`.
        scores: Shape: `[versions, rows]`.
        probabilities: Whether the bins go from 0 to 1, and not from the least to the most.
    """
    low, high = (0.0, 1.0) if probabilities else (float(scores.min()), float(scores.max()))
    edges = np.linspace(low, high if high > low else low + 1, _HISTOGRAM_BINS + 1)
    return {
        "edges": edges.tolist(),
        "positive": [np.histogram(each[labels], edges)[0].tolist() for each in scores],
        "negative": [np.histogram(each[~labels], edges)[0].tolist() for each in scores],
    }


def residuals_of(labels: Array, predictions: Array) -> dict[str, Any]:
    """Prediction less label: rows by it, and its mean from low to high predictions.

    Args:
        labels: Shape: `[rows]`.
        predictions: Shape: `[versions, rows]`.
    """
    errors = predictions - labels
    low, high = np.quantile(errors, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, _HISTOGRAM_BINS + 1)
    return {
        "edges": edges.tolist(),
        "rows": [np.histogram(each, edges)[0].tolist() for each in errors],
        "outside": [int(((each < edges[0]) | (each > edges[-1])).sum()) for each in errors],
        "by_prediction": [
            _by_prediction(each, error) for each, error in zip(predictions, errors, strict=True)
        ],
    }


def _by_prediction(predictions: Array, errors: Array) -> list[dict[str, float]]:
    """Mean residual of as many rows each, from the lowest prediction to the highest."""
    edges = np.unique(np.quantile(predictions, np.linspace(0, 1, _RESIDUAL_BINS + 1)))
    bins = np.searchsorted(edges[1:-1], predictions, side="right")
    rows = np.bincount(bins)
    used = np.flatnonzero(rows)
    means = np.bincount(bins, predictions)[used] / rows[used]
    residuals = np.bincount(bins, errors)[used] / rows[used]
    return [
        {"prediction": float(mean), "residual": float(residual), "rows": int(rows[index])}
        for mean, residual, index in zip(means, residuals, used, strict=True)
    ]
