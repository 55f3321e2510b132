"""Copies of repositories, to a folder and to a store that has no folders."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from pyarrow import fs as pa_fs

from rayprism.cli.main import cli
from rayprism.errors import DigestMismatch, RepositoryError
from rayprism.models.copying import Place, copy_versions
from rayprism.models.manifest import MANIFEST_FILE
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.models import mlp_example, save_mlp


def push(folder: Path, repository: Path, seed: int) -> None:
    example = folder / "rows.json"
    example.write_text(json.dumps(mlp_example()))
    model = save_mlp(folder / "m.onnx", seed=seed)
    push_model(Repository(repository), "mlp", model, example=example)


@pytest.fixture
def pushed(tmp_path: Path) -> Path:
    for seed in (1, 2):
        push(tmp_path, tmp_path / "models", seed)
    return tmp_path / "models"


def local(path: Path) -> Place:
    return pa_fs.LocalFileSystem(), str(path)


@pytest.fixture
def store() -> Place:
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.store = {}
    memory.pseudo_dirs = [""]
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(memory)), "/bucket/models"


def test_through_a_store_and_back(pushed, store, tmp_path):
    (pushed / "mlp" / "journal.jsonl").write_text("{}\n")
    (pushed / "mlp" / "3").mkdir()  # a push that was killed
    assert copy_versions(local(pushed), store).copied == ["mlp/1", "mlp/2"]
    done = copy_versions(store, local(tmp_path / "back"))
    assert done.copied == ["mlp/1", "mlp/2"]
    back = Repository(tmp_path / "back")
    assert back.versions("mlp") == [1, 2]
    for number in (1, 2):
        version = back.version("mlp", number)
        version.verify()
        assert version.manifest == Repository(pushed).version("mlp", number).manifest
    again = copy_versions(store, local(tmp_path / "back"))
    assert (again.copied, again.present) == ([], ["mlp/1", "mlp/2"])


def test_only_what_is_missing_is_copied(pushed, store, tmp_path):
    copy_versions(local(pushed), store)
    push(tmp_path, pushed, 3)
    said: list[str] = []
    assert copy_versions(local(pushed), store, say=said.append).copied == ["mlp/3"]
    assert said == ["copied mlp/3"]


def test_a_copy_that_was_cut_off_is_no_version_and_is_completed(pushed, store, tmp_path):
    target = tmp_path / "copy"
    half = target / "mlp" / "1"
    half.mkdir(parents=True)
    (half / "m.onnx").write_bytes(b"half")
    assert Repository(target).models() == []
    copy_versions(local(pushed), local(target))
    Repository(target).version("mlp", 1).verify()


def test_a_file_that_is_not_what_was_pushed_is_not_handed_on(pushed, store):
    file = pushed / "mlp" / "1" / "m.onnx"
    file.chmod(0o644)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(DigestMismatch, match="mlp/1 is not what was pushed"):
        copy_versions(local(pushed), store)
    assert store[0].get_file_info(f"/bucket/models/mlp/1/{MANIFEST_FILE}").type == (
        pa_fs.FileType.NotFound
    )


def test_another_version_under_the_same_number_stays(pushed, tmp_path):
    other = tmp_path / "other"
    push(tmp_path, other, 9)
    before = Repository(other).version("mlp", 1).manifest
    with pytest.raises(RepositoryError, match="mlp/1: the target has others under these numbers"):
        copy_versions(local(pushed), local(other))
    assert Repository(other).version("mlp", 1).manifest == before
    # What is without doubt was copied.
    assert Repository(other).versions("mlp") == [1, 2]


def test_a_version_that_was_renamed_is_refused(pushed, store):
    (pushed / "mlp" / "1").rename(pushed / "mlp" / "7")
    with pytest.raises(RepositoryError, match="mlp/7 holds the manifest of 'mlp' version 1"):
        copy_versions(local(pushed), store)


def test_a_target_that_cannot_be_written(pushed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match="copying stopped"):
        copy_versions(local(pushed), local(tmp_path / "file"))


def test_the_command(pushed, tmp_path):
    arguments = ["models", "copy", str(pushed), (tmp_path / "copy").as_uri()]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "2 copied, 0 were there\n"
    assert result.stderr == "copied mlp/1\ncopied mlp/2\n"
    assert CliRunner().invoke(cli, arguments).stdout == "0 copied, 2 were there\n"


def test_nothing_to_copy_is_no_error(store, tmp_path):
    assert copy_versions(store, local(tmp_path / "new")).copied == []
    assert (tmp_path / "new").is_dir()
