"""One suite for every runtime: what holds of a version, however it is run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import (
    CodeNotAllowed,
    ConfigInvalid,
    DigestMismatch,
    GoldenMismatch,
    LoadFailed,
    RepositoryError,
)
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.manifest import Batching, Manifest
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from tests.models.conftest import Form
from tests.support.models import FEATURES, example_rows, mlp_example, mlp_reference


def load(form: Form, repository: Repository, version: int = 1) -> LoadedModel:
    return load_model(repository.version("mlp", version), allow_code=form.case.needs_code)


def rewrite(version: ModelVersion, **changes: object) -> None:
    """Writes a version's manifest anew, as somebody with access to the disk could."""
    path = version.folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.chmod(0o644)
    path.write_text(json.dumps(raw))


def test_push_describes_the_model(form: Form, repository: Repository) -> None:
    result = form.push(repository, metadata={"team": "delays"})
    manifest = result.version.manifest
    assert result.warnings == ()
    assert (manifest.model, manifest.version, manifest.file) == ("mlp", 1, form.case.file)
    assert manifest.inputs == (TensorSpec("x", Datatype.FP32, (-1, FEATURES)),)
    assert [(spec.name, spec.datatype) for spec in manifest.outputs] == [("y", Datatype.FP32)]
    assert manifest.batching == Batching()
    assert manifest.metadata["team"] == "delays"
    assert manifest.metadata["pushed_with"]["numpy"] == np.__version__
    assert repository.version("mlp", 1).manifest == manifest
    assert repository.version("mlp", 1).manifest.digest == manifest.digest


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 200])
def test_answers_are_the_model_s(form: Form, repository: Repository, rows: int) -> None:
    form.push(repository)
    model = load(form, repository)
    x = example_rows(rows)
    outputs = model.run(model.prepare({"x": x}))
    assert outputs.keys() == {"y"}
    assert outputs["y"].dtype == np.float32
    np.testing.assert_allclose(outputs["y"], mlp_reference(x), rtol=1e-4, atol=1e-5)


def test_read_only_and_strided_inputs_run(form: Form, repository: Repository) -> None:
    form.push(repository)
    model = load(form, repository)
    frozen = np.frombuffer(example_rows(4).tobytes(), np.float32).reshape(4, FEATURES)
    strided = np.repeat(example_rows(4), 2, axis=0)[::2]
    for x in (frozen, strided):
        np.testing.assert_allclose(
            model.run(model.prepare({"x": x}))["y"], mlp_reference(x), rtol=1e-4, atol=1e-5
        )


def test_loading_measures_every_step(form: Form, repository: Repository) -> None:
    form.push(repository)
    model = load(form, repository)
    assert list(model.load_s) == ["verify", "open", "warm_up", "golden"]
    assert all(seconds >= 0 for seconds in model.load_s.values())
    assert 1 <= model.measured_rows <= 64
    assert model.measured_run_s > 0
    assert model.device == "cpu"
    assert model.has_prepare is (form.case.name == "processor")


def test_the_next_push_is_the_next_version(form: Form, repository: Repository) -> None:
    assert form.push(repository).version.manifest.version == 1
    assert form.push(repository, seed=1).version.manifest.version == 2
    x = example_rows(3)
    first, second = load(form, repository, 1), load(form, repository, 2)
    for model, seed in ((first, 0), (second, 1)):
        np.testing.assert_allclose(
            model.run(model.prepare({"x": x}))["y"], mlp_reference(x, seed), rtol=1e-4, atol=1e-5
        )


def test_files_are_read_only(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    files = [path for path in version.folder.rglob("*") if path.is_file()]
    assert {path.relative_to(version.folder).as_posix() for path in files} == {
        *version.manifest.files,
        "manifest.json",
    }
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}


def test_loading_leaves_the_folder_as_it_was(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    load(form, repository).close()
    load(form, repository).close()
    assert not [path for path in version.folder.rglob("*") if path.name == "__pycache__"]


def test_code_needs_permission(form: Form, repository: Repository) -> None:
    if not form.case.needs_code:
        form.push(repository, allow_code=False)
        load_model(repository.version("mlp", 1))
        return
    with pytest.raises(CodeNotAllowed, match=r"args\.allow_code: true"):
        form.push(repository, allow_code=False)
    assert repository.models() == []
    form.push(repository)
    with pytest.raises(CodeNotAllowed, match=r"args\.allow_code: true"):
        load_model(repository.version("mlp", 1))


def test_a_changed_byte_is_found(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    path = version.folder / form.case.file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    with pytest.raises(DigestMismatch) as caught:
        load(form, repository)
    assert f"{form.case.file} has sha256" in str(caught.value)
    assert version.manifest.files[form.case.file].sha256 in str(caught.value)


def test_every_file_that_is_wrong_is_named(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    (version.folder / form.case.file).unlink()
    (version.folder / "planted.py").write_text("raise SystemExit")
    (version.folder / "deep").mkdir()
    (version.folder / "deep" / "manifest.json").write_text("{}")
    (version.folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(DigestMismatch) as caught:
        load(form, repository)
    message = str(caught.value)
    assert f"{form.case.file} is missing" in message
    assert "planted.py is extra" in message
    assert "deep/manifest.json is extra" in message
    assert "link is a symbolic link" in message


def test_a_version_in_another_folder_is_refused(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    shutil.copytree(version.folder, version.folder.parent / "7")
    with pytest.raises(RepositoryError, match=r"holds the manifest of 'mlp' version 1"):
        repository.version("mlp", 7)
    shutil.copytree(version.folder.parent, repository.root / "other")
    with pytest.raises(RepositoryError, match="holds the manifest of 'mlp' version 1"):
        repository.version("other", 1)


def test_a_golden_example_that_is_not_reproduced(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    golden = version.manifest.golden.model_dump(mode="json")
    golden["outputs"][0]["data"][4] += 0.5
    rewrite(version, golden=golden)
    with pytest.raises(GoldenMismatch, match=r"output 'y': 1 of 9 values are off; .* \[1, 1\]"):
        load(form, repository)
    model = load_model(repository.version("mlp", 1), allow_code=form.case.needs_code, check=False)
    assert "golden" not in model.load_s


def test_expected_outputs_are_checked_at_push(form: Form, repository: Repository) -> None:
    x = example_rows(3)
    right = {"inputs": {"x": x}, "outputs": {"y": mlp_reference(x)}}
    form.push(repository, example=right)
    wrong = {"inputs": {"x": x}, "outputs": {"y": mlp_reference(x) + 1}}
    with pytest.raises(GoldenMismatch, match="does not give the outputs that the example expects"):
        form.push(repository, example=wrong)
    form.push(repository, example=wrong, tolerance=Tolerance(absolute=2.0))
    assert repository.versions("mlp") == [1, 2]


def test_many_example_rows_are_cut(form: Form, repository: Repository) -> None:
    x = example_rows(40)
    example = {"inputs": {"x": x}, "outputs": {"y": mlp_reference(x)}}
    golden = form.push(repository, example=example).version.manifest.golden
    assert golden.inputs[0].shape == (16, FEATURES)
    assert golden.outputs[0].shape[0] == 16


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"inputs": {"z": [[1.0] * FEATURES]}}, "inputs.z: not one of the model's inputs"),
        ({"inputs": {"x": [[1.0] * FEATURES, [1.0]]}}, "nested otherwise than shape"),
        ({"inputs": {"x": [[1.0] * 3]}}, "got 3, allowed is 4"),
        ({"inputs": {"x": [["a"] * FEATURES]}}, "allowed for FP32 are numbers"),
        ({"inputs": {"x": 3}}, "allowed are nested lists"),
        ({"inputs": {"x": []}}, "shape"),
        ({}, "empty"),
    ],
)  # fmt: skip
def test_an_example_that_does_not_fit(
    form: Form, repository: Repository, example: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        form.push(repository, example=example)
    assert said in str(caught.value)
    assert list(repository.root.glob("*")) == []


def test_a_failed_push_leaves_nothing(form: Form, repository: Repository) -> None:
    form.push(repository)
    before = sorted(path.name for path in (repository.root / "mlp").iterdir())
    with pytest.raises(LoadFailed, match=r"gives no output|no output|outputs"):
        form.push(repository, outputs=[TensorSpec("nonsense", Datatype.FP32, (-1, 3)),
                                       TensorSpec("more", Datatype.FP32, (-1, 3))])  # fmt: skip
    assert sorted(path.name for path in (repository.root / "mlp").iterdir()) == before == ["1"]


def test_a_manifest_of_another_model_is_refused(form: Form, repository: Repository) -> None:
    version = form.push(repository).version
    raw = json.loads(version.manifest.to_json())
    for part in ("inputs", "runtime_inputs"):
        for spec in raw[part]:
            spec["datatype"] = "FP64"
    raw["golden"]["inputs"][0]["datatype"] = "FP64"
    rewrite(version, **{key: raw[key] for key in ("inputs", "runtime_inputs", "golden")})
    # The runtime declares another datatype, or the model answers with one.
    with pytest.raises((LoadFailed, GoldenMismatch)):
        load(form, repository)


def test_warm_up_shapes_of_the_manifest_run(form: Form, repository: Repository) -> None:
    inner = "features" if form.case.name == "processor" else "x"
    form.push(repository, warmup=[{inner: (5, FEATURES)}, {inner: (9, FEATURES)}])
    load(form, repository)
    if form.case.name == "onnx":
        with pytest.raises(LoadFailed, match=r"warming up with x \[5, 3\] raised"):
            form.push(repository, warmup=[{inner: (5, 3)}])
    with pytest.raises(ConfigInvalid, match="warmup"):
        form.push(repository, warmup=[{"nonsense": (5, FEATURES)}])


def test_a_version_pushed_here_is_what_its_manifest_says(
    form: Form, repository: Repository
) -> None:
    version = form.push(repository).version
    text = (version.folder / "manifest.json").read_text()
    assert Manifest.from_json(text, "m") == version.manifest
    assert Manifest.from_json(text, "m").to_json() == text


def test_the_source_is_not_imported_from(form: Form, repository: Repository) -> None:
    """The version works without its source, and its modules are nobody else's."""
    before = set(sys.modules)
    copy = Form(form.case, {0: Path(shutil.copytree(
        form.sources[0] if form.sources[0].is_dir() else form.sources[0].parent,
        repository.root.parent / "copy"))})  # fmt: skip
    if not form.sources[0].is_dir():
        copy.sources[0] = copy.sources[0] / form.sources[0].name
    copy.push(repository)
    shutil.rmtree(repository.root.parent / "copy")
    model = load(form, repository)
    assert model.run(model.prepare({"x": example_rows(2)}))["y"].shape == (2, 3)
    ours = {name for name in set(sys.modules) - before if "processor" in name or "layers" in name}
    assert all(name.startswith("_rayprism_version_") for name in ours)


def test_a_request_file_is_an_example(form: Form, repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(mlp_example(2)))
    assert form.push(repository, example=path).version.manifest.golden.inputs[0].shape == (2, 4)
    for text, said in (
        ("", "not JSON"),
        ("[1]", "got a list"),
        ('{"inputs": [{"name": "x"}]}', "inputs[0].datatype"),
        ('{"inputs": 3}', "inputs"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigInvalid) as caught:
            form.push(repository, example=path)
        assert said in str(caught.value)
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        form.push(repository, example=tmp_path / "nowhere.json")


def test_model_names_are_checked(form: Form, repository: Repository) -> None:
    for name in ("../x", "a/b", "", ".x", "x" * 129, "a..b"):
        with pytest.raises(RepositoryError, match="not a model name"):
            push_model(repository, name, form.sources[0], example=mlp_example(),
                       allow_code=True, **form.case.push)  # fmt: skip
    assert not repository.root.exists()
