"""Columns as inputs: nothing is lost or made up, and only the rows at fault are left out."""

from __future__ import annotations

import datetime
import decimal
import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.core.tensors import Datatype, TensorSpec, check_inputs, numpy_dtype
from rayprism.errors import ConfigInvalid
from rayprism.offline.columns import ColumnMap, Mapped
from rayprism.offline.outputs import output_fields
from rayprism.offline.rows import RaggedRows
from tests.offline.manifests import manifest

NUMBERS = [d for d in Datatype if d is not Datatype.BYTES]
SCORE = TensorSpec("score", Datatype.FP32, (-1, 1))


def column_map(schema: pa.Schema, *inputs: TensorSpec, **options: Any) -> ColumnMap:
    batched = options.pop("batched", True)
    batching = {} if batched else {"batched": False, "max_rows": 1}
    outputs = options.pop("outputs", [SCORE])
    return ColumnMap.plan(schema, manifest(list(inputs), outputs, **batching), **options)


def read(array: Any, datatype: Datatype, shape: tuple[int, ...] = (-1,), **spec: Any) -> Mapped:
    table = pa.table({"x": array})
    return column_map(table.schema, TensorSpec("x", datatype, shape, **spec)).tensors(table)


def codes(mapped: Mapped) -> dict[int, str]:
    assert np.flatnonzero(~mapped.ok).tolist() == list(mapped.reasons)
    return {row: fault.code for row, fault in mapped.reasons.items()}


def problem(schema: pa.Schema, *inputs: TensorSpec, **options: Any) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        column_map(schema, *inputs, **options)
    return str(caught.value)


# --- the fast path


def test_columns_that_fit_are_views_of_the_table() -> None:
    numbers = np.arange(5, dtype=np.float32)
    lists = np.arange(10, dtype=np.int64)
    table = pa.table(
        {
            "a": numbers,
            "b": pa.FixedSizeListArray.from_arrays(pa.array(lists), 2),
            "c": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6, 8, 10], pa.int32()), lists),
        }
    )
    mapped = column_map(
        table.schema,
        TensorSpec("a", Datatype.FP32, (-1, 1)),
        TensorSpec("b", Datatype.INT64, (-1, 2)),
        TensorSpec("c", Datatype.INT64, (-1, 2)),
    ).tensors(table)
    assert mapped.ok.all()
    assert np.shares_memory(mapped.tensors["a"], numbers)
    assert mapped.tensors["a"].shape == (5, 1)
    for name in ("b", "c"):
        assert np.shares_memory(mapped.tensors[name], lists)
        np.testing.assert_array_equal(mapped.tensors[name], lists.reshape(5, 2))


def test_a_slice_of_several_chunks_is_read_where_it_begins() -> None:
    column = pa.chunked_array([[1.0, 2.0], [3.0, 4.0, 5.0]], pa.float32())
    lists = pa.chunked_array([[[1], [2]], [[3], [4], [5]]], pa.list_(pa.float32()))
    table = pa.table({"a": column, "b": lists}).slice(1, 3)
    mapped = column_map(
        table.schema,
        TensorSpec("a", Datatype.FP32, (-1,)),
        TensorSpec("b", Datatype.FP32, (-1, 1)),
    ).tensors(table)
    assert mapped.tensors["a"].tolist() == [2, 3, 4]
    assert mapped.tensors["b"].tolist() == [[2], [3], [4]]


def test_a_batch_and_a_table_without_rows_are_read() -> None:
    table = pa.table({"x": pa.array([1.0], pa.float32())})
    planned = column_map(table.schema, TensorSpec("x", Datatype.FP32, (-1,)))
    assert planned.tensors(table.to_batches()[0]).tensors["x"].tolist() == [1]
    nothing = planned.tensors(table.slice(0, 0))
    assert nothing.tensors["x"].shape == (0,)
    assert len(nothing.ok) == 0
    for kind in (pa.list_(pa.float32()), pa.string(), pa.list_(pa.float32(), 2)):
        shape = (-1,) if kind == pa.string() else (-1, 2)
        assert len(read(pa.array([], kind), Datatype.FP32, shape).tensors["x"]) == 0


# --- casts lose nothing


def fits(value: int | float | bool, datatype: Datatype) -> bool:
    """What the rules of the module say, in exact arithmetic."""
    target = numpy_dtype(datatype)
    if datatype is Datatype.BOOL:
        return value in (0, 1)
    if datatype.is_integer:
        limits = np.iinfo(target)
        return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max
    with np.errstate(all="ignore"):
        if isinstance(value, float):
            return not math.isfinite(value) or bool(np.isfinite(np.float64(value).astype(target)))
        narrow = float(np.array(value, object).astype(np.float64).astype(target))
        return math.isfinite(narrow) and Fraction(narrow) == value


EDGES = sorted(
    {
        sign * (2**power + delta)
        for power in (0, 7, 8, 10, 11, 12, 15, 16, 24, 25, 31, 32, 53, 62, 63)
        for delta in (-1, 0, 1)
        for sign in (-1, 1)
    }
)


@given(
    st.lists(st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1)),
    st.sampled_from(NUMBERS),
    st.sampled_from([pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()]),
)
def test_integers_pass_exactly_where_the_datatype_holds_them(
    values: list[int], datatype: Datatype, kind: pa.DataType
) -> None:
    limits = np.iinfo(kind.to_pandas_dtype())
    values = [value for value in values if limits.min <= value <= limits.max]
    mapped = read(pa.array(values, kind), datatype)
    assert mapped.ok.tolist() == [fits(value, datatype) for value in values]
    got = mapped.tensors["x"]
    assert got.dtype == numpy_dtype(datatype)
    good = [value for value, ok in zip(values, mapped.ok, strict=True) if ok]
    assert [int(value) for value in got] == good
    assert set(codes(mapped).values()) <= {"out_of_range"}


@given(
    st.lists(st.floats() | st.sampled_from(EDGES).map(float)),
    st.sampled_from([d for d in NUMBERS if d is not Datatype.BOOL]),
    st.sampled_from([pa.float16(), pa.float32(), pa.float64()]),
)
def test_floats_round_to_narrower_floats_and_are_whole_as_integers(
    values: list[float], datatype: Datatype, kind: pa.DataType
) -> None:
    with np.errstate(all="ignore"):
        source = np.array(values, kind.to_pandas_dtype())
    mapped = read(pa.array(source), datatype)
    assert mapped.ok.tolist() == [fits(float(value), datatype) for value in source]
    with np.errstate(all="ignore"):
        expected = source[mapped.ok].astype(numpy_dtype(datatype))
    np.testing.assert_array_equal(
        mapped.tensors["x"].astype(np.float64), expected.astype(np.float64)
    )


def test_what_does_not_fit_says_why() -> None:
    mapped = read([1, 16777217, 3], Datatype.FP32)
    assert codes(mapped) == {1: "out_of_range"}
    reason = mapped.reasons[1].reason
    assert reason.startswith("column 'x': got the number 16777217, which FP32 cannot hold")
    assert "exactly" in reason
    mapped = read([1.0, 1e39, 2.5], Datatype.INT8)
    assert codes(mapped) == {1: "out_of_range", 2: "out_of_range"}
    assert "from -128 to 127" in mapped.reasons[2].reason


def test_booleans_are_0_and_1() -> None:
    for datatype in NUMBERS:
        assert read([True, False], datatype).tensors["x"].tolist() == [1, 0]
    mapped = read([0, 1, 2], Datatype.BOOL)
    assert mapped.tensors["x"].tolist() == [False, True]
    assert codes(mapped) == {2: "out_of_range"}


def test_decimals_become_floats_or_whole_numbers() -> None:
    fractions = pa.array([decimal.Decimal("1.5"), None], pa.decimal128(10, 2))
    mapped = read(fractions, Datatype.FP64)
    assert mapped.tensors["x"].tolist() == [1.5]
    assert codes(mapped) == {1: "missing_value"}
    whole = pa.array([decimal.Decimal(7), decimal.Decimal(300)], pa.decimal128(10, 0))
    mapped = read(whole, Datatype.UINT8)
    assert mapped.tensors["x"].tolist() == [7]
    assert codes(mapped) == {1: "wrong_value"}


# --- nulls and NaN


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_nulls_of_float_columns_are_nan_where_the_input_takes_nan(kind: pa.DataType) -> None:
    column = pa.array(np.array([1, 2, math.nan], kind.to_pandas_dtype()), mask=np.arange(3) == 1)
    taken = read(column, Datatype.FP32, allow_nan=True)
    assert taken.ok.all()
    np.testing.assert_array_equal(taken.tensors["x"], np.float32([1, math.nan, math.nan]))
    refused = read(column, Datatype.FP32, allow_nan=False)
    assert codes(refused) == {1: "missing_value", 2: "nan_value"}
    assert refused.tensors["x"].tolist() == [1]


@pytest.mark.parametrize(
    ("column", "datatype"),
    [
        (pa.array([1, None]), Datatype.FP32),
        (pa.array([1, None]), Datatype.INT64),
        (pa.array([True, None]), Datatype.BOOL),
        (pa.array([1.0, None]), Datatype.INT32),
        (pa.array(["1", None]), Datatype.INT32),
        (pa.array(["1", ""]), Datatype.INT32),
        (pa.array(["1", " "]), Datatype.BOOL),
        (pa.array(["1", None]), Datatype.BYTES),
        (pa.array([b"1", None]), Datatype.BYTES),
        (pa.array([1, None]).dictionary_encode(), Datatype.INT64),
        (pa.array([[1.0], None], pa.list_(pa.float32())), Datatype.FP32),
        (pa.array([[1.0], None], pa.list_(pa.float32(), 1)), Datatype.FP32),
    ],
)
def test_other_missing_values_are_faults(column: pa.Array, datatype: Datatype) -> None:
    shape = (-1, 1) if pa.types.is_nested(column.type) else (-1,)
    mapped = read(column, datatype, shape)
    assert codes(mapped) == {1: "missing_value"}
    assert len(mapped.tensors["x"]) == 1


# --- text


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_text_is_parsed(kind: pa.DataType) -> None:
    def parsed(values: list[Any], datatype: Datatype) -> Mapped:
        return read(pa.array(values, kind), datatype)

    mapped = parsed(["1", " -2 ", "+3", "4.0", "5.5", "x", "0x10", "300", "1e2", "9" * 30],
                    Datatype.INT8)  # fmt: skip
    assert mapped.tensors["x"].tolist() == [1, -2, 3, 4]
    assert codes(mapped) == dict.fromkeys(range(4, 10), "wrong_value")
    reason = mapped.reasons[5].reason
    assert reason == (
        "column 'x': got the string 'x', allowed for INT8 are whole numbers from -128 to 127"
    )
    mapped = parsed(["1.5", "nan", "-inf", "", "1e39", "1,5", " 2 "], Datatype.FP32)
    np.testing.assert_array_equal(
        mapped.tensors["x"], np.float32([1.5, math.nan, -math.inf, math.nan, 2])
    )
    assert codes(mapped) == {4: "out_of_range", 5: "wrong_value"}
    mapped = parsed(["true", "False", "1", "0", "yes"], Datatype.BOOL)
    assert mapped.tensors["x"].tolist() == [True, False, True, False]
    assert codes(mapped) == {4: "wrong_value"}
    assert read(pa.array(["nan", ""], kind), Datatype.FP64, allow_nan=False).reasons.keys() == {
        0,
        1,
    }


@given(
    st.lists(
        st.integers(-(2**65), 2**65).map(str)
        | st.floats().map(repr)
        | st.text(alphabet="01.+-xe ", max_size=5)
    ),
    st.sampled_from([Datatype.INT64, Datatype.UINT64, Datatype.INT16]),
)
def test_text_becomes_just_the_whole_number_that_it_says(
    values: list[str], datatype: Datatype
) -> None:
    mapped = read(pa.array(values, pa.string()), datatype)
    got = iter(mapped.tensors["x"].tolist())
    limits = np.iinfo(numpy_dtype(datatype))
    for row, value in enumerate(values):
        head, _, tail = value.strip().partition(".")
        digits = head[1:] if head[:1] in ("+", "-") else head
        whole = digits.isdigit() and len(digits) <= 20 and not tail.strip("0")
        if whole and limits.min <= int(head) <= limits.max:
            assert mapped.ok[row]
            assert next(got) == int(head)
        else:
            assert not mapped.ok[row]
            missing = not value.strip()
            assert mapped.reasons[row].code == ("missing_value" if missing else "wrong_value")
    assert next(got, None) is None


def test_text_and_bytes_become_bytes() -> None:
    values = ["a", "é", "", "a"]
    raw = [value.encode() for value in values]
    for column in (
        pa.array(values),
        pa.array(values, pa.large_string()),
        pa.array(values, pa.string_view()),
        pa.array(values).dictionary_encode(),
        pa.chunked_array([values[:1], values[1:]]).dictionary_encode(),
        pa.array(raw),
        pa.array(raw, pa.large_binary()),
    ):
        got = read(column, Datatype.BYTES).tensors["x"]
        assert got.dtype == object
        assert got.tolist() == raw
    fixed = pa.array([b"ab", b"cd"], pa.binary(2))
    assert read(fixed, Datatype.BYTES).tensors["x"].tolist() == [b"ab", b"cd"]
    lists = read(pa.array([["a", "b"], ["c"], ["d", None]]), Datatype.BYTES, (-1, 2))
    assert lists.tensors["x"].tolist() == [[b"a", b"b"]]
    assert codes(lists) == {1: "wrong_shape", 2: "missing_value"}


def test_text_stays_text_for_a_runtime_that_wants_it() -> None:
    table = pa.table(
        {"t": pa.array(["ä", None, "b", "ä"]), "b": pa.array([b"1", b"2", b"3", b"4"])}
    )
    inputs = [TensorSpec(name, Datatype.BYTES, (-1,)) for name in "tb"]
    mapped = column_map(table.schema, *inputs).tensors(table, as_text=True)
    assert mapped.tensors["t"].tolist() == ["ä", "b", "ä"]
    assert mapped.tensors["b"].tolist() == [b"1", b"3", b"4"]
    assert codes(mapped) == {1: "missing_value"}


def test_dictionary_columns_of_numbers_are_decoded() -> None:
    column = pa.array([7, 300, 7]).dictionary_encode()
    mapped = read(column, Datatype.UINT8)
    assert mapped.tensors["x"].tolist() == [7, 7]
    assert codes(mapped) == {1: "out_of_range"}


# --- lists


def test_lists_of_the_wrong_length_or_with_a_bad_value_are_faults_of_their_row() -> None:
    column = pa.array([[1, 2], [3], [], None, [4, None], [5, 6, 7], [8, 2**40], [9, 10]])
    mapped = read(column, Datatype.INT32, (-1, 2))
    assert mapped.tensors["x"].tolist() == [[1, 2], [9, 10]]
    assert codes(mapped) == {
        1: "wrong_shape",
        2: "wrong_shape",
        3: "missing_value",
        4: "missing_value",
        5: "wrong_shape",
        6: "out_of_range",
    }
    assert mapped.reasons[5].reason == "column 'x': 3 values along axis 1, allowed are 2"
    assert mapped.reasons[4].reason == "column 'x', value 1: the value is missing"


def test_a_bad_value_in_lists_of_one_length_is_told_by_its_place() -> None:
    mapped = read(pa.array([[1, 2], [3, 400]]), Datatype.UINT8, (-1, 2))
    assert mapped.tensors["x"].tolist() == [[1, 2]]
    assert mapped.reasons[1].reason.startswith("column 'x', value 1: got the number 400")


def test_nested_and_flat_lists_and_tensors_fill_several_axes() -> None:
    want = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    flat = pa.array(want.reshape(2, 6).tolist(), pa.list_(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(want.ravel()), 6)
    for column in (
        pa.array(want.tolist()),
        flat,
        fixed,
        pa.FixedShapeTensorArray.from_numpy_ndarray(want),
    ):
        got = read(column, Datatype.FP32, (-1, 2, 3))
        assert got.ok.all()
        np.testing.assert_array_equal(got.tensors["x"], want)
    uneven = pa.array([[[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], None]])
    mapped = read(uneven, Datatype.FP32, (-1, 2, 2))
    assert codes(mapped) == {0: "wrong_shape", 2: "missing_value"}


def rows_of(tensor: Any) -> list[Any]:
    if isinstance(tensor, RaggedRows):
        return [tensor.row(index).tolist() for index in range(len(tensor))]
    return list(tensor.tolist())


def rectangular(value: Any, axes: int) -> bool:
    if axes == 0:
        return value is not None
    if not isinstance(value, list) or not value:
        return False
    return all(rectangular(item, axes - 1) for item in value) and (
        axes == 1 or len({len(item) for item in value}) == 1
    )


@given(
    st.lists(
        st.none()
        | st.lists(st.none() | st.lists(st.none() | st.integers(0, 9), max_size=3), max_size=3)
    )
)
def test_free_axes_give_each_row_its_own_shape(values: list[Any]) -> None:
    column = pa.array(values, pa.list_(pa.list_(pa.int64())))
    mapped = read(column, Datatype.INT64, (-1, -1, -1))
    good = [value for value in values if rectangular(value, 2)]
    assert mapped.ok.tolist() == [rectangular(value, 2) for value in values]
    assert rows_of(mapped.tensors["x"]) == good
    codes(mapped)


def test_rows_of_one_shape_are_one_array_even_where_an_axis_is_free() -> None:
    mapped = read(pa.array([[1, 2], None, [3, 4]]), Datatype.INT64, (-1, -1))
    assert isinstance(mapped.tensors["x"], np.ndarray)
    assert mapped.tensors["x"].tolist() == [[1, 2], [3, 4]]
    assert isinstance(read(pa.array([[1], [2, 3]]), Datatype.INT64, (-1, -1)).tensors["x"],
                      RaggedRows)  # fmt: skip


# --- several columns


def test_a_list_of_one_column_of_lists_is_that_column() -> None:
    """A YAML file says `x: features` and `x: [features]` for the same."""
    table = pa.table({"l": [[1.0, 2.0], [3.0, 4.0]], "n": [5.0, 6.0]})
    wide = TensorSpec("x", Datatype.FP32, (-1, 2))
    mapped = column_map(table.schema, wide, columns={"x": ["l"]}).tensors(table)
    assert mapped.tensors["x"].tolist() == [[1, 2], [3, 4]]
    free = TensorSpec("x", Datatype.FP32, (-1, -1))
    mapped = column_map(table.schema, free, columns={"x": ["n"]}).tensors(table)
    assert mapped.tensors["x"].tolist() == [[5], [6]]


def test_columns_for_the_model_only_are_not_copied() -> None:
    schema = pa.schema({"x": pa.float32(), "path": pa.string()})
    x = TensorSpec("x", Datatype.FP32, (-1,))
    every = column_map(schema, x, passthrough=["*"], uncopied=["x"])
    assert every.passthrough == ("path",)
    assert every.needed == ("x", "path")
    said = problem(schema, x, passthrough=["x"], uncopied=["x"])
    assert "output.passthrough: column 'x' is for the model and is not copied" in said


def test_columns_are_stacked_into_one_input() -> None:
    table = pa.table({"a": [1.5, 2.5, None], "b": [1, 2**30 + 1, 3], "c": ["7", "8", "9"]})
    spec = TensorSpec("x", Datatype.FP32, (-1, 3), allow_nan=False)
    planned = column_map(table.schema, spec, columns={"x": ["c", "a", "b"]})
    assert planned.needed == ("c", "a", "b")
    mapped = planned.tensors(table)
    assert mapped.tensors["x"].tolist() == [[7, 1.5, 1]]
    assert codes(mapped) == {1: "out_of_range", 2: "missing_value"}
    assert mapped.reasons[1].reason.startswith("column 'b': ")
    free = column_map(table.schema, TensorSpec("x", Datatype.FP64, (-1, -1)),
                      columns={"x": ["a", "b"]})  # fmt: skip
    assert free.tensors(table.slice(0, 1)).tensors["x"].tolist() == [[1.5, 1.0]]


def test_a_fault_in_one_input_leaves_the_row_out_of_all() -> None:
    table = pa.table({"a": [1, None, 3], "b": [[1], [2], []], "c": ["x", "y", "z"]})
    mapped = column_map(
        table.schema,
        TensorSpec("a", Datatype.INT64, (-1,)),
        TensorSpec("b", Datatype.INT64, (-1, -1)),
        TensorSpec("c", Datatype.BYTES, (-1,)),
    ).tensors(table)
    assert {name: rows_of(rows) for name, rows in mapped.tensors.items()} == {
        "a": [1],
        "b": [[1]],
        "c": [b"x"],
    }
    assert codes(mapped) == {1: "missing_value", 2: "wrong_shape"}


def test_what_is_mapped_passes_the_checks_that_requests_pass() -> None:
    table = pa.table({"a": [1, 2], "b": [[1.0, 2.0], [3.0, 4.0]], "c": ["x", "y"]})
    specs = [
        TensorSpec("a", Datatype.INT32, (-1, 1)),
        TensorSpec("b", Datatype.FP32, (-1, 2), allow_nan=False),
        TensorSpec("c", Datatype.BYTES, (-1,)),
    ]
    mapped = column_map(table.schema, *specs).tensors(table)
    assert check_inputs(specs, mapped.tensors, batched=True) == 2


def test_a_model_that_is_not_batched_gets_rows_of_its_whole_shape() -> None:
    table = pa.table({"a": [1.0, 2.0], "b": [[1.0], [2.0]]})
    mapped = column_map(
        table.schema,
        TensorSpec("a", Datatype.FP64, ()),
        TensorSpec("b", Datatype.FP64, (1,)),
        batched=False,
    ).tensors(table)
    assert mapped.tensors["a"].shape == (2,)
    assert mapped.tensors["b"].shape == (2, 1)


# --- what is said beforehand


def test_every_fault_of_a_mapping_is_told_at_once() -> None:
    schema = pa.schema(
        {
            "hour": pa.int64(),
            "when": pa.timestamp("s"),
            "tags": pa.struct({"a": pa.int64()}),
            "pairs": pa.list_(pa.float32(), 2),
            "empty": pa.null(),
        }
    )
    told = problem(
        schema,
        TensorSpec("hours", Datatype.INT64, (-1,)),
        TensorSpec("when", Datatype.INT64, (-1,)),
        TensorSpec("tags", Datatype.FP32, (-1,)),
        TensorSpec("pairs", Datatype.FP32, (-1, 3)),
        TensorSpec("name", Datatype.BYTES, (-1,)),
        TensorSpec("empty", Datatype.FP32, (-1,)),
        TensorSpec("both", Datatype.FP32, (-1, 3)),
        columns={"name": "hour", "both": ["hour", "hour"], "nme": "hour"},
        passthrough=["hur"],
        source="flights.yaml",
    )
    assert told.startswith("flights.yaml: 9 faults")
    assert "input.columns.hours: column 'hours' is missing. Did you mean 'hour'?" in told
    assert "input.columns.when: column 'when' is timestamp[s]" in told
    assert "Add a column that holds the number" in told
    assert "input.columns.tags: " in told
    assert "the lists do not have this shape" in told
    assert "only text and bytes are cast to BYTES" in told
    assert "only nulls" in told
    assert "name 3 column(s)" in told
    assert "m 3 has no input 'nme'. Did you mean 'name'?" in told
    assert "output.passthrough: column 'hur' is missing. Did you mean 'hour'?" in told


@pytest.mark.parametrize(
    ("kind", "datatype", "shape"),
    [
        (pa.date32(), Datatype.INT64, (-1,)),
        (pa.duration("s"), Datatype.INT64, (-1,)),
        (pa.list_(pa.timestamp("ms")), Datatype.INT64, (-1, 2)),
        (pa.dictionary(pa.int8(), pa.date32()), Datatype.INT64, (-1,)),
        (pa.float32(), Datatype.BOOL, (-1,)),
        (pa.binary(), Datatype.FP32, (-1,)),
        (pa.decimal128(10, 2), Datatype.INT64, (-1,)),
        (pa.float32(), Datatype.FP32, (-1, 2)),
        (pa.float32(), Datatype.FP32, (-1, -1)),
        (pa.list_(pa.float32()), Datatype.FP32, (-1,)),
        (pa.list_(pa.float32()), Datatype.FP32, (-1, 2, -1)),
        (pa.list_(pa.float32(), 5), Datatype.FP32, (-1, 2, 3)),
        (pa.list_(pa.list_(pa.list_(pa.float32()))), Datatype.FP32, (-1, 2, 3)),
        (pa.map_(pa.string(), pa.int64()), Datatype.INT64, (-1, 2)),
    ],
)
def test_types_that_cannot_be_cast_are_refused(
    kind: pa.DataType, datatype: Datatype, shape: tuple[int, ...]
) -> None:
    assert "column 'x' is " in problem(pa.schema({"x": kind}), TensorSpec("x", datatype, shape))


def test_a_column_that_is_there_twice_or_not_named_is_refused() -> None:
    x = TensorSpec("x", Datatype.FP32, (-1,))
    twice = pa.schema([("x", pa.float32()), ("x", pa.float32())])
    assert "there 2 times" in problem(twice, x)
    assert "no column is named" in problem(pa.schema({"y": pa.int64()}), x, columns={"x": []})


def test_a_table_of_another_type_than_planned_is_cast_or_refused() -> None:
    planned = column_map(pa.schema({"x": pa.int64()}), TensorSpec("x", Datatype.INT64, (-1,)))
    assert planned.tensors(pa.table({"x": ["7"]})).tensors["x"].tolist() == [7]
    for table in (pa.table({"y": [1]}), pa.table({"x": [datetime.date(2025, 1, 1)]})):
        with pytest.raises(ConfigInvalid, match=r"input\.columns\.x"):
            planned.tensors(table)


def test_a_part_that_holds_only_nulls_has_the_type_of_the_whole() -> None:
    schema = pa.schema({"x": pa.float64(), "n": pa.list_(pa.int64())})
    x, n = TensorSpec("x", Datatype.FP32, (-1,)), TensorSpec("n", Datatype.INT64, (-1, 2))
    mapped = column_map(schema, x).tensors(pa.table({"x": pa.nulls(2)}))
    assert np.isnan(mapped.tensors["x"]).tolist() == [True, True]
    mapped = column_map(schema, n).tensors(pa.table({"n": pa.nulls(2)}))
    assert codes(mapped) == {0: "missing_value", 1: "missing_value"}


# --- outputs

X = TensorSpec("x", Datatype.FP32, (-1,))


def test_outputs_become_columns_beside_those_that_are_copied() -> None:
    outputs = [
        TensorSpec("p", Datatype.FP32, (-1, 1)),
        TensorSpec("label", Datatype.BYTES, (-1,)),
        TensorSpec("grid", Datatype.INT64, (-1, 2, 2)),
        TensorSpec("half", Datatype.BF16, (-1, 2)),
        TensorSpec("tokens", Datatype.INT32, (-1, -1)),
    ]
    table = pa.table({"x": [1.0, 2.0], "id": [7, 8]}).replace_schema_metadata({"pandas": "{}"})
    planned = column_map(
        table.schema, X, outputs=outputs, passthrough=["id"], prefix="pred_", columns={}
    )
    assert planned.needed == ("x", "id")
    got = planned.output_table(
        {
            "p": np.float32([[0.5], [math.nan]]),
            "label": np.array([b"a", "é".encode()], object),
            "grid": np.arange(8).reshape(2, 2, 2),
            "half": np.ones((2, 2), ml_dtypes.bfloat16),
            "tokens": RaggedRows(np.int32([1, 2, 3]), np.array([[1], [2]])),
        },
        table.select(planned.passthrough),
    )
    got.validate(full=True)
    assert got.schema.metadata is None
    assert [field.name for field in got.schema][1:] == [
        field.name for field in output_fields(planned.manifest, "pred_")
    ]
    assert got["id"].to_pylist() == [7, 8]
    assert got["pred_p"].null_count == 0
    assert math.isnan(got["pred_p"][1].as_py())
    assert got["pred_label"].to_pylist() == ["a", "é"]
    assert got["pred_grid"].to_pylist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert got["pred_half"].type == pa.list_(pa.float32(), 2)
    assert got["pred_tokens"].to_pylist() == [[1], [2, 3]]
    assert set(got["model"].to_pylist()) == {"m"}
    assert set(got["model_version"].to_pylist()) == {"3"}
    assert set(got["model_digest"].to_pylist()) == {planned.manifest.digest}
    assert got.schema.field("model").type == pa.dictionary(pa.int32(), pa.string())


def test_the_schema_of_the_output_does_not_depend_on_the_rows() -> None:
    outputs = [TensorSpec("y", Datatype.FP32, (-1, -1, 2)), TensorSpec("t", Datatype.BYTES, (-1,))]
    planned = column_map(pa.schema({"x": pa.float32()}), X, outputs=outputs)

    def made(y: Any, rows: int) -> pa.Table:
        text = np.array([b"a"] * rows, object)
        return planned.output_table({"y": y, "t": text}, pa.table({}))

    ragged = RaggedRows(np.arange(6, dtype=np.float32), np.array([[1, 2], [2, 2]]))
    tables = [
        made(ragged, 2),
        made(np.zeros((3, 5, 2), np.float32), 3),
        made(np.zeros((0, 0, 2), np.float32), 0),
    ]
    assert [table.num_rows for table in tables] == [2, 3, 0]
    assert len({table.schema.to_string() for table in tables}) == 1
    assert tables[0]["y"].to_pylist() == [[[0, 1]], [[2, 3], [4, 5]]]


def test_columns_that_would_be_twice_in_the_output_are_refused() -> None:
    schema = pa.schema({"x": pa.float32(), "score": pa.float32(), "_row": pa.int64()})
    told = problem(schema, X, passthrough=["*"], added=["_row"])
    assert told.count("would be in the output twice") == 2
    assert "'score'" in told
    assert "'_row'" in told
    planned = column_map(schema, X, passthrough=["*"], prefix="pred_")
    assert planned.passthrough == ("x", "score", "_row")
    assert planned.needed == ("x", "score", "_row")


def test_predictions_of_other_rows_than_are_copied_are_refused() -> None:
    planned = column_map(pa.schema({"x": pa.float32()}), X, passthrough=["x"])
    with pytest.raises(ValueError, match="2 rows to copy, 1 predictions"):
        planned.output_table({"score": np.zeros((1, 1), np.float32)}, pa.table({"x": [1.0, 2.0]}))
