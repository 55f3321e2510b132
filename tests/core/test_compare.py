"""Whether two answers agree, by each rule."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from rayprism.core.compare import Difference, Tolerance, compare_outputs

CLOSE = Tolerance()


def differ(want: Any, got: Any, tolerance: Tolerance = CLOSE) -> str:
    """The message of the one difference, or an empty string."""
    found = compare_outputs({"y": np.asarray(want)}, {"y": np.asarray(got)}, tolerance)
    assert len(found) <= 1
    return found[0].message if found else ""


FLOATS = stnp.arrays(
    np.float32,
    stnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements=st.floats(width=32),
)


@given(FLOATS, st.sampled_from(["close", "exact", "top1"]))
def test_an_answer_agrees_with_itself(array: Any, rule: Any) -> None:
    assert differ(array, array.copy(), Tolerance(rule)) == ""


@given(
    stnp.arrays(
        np.float32,
        stnp.array_shapes(min_dims=1, max_side=4),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_a_finite_answer_agrees_with_itself_by_cosine(array: Any) -> None:
    assert differ(array, array.copy(), Tolerance("cosine", cosine=0.999)) == ""


@given(st.floats(-1e6, 1e6), st.floats(0, 1e3), st.floats(0, 1), st.floats(0, 1e4))
def test_close_is_the_rule_that_is_written(
    want: float, absolute: float, relative: float, gap: float
) -> None:
    got = want + gap
    allowed = absolute + relative * abs(want)
    message = differ([want], [got], Tolerance(absolute=absolute, relative=relative))
    assert (message == "") == (abs(got - want) <= allowed)


def test_the_worst_value_is_shown_with_its_place() -> None:
    want = np.zeros((2, 3), np.float32)
    got = want.copy()
    got[0, 1], got[1, 2] = 0.5, -2
    assert differ(want, got) == (
        "2 of 6 values are off; the worst, at [1, 2], is -2, expected 0 "
        "(absolute 1e-05, relative 0.0001)"
    )


def test_not_a_number_agrees_only_with_itself() -> None:
    nan, inf = float("nan"), float("inf")
    for rule in ("close", "exact"):
        tolerance = Tolerance(rule)  # type: ignore[arg-type]
        assert differ([nan, inf, -inf], [nan, inf, -inf], tolerance) == ""
        for want, got in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1e30), (1.0, inf)):
            assert "1 of 2 values" in differ([want, 0.0], [got, 0.0], tolerance)


def test_shape_and_datatype_have_to_agree() -> None:
    assert differ(np.zeros((2, 3)), np.zeros((3, 2))) == "shape is [3, 2], expected [2, 3]"
    assert differ(np.zeros(2, np.float32), np.zeros(2)) == "datatype is float64, expected float32"
    assert differ(np.zeros((0, 3)), np.zeros((0, 3))) == ""


def test_what_is_no_float_is_exact_under_every_rule() -> None:
    wide = {"absolute": 100.0, "relative": 1.0}
    for rule in ("close", "exact", "cosine"):
        tolerance = Tolerance(rule, **wide)  # type: ignore[arg-type]
        assert differ([1, 2], [1, 2], tolerance) == ""
        assert differ([1, 2], [1, 3], tolerance) == (
            "1 of 2 values differ; the first, at [1], is np.int64(3), expected np.int64(2)"
        )
        assert differ([True], [False], tolerance) != ""
        text = np.array([b"a", b"b"], object)
        assert differ(text, text.copy(), tolerance) == ""
        assert "is b'c', expected b'b'" in differ(text, np.array([b"a", b"c"], object), tolerance)


def test_exact_is_exact() -> None:
    assert differ([1.0], [np.nextafter(1.0, 2)], Tolerance("exact")) != ""
    assert differ([0.0], [-0.0], Tolerance("exact")) == ""


def test_top1_looks_at_the_largest_of_each_row() -> None:
    want = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    top1 = Tolerance("top1")
    assert differ(want, want * 3 + 1, top1) == ""
    assert differ(want, 1 - want, top1) == ("the largest value is at another index in 3 of 3 rows")
    assert "in 1 of 3 rows" in differ(want, [[0, 1], [1, 0], [1, 0]] * np.ones(1), top1)
    assert differ(np.array([[1, 5]]), np.array([[0, 9]]), top1) == ""
    assert differ(np.array([b"a"], object), np.array([b"b"], object), top1) != ""


def test_cosine_looks_at_the_direction_of_each_row() -> None:
    want = np.array([[1.0, 0.0], [0.0, 2.0]])
    tolerance = Tolerance("cosine", cosine=0.99)
    assert differ(want, want * 7, tolerance) == ""
    turned = want.copy()
    turned[1] = [1.0, 1.0]
    assert differ(want, turned, tolerance) == (
        "cosine similarity is 0.707107, allowed is at least 0.99"
    )
    zero = np.zeros((1, 2))
    assert differ(zero, zero, tolerance) == ""
    assert differ(zero, np.ones((1, 2)), tolerance) != ""
    assert differ(np.ones((1, 2)), zero, tolerance) != ""
    assert differ([[np.nan, 1.0]], [[1.0, 1.0]], tolerance) != ""
    assert differ([[np.nan, np.inf]], [[np.nan, np.inf]], tolerance) == ""
    assert differ([[np.inf, 1.0]], [[1.0, 1.0]], tolerance) != ""


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_narrow_floats_are_floats(dtype: Any) -> None:
    want = np.array([[1, 2, np.nan]], dtype)
    assert differ(want, want.copy()) == ""
    assert differ(want, want.copy(), Tolerance("exact")) == ""
    near = np.array([[1, 2.01, np.nan]], dtype)
    assert differ(want, near, Tolerance(absolute=0.05)) == ""
    assert differ(want, near, Tolerance("exact")) != ""


def test_outputs_are_told_by_name() -> None:
    one, two = np.ones(1), np.full(1, 2.0)
    want = {"a": one, "b": one, "c": one}
    got = {"b": two, "a": one, "extra": one}
    found = compare_outputs(want, got, CLOSE)
    assert [difference.output for difference in found] == ["b", "c"]
    assert str(found[1]) == "output 'c': it is missing"
    assert found[1] == Difference("c", "it is missing")
    assert compare_outputs({}, got, CLOSE) == []


@pytest.mark.parametrize(
    "arguments", [{"absolute": -1.0}, {"relative": -0.1}, {"cosine": 1.5}, {"cosine": -0.1}]
)
def test_tolerances_check_themselves(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"tolerance|cosine"):
        Tolerance(**arguments)  # type: ignore[arg-type]
