"""What quality is, by task: the metrics of predictions on labelled rows. Pure.

A value over all rows comes from scikit-learn where it has the metric. For resamples each metric is
here once more as a function of row weights, which sorts once and not a thousand times.

Source: the definitions of scikit-learn's user guide, "Metrics and scoring". Calibration error:
see `rayprism.offline.quality_curves`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayprism.core.tensors import Array
from rayprism.offline.quality import Metric, Statistic
from rayprism.offline.quality_curves import (
    calibration_bins,
    calibration_error,
    calibration_of,
    precision_recall_of,
    residuals_of,
    roc_of,
    score_histogram,
)
from rayprism.offline.rows import Mask, Rows

__all__ = ["BinaryRows", "MulticlassRows", "RegressionRows", "log_losses"]

# Scores are float32: what is nearer to 0 or 1 cannot be told from them.
# Source: sklearn.metrics.log_loss, which clips by the precision of what it is given.
_SMALLEST = float(np.finfo(np.float32).eps)

_ACCURACY = Metric("accuracy", "Accuracy", "higher", is_mean=True)
_LOG_LOSS = Metric("log_loss", "Log loss", "lower", is_mean=True)
_BRIER = Metric("brier", "Brier score", "lower", is_mean=True)
_PRECISION = Metric("precision", "Precision", "higher")
_RECALL = Metric("recall", "Recall", "higher")
_F1 = Metric("f1", "F1", "higher")
_ROC_AUC = Metric("roc_auc", "ROC AUC", "higher")
_AVERAGE_PRECISION = Metric("average_precision", "Average precision", "higher")
_ECE = Metric("ece", "Expected calibration error", "lower", is_biased=True)
_MACRO_F1 = Metric("macro_f1", "Macro F1", "higher")
_MAE = Metric("mae", "Mean absolute error", "lower", is_mean=True)
_RMSE = Metric("rmse", "Root mean squared error", "lower")
_R2 = Metric("r2", "R²", "higher")
_BIAS = Metric("bias", "Bias (mean of prediction - label)", "zero")


def log_losses(probabilities: Array) -> Array:
    """Of the probabilities of what came true: `-log p`, with p kept away from 0 and 1."""
    clipped = np.clip(probabilities.astype(np.float64), _SMALLEST, 1 - _SMALLEST)
    return np.asarray(-np.log(clipped))


def _take(array: Array, sample: Rows | None) -> Array:
    return array if sample is None else array[sample]


def _share(part: Array, whole: Array) -> Array:
    """A quotient that is NaN where nothing is below the line."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.true_divide(part, whole))


@dataclass(frozen=True)
class BinaryRows:
    """Rows that are positive or not.

    Args:
        labels: Which are. Shape: `[rows] bool`.
        scores: Higher: more likely positive. Shape: `[versions, rows] float32`.
        threshold: From this score on a row counts as predicted positive.
        ranked: Whether scores are more than 0 and 1.
        probabilities: Whether all scores are from 0 to 1, and may be read as probabilities.
    """

    labels: Mask
    scores: Array
    threshold: float = 0.5
    ranked: bool = True
    probabilities: bool = True

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.labels)

    @property
    def versions(self) -> int:
        """How many."""
        return len(self.scores)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that can be told of these predictions."""
        calibrated = (_LOG_LOSS, _BRIER) if self.ranked and self.probabilities else ()
        ranking = (_ROC_AUC, _AVERAGE_PRECISION) if self.ranked else ()
        errors = (_ECE,) if calibrated else ()
        return (*calibrated, *ranking, _ACCURACY, _PRECISION, _RECALL, _F1, *errors)

    def value(self, metric: str, version: int) -> float:
        """A metric over all rows; NaN where it is not defined."""
        from sklearn import metrics

        labels, scores = self.labels, self.scores[version]
        if metric in ("accuracy", "log_loss", "brier"):
            return float(self.losses(metric, version).mean())
        if metric == "ece":
            bins = calibration_bins(scores)
            gaps = scores.astype(np.float64) - labels
            return calibration_error(bins, gaps, np.ones(len(labels)))
        if metric in ("roc_auc", "average_precision"):
            if not labels.any() or (metric == "roc_auc" and labels.all()):
                return float("nan")
            function = {
                "roc_auc": metrics.roc_auc_score,
                "average_precision": metrics.average_precision_score,
            }[metric]
            return float(function(labels, scores))
        of_positives = metrics.precision_recall_fscore_support(
            labels, scores >= self.threshold, average="binary", zero_division=np.nan
        )
        return float(of_positives[("precision", "recall", "f1").index(metric)])

    def losses(self, metric: str, version: int) -> Array:
        """What each row adds to `accuracy`, `log_loss` or `brier`. Returns `[rows] float64`."""
        return self._losses(metric, version, None)

    def _losses(self, metric: str, version: int, sample: Rows | None) -> Array:
        labels, scores = _take(self.labels, sample), _take(self.scores[version], sample)
        if metric == "accuracy":
            return np.asarray((scores >= self.threshold) == labels, np.float64)
        if metric == "brier":
            return np.asarray((scores.astype(np.float64) - labels) ** 2)
        return log_losses(np.where(labels, scores, 1 - scores.astype(np.float64)))

    def statistic(self, sample: Rows | None) -> Statistic:
        """All metrics as a function of row weights; see `rayprism.offline.quality.Scored`."""
        labels = _take(self.labels, sample)
        scores = [_take(each, sample) for each in self.scores]
        predicted = np.stack([each >= self.threshold for each in scores]).astype(np.float64)
        means = [metric.name for metric in self.metrics if metric.is_mean]
        losses = {
            name: np.stack([self._losses(name, v, sample) for v in range(self.versions)])
            for name in means
        }
        orders = [_Ranking.of(each, labels) for each in scores] if self.ranked else []
        calibrated = _ECE in self.metrics
        bins = [calibration_bins(each) for each in scores] if calibrated else []
        gaps = [each.astype(np.float64) - labels for each in scores] if calibrated else []

        def statistic(weights: Array) -> Mapping[str, Array]:
            positives = weights * labels
            found = {name: each @ weights / weights.sum() for name, each in losses.items()}
            hits, called = predicted @ positives, predicted @ weights
            found["precision"] = _share(hits, called)
            found["recall"] = _share(hits, np.full_like(hits, positives.sum()))
            found["f1"] = _share(2 * hits, called + positives.sum())
            if orders:
                ranked = np.array([order.areas(weights) for order in orders])
                found["roc_auc"], found["average_precision"] = ranked.T
            if calibrated:
                pairs = zip(bins, gaps, strict=True)
                found["ece"] = np.array([calibration_error(b, g, weights) for b, g in pairs])
            return found

        return statistic

    def plots(self) -> dict[str, Any]:
        """What is plotted, as JSON: `roc`, `precision_recall`, `calibration`, `histogram`."""
        found: dict[str, Any] = {}
        both = self.labels.any() and not self.labels.all()
        if self.ranked and both:
            found["roc"] = [roc_of(self.labels, each) for each in self.scores]
            found["precision_recall"] = [precision_recall_of(self.labels, s) for s in self.scores]
        if self.ranked:
            found["histogram"] = score_histogram(self.labels, self.scores, self.probabilities)
        if _ECE in self.metrics:
            found["calibration"] = [calibration_of(self.labels, each) for each in self.scores]
        return found


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Rows from the highest score to the lowest.

    Args:
        order: Indices of the rows.
        positive: 1 where such a row is positive. Shape: `[rows] float64`.
        starts: Where rows of one score begin, which count as one step; None where no two are equal.
    """

    order: Rows
    positive: Array
    starts: Rows | None

    @classmethod
    def of(cls, scores: Array, labels: Mask) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
        positive = labels[order].astype(np.float64)
        return cls(order, positive, starts if len(starts) < len(order) else None)

    def areas(self, weights: Array) -> tuple[float, float]:
        """ROC AUC and average precision; NaN where they are not defined."""
        every = weights[self.order]
        true = every * self.positive
        if self.starts is not None:
            every, true = np.add.reduceat(every, self.starts), np.add.reduceat(true, self.starts)
        true_so_far, so_far = np.cumsum(true), np.cumsum(every)
        positives, negatives = true_so_far[-1], so_far[-1] - true_so_far[-1]
        if positives == 0:
            return float("nan"), float("nan")
        # Where nothing came so far, the precision is multiplied by 0 anyway.
        precision = true_so_far / np.maximum(so_far, np.finfo(np.float64).tiny)
        average_precision = float(true @ precision / positives)
        if negatives == 0:
            return float("nan"), average_precision
        area = (every - true) @ (true_so_far - true / 2)
        return float(area / (positives * negatives)), average_precision


@dataclass(frozen=True)
class MulticlassRows:
    """Rows that are of one of several classes.

    Args:
        labels: Class of each row as a number from 0. Shape: `[rows] int32`.
        predicted: The same of each version. Shape: `[versions, rows] int32`.
        classes: How many there are.
        row_log_losses: Where there are probabilities. Shape: `[versions, rows] float32`.
        ranks: Where there are scores: how many classes score at least as high as the true one,
            itself not counted. Shape: `[versions, rows] int32`.
        top_k: A row is a hit where the true class is among so many with the highest scores.
    """

    labels: Array
    predicted: Array
    classes: int
    row_log_losses: Array | None = None
    ranks: Array | None = None
    top_k: int = 5

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.labels)

    @property
    def versions(self) -> int:
        """How many."""
        return len(self.predicted)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that can be told of these predictions."""
        found = [_ACCURACY, _MACRO_F1]
        if self.row_log_losses is not None:
            found.insert(0, _LOG_LOSS)
        if self.ranks is not None and 1 < self.top_k < self.classes:
            title = f"Top-{self.top_k} accuracy"
            found.append(Metric("top_k_accuracy", title, "higher", is_mean=True))
        return tuple(found)

    def value(self, metric: str, version: int) -> float:
        """A metric over all rows."""
        if metric != "macro_f1":
            return float(self.losses(metric, version).mean())
        from sklearn import metrics

        return float(
            metrics.f1_score(
                self.labels,
                self.predicted[version],
                labels=np.flatnonzero(np.bincount(self.labels)),
                average="macro",
                zero_division=np.nan,
            )
        )

    def losses(self, metric: str, version: int) -> Array:
        """What each row adds to a metric but `macro_f1`. Shapes: returns `[rows] float64`."""
        return self._losses(metric, version, None)

    def _losses(self, metric: str, version: int, sample: Rows | None) -> Array:
        if metric == "log_loss" and self.row_log_losses is not None:
            return _take(self.row_log_losses[version], sample).astype(np.float64)
        if metric == "top_k_accuracy" and self.ranks is not None:
            return np.asarray(_take(self.ranks[version], sample) < self.top_k, np.float64)
        predicted, labels = _take(self.predicted[version], sample), _take(self.labels, sample)
        return np.asarray(predicted == labels, np.float64)

    def statistic(self, sample: Rows | None) -> Statistic:
        """All metrics as a function of row weights; see `rayprism.offline.quality.Scored`."""
        labels = _take(self.labels, sample)
        predicted = [_take(each, sample) for each in self.predicted]
        present = np.flatnonzero(np.bincount(self.labels))
        means = [metric.name for metric in self.metrics if metric.is_mean]
        losses = {
            name: np.stack([self._losses(name, v, sample) for v in range(self.versions)])
            for name in means
        }

        def macro_f1(theirs: Array, weights: Array, support: Array) -> float:
            hits = np.bincount(labels, weights * (theirs == labels), self.classes)
            called = np.bincount(theirs, weights, self.classes)
            each = _share(2 * hits, support + called)[present]
            return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")

        def statistic(weights: Array) -> Mapping[str, Array]:
            found = {name: each @ weights / weights.sum() for name, each in losses.items()}
            support = np.bincount(labels, weights, self.classes)
            found["macro_f1"] = np.array([macro_f1(each, weights, support) for each in predicted])
            return found

        return statistic

    def plots(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}


@dataclass(frozen=True)
class RegressionRows:
    """Rows with a number.

    Args:
        labels: Shape: `[rows] float64`.
        predictions: Shape: `[versions, rows] float64`.
    """

    labels: Array
    predictions: Array

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.labels)

    @property
    def versions(self) -> int:
        """How many."""
        return len(self.predictions)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All of them."""
        return (_MAE, _RMSE, _R2, _BIAS)

    def value(self, metric: str, version: int) -> float:
        """A metric over all rows; NaN where it is not defined."""
        from sklearn import metrics

        labels, predictions = self.labels, self.predictions[version]
        if metric == "bias":
            return float((predictions - labels).mean())
        if metric == "r2" and labels.min() == labels.max():
            return float("nan")
        functions = {
            "mae": metrics.mean_absolute_error,
            "rmse": metrics.root_mean_squared_error,
            "r2": metrics.r2_score,
        }
        return float(functions[metric](labels, predictions))

    def losses(self, metric: str, version: int) -> Array:
        """What each row adds to `mae`. Shapes: returns `[rows] float64`."""
        return np.asarray(np.abs(self.predictions[version] - self.labels))

    def statistic(self, sample: Rows | None) -> Statistic:
        """All metrics as a function of row weights; see `rayprism.offline.quality.Scored`."""
        labels = _take(self.labels, sample)
        errors = np.stack([_take(each, sample) for each in self.predictions]) - labels
        absolute, squares = np.abs(errors), errors**2
        # Around their middle, or large labels would eat the digits of their variance.
        centred = labels - labels.mean()

        def statistic(weights: Array) -> Mapping[str, Array]:
            total = weights.sum()
            mean = centred @ weights / total
            spread = (centred - mean) ** 2 @ weights
            squared = squares @ weights
            return {
                "mae": absolute @ weights / total,
                "rmse": np.sqrt(squared / total),
                "r2": 1 - _share(squared, np.full_like(squared, spread or np.nan)),
                "bias": errors @ weights / total,
            }

        return statistic

    def plots(self) -> dict[str, Any]:
        """What is plotted, as JSON: `residuals`, their histogram and their mean by prediction."""
        return {"residuals": residuals_of(self.labels, self.predictions)}
