from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.core.tensors import Datatype, TensorSpec, check_inputs, numpy_dtype
from rayprism.core.values import array_from_values, describe_value, values_from_array
from rayprism.errors import InvalidInput

INTEGERS = [datatype for datatype in Datatype if datatype.is_integer]
FLOATS = [datatype for datatype in Datatype if datatype.is_float]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(INTEGERS), st.lists(st.integers(-(2**65), 2**65), min_size=1))
def test_integers_are_exact_or_refused(datatype: Datatype, data: list[int]) -> None:
    limits = np.iinfo(numpy_dtype(datatype))
    wrong = [value for value in data if not limits.min <= value <= limits.max]
    if not wrong:
        assert array_from_values("x", datatype, (len(data),), data).tolist() == data
        return
    with pytest.raises(InvalidInput, match=str(wrong[0])):
        array_from_values("x", datatype, (len(data),), data)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(INTEGERS), st.integers(-300, 300))
def test_integers_near_the_limits(datatype: Datatype, offset: int) -> None:
    limits = np.iinfo(numpy_dtype(datatype))
    for edge in (limits.min, limits.max):
        value = edge + offset
        if limits.min <= value <= limits.max:
            assert array_from_values("x", datatype, (1,), [value])[0] == value
        else:
            with pytest.raises(InvalidInput, match="out of range"):
                array_from_values("x", datatype, (1,), [value])


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FLOATS), st.lists(st.floats() | st.integers() | st.none(), min_size=1))
def test_floats_are_the_nearest_or_refused(datatype: Datatype, data: list[Any]) -> None:
    plain = [math.nan if value is None else float(value) for value in data]
    with np.errstate(over="ignore"):
        want = np.array(plain).astype(numpy_dtype(datatype))
    overflows = any(
        math.isfinite(value) and not math.isfinite(float(cast))
        for value, cast in zip(plain, want, strict=True)
    )
    if overflows:
        with pytest.raises(InvalidInput, match="out of range"):
            array_from_values("x", datatype, (len(data),), data)
        return
    got = array_from_values("x", datatype, (len(data),), data)
    assert got.dtype == want.dtype
    if datatype is Datatype.BF16:
        # Through FP32, which numpy's own cast may skip: one unit in the last place apart.
        np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=2**-7)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("datatype", "largest", "above"),
    [
        (Datatype.FP16, 65519.99, 65520),
        (Datatype.FP32, 3.4028235677973362e38, 3.4028235677973366e38),
        (Datatype.BF16, 3.39e38, 3.4e38),
        (Datatype.FP64, 2**1023, 2**1024),
    ],
)
def test_the_largest_floats(datatype: Datatype, largest: float, above: float) -> None:
    for sign in (1, -1):
        assert np.isfinite(array_from_values("x", datatype, (1,), [sign * largest])).all()
        with pytest.raises(InvalidInput, match=f"out of range for {datatype}"):
            array_from_values("x", datatype, (1,), [sign * above])
        infinite = array_from_values("x", datatype, (1,), [sign * math.inf])
        assert np.isinf(infinite).all()


@pytest.mark.parametrize("datatype", [*INTEGERS, *FLOATS])
def test_a_truth_value_is_no_number(datatype: Datatype) -> None:
    for data in ([True, True], [1, True], [False, 2]):
        with pytest.raises(InvalidInput, match=r"is (true|false)"):
            array_from_values("x", datatype, (2,), data)


def test_a_long_string_among_numbers_costs_nothing() -> None:
    data: list[Any] = [0.0] * 100_000 + ["x" * 1_000_000]
    with pytest.raises(InvalidInput, match=r"value 100000 is the string 'x{40}'") as caught:
        array_from_values("x", Datatype.FP32, (100_001,), data)
    assert len(str(caught.value)) < 200


def test_arrays_are_new_aligned_and_writable() -> None:
    for datatype in Datatype:
        value: Any = {"BOOL": True, "BYTES": "a"}.get(datatype, 1)
        array = array_from_values("x", datatype, (2, 1), [[value], [value]])
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.shape == (2, 1)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ((2, 2), [[1, 2], [3]]),
        ((2, 2), [[1, 2], [3, 4], []]),
        ((2, 2), [[1, 2], 3]),
        ((2, 2), [1, [2], 3, 4]),
        ((2, 2), [[[1], [2]], [[3], [4]]]),
        ((4,), [[1, 2], [3, 4]]),
        ((4,), [[1, 2, 3, 4]]),
        ((1, 4), [[[1, 2, 3, 4]]]),
        ((1, 1, 2), [[1, 2]]),
        ((2, 0), [[]]),
        ((0, 2), [[1, 2]]),
        ((), [[1]]),
    ],
)
def test_nesting_is_the_shapes_or_none(shape: tuple[int, ...], data: list[Any]) -> None:
    for datatype in (Datatype.INT32, Datatype.BYTES):
        values = data if datatype is Datatype.INT32 else as_strings(data)
        with pytest.raises(InvalidInput, match="input 'x'"):
            array_from_values("x", datatype, shape, values)


def as_strings(data: Any) -> Any:
    return [as_strings(item) for item in data] if isinstance(data, list) else str(data)


def test_shapes_no_array_can_have() -> None:
    for shape in ((0, 2**63), (0, 2**40, 2**40), (0,) * 100):
        for datatype in (Datatype.FP32, Datatype.BYTES):
            with pytest.raises(InvalidInput, match="beyond what an array can have"):
                array_from_values("x", datatype, shape, [])


def test_nan_comes_back_as_nan() -> None:
    for datatype in FLOATS:
        array = array_from_values("x", datatype, (2,), [None, 1])
        assert math.isnan(values_from_array(array)[0])
        assert values_from_array(array)[1] == 1.0


def test_values_from_array() -> None:
    assert values_from_array(np.array([[1, 2]], np.uint8)) == [1, 2]
    assert values_from_array(np.array([0.5], ml_dtypes.bfloat16)) == [0.5]
    assert values_from_array(np.array([b"a", "é"], np.object_)) == ["a", "é"]
    assert values_from_array(np.array(["a"])) == ["a"]
    with pytest.raises(ValueError, match="utf-8"):
        values_from_array(np.array([b"\xff"], np.object_))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "the number 1.5"),
        (10**60, f"the number 1{'0' * 39}"),
        ("a\n", r"the string 'a\n'"),
        ([], "an empty list"),
        ([1], "a list"),
        ({}, "an object"),
        (b"", "bytes"),
    ],
)
def test_describe_value(value: Any, text: str) -> None:
    assert describe_value(value) == text


@pytest.mark.parametrize("datatype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (0, 5)])
def test_nan_is_found_wherever_it_is(datatype: Datatype, shape: tuple[int, int]) -> None:
    """The check for NaN is a trick with minima; it has to see every place, and no infinity."""
    spec = TensorSpec("x", datatype, (-1, 5), allow_nan=False)
    dtype = numpy_dtype(datatype)
    base = np.array([np.inf, -np.inf, 0, 1, -1]).astype(dtype)
    array = np.broadcast_to(base, shape).copy()
    if shape[0]:
        assert check_inputs([spec], {"x": array}, batched=True) == shape[0]
    for index in np.ndindex(shape):
        holed = array.copy()
        holed[index] = dtype.type(np.nan)
        with pytest.raises(InvalidInput, match="holds NaN"):
            check_inputs([spec], {"x": holed}, batched=True)


@pytest.mark.parametrize(
    ("datatype", "bits"),
    [
        (Datatype.FP16, np.uint16(0x7D00)),
        (Datatype.BF16, np.uint16(0x7FA0)),
        (Datatype.FP32, np.uint32(0x7FA00000)),
        (Datatype.FP64, np.uint64(0x7FF4000000000000)),
    ],
)
def test_a_signalling_nan_is_found_without_a_warning(datatype: Datatype, bits: Any) -> None:
    """Raw tensors bring any bits; warnings fail this test."""
    array = np.full((1, 5), bits).view(numpy_dtype(datatype))
    spec = TensorSpec("x", datatype, (-1, 5), allow_nan=False)
    with pytest.raises(InvalidInput, match="holds NaN"):
        check_inputs([spec], {"x": array}, batched=True)
