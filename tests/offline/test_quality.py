"""What is concluded of labelled rows: scikit-learn and scipy are the oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn import metrics

from rayprism.offline.quality import Comparison, Metric, Scored, compare, compare_segments, judge
from rayprism.offline.quality_curves import calibration_of, precision_recall_of, roc_of
from rayprism.offline.quality_tasks import BinaryRows, MulticlassRows, RegressionRows, log_losses

Array = npt.NDArray[Any]
ROWS = 400


def binary(
    rows: int = ROWS, *, seed: int = 0, signal: tuple[float, ...] = (0.2, 0.5)
) -> BinaryRows:
    """Scores in tenths of a percent, so that many are equal; later versions know more."""
    random = np.random.default_rng(seed)
    labels = random.random(rows) < 0.3
    noise = random.random((len(signal), rows))
    scores = (
        np.array(signal)[:, np.newaxis] * labels + (1 - np.array(signal))[:, np.newaxis] * noise
    )
    return BinaryRows(labels, np.round(scores, 2).astype(np.float32))


def multiclass(rows: int = ROWS, *, seed: int = 0) -> tuple[MulticlassRows, Array]:
    """Four classes, the last of which no label has; and the probabilities of two versions."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, rows).astype(np.int32)
    scores = random.random((2, rows, 4)) + 0.5 * np.eye(4)[labels]
    scores /= scores.sum(axis=2, keepdims=True)
    own = np.take_along_axis(scores, np.tile(labels, (2, 1))[..., np.newaxis], axis=2)
    ranks = ((scores >= own).sum(axis=2) - 1).astype(np.int32)
    losses = log_losses(own[..., 0]).astype(np.float32)
    predicted = scores.argmax(axis=2).astype(np.int32)
    return MulticlassRows(labels, predicted, 4, losses, ranks, top_k=2), scores


def regression(rows: int = ROWS, *, seed: int = 0, bias: float = 0.0) -> RegressionRows:
    random = np.random.default_rng(seed)
    labels = 1000 + random.standard_normal(rows)
    errors = np.array([[1.0], [0.5]]) * random.standard_normal((2, rows)) + [[bias], [0]]
    return RegressionRows(labels, labels + errors)


def compared(scored: Scored, *, seed: int = 0, **options: Any) -> dict[str, Comparison]:
    random = np.random.default_rng(seed)
    options = {"confidence": 0.95, "resamples": 300, **options}
    return {each.metric.name: each for each in compare(scored, random=random, **options)}


# --- the metrics are those of scikit-learn, with any weights


def of_binary(scored: BinaryRows, version: int, weights: Array) -> dict[str, float]:
    y, s, w = scored.labels, scored.scores[version], {"sample_weight": weights}
    p = s >= scored.threshold
    clipped = np.clip(s.astype(np.float64), np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
    return {
        "accuracy": metrics.accuracy_score(y, p, **w),
        "precision": metrics.precision_score(y, p, **w),
        "recall": metrics.recall_score(y, p, **w),
        "f1": metrics.f1_score(y, p, **w),
        "roc_auc": metrics.roc_auc_score(y, s, **w),
        "average_precision": metrics.average_precision_score(y, s, **w),
        "log_loss": metrics.log_loss(y, clipped, **w),
        "brier": metrics.brier_score_loss(y, s, **w),
    }


def of_multiclass(
    scored: MulticlassRows, scores: Array, version: int, weights: Array
) -> dict[str, float]:
    y, p, w = scored.labels, scored.predicted[version], {"sample_weight": weights}
    every = range(4)
    return {
        "accuracy": metrics.accuracy_score(y, p, **w),
        "macro_f1": metrics.f1_score(y, p, average="macro", labels=[0, 1, 2], **w),
        "log_loss": metrics.log_loss(y, scores[version], labels=every, **w),
        "top_k_accuracy": metrics.top_k_accuracy_score(y, scores[version], k=2, labels=every, **w),
    }


def of_regression(scored: RegressionRows, version: int, weights: Array) -> dict[str, float]:
    y, p, w = scored.labels, scored.predictions[version], {"sample_weight": weights}
    return {
        "mae": metrics.mean_absolute_error(y, p, **w),
        "rmse": metrics.root_mean_squared_error(y, p, **w),
        "r2": metrics.r2_score(y, p, **w),
        "bias": float(np.average(p - y, weights=weights)),
    }


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("kind", ["ones", "counts", "fractions"])
def test_every_metric_is_that_of_scikit_learn(task: str, kind: str) -> None:
    random = np.random.default_rng(5)
    weights = {
        "ones": np.ones(ROWS),
        "counts": np.bincount(random.integers(ROWS, size=ROWS), minlength=ROWS).astype(float),
        "fractions": random.random(ROWS) * 0.01,
    }[kind]
    scored: Scored
    if task == "binary":
        scored = rows = binary()
        expected = [of_binary(rows, version, weights) for version in range(2)]
    elif task == "multiclass":
        scored, scores = multiclass()
        expected = [of_multiclass(scored, scores, version, weights) for version in range(2)]
    else:
        scored = numbers = regression(bias=0.3)
        expected = [of_regression(numbers, version, weights) for version in range(2)]
    found = scored.statistic(None)(weights)
    assert set(found) == {metric.name for metric in scored.metrics}
    for version in range(2):
        for name, value in expected[version].items():
            assert found[name][version] == pytest.approx(value, rel=1e-6), name
            if kind == "ones":
                assert scored.value(name, version) == pytest.approx(value, rel=1e-6), name
    for metric in scored.metrics:
        if metric.is_mean:
            mean = np.average(scored.losses(metric.name, 1), weights=weights)
            assert found[metric.name][1] == pytest.approx(mean)


def test_a_statistic_of_a_sample_is_that_of_its_rows() -> None:
    sample = np.arange(0, ROWS, 3)
    for whole, part in (
        (binary(), lambda s: BinaryRows(s.labels[sample], s.scores[:, sample])),
        (
            regression(),
            lambda s: RegressionRows(s.labels[sample], s.predictions[:, sample]),
        ),
    ):
        weights = np.ones(len(sample))
        found, expected = whole.statistic(sample)(weights), part(whole).statistic(None)(weights)
        for name, values in expected.items():
            assert found[name] == pytest.approx(values)


def test_the_calibration_error_of_a_small_example() -> None:
    # One bin: scores of 0.5, of which 3 in 4 are positive. Another: 0.1, of which none is.
    labels = np.array([True, True, True, False, False, False])
    scores = np.array([[0.5, 0.5, 0.5, 0.5, 0.1, 0.1]], np.float32)
    rows = BinaryRows(labels, scores)
    assert rows.value("ece", 0) == pytest.approx((4 * 0.25 + 2 * 0.1) / 6)
    low, high = calibration_of(labels, scores[0])
    assert (low["rows"], low["positive_share"], high["rows"]) == (2, 0.0, 4)
    assert high["positive_share"] == 0.75
    assert high["interval"][0] < 0.75 < high["interval"][1]


def test_the_interval_of_a_calibration_error_is_around_it() -> None:
    # Resampling makes the error of scores that are right only larger.
    random = np.random.default_rng(1)
    scores = random.random((1, 2_000)).astype(np.float32)
    rows = BinaryRows(random.random(2_000) < scores[0], scores)
    (found,) = compared(rows, confidence=0.5)["ece"].versions
    assert found.value is not None
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


def test_certain_and_wrong_costs_much_and_not_everything() -> None:
    assert log_losses(np.array([0.0, 1.0])) == pytest.approx([15.942385, 0], abs=1e-6)


def test_curves_are_short_and_keep_their_area() -> None:
    rows = binary(50_000)
    roc = roc_of(rows.labels, rows.scores[1])
    x, y = roc["false_positive_rate"], roc["true_positive_rate"]
    assert len(x) <= 402
    assert metrics.auc(x, y) == pytest.approx(rows.value("roc_auc", 1), abs=1e-3)
    curve = precision_recall_of(rows.labels, rows.scores[1])
    assert curve["recall"] == sorted(curve["recall"])
    assert len(curve["recall"]) <= 201


# --- what is concluded


def test_the_better_version_is_better_by_every_metric_whichever_way_it_points() -> None:
    verdicts = {name: each.differences[0].verdict for name, each in compared(binary(5_000)).items()}
    assert {verdicts[name] for name in ("log_loss", "brier", "roc_auc", "accuracy", "f1")} == {
        "better"
    }
    turned = {
        name: each.differences[0].verdict
        for name, each in compared(binary(5_000, signal=(0.5, 0.2))).items()
    }
    assert {turned[name] for name in ("log_loss", "brier", "roc_auc", "accuracy", "f1")} == {
        "worse"
    }


@pytest.mark.parametrize("bias", [0.5, -0.5])
def test_bias_is_better_nearer_to_zero_on_either_side(bias: float) -> None:
    found = compared(regression(2_000, bias=bias))["bias"]
    assert found.versions[0].value == pytest.approx(bias, abs=0.1)
    assert found.differences[0].verdict == "better"
    assert found.differences[0].value is not None
    assert found.differences[0].value < 0


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("most_rows", [10_000, 200])
def test_a_version_does_not_differ_from_itself(task: str, most_rows: int) -> None:
    scored: Scored
    if task == "binary":
        rows = binary()
        scored = BinaryRows(rows.labels, rows.scores[[0, 0]])
    elif task == "multiclass":
        classes, _ = multiclass()
        scored = MulticlassRows(classes.labels, classes.predicted[[0, 0]], 4)
    else:
        numbers = regression()
        scored = RegressionRows(numbers.labels, numbers.predictions[[0, 0]])
    for each in compared(scored, most_rows=most_rows).values():
        (difference,) = each.differences
        assert difference.value == 0
        assert difference.interval == pytest.approx((0, 0), abs=1e-12)
        assert difference.verdict == "no difference shown"


def test_the_bootstrap_of_a_mean_agrees_with_students_t() -> None:
    rows = regression(2_000)
    found = compared(rows, resamples=2_000)["mae"]
    paired = stats.ttest_rel(rows.losses("mae", 1), rows.losses("mae", 0))
    expected = paired.confidence_interval(0.95)
    width = expected.high - expected.low
    assert found.method == "bootstrap"
    assert found.differences[0].interval == pytest.approx(tuple(expected), abs=0.1 * width)


def test_means_of_many_rows_take_students_t_on_all_of_them() -> None:
    rows = regression(2_000)
    found = compared(rows, most_rows=500)["mae"]
    paired = stats.ttest_rel(rows.losses("mae", 1), rows.losses("mae", 0))
    assert found.method == "t"
    assert found.differences[0].interval == pytest.approx(tuple(paired.confidence_interval(0.95)))
    assert found.versions[1].value == pytest.approx(rows.value("mae", 1))


def test_intervals_of_a_sample_are_as_wide_as_those_of_all_rows() -> None:
    rows = binary(20_000)
    whole, part = compared(rows), compared(rows, most_rows=2_000)
    for name in ("roc_auc", "average_precision", "f1", "recall"):
        assert part[name].method == "bootstrap of a sample"
        one, other = whole[name].differences[0], part[name].differences[0]
        assert other.value == one.value, "values are of all rows"
        assert one.interval is not None
        assert other.interval is not None
        widths = one.interval[1] - one.interval[0], other.interval[1] - other.interval[0]
        assert widths[1] == pytest.approx(widths[0], rel=0.3)
        assert other.interval[0] < one.value < other.interval[1]


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    true = compared(binary(400_000, seed=99), resamples=100, most_rows=1_000)["roc_auc"]
    held = 0
    for seed in range(60):
        found = compared(binary(300, seed=seed), resamples=200, confidence=0.9)["roc_auc"]
        interval = found.differences[0].interval
        assert interval is not None
        held += interval[0] <= (true.differences[0].value or 0) <= interval[1]
    # 90 % of 60; less than 46 or all 60 has a chance of 1 in 500 each.
    assert 46 <= held < 60


def test_pairing_makes_differences_narrower_than_the_values_say() -> None:
    rows = binary(2_000)
    almost = np.stack([rows.scores[0], np.clip(rows.scores[0] + 0.01 * rows.labels, 0, 1)])
    found = compared(BinaryRows(rows.labels, almost.astype(np.float32)))["brier"]
    assert found.differences[0].verdict == "better"
    (low, high), (base_low, base_high) = found.differences[0].interval, found.versions[0].interval  # type: ignore[misc]
    assert high - low < 0.1 * (base_high - base_low)


def test_one_seed_gives_one_answer() -> None:
    assert compared(binary(), seed=3) == compared(binary(), seed=3)
    assert compared(binary(), seed=3) != compared(binary(), seed=4)


def test_one_version_alone_is_measured() -> None:
    found = compared(binary(signal=(0.4,)))["roc_auc"]
    assert found.differences == ()
    assert found.versions[0].interval is not None


def test_three_versions_are_each_compared_with_the_first() -> None:
    found = compared(binary(5_000, signal=(0.3, 0.3, 0.6)))["roc_auc"]
    same, better = found.differences
    assert (same.verdict, better.verdict) == ("no difference shown", "better")


def test_what_is_not_defined_is_not_known_and_the_rest_is() -> None:
    rows = binary()
    found = compared(BinaryRows(np.zeros(ROWS, np.bool_), rows.scores))
    for name in ("roc_auc", "average_precision", "recall"):
        assert found[name].versions[0].value is None
        assert found[name].differences[0].value is None
        assert found[name].differences[0].interval is None
        assert found[name].differences[0].verdict == "not known"
    assert found["accuracy"].differences[0].interval is not None


def test_classes_without_scores_have_no_ranking_and_scores_beyond_one_no_calibration() -> None:
    rows = binary()
    classes = BinaryRows(rows.labels, (rows.scores > 0.5).astype(np.float32), ranked=False)
    assert [each.name for each in classes.metrics] == ["accuracy", "precision", "recall", "f1"]
    margins = BinaryRows(rows.labels, 5 * rows.scores, probabilities=False)
    names = {each.name for each in margins.metrics}
    assert "roc_auc" in names
    assert not names & {"log_loss", "brier", "ece"}
    assert margins.plots()["histogram"]["edges"][-1] == pytest.approx(margins.scores.max())


def test_few_rows_give_no_verdict() -> None:
    accuracy = Metric("accuracy", "", "higher")
    assert judge(accuracy, (0.1, 0.2), 29) == "not known"
    assert judge(accuracy, (0.1, 0.2), 30) == "better"
    assert judge(accuracy, (0.0, 0.2), 30) == "no difference shown"
    assert judge(accuracy, None, 30) == "not known"


def test_segments_are_those_with_the_most_rows_and_have_paired_intervals() -> None:
    rows = regression(1_000)
    codes = np.repeat(np.array([3, 1, 0, 2], np.int16), [500, 300, 199, 1])
    found = compare_segments(rows, codes, confidence=0.95, most=3)
    assert [(each.code, each.rows) for each in found] == [(3, 500), (1, 300), (0, 199)]
    (mae,) = found[1].comparisons
    mask = codes == 1
    paired = stats.ttest_rel(rows.losses("mae", 1)[mask], rows.losses("mae", 0)[mask])
    assert mae.differences[0].interval == pytest.approx(tuple(paired.confidence_interval(0.95)))
    assert mae.versions[0].value == pytest.approx(rows.losses("mae", 0)[mask].mean())
    alone = compare_segments(rows, codes, confidence=0.95)[-1]
    assert alone.rows == 1
    assert alone.comparisons[0].differences[0].interval is None
