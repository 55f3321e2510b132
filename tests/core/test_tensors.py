"""Named arrays: what is refused and how it is said, and the laws of joining and splitting."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.core.tensors import (
    Array,
    Datatype,
    RaggedAxis,
    Tensors,
    TensorSpec,
    batch_key,
    check_inputs,
    concatenate,
    count_rows,
    datatype_of,
    item_size_bytes,
    numpy_dtype,
    ragged_length,
    split_rows,
    suggest,
)
from rayprism.errors import InvalidInput

A = TensorSpec("a", Datatype.FP32, (-1, 2))
B = TensorSpec("b", Datatype.INT64, (-1, -1))
T = TensorSpec("t", Datatype.BYTES, (-1, 1))


def zeros(rows: int = 3, **changes: Any) -> Tensors:
    """Inputs that fit A and B, with some of them replaced; None takes one away."""
    tensors: dict[str, Any] = {
        "a": np.zeros((rows, 2), np.float32),
        "b": np.zeros((rows, 5), np.int64),
        **changes,
    }
    return {name: array for name, array in tensors.items() if array is not None}


def test_rows_are_counted() -> None:
    assert check_inputs([A, B], zeros(3), batched=True) == 3
    assert check_inputs([A, B], dict(reversed(zeros(3).items())), batched=True) == 3


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"a": None}, "input 'a' is missing (FP32, shape [-1, 2])"),
    ({"c": np.zeros(1)}, "input 'c' is not an input of this model. Its inputs: a, b"),
    ({"a": np.zeros((3, 2))}, "input 'a': datatype is FP64, allowed is FP32"),
    ({"a": np.zeros((3, 2), np.complex64)}, "input 'a': datatype is complex64, allowed is FP32"),
    ({"a": np.full((3, 2), b"x", object)}, "input 'a': datatype is BYTES, allowed is FP32"),
    ({"a": np.zeros(3, np.float32)}, "shape [3] has 1 axes, allowed is [-1, 2] (-1: any size)"),
    ({"a": np.zeros((), np.float32)}, "shape [] has 0 axes"),
    ({"a": np.zeros((3, 2, 1), np.float32)}, "shape [3, 2, 1] has 3 axes"),
    (
        {"a": np.zeros((3, 4), np.float32)},
        "shape [3, 4] does not fit [-1, 2] at axis 1: got 4, allowed is 2",
    ),
    ({"b": np.zeros((3, 0), np.int64)}, "at axis 1: got 0, allowed is any size from 1"),
    (
        {"b": np.zeros((4, 5), np.int64)},
        "input 'b' has 4 rows, 'a' has 3: all inputs need the same number of rows",
    ),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_each_fault_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_inputs([A, B], zeros(3, **changes), batched=True)
    assert said in str(caught.value)
    assert ";" not in str(caught.value)


def test_all_faults_come_at_once() -> None:
    tensors = zeros(3, a=np.zeros((3, 2)), b=None, aa=np.zeros(1))
    with pytest.raises(InvalidInput) as caught:
        check_inputs([A, B, T], tensors, batched=True)
    said = str(caught.value).split("; ")
    assert len(said) == 4
    assert "datatype is FP64" in said[0]
    assert "'b' is missing" in said[1]
    assert "'t' is missing" in said[2]
    assert "Did you mean 'a'?" in said[3]


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidInput, match="0 rows: a request needs at least 1 row"):
        check_inputs([A, B], zeros(0), batched=True)


def test_without_rows_all_axes_are_the_model_s() -> None:
    one = TensorSpec("a", Datatype.FP32, (1, 2))
    assert check_inputs([one], {"a": np.zeros((1, 2), np.float32)}, batched=False) == 1
    with pytest.raises(InvalidInput, match="at axis 0: got 2, allowed is 1"):
        check_inputs([one], {"a": np.zeros((2, 2), np.float32)}, batched=False)
    # The sizes of axis 0 need not agree, where it is not the row.
    assert check_inputs([A, B], zeros(3, b=np.zeros((1, 1), np.int64)), batched=False) == 1
    scalar = TensorSpec("s", Datatype.FP32, ())
    assert check_inputs([scalar], {"s": np.zeros((), np.float32)}, batched=False) == 1


def test_a_fixed_batch_leaves_clients_free() -> None:
    fixed = TensorSpec("a", Datatype.FP32, (4, 2))
    for rows in (1, 4, 9):
        assert check_inputs([fixed], {"a": np.zeros((rows, 2), np.float32)}, batched=True) == rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
def test_nan_is_refused_where_it_is_forbidden(dtype: Any) -> None:
    datatype = datatype_of(np.zeros(1, dtype))
    strict = TensorSpec("a", datatype, (-1, 2), allow_nan=False)
    free = TensorSpec("a", datatype, (-1, 2))
    array = np.ones((3, 2), dtype)
    assert check_inputs([strict], {"a": array}, batched=True) == 3
    array[2, 1] = np.inf
    assert check_inputs([strict], {"a": array}, batched=True) == 3
    array[0, 1] = np.nan
    with pytest.raises(InvalidInput, match="input 'a' holds NaN"):
        check_inputs([strict], {"a": array}, batched=True)
    assert check_inputs([free], {"a": array}, batched=True) == 3


def test_ragged_inputs_agree_on_their_length() -> None:
    ragged = {"b": RaggedAxis(1), "c": RaggedAxis(1)}
    c = TensorSpec("c", Datatype.INT64, (-1, -1))
    tensors = zeros(3, c=np.zeros((3, 5), np.int64))
    assert check_inputs([A, B, c], tensors, batched=True, ragged=ragged) == 3
    assert ragged_length(tensors, ragged) == 5
    tensors["c"] = np.zeros((3, 4), np.int64)
    with pytest.raises(InvalidInput, match="'c' has length 4 along axis 1, 'b' has 5"):
        check_inputs([A, B, c], tensors, batched=True, ragged=ragged)
    assert ragged_length(tensors, {}) == 1


@pytest.mark.parametrize("datatype", list(Datatype))
def test_datatypes_and_dtypes_belong_together(datatype: Datatype) -> None:
    dtype = numpy_dtype(datatype)
    assert datatype_of(np.zeros(1, dtype)) is datatype
    size = item_size_bytes(datatype)
    assert size is None if datatype is Datatype.BYTES else size == dtype.itemsize
    assert datatype.is_float == (datatype in ("FP16", "BF16", "FP32", "FP64"))
    assert datatype.is_integer == ("INT" in datatype)


def test_strings_count_as_bytes_and_strangers_do_not() -> None:
    assert datatype_of(np.array(["a"])) is Datatype.BYTES
    assert datatype_of(np.array([b"a"])) is Datatype.BYTES
    for array in (np.zeros(1, np.complex128), np.zeros(1, "datetime64[s]"), np.zeros(1, "V4")):
        with pytest.raises(ValueError, match="has no counterpart"):
            datatype_of(array)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("", (1,)), ("a\n", (1,)), ("a\x7f", (1,)), ("n" * 257, (1,)), ("a", (0,)), ("a", (-2,))],
)
def test_specs_check_themselves(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tensor name|shape"):
        TensorSpec(name, Datatype.FP32, shape)
    TensorSpec("ein Name: ä/0", Datatype.FP32, ())


def test_the_row_is_never_ragged() -> None:
    with pytest.raises(ValueError, match="axis 0 is the row"):
        RaggedAxis(0)


def test_near_misses_are_suggested() -> None:
    assert suggest("flihgts", ["flights", "digits"]) == " Did you mean 'flights'?"
    assert suggest("FLIGHTS", ["flights"]) == " Did you mean 'flights'?"
    assert suggest("weather", ["flights"]) == ""
    assert suggest("x", []) == ""


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Tensors], dict[str, RaggedAxis]]:
    """Requests that may share a batch: an input of fixed shape, two ragged ones, and text."""
    axis = draw(st.integers(1, 2))
    width = draw(st.integers(1, 3))
    ragged = {"ids": RaggedAxis(axis, draw(st.integers(-3, 3))), "mask": RaggedAxis(1)}
    parts: list[Tensors] = []
    for number in range(draw(st.integers(1, 6))):
        rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        shape = (rows, width, length) if axis == 2 else (rows, length, width)
        start = number * 1000 + 1
        text = np.empty((rows, 1), object)
        text[:, 0] = [f"{number}-{row}".encode() for row in range(rows)]
        parts.append(
            {
                "x": np.arange(start, start + rows * 2, dtype=np.float32).reshape(rows, 2),
                "ids": np.arange(start, start + rows * width * length).reshape(shape),
                "mask": np.ones((rows, length), draw(st.sampled_from([np.int64])), order="C"),
                "text": text,
            }
        )
    return parts, ragged


@given(requests())
def test_a_batch_holds_every_row_once_in_order(
    drawn: tuple[list[Tensors], dict[str, RaggedAxis]],
) -> None:
    parts, ragged = drawn
    batch = concatenate(parts, ragged)
    longest = max(ragged_length(part, ragged) for part in parts)
    assert count_rows(batch) == sum(count_rows(part) for part in parts)
    assert ragged_length(batch, ragged) == longest
    start = 0
    for part in parts:
        stop = start + count_rows(part)
        back = split_rows(batch, start, stop)
        for name, array in part.items():
            assert batch[name].dtype == array.dtype
            own = tuple(slice(size) for size in array.shape)
            np.testing.assert_array_equal(back[name][own], array)
            rule = ragged.get(name)
            if rule is None:
                assert back[name].shape == array.shape
            else:
                beyond = [slice(None)] * array.ndim
                beyond[rule.axis] = slice(array.shape[rule.axis], None)
                assert (back[name][tuple(beyond)] == rule.value).all()
        start = stop


@given(requests())
def test_requests_that_may_share_a_batch_have_one_key(
    drawn: tuple[list[Tensors], dict[str, RaggedAxis]],
) -> None:
    parts, ragged = drawn
    assert len({batch_key(part, ragged) for part in parts}) == 1
    other = dict(parts[0])
    other["x"] = np.zeros((count_rows(other), 3), np.float32)
    assert batch_key(other, ragged) != batch_key(parts[0], ragged)
    # Without the rules, another length is another key.
    lengths = {part["mask"].shape[1] for part in parts}
    assert len({batch_key(part, {}) for part in parts}) == len(lengths)


@given(st.lists(st.integers(0, 12), max_size=6))
def test_splits_partition_the_rows(cuts: list[int]) -> None:
    tensors: Tensors = {"a": np.arange(24).reshape(12, 2), "b": np.arange(12)}
    edges = [0, *sorted(cuts), 12]
    pieces = [split_rows(tensors, a, b) for a, b in pairwise(edges)]
    for name, array in tensors.items():
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), array)


def test_one_request_is_not_copied_and_splits_are_views() -> None:
    tensors = zeros(3)
    assert concatenate([tensors], {"b": RaggedAxis(1)}) is tensors
    assert np.shares_memory(split_rows(tensors, 1, 2)["a"], tensors["a"])


@pytest.mark.parametrize("datatype", [d for d in Datatype if d not in ("BYTES", "BOOL")])
def test_every_number_can_be_padded(datatype: Datatype) -> None:
    def ones(length: int) -> Array:
        return np.ones((1, length), numpy_dtype(datatype))

    batch = concatenate([{"a": ones(1)}, {"a": ones(3)}], {"a": RaggedAxis(1, 2)})
    assert batch["a"].dtype == numpy_dtype(datatype)
    assert batch["a"].astype(np.float64).tolist() == [[1, 2, 2], [1, 1, 1]]


def test_nothing_has_no_rows() -> None:
    assert count_rows({}) == 0


def test_the_order_of_inputs_is_no_part_of_the_batch_key() -> None:
    a, b = np.zeros((1, 3)), np.zeros((1, 5))
    assert batch_key({"a": a, "b": b}, {}) == batch_key({"b": b, "a": a}, {})
    assert batch_key({"a": a, "b": b}, {}) != batch_key({"b": a, "a": b}, {})
