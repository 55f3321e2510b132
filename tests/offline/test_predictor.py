"""Many rows through a model: none is lost, none changes its place, faults stay alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.core.tensors import Array, Datatype, RaggedAxis, Tensors, TensorSpec
from rayprism.errors import InvalidInput, OutOfMemory
from rayprism.models.loader import load_model
from rayprism.models.manifest import Batching, Manifest
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.predictor import Predicted, Predictor
from rayprism.offline.rows import Faults, RaggedRows, RowFault, merge_faults
from tests.offline.manifests import manifest
from tests.support.models import FEATURES, mlp_example, mlp_reference, save_mlp

X = TensorSpec("x", Datatype.INT64, (-1,))
Y = TensorSpec("y", Datatype.FP32, (-1,))
TOKENS = TensorSpec("tokens", Datatype.INT64, (-1, -1))
RAGGED = {"ragged": {"tokens": RaggedAxis(1, -1)}}


class Model:
    """A model made of functions, which notes the shapes that it was given."""

    def __init__(
        self,
        manifest: Manifest,
        run: Callable[[Tensors], Tensors],
        prepare: Callable[[Tensors], Tensors] | None = None,
    ) -> None:
        self.manifest = manifest
        self.has_prepare = prepare is not None
        self.shapes: list[tuple[int, ...]] = []
        self._run = run
        self._prepare = prepare

    def prepare(self, inputs: Tensors) -> Tensors:
        assert self._prepare is not None
        return self._prepare(inputs)

    def run(self, batch: Tensors) -> Tensors:
        self.shapes.append(next(iter(batch.values())).shape)
        return self._run(batch)


def ragged(rows: list[list[int]]) -> Array | RaggedRows:
    return RaggedRows.from_arrays(
        [np.array(row, np.int64) for row in rows], np.dtype(np.int64)
    ).simplify()


def rows_of(tensor: Any) -> list[Any]:
    if isinstance(tensor, RaggedRows):
        return [tensor.row(index).tolist() for index in range(len(tensor))]
    return list(tensor.tolist())


def codes(predicted: Predicted) -> dict[int, str]:
    assert np.flatnonzero(~predicted.ok).tolist() == list(predicted.reasons)
    return {row: fault.code for row, fault in predicted.reasons.items()}


def fragile(bad: set[int], nan: frozenset[int] | set[int] = frozenset()) -> Model:
    """Halves numbers; fails with some of them in the batch, and answers NaN to others."""

    def run(batch: Tensors) -> Tensors:
        wrong = bad & set(batch["x"].tolist())
        if wrong:
            raise RuntimeError(f"cannot take {min(wrong)}")
        halved = (batch["x"] / 2).astype(np.float32)
        halved[np.isin(batch["x"], list(nan))] = np.nan
        return {"y": halved}

    return Model(manifest([X], [Y]), run)


# --- rows and their places


@given(
    st.integers(0, 200).flatmap(
        lambda rows: st.tuples(
            st.just(rows),
            st.sets(st.integers(0, max(rows - 1, 0))),
            st.sets(st.integers(0, max(rows - 1, 0))),
        )
    ),
    st.none() | st.integers(1, 70),
)
def test_no_row_is_lost_or_moved_and_only_the_bad_ones_fail(
    drawn: tuple[int, set[int], set[int]], batch_rows: int | None
) -> None:
    rows, bad, nan = drawn
    bad = {row for row in bad if row < rows}
    got = Predictor(fragile(bad, nan), batch_rows).predict({"x": np.arange(rows)}, rows)
    good = [row for row in range(rows) if row not in bad]
    expected = np.array([np.nan if row in nan else row / 2 for row in good], np.float32)
    np.testing.assert_array_equal(got.outputs["y"], expected)
    assert got.outputs["y"].dtype == np.float32
    assert codes(got) == dict.fromkeys(sorted(bad), "model_failed")
    assert all(
        fault.reason == f"RuntimeError: cannot take {row}" for row, fault in got.reasons.items()
    )


def test_batches_have_the_rows_that_the_manifest_or_the_job_says() -> None:
    for batch_rows, expected in ((None, [64, 64, 22]), (100, [100, 50]), (1000, [150])):
        model = fragile(set())
        Predictor(model, batch_rows).predict({"x": np.arange(150)}, 150)
        assert [shape[0] for shape in model.shapes] == expected
    with pytest.raises(ValueError, match="batch_rows 0"):
        Predictor(fragile(set()), 0)


def test_a_fault_is_found_in_about_twice_the_logarithm_of_the_batch() -> None:
    model = fragile({700})
    got = Predictor(model, 1024).predict({"x": np.arange(1024)}, 1024)
    assert codes(got) == {700: "model_failed"}
    assert len(model.shapes) == 21


def test_a_batch_that_is_only_too_large_loses_no_row() -> None:
    def run(batch: Tensors) -> Tensors:
        if len(batch["x"]) > 10:
            raise MemoryError("no room")
        return {"y": batch["x"].astype(np.float32)}

    got = Predictor(Model(manifest([X], [Y]), run), 64).predict({"x": np.arange(150)}, 150)
    assert got.ok.all()
    assert got.outputs["y"].tolist() == list(range(150))


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_batches_are_smaller_after_one_that_ran_out_of_memory() -> None:
    def run(batch: Tensors) -> Tensors:
        if len(batch["x"]) > most:
            raise OutOfMemory("out of memory on cuda:0")
        return {"y": batch["x"].astype(np.float32)}

    most, clock = 20, Clock()
    model = Model(manifest([X], [Y]), run)
    predictor = Predictor(model, 64, clock=clock)
    got = predictor.predict({"x": np.arange(150)}, 150)
    assert got.ok.all()
    assert got.outputs["y"].tolist() == list(range(150))
    rows = [shape[0] for shape in model.shapes]
    assert rows[:3] == [64, 32, 16]
    assert rows.count(64) == 1
    assert set(rows[rows.index(16) :]) <= {16, 32, 6}, "one half was waiting, and is tried once"
    assert predictor.limits.max_rows == 64, "what was asked for is not forgotten"
    most = 1000
    for _ in range(30):
        clock.now_s += 61.0
        predictor.predict({"x": np.arange(5)}, 5)
    model.shapes.clear()
    predictor.predict({"x": np.arange(64)}, 64)
    assert model.shapes == [(64,)]


def test_rows_that_do_not_fit_are_told_apart_from_batches_that_do_not() -> None:
    def run(batch: Tensors) -> Tensors:
        tokens = batch["tokens"]
        if tokens.size > 30:
            raise OutOfMemory(f"m 1: out of memory on cuda:0: {tokens.size} tokens")
        return {"y": (tokens != -1).sum(axis=1).astype(np.float32)}

    model = Model(manifest([TOKENS], [Y], max_rows=16, **RAGGED), run)
    rows = [[1] * length for length in (5, 40, 6, 7, 5, 5, 6)]
    got = Predictor(model).predict({"tokens": ragged(rows)}, len(rows))
    assert codes(got) == {1: "model_failed"}
    assert got.reasons[1].reason == "m 1: out of memory on cuda:0: 40 tokens"
    assert got.outputs["y"].tolist() == [5, 6, 7, 5, 5, 6]


def test_what_the_model_refuses_is_told_in_its_words() -> None:
    def run(batch: Tensors) -> Tensors:
        if (batch["x"] == 1).any():
            raise InvalidInput("input 'x' is one")
        if (batch["x"] == 2).any():
            raise ValueError("a" * 5000)
        return {"y": batch["x"].astype(np.float32)}

    got = Predictor(Model(manifest([X], [Y]), run)).predict({"x": np.arange(4)}, 4)
    assert got.reasons[1] == RowFault("invalid_input", "input 'x' is one")
    assert got.reasons[2].code == "model_failed"
    assert got.reasons[2].reason.startswith("ValueError: aaa")
    assert len(got.reasons[2].reason) == 2000


def test_an_interrupt_is_not_taken_for_a_fault_of_a_row() -> None:
    def run(batch: Tensors) -> Tensors:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Predictor(Model(manifest([X], [Y]), run)).predict({"x": np.arange(4)}, 4)


def test_a_model_that_uses_its_memory_again_does_not_change_what_it_gave() -> None:
    memory = np.empty(64, np.float32)

    def run(batch: Tensors) -> Tensors:
        out = memory[: len(batch["x"])]
        out[:] = batch["x"]
        return {"y": out}

    got = Predictor(Model(manifest([X], [Y]), run)).predict({"x": np.arange(200)}, 200)
    assert got.outputs["y"].tolist() == list(range(200))


def test_outputs_that_the_columns_could_not_hold_are_faults() -> None:
    def run(batch: Tensors) -> Tensors:
        text = np.array([b"\xff" if x == 3 else b"a" for x in batch["x"]], object)
        return {"y": text, "z": np.zeros((len(text), 3 if 5 in batch["x"] else 2), np.float32)}

    outputs = [TensorSpec("y", Datatype.BYTES, (-1,)), TensorSpec("z", Datatype.FP32, (-1, 2))]
    got = Predictor(Model(manifest([X], outputs), run)).predict({"x": np.arange(8)}, 8)
    assert codes(got) == {3: "model_failed", 5: "model_failed"}
    assert got.reasons[3].reason == "output 'y' is not UTF-8"
    assert "the manifest says [2]" in got.reasons[5].reason
    assert got.outputs["z"].shape == (6, 2)


def test_where_no_row_is_good_the_outputs_are_there_and_empty() -> None:
    outputs = [TensorSpec("y", Datatype.FP32, (-1, 3)), TensorSpec("t", Datatype.BYTES, (-1, -1))]

    def run(batch: Tensors) -> Tensors:
        raise RuntimeError

    for rows in (0, 3):
        model = Model(manifest([X], outputs), run)
        got = Predictor(model).predict({"x": np.arange(rows)}, rows)
        assert len(got.reasons) == rows
        assert got.outputs["y"].shape == (0, 3)
        assert got.outputs["t"].shape == (0, 0)
        assert got.outputs["t"].dtype == object


def test_a_model_that_is_not_batched_gets_rows_without_a_row_axis() -> None:
    def run(inputs: Tensors) -> Tensors:
        assert inputs["x"].ndim == 1
        return {"y": inputs["x"].sum(keepdims=True).astype(np.float32)}

    spec = TensorSpec("x", Datatype.INT64, (-1,))
    made = manifest([spec], [TensorSpec("y", Datatype.FP32, (1,))], batched=False, max_rows=1)
    for prepare in (None, lambda inputs: {"x": inputs["x"] * 1}):
        model = Model(made, run, prepare)
        got = Predictor(model, 100).predict({"x": ragged([[1, 2], [3], [4, 5, 6]])}, 3)
        assert got.outputs["y"].tolist() == [[3], [3], [15]]
        got = Predictor(model, 100).predict({"x": np.ones((2, 4), np.int64)}, 2)
        assert got.outputs["y"].tolist() == [[4], [4]]


# --- ragged rows


def echo(**batching: Any) -> Model:
    """Gives the tokens back, as long as they were padded, and their sum without padding."""

    def run(batch: Tensors) -> Tensors:
        tokens = batch["tokens"]
        if (tokens == 13).any():
            raise RuntimeError("unlucky")
        return {
            "same": tokens,
            "sum": np.where(tokens == -1, 0, tokens).sum(axis=1).astype(np.float32),
        }

    outputs = [
        TensorSpec("same", Datatype.INT64, (-1, -1)),
        TensorSpec("sum", Datatype.FP32, (-1,)),
    ]
    made = manifest([TOKENS], outputs, **RAGGED, ragged_outputs={"same": 1}, **batching)
    return Model(made, run)


@given(
    st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=20), min_size=1, max_size=60),
    st.integers(1, 10),
    st.none() | st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_ragged_rows_keep_the_bounds_their_places_and_their_lengths(
    rows: list[list[int]], max_rows: int, max_cost: int | None, share: float
) -> None:
    model = echo(max_rows=max_rows, max_cost=max_cost, max_padding_share=share)
    got = Predictor(model).predict({"tokens": ragged(rows)}, len(rows))
    good = [row for row in rows if 13 not in row]
    assert got.ok.tolist() == [13 not in row for row in rows]
    codes(got)
    assert rows_of(got.outputs["same"]) == good
    assert got.outputs["sum"].tolist() == [sum(row) for row in good]
    for count, longest in model.shapes:
        assert count <= max_rows
        assert max_cost is None or count == 1 or count * longest <= max_cost


def test_padding_stays_within_its_share() -> None:
    random = np.random.default_rng(4)
    rows = [[1] * int(length) for length in random.integers(1, 200, 500)]
    seen: list[float] = []

    def run(batch: Tensors) -> Tensors:
        seen.append(float((batch["tokens"] == -1).mean()))
        return {"y": np.zeros(len(batch["tokens"]), np.float32)}

    made = manifest([TOKENS], [Y], **RAGGED, max_rows=32, max_cost=2000, max_padding_share=0.05)
    assert Predictor(Model(made, run)).predict({"tokens": ragged(rows)}, 500).ok.all()
    assert max(seen) <= 0.05
    # In the order that they came in, a batch within this share would be of one or two rows.
    assert len(seen) < 2 * sum(map(len, rows)) / 2000


def test_the_job_may_ask_for_more_rows_but_not_for_more_cost() -> None:
    model = echo(max_rows=4, max_cost=30)
    Predictor(model, 1000).predict({"tokens": np.ones((20, 3), np.int64)}, 20)
    assert model.shapes == [(10, 3), (10, 3)]
    model = echo(max_rows=4, max_cost=12)
    Predictor(model, 1000).predict({"tokens": ragged([[1], [1] * 20, [1] * 6, [1] * 5, [1, 2]])}, 5)
    # The longest row is over the bound by itself, and runs alone.
    assert model.shapes == [(1, 20), (2, 6), (2, 2)]


def test_rows_whose_other_sizes_differ_do_not_share_a_batch() -> None:
    grids = [np.full(shape, place) for place, shape in enumerate([(2, 3), (1, 2), (4, 3), (2, 2)])]

    def run(batch: Tensors) -> Tensors:
        return {"y": batch["grid"].max(axis=(1, 2)).astype(np.float32)}

    spec = TensorSpec("grid", Datatype.INT64, (-1, -1, -1))
    value = RaggedRows.from_arrays(grids, np.dtype(np.int64))
    padded = Model(manifest([spec], [Y], ragged={"grid": RaggedAxis(1)}), run)
    assert Predictor(padded).predict({"grid": value}, 4).outputs["y"].tolist() == [0, 1, 2, 3]
    assert sorted(padded.shapes) == [(2, 2, 2), (2, 4, 3)]
    apart = Model(manifest([spec], [Y]), run)
    assert Predictor(apart).predict({"grid": value}, 4).outputs["y"].tolist() == [0, 1, 2, 3]
    assert len(apart.shapes) == 4


def test_outputs_of_different_widths_are_kept_row_by_row() -> None:
    def run(batch: Tensors) -> Tensors:
        return {"y": batch["tokens"].astype(np.float32)}

    made = manifest([TOKENS], [TensorSpec("y", Datatype.FP32, (-1, -1))])
    rows = [[1], [2, 3], [4], [5, 6, 7]]
    got = Predictor(Model(made, run)).predict({"tokens": ragged(rows)}, 4)
    assert rows_of(got.outputs["y"]) == rows


def test_ragged_inputs_of_one_row_need_the_same_length() -> None:
    def run(batch: Tensors) -> Tensors:
        return {"y": (batch["a"] * batch["b"]).sum(axis=1).astype(np.float32)}

    specs = [TensorSpec(name, Datatype.INT64, (-1, -1)) for name in "ab"]
    made = manifest(specs, [Y], ragged={"a": RaggedAxis(1), "b": RaggedAxis(1)})
    inputs = {"a": ragged([[1], [1, 2], [3]]), "b": ragged([[5], [5], [7]])}
    got = Predictor(Model(made, run)).predict(inputs, 3)
    assert codes(got) == {1: "invalid_input"}
    assert got.reasons[1].reason.startswith("input 'b' has length 1, 'a' has 2")
    assert got.outputs["y"].tolist() == [5, 21]
    inputs = {"a": np.ones((2, 3), np.int64), "b": np.ones((2, 4), np.int64)}
    assert not Predictor(Model(made, run)).predict(inputs, 2).ok.any()


# --- pre-processing


def words(inputs: Tensors) -> Tensors:
    """Numbers of the words of texts, padded to the longest of this request."""
    texts = [text.decode().split() for text in inputs["text"]]
    if any("bad" in text for text in texts):
        raise InvalidInput("input 'text': a bad word")
    longest = max(map(len, texts))
    tokens = [[int(word) for word in text] + [-1] * (longest - len(text)) for text in texts]
    return {"tokens": np.array(tokens, np.int64)}


TEXT = TensorSpec("text", Datatype.BYTES, (-1,))


@given(
    st.lists(
        st.lists(st.integers(2**53, 2**60), min_size=1, max_size=9) | st.none(),
        min_size=1,
        max_size=40,
    )
)
def test_rows_of_ragged_models_are_prepared_one_by_one(rows: list[list[int] | None]) -> None:
    def run(batch: Tensors) -> Tensors:
        return {"same": batch["tokens"]}

    made = manifest(
        [TEXT],
        [TensorSpec("same", Datatype.INT64, (-1, -1))],
        runtime_inputs=(TOKENS,),
        ragged_outputs={"same": 1},
        max_padding_share=0.2,
        **RAGGED,
    )
    texts = np.empty(len(rows), object)
    texts[:] = [b"bad" if row is None else " ".join(map(str, row)).encode() for row in rows]
    got = Predictor(Model(made, run, words)).predict({"text": texts}, len(rows))
    assert rows_of(got.outputs["same"]) == [row for row in rows if row is not None]
    bad = [place for place, row in enumerate(rows) if row is None]
    assert codes(got) == dict.fromkeys(bad, "invalid_input")


def test_rows_of_other_models_are_prepared_by_the_batch() -> None:
    calls: list[int] = []

    def prepare(inputs: Tensors) -> Tensors:
        calls.append(len(inputs["text"]))
        return {"x": np.array([int(text) for text in inputs["text"]])}

    model = fragile({7})
    model = Model(manifest([TEXT], [Y], runtime_inputs=(X,)), model.run, prepare)
    texts = np.array([b"x" if row == 3 else str(row).encode() for row in range(100)], object)
    got = Predictor(model).predict({"text": texts}, 100)
    assert codes(got) == {3: "model_failed", 7: "model_failed"}
    assert got.reasons[3].reason.startswith("ValueError: invalid literal")
    assert got.outputs["y"].tolist() == [row / 2 for row in range(100) if row not in (3, 7)]
    assert max(calls) == 64


# --- a real model


def test_a_pushed_model_gives_what_it_gives_by_itself(tmp_path: Any) -> None:
    file = save_mlp(tmp_path / "mlp.onnx", batch=8)  # exported with a fixed batch
    result = push_model(
        Repository(tmp_path / "models"),
        "mlp",
        file,
        example=mlp_example(),
        batching=Batching(max_rows=8),
    )
    model = load_model(result.version)
    x = np.random.default_rng(0).standard_normal((203, FEATURES)).astype(np.float32)
    x.setflags(write=False)
    for batch_rows in (None, 5, 1000):
        got = Predictor(model, batch_rows).predict({"x": x}, 203)
        assert got.ok.all()
        np.testing.assert_allclose(got.outputs["y"], mlp_reference(x), atol=1e-5)
    model.close()
    gone = Predictor(model).predict({"x": x[:2]}, 2)
    assert codes(gone) == {0: "model_failed", 1: "model_failed"}


# --- faults of two steps


@given(st.lists(st.sampled_from(["first", "second", ""])))
def test_faults_of_two_steps_are_told_by_the_rows_of_the_first(steps: list[str]) -> None:
    first, second = Faults(len(steps)), Faults(sum(step != "first" for step in steps))
    place = 0
    for row, step in enumerate(steps):
        if step == "first":
            first.add([row], "a", str)
            continue
        if step == "second":
            second.add([place], "b", str)
        place += 1
    ok, reasons = merge_faults(first.ok, first.reasons, second.ok, second.reasons)
    assert ok.tolist() == [not step for step in steps]
    want = {row: "a" if step == "first" else "b" for row, step in enumerate(steps) if step}
    assert {row: fault.code for row, fault in reasons.items()} == want
    assert list(reasons) == sorted(reasons)


def test_the_first_fault_of_a_row_is_the_one_that_is_told() -> None:
    faults, others = Faults(3), Faults(3)
    faults.add([0, 0], "a", lambda place: f"place {place}")
    others.add([0, 2], "b", str)
    faults.update(others)
    assert faults.ok.tolist() == [False, True, False]
    assert faults.reasons[0] == RowFault("a", "place 0")
    assert faults.reasons[2].code == "b"


def test_the_hints_of_the_manifest_are_the_bounds() -> None:
    hints = Batching(max_rows=7, max_cost=9, max_padding_share=0.5, **RAGGED)
    limits = Predictor(Model(manifest([TOKENS], [Y], **hints.model_dump()), dict)).limits
    assert (limits.max_rows, limits.max_cost, limits.max_padding_share) == (7, 9, 0.5)
