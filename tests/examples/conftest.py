"""One repository into which every example pushes, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from rayprism.models.repository import Repository
from tests.examples.scripts import import_script, run_script


@dataclass(frozen=True)
class Pushed:
    """What the scripts left behind."""

    repository: Repository
    printed: str
    rows: Path


@pytest.fixture(scope="session")
def examples_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="session")
def flights(examples_root: Path) -> Pushed:
    """Both versions, trained on the whole data."""
    root, rows = examples_root / "models", examples_root / "rows.json"
    printed = run_script("flights/train.py", "--repository", root, "--rows", rows)
    return Pushed(Repository(root), printed, rows)


@pytest.fixture(scope="session")
def digits(examples_root: Path) -> Pushed:
    root = examples_root / "models"
    printed = run_script("digits/train.py", "--repository", root)
    return Pushed(Repository(root), printed, Path())


@pytest.fixture(scope="session")
def minilm(examples_root: Path) -> Pushed:
    """Fails, and does not skip, where a package is missing: nobody would notice a skip."""
    push = import_script("minilm/push.py")
    for package, path in (push.NETWORK, push.TOKENIZER):
        try:
            push.find_file(package, path)
        except SystemExit as error:
            pytest.fail(str(error))
    root = examples_root / "models"
    printed = run_script("minilm/push.py", "--repository", root)
    return Pushed(Repository(root), printed, Path())
