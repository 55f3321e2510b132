"""The commands of docs/operations.md: a copy of the repository brings back what was there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayprism.fleet.journal import Journal
from rayprism.fleet.lock import LOCK_FILE
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.models import mlp_example, save_mlp

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def commands(program: str) -> list[str]:
    """What the page says to type, of one program."""
    pages = PAGE.replace("\\\n", " ")
    return list(re.findall(rf"^\s*({program} .*)$", pages, re.M))


def shell(command: str, repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RAYPRISM_REPOSITORY": str(repository), "PATH": path}
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


def rayprism(command: str, repository: Path, folder: Path) -> str:
    program = f"{sys.executable} -m rayprism.cli.main"
    return shell(command.replace("rayprism", program, 1), repository, folder).stdout


def test_a_backup_is_restored_whole(tmp_path):
    lost, found = tmp_path / "lost", tmp_path / "found"
    found.mkdir()
    repository = Repository(lost)
    model = save_mlp(tmp_path / "mlp.onnx")
    for _ in range(2):
        push_model(repository, "flights", model, example=mlp_example())
    journal = Journal(lost, "flights")
    change = journal.begin(
        "promote",
        who="x@y",
        before={"version": 1, "traffic": None},
        after={"version": 2, "traffic": None},
        why="better",
        cluster="http://127.0.0.1:8265",
        config_before=[],
    )
    journal.end(change, "done")
    # A push and a change are on their way while the copy is made; half a line has been written.
    (lost / "flights" / ".push-0123").mkdir()
    (lost / "flights" / ".push-0123" / "model.onnx").write_bytes(b"half")
    (lost / LOCK_FILE).touch()
    with journal.path.open("a") as file:
        file.write('{"id": "00')

    create, extract = commands("tar")
    shell(create, lost, tmp_path)
    [archive] = tmp_path.glob("*.tar.gz")
    extract = re.sub(r"models-\S+\.tar\.gz", archive.name, extract)
    shell(extract, found, tmp_path)

    assert {path.name for path in (found / "flights").iterdir()} == {"1", "2", "journal.jsonl"}
    assert not (found / LOCK_FILE).exists()
    verify = [command for command in commands("rayprism models verify") if "--repo" not in command]
    assert len(verify) == 2
    for command in verify:
        rayprism(command.partition("#")[0], found, tmp_path)
    [history] = commands("rayprism history")
    shown = rayprism(f"{history} --repository {found}", found, tmp_path)
    assert "promote" in shown
    assert "better" in shown
