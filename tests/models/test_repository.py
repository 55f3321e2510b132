"""Versions appear whole or not at all, and a number is given once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rayprism.errors import ConfigInvalid, DigestMismatch, RepositoryError
from rayprism.models.manifest import FileEntry, Manifest
from rayprism.models.repository import ModelVersion, Repository, describe_files

ROOT = Path(__file__).parents[2]


def manifest_of(model: str, version: int, folder: Path) -> Manifest:
    tensor = {"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [1]}
    spec = {"name": "x", "datatype": "INT32", "shape": [-1, 1]}
    return Manifest.model_validate(
        {
            "model": model,
            "version": version,
            "created": "2026-01-01T00:00:00+00:00",
            "runtime": "onnx",
            "file": "m.onnx",
            "inputs": [spec],
            "outputs": [spec],
            "golden": {"inputs": [tensor], "outputs": [tensor]},
            "files": describe_files(folder),
        }
    )


def push(repository: Repository, model: str = "m", content: bytes = b"weights") -> ModelVersion:
    def write(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "vocabulary.txt").write_text("a\nb\n")
        return manifest_of(model, version, folder)

    return repository.add_version(model, write)


def test_an_empty_repository_has_nothing(repository: Repository) -> None:
    assert repository.models() == []
    with pytest.raises(RepositoryError, match=r"has no model 'm'.*It has no models yet"):
        repository.versions("m")
    assert not repository.root.exists()


def test_versions_count_up(repository: Repository) -> None:
    for version in (1, 2, 3):
        pushed = push(repository)
        assert pushed.folder == repository.root / "m" / str(version)
        assert pushed.manifest.version == version
        pushed.verify()
    push(repository, "a")
    assert repository.models() == ["a", "m"]
    assert repository.versions("m") == [1, 2, 3]
    assert repository.version("m", 2).manifest.version == 2


def test_versions_are_sorted_as_numbers(repository: Repository) -> None:
    for _ in range(11):
        push(repository)
    assert repository.versions("m") == list(range(1, 12))


def test_unknown_names_are_told_with_what_there_is(repository: Repository) -> None:
    push(repository, "flights")
    push(repository, "flights")
    push(repository, "digits")
    with pytest.raises(RepositoryError, match=r"Did you mean 'flights'\? It has: digits, flights"):
        repository.version("flihgts", 1)
    with pytest.raises(RepositoryError, match=r"no version 9 in .*It has: 1, 2"):
        repository.version("flights", 9)


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "a/b", "a\\b", "/etc", ".push-1", "ä", "x" * 129]
)
def test_names_that_leave_the_root_are_refused(repository: Repository, name: str) -> None:
    for use in (
        lambda: repository.versions(name),
        lambda: repository.version(name, 1),
        lambda: push(repository, name),
    ):
        with pytest.raises(RepositoryError, match="is not a model name"):
            use()
    assert not repository.root.exists()


def test_what_is_no_version_is_passed_over(repository: Repository) -> None:
    push(repository)
    home = repository.root / "m"
    for name in ("0", "-1", "01", "1.5", "latest", "notes", ".push-1234", "9" * 12):
        (home / name).mkdir()
        (home / name / "manifest.json").write_text("{}")
    (home / "5").mkdir()
    (home / "6").write_text("a file")
    (home / "README.md").write_text("about")
    (home / "2").symlink_to(home / "1")
    (repository.root / "empty").mkdir()
    (repository.root / "file").write_text("x")
    (repository.root / ".hidden").mkdir()
    assert repository.models() == ["m"]
    assert repository.versions("m") == [1]
    # A number that is taken, by whatever, is not given again.
    assert push(repository).manifest.version == 7


def test_a_hole_is_not_filled(repository: Repository) -> None:
    push(repository)
    push(repository)
    (repository.root / "m" / "1").rename(repository.root / "m" / "away")
    assert push(repository).manifest.version == 3


def test_a_number_that_is_taken_meanwhile(repository: Repository) -> None:
    def write(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(b"slow")
        assert version == 1
        push(repository)
        push(repository)
        return manifest_of("m", version, folder)

    pushed = repository.add_version("m", write)
    assert pushed.manifest.version == 3
    pushed.verify()
    assert repository.versions("m") == [1, 2, 3]
    assert repository.version("m", 1).manifest.files["m.onnx"].size_bytes == len(b"weights")


@pytest.mark.parametrize("fault", [ValueError("mine"), KeyboardInterrupt()])
def test_a_push_that_fails_leaves_nothing(repository: Repository, fault: BaseException) -> None:
    def write(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(b"half")
        raise fault

    with pytest.raises(type(fault)):
        repository.add_version("m", write)
    assert list(repository.root.iterdir()) == []
    push(repository)
    with pytest.raises(type(fault)):
        repository.add_version("m", write)
    assert [path.name for path in (repository.root / "m").iterdir()] == ["1"]


def test_the_manifest_has_to_be_the_folder_s(repository: Repository) -> None:
    def unlisted(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(b"x")
        manifest = manifest_of("m", version, folder)
        (folder / "late.txt").write_text("not listed")
        return manifest

    def stranger(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(b"x")
        return manifest_of("other", version, folder)

    def linked(version: int, folder: Path) -> Manifest:
        (folder / "m.onnx").write_bytes(b"x")
        manifest = manifest_of("m", version, folder)
        (folder / "link").symlink_to("/etc/passwd")
        return manifest

    for write, said in ((unlisted, "late.txt"), (stranger, "'other'"), (linked, "link")):
        with pytest.raises(RepositoryError, match=said):
            repository.add_version("m", write)
    assert repository.models() == []


def test_digests_are_of_the_content(repository: Repository) -> None:
    files = push(repository, content=b"abc").manifest.files
    assert files == {
        "deep/vocabulary.txt": FileEntry(
            sha256=hashlib.sha256(b"a\nb\n").hexdigest(), size_bytes=4
        ),
        "m.onnx": FileEntry(sha256=hashlib.sha256(b"abc").hexdigest(), size_bytes=3),
    }


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "m.onnx").write_bytes(b"weightz"), "m.onnx has sha256"),
        (lambda f: (f / "m.onnx").write_bytes(b"weight"), "m.onnx has 6 bytes, expected 7"),
        (lambda f: (f / "m.onnx").unlink(), "m.onnx is missing"),
        (lambda f: (f / "deep/vocabulary.txt").unlink(), "deep/vocabulary.txt is missing"),
        (lambda f: (f / "deep/new").touch(), "deep/new is extra"),
        (lambda f: (f / ".hidden").touch(), ".hidden is extra"),
        (lambda f: (f / "link").symlink_to("m.onnx"), "link is a symbolic link"),
        (lambda f: (f / "folder").symlink_to("deep"), "folder is a symbolic link"),
    ],
)
def test_damage_is_named(repository: Repository, damage: Any, said: str) -> None:
    version = push(repository)
    for path in version.folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    version.verify()
    damage(version.folder)
    with pytest.raises(DigestMismatch) as caught:
        repository.version("m", 1).verify()
    assert said in str(caught.value)
    assert "m version 1" in str(caught.value)


def test_a_listed_file_that_is_a_link_is_refused(repository: Repository, tmp_path: Path) -> None:
    version = push(repository)
    (tmp_path / "same").write_bytes(b"weights")
    (version.folder / "m.onnx").unlink()
    (version.folder / "m.onnx").symlink_to(tmp_path / "same")
    with pytest.raises(DigestMismatch, match=r"m\.onnx is a symbolic link"):
        version.verify()


def test_a_manifest_that_is_broken_names_its_path(repository: Repository) -> None:
    path = push(repository).folder / "manifest.json"
    path.chmod(0o644)
    path.write_text("{")
    with pytest.raises(ConfigInvalid, match="not JSON") as caught:
        repository.version("m", 1)
    assert str(path) in str(caught.value)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    repository = Repository(tmp_path / "file")
    with pytest.raises(RepositoryError, match="cannot be read"):
        repository.models()
    with pytest.raises(RepositoryError, match="cannot be written"):
        push(repository)


def test_old_leftovers_go_and_new_ones_stay(repository: Repository) -> None:
    push(repository)
    home = repository.root / "m"
    for name, age_s in ((".push-old", 90_000), (".push-new", 60)):
        (home / name).mkdir()
        (home / name / "m.onnx").write_bytes(b"half")
        os.utime(home / name, (time.time() - age_s,) * 2)
    push(repository)
    assert sorted(path.name for path in home.iterdir()) == [".push-new", "1", "2"]


def test_a_version_appears_by_one_rename(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename
    renames = []

    def spy(path: Path, target: Any) -> Any:
        whole = {file.name for file in path.rglob("*") if file.is_file()}
        renames.append((whole, Path(target).exists(), repository.models()))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    push(repository)
    assert renames == [({"m.onnx", "vocabulary.txt", "manifest.json"}, False, [])]
    assert repository.versions("m") == [1]


_PUSHER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from rayprism.models.repository import Repository
    from tests.models.test_repository import push
    repository = Repository(Path({repository!r}))
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range({turns}):
        print(push(repository, content=f"{{sys.argv[1]}}-{{turn}}".encode()).manifest.version)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_pushes_at_once_get_numbers_of_their_own(repository: Repository) -> None:
    turns, pushers = 5, 4
    script = _PUSHER.format(root=str(ROOT), repository=str(repository.root), turns=turns)
    processes = [start(script, str(number)) for number in range(pushers)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    # Whatever is visible while they push is whole.
    seen = 0
    while any(process.poll() is None for process in processes):
        for version in repository.versions("m") if repository.models() else []:
            repository.version("m", version).verify()
            seen += 1
    given: list[int] = []
    for number, process in enumerate(processes):
        out, _ = process.communicate()
        assert process.returncode == 0
        own = [int(line) for line in out.split()]
        assert own == sorted(own)
        for turn, version in enumerate(own):
            content = (repository.root / "m" / str(version) / "m.onnx").read_text()
            assert content == f"{number}-{turn}"
        given += own
    assert sorted(given) == list(range(1, turns * pushers + 1)) == repository.versions("m")
    assert seen > 0
    assert not list((repository.root / "m").glob(".*"))


_CRASHER = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from rayprism.models import repository as module
    from tests.models.test_repository import push
    stop_at = {stop_at!r}
    calls = 0
    real = module._sync
    def sync(path):
        global calls
        calls += 1
        if calls == stop_at:
            print("there", flush=True)
            time.sleep(60)
        real(path)
    module._sync = sync
    push(module.Repository(Path({repository!r})))
"""


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6])
def test_a_push_that_is_killed_leaves_nothing_visible(repository: Repository, stop_at: int) -> None:
    """Killed at its writes to disk: files, folders, manifest, and the last before the rename."""
    push(repository)
    process = start(
        _CRASHER.format(root=str(ROOT), repository=str(repository.root), stop_at=stop_at)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert repository.versions("m") == [1]
    assert repository.models() == ["m"]
    leftovers = list((repository.root / "m").glob(".push-*"))
    assert len(leftovers) == 1
    assert push(repository).manifest.version == 2
    for version in repository.versions("m"):
        repository.version("m", version).verify()


def test_the_manifest_on_disk_is_readable_json(repository: Repository) -> None:
    version = push(repository)
    raw = json.loads((version.folder / "manifest.json").read_text())
    assert raw["model"] == "m"
    assert raw["files"].keys() == {"m.onnx", "deep/vocabulary.txt"}
