"""What a push finds out by itself, warns of, and refuses."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec
from rayprism.errors import ConfigInvalid, GoldenMismatch, LoadFailed, RepositoryError
from rayprism.models.example import read_example
from rayprism.models.loader import load_model
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.models.source import git_state
from tests.support.models import (
    FEATURES,
    example_rows,
    mlp_example,
    mlp_reference,
    save_mlp,
    save_onnx,
    save_python_mlp,
)


def unary(
    path: Path, operator: str, shape: list[Any], out: list[Any] | None = None, **attr: Any
) -> Path:
    return save_onnx(
        path,
        [helper.make_node(operator, ["x"], ["y"], **attr)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape if out is None else out)],
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.pkl", "is a pickle"),
        ("model.joblib", r"skl2onnx\.to_onnx"),
        ("model.bin", "suffix .bin is not one of"),
        ("model.h5", "convert it with tf2onnx"),
        ("model.safetensors", "weights without their model"),
        ("model", r"suffix \(none\)"),
    ],
)
def test_files_that_are_not_served(
    repository: Repository, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(LoadFailed, match=said):
        push_model(repository, "m", tmp_path / name, example=mlp_example())
    assert not repository.root.exists()


def test_a_pickle_is_known_by_its_content(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "model.dat").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(LoadFailed, match="would run whatever it holds"):
        push_model(repository, "m", tmp_path / "model.dat", example=mlp_example())


def test_a_source_that_is_not_there(repository: Repository, mlp_onnx: Path) -> None:
    with pytest.raises(RepositoryError, match=r"does not exist\. Did you mean 'mlp\.onnx'\?"):
        push_model(repository, "m", mlp_onnx.with_name("mpl.onnx"), example=mlp_example())
    with pytest.raises(RepositoryError, match="does not exist"):
        push_model(repository, "m", Path("/nowhere/at/all.onnx"), example=mlp_example())


def test_a_folder_is_pushed_without_what_is_hidden(repository: Repository, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in (".git", "__pycache__", "deep/.cache", "deep/er"):
        (source / folder).mkdir(parents=True)
        (source / folder / "file").write_text("x")
    (source / "manifest.json").write_text("an old one")
    (source / "link.txt").symlink_to("deep/er/file")
    save_mlp(source / "m.onnx")
    version = push_model(repository, "m", source, example=mlp_example()).version
    assert version.manifest.files.keys() == {"m.onnx", "deep/er/file", "link.txt"}
    assert not (version.folder / "link.txt").is_symlink()
    load_model(version)


def test_which_file_of_a_folder(repository: Repository, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(RepositoryError, match="holds no model file"):
        push_model(repository, "m", source, example=mlp_example())
    (source / "m.joblib").write_bytes(b"x")
    with pytest.raises(LoadFailed, match="is a pickle"):
        push_model(repository, "m", source, example=mlp_example())
    save_mlp(source / "a.onnx")
    save_mlp(source / "b.onnx", seed=1)
    with pytest.raises(RepositoryError, match=r"2 model files \(a\.onnx, b\.onnx\): say which"):
        push_model(repository, "m", source, example=mlp_example())
    with pytest.raises(RepositoryError, match=r"no file 'c\.onnx'"):
        push_model(repository, "m", source, example=mlp_example(), file="c.onnx")
    pushed = push_model(repository, "m", source, example=mlp_example(), file="b.onnx")
    x = example_rows(2)
    np.testing.assert_allclose(
        load_model(pushed.version).run({"x": x})["y"], mlp_reference(x, 1), rtol=1e-5
    )
    with pytest.raises(RepositoryError, match="is a file itself"):
        push_model(repository, "m", source / "a.onnx", example=mlp_example(), file="b.onnx")


def test_a_runtime_may_be_named(repository: Repository, tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "model.bin")
    pushed = push_model(repository, "m", path, example=mlp_example(), runtime="onnx")
    assert pushed.version.manifest.file == "model.bin"


def test_a_free_first_axis_is_the_row(repository: Repository, mlp_onnx: Path) -> None:
    pushed = push_model(repository, "m", mlp_onnx, example=mlp_example())
    assert pushed.version.manifest.batching == Batching()
    assert pushed.warnings == ()


def test_fixed_axes_are_run_one_at_a_time(repository: Repository, tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "m.onnx", batch=2)
    pushed = push_model(repository, "m", path, example=mlp_example(2))
    assert pushed.version.manifest.batching == Batching(batched=False, max_rows=1)
    assert "fixed at 2" in pushed.warnings[0]
    loaded = load_model(pushed.version)
    assert loaded.measured_rows == 1
    assert loaded.run({"x": example_rows(2)})["y"].shape == (2, 3)


def test_a_fixed_batch_is_padded_and_cut(repository: Repository, tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "m.onnx", batch=4)
    pushed = push_model(
        repository, "m", path, example=mlp_example(3), batching=Batching(max_rows=4)
    )
    loaded = load_model(pushed.version)
    assert loaded.measured_rows == 4
    for rows in (1, 2, 4, 5, 8, 11):
        x = example_rows(rows)
        np.testing.assert_allclose(loaded.run({"x": x})["y"], mlp_reference(x), rtol=1e-5)
    with pytest.raises(ConfigInvalid, match=r"max_rows: got 8, .* exactly 4 rows: set 4"):
        push_model(repository, "m", path, example=mlp_example(3), batching=Batching(max_rows=8))


def test_an_output_without_rows_is_not_batched(repository: Repository, tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    pushed = push_model(repository, "m", path, example={"x": [[1.0, 2.0], [3.0, 4.0]]})
    assert not pushed.version.manifest.batching.batched
    assert pushed.version.manifest.outputs[0].shape == ()
    assert load_model(pushed.version).run({"x": np.ones((2, 2), np.float32)})["y"] == 4
    with pytest.raises((LoadFailed, ConfigInvalid)):
        push_model(repository, "m", path, example={"x": [[1.0, 2.0], [3.0, 4.0]]},
                   batching=Batching())  # fmt: skip


def test_rows_that_depend_on_their_neighbours_are_told(
    repository: Repository, tmp_path: Path
) -> None:
    path = unary(tmp_path / "m.onnx", "Softmax", ["n", 2], axis=0)
    example = {"x": [[1.0, 2.0], [3.0, -4.0]]}
    [warning] = push_model(repository, "m", path, example=example).warnings
    assert "depends on the rows beside it" in warning
    assert "largest difference is 0.998 on a value of 0.00247" in warning
    assert "batching.max_rows 1" in warning
    assert (
        push_model(repository, "m", path, example=example, tolerance=Tolerance(absolute=2)).warnings
        == ()
    )
    assert (
        push_model(repository, "m", path, example=example, batching=Batching(max_rows=1)).warnings
        == ()
    )


def test_one_row_cannot_show_it(repository: Repository, mlp_onnx: Path) -> None:
    [warning] = push_model(repository, "m", mlp_onnx, example=mlp_example(1)).warnings
    assert "the example has 1 row" in warning


def test_a_model_that_is_not_the_same_twice(repository: Repository, tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("RandomNormalLike", ["x"], ["r"]),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    with pytest.raises(GoldenMismatch):
        push_model(repository, "m", path, example={"x": [[1.0, 2.0]]})
    assert repository.models() == []


def test_ragged_axes_are_padded_to_see(repository: Repository, tmp_path: Path) -> None:
    example = {"x": [[1.0, 2.0], [3.0, -4.0]]}
    ragged = Batching(ragged={"x": RaggedAxis(1)})
    total = unary(tmp_path / "sum.onnx", "ReduceSum", ["n", "s"], ["n", 1], keepdims=1)
    # Without axes the whole is summed up; along axis 1 it takes an input.
    total = save_onnx(
        tmp_path / "sum.onnx",
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "s"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    assert push_model(repository, "m", total, example=example, batching=ragged).warnings == ()
    mean = unary(tmp_path / "mean.onnx", "ReduceMean", ["n", "s"], ["n", 1], axes=[1])
    with pytest.raises(GoldenMismatch, match="padding x by 3 changes the answer"):
        push_model(repository, "m", mean, example=example, batching=ragged)
    same = unary(tmp_path / "same.onnx", "Relu", ["n", "s"])
    [warning] = push_model(repository, "m", same, example=example, batching=ragged).warnings
    assert "outputs y grow with the padding" in warning
    named = ragged.model_copy(update={"ragged_outputs": {"y": 1}})
    assert push_model(repository, "m", same, example=example, batching=named).warnings == ()


def test_declared_specs_may_be_narrowed_and_described(
    repository: Repository, tmp_path: Path
) -> None:
    path = unary(tmp_path / "m.onnx", "Relu", ["n", "features"])
    spec = TensorSpec("x", Datatype.FP32, (-1, 2), allow_nan=False, description="delays")
    pushed = push_model(repository, "m", path, example={"x": [[1.0, 2.0]]}, inputs=[spec])
    assert pushed.version.manifest.inputs == (spec,)
    load_model(pushed.version)
    wrong = TensorSpec("x", Datatype.FP64, (-1, 2))
    with pytest.raises(LoadFailed, match=r"FLOAT|FP32|double|float"):
        push_model(repository, "m", path, example={"x": [[1.0, 2.0]]}, inputs=[wrong])
    with pytest.raises(ConfigInvalid, match="holds NaN"):
        push_model(repository, "m", path, example={"x": [[1.0, None]]}, inputs=[spec])


def test_specs_may_come_from_a_protocol_request(repository: Repository, tmp_path: Path) -> None:
    source = save_python_mlp(tmp_path / "source")
    pushed = push_model(
        repository, "m", source, example=mlp_example(3), allow_code=True, batching=Batching()
    )
    assert pushed.version.manifest.inputs == (TensorSpec("x", Datatype.FP32, (-1, FEATURES)),)
    assert [warning.partition(":")[0] for warning in pushed.warnings] == [
        "inputs were taken from the example",
        "outputs were taken from the example",
    ]
    with pytest.raises(ConfigInvalid, match="does not tell their datatypes"):
        push_model(repository, "m", source, example={"x": [[1.0] * FEATURES]}, allow_code=True)


def test_an_output_whose_axes_are_not_told(repository: Repository, tmp_path: Path) -> None:
    def branch(name: str, operator: str, *inputs: str) -> Any:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, inputs, [name])], name, [], [output])

    path = save_onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Greater", ["most", "bound"], ["large"]),
            helper.make_node(
                "If",
                ["large"],
                ["y"],
                then_branch=branch("a", "Reshape", "x", "square"),
                else_branch=branch("b", "Identity", "x"),
            ),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("bound", TensorProto.FLOAT, [], [100.0]),
            helper.make_tensor("square", TensorProto.INT64, [3], [-1, 2, 2]),
        ],
    )
    example = {"x": [[1.0, 2, 3, 4], [5, 6, 7, 8]]}
    pushed = push_model(repository, "m", path, example=example)
    assert pushed.version.manifest.outputs[0].shape == (-1, 4)
    assert pushed.version.manifest.batching.batched


def test_first_axes_that_only_look_like_rows(repository: Repository, tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
    )
    example = {"x": [[1.0, 2, 3, 4], [5, 6, 7, 8]], "shape": [2, 4]}
    with pytest.raises(LoadFailed, match=r"If axis 0 is not the row, push with batching"):
        push_model(repository, "m", path, example=example, batching=Batching(), inputs=[
            TensorSpec("x", Datatype.FP32, (-1, 4)), TensorSpec("shape", Datatype.INT64, (-1,))
        ])  # fmt: skip
    pushed = push_model(repository, "m", path, example=example)
    assert not pushed.version.manifest.batching.batched


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_recorded(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    tree = tmp_path / "tree"
    tree.mkdir()
    path = save_mlp(tree / "m.onnx")

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments],
            cwd=tree, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "model")
    metadata = push_model(repository, "m", path, example=mlp_example()).version.manifest.metadata
    assert metadata["git_commit"] == git("rev-parse", "HEAD")
    assert metadata["git_changed"] is False
    assert set(metadata["pushed_with"]) >= {"python", "numpy", "onnxruntime"}
    save_mlp(path, seed=1)
    assert git_state(path)["git_changed"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(path) == {}
    push_model(repository, "m", path, example=mlp_example())


def test_what_the_owner_writes_comes_before_what_is_found(
    repository: Repository, mlp_onnx: Path
) -> None:
    metadata = {"git_commit": "mine", "data": {"rows": 3}}
    found = push_model(
        repository, "m", mlp_onnx, example=mlp_example(), metadata=metadata
    ).version.manifest.metadata
    assert found["git_commit"] == "mine"
    assert found["data"] == {"rows": 3}


@pytest.mark.parametrize(
    ("example", "inputs", "outputs"),
    [
        (mlp_example(), {"x"}, set()),
        ({"x": [[1.0]]}, {"x"}, set()),
        ({"inputs": {"x": [[1.0]]}, "outputs": {"y": [[1.0]]}}, {"x"}, {"y"}),
        ({**mlp_example(), "id": "7", "outputs": mlp_example()["inputs"]}, {"x"}, {"x"}),
        ({"inputs": [[1.0]], "x": [[1.0]]}, {"inputs", "x"}, set()),
        ({"inputs": np.ones((1, 1), np.float32)}, {"inputs"}, set()),
    ],
)
def test_the_forms_of_an_example(
    example: dict[str, Any], inputs: set[str], outputs: set[str]
) -> None:
    read = read_example(example)
    assert read.inputs.keys() == inputs
    assert read.outputs.keys() == outputs


def test_nested_and_flat_data_are_the_same(repository: Repository, mlp_onnx: Path) -> None:
    flat = mlp_example(2)
    nested = json.loads(json.dumps(flat))
    nested["inputs"][0]["data"] = example_rows(2).tolist()
    nested["inputs"][0]["parameters"] = {"binary_data_size": 3}
    first = push_model(repository, "m", mlp_onnx, example=flat).version.manifest.golden
    second = push_model(repository, "m", mlp_onnx, example=nested).version.manifest.golden
    assert first.inputs == second.inputs


def test_doubles_in_an_example_are_named(repository: Repository, mlp_onnx: Path) -> None:
    twice = {"inputs": [*mlp_example()["inputs"], *mlp_example()["inputs"]]}
    with pytest.raises(ConfigInvalid, match="'x' is there twice"):
        push_model(repository, "m", mlp_onnx, example=twice)
    wrong = json.loads(json.dumps(mlp_example()))
    wrong["inputs"][0]["datatype"] = "FP64"
    with pytest.raises(ConfigInvalid, match="datatype is FP64, the model has FP32"):
        push_model(repository, "m", mlp_onnx, example=wrong)
    with pytest.raises(ConfigInvalid, match=r"outputs\.z: not one of the model's outputs"):
        push_model(
            repository,
            "m",
            mlp_onnx,
            example={"inputs": {"x": example_rows(2)}, "outputs": {"z": [[1.0]]}},
        )


def test_arrays_of_other_kinds_are_converted_strictly(
    repository: Repository, mlp_onnx: Path
) -> None:
    wide = example_rows(2).astype(np.float64)
    golden = push_model(repository, "m", mlp_onnx, example={"x": wide}).version.manifest.golden
    np.testing.assert_array_equal(golden.input_arrays()["x"], example_rows(2))
    with pytest.raises(ConfigInvalid, match="out of range for FP32"):
        push_model(repository, "m", mlp_onnx, example={"x": wide * 1e300})
