"""The environments of peers, and what their servers are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.models import MODELS
from bench.peers import environments
from bench.peers.environments import (
    PEERS,
    PeerUnavailable,
    command_of,
    environment_of,
    is_ready,
    variables_of,
    versions_of,
)
from bench.peers.served import Arguments

_ROOT = Path(__file__).parents[2]


class Installer:
    """In place of venv and pip."""

    def __init__(self, peers: Path) -> None:
        self.commands: list[list[str]] = []
        self.fails_with: Exception | None = None
        self.requirements = peers / "bare" / "requirements.txt"
        self.requirements.parent.mkdir(parents=True)
        self.requirements.write_text("fastapi==1.0\n")

    def run(self, command: Sequence[str], *, stdout: Any, **_: Any) -> None:
        self.commands.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir()
            return
        stdout.write("Collecting fastapi\nERROR: no such version\n")
        stdout.flush()
        if self.fails_with is not None:
            raise self.fails_with


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installer:
    installer = Installer(tmp_path / "peers")
    monkeypatch.setattr(environments, "_PEERS", tmp_path / "peers")
    monkeypatch.setattr(environments.subprocess, "run", installer.run)
    return installer


def test_an_environment_is_made_once(installer: Installer, tmp_path: Path) -> None:
    root = tmp_path / "made"
    assert not is_ready("bare", root)
    folder = environment_of("bare", root)
    assert folder == root / "bare"
    assert is_ready("bare", root)
    made, filled = installer.commands
    assert made == [sys.executable, "-m", "venv", str(folder)]
    assert filled[0] == str(folder / "bin" / "python")
    assert filled[-2:] == ["-r", str(installer.requirements)]
    environment_of("bare", root)
    assert len(installer.commands) == 2


def test_other_requirements_need_another_environment(installer: Installer, tmp_path: Path) -> None:
    folder = environment_of("bare", tmp_path)
    (folder / "left").touch()
    installer.requirements.write_text("fastapi==2.0\n")
    assert not is_ready("bare", tmp_path)
    environment_of("bare", tmp_path)
    assert len(installer.commands) == 4
    assert not (folder / "left").exists(), "nothing of the old one is in the new one"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.CalledProcessError(1, "pip"), "pip failed with exit code 1"),
        (subprocess.TimeoutExpired("pip", 1.0), "pip took longer than"),
        (OSError("no pip"), "pip could not be started: no pip"),
    ],
)
def test_what_cannot_be_installed_says_why(
    installer: Installer, tmp_path: Path, error: Exception, reason: str
) -> None:
    installer.fails_with = error
    with pytest.raises(PeerUnavailable) as caught:
        environment_of("bare", tmp_path)
    assert reason in str(caught.value)
    assert "ERROR: no such version" in str(caught.value)
    assert str(tmp_path / "bare.log") in str(caught.value)
    assert not is_ready("bare", tmp_path)
    installer.fails_with = None
    environment_of("bare", tmp_path)
    assert is_ready("bare", tmp_path), "what is half there is made anew"


def test_only_known_peers_and_models_are_served(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="no peer 'torchserve'; there are bare, mosec"):
        environment_of("torchserve", tmp_path)
    with pytest.raises(PeerUnavailable, match="mosec does not serve llama here"):
        command_of("mosec", model="llama", model_file=Path("m.onnx"), port=1)


@pytest.mark.parametrize("peer", PEERS)
def test_each_peer_is_pinned_and_runs_the_model_on_the_same_libraries(peer: str) -> None:
    ours = dict(
        line.split("==") for line in (_ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    lines = (PEERS[peer].folder / "requirements.txt").read_text().splitlines()
    pins = versions_of(peer)
    assert len(pins) == sum(bool(line) and not line.startswith("#") for line in lines)
    assert PEERS[peer].package in pins
    for package in ("onnxruntime", "numpy", "tokenizers", "orjson", "httptools"):
        if package == "httptools" and peer == "mosec":
            continue
        assert pins[package] == ours[package], package
    assert (PEERS[peer].folder / "server.py").is_file()
    assert set(PEERS[peer].models) <= set(MODELS)


def test_servers_are_told_what_the_command_says(tmp_path: Path) -> None:
    command = command_of(
        "bentoml",
        model="minilm",
        model_file=tmp_path / "m.onnx",
        tokenizer=tmp_path / "tokenizer.json",
        port=8123,
        options={"max_batch_size": 8},
        root=tmp_path,
    )
    assert command[:2] == [
        str(tmp_path / "bentoml" / "bin" / "python"),
        str(PEERS["bentoml"].folder / "server.py"),
    ]
    told = Arguments.from_command(command[2:])
    assert told == Arguments(
        model="minilm",
        model_file=tmp_path / "m.onnx",
        port=8123,
        tokenizer=tmp_path / "tokenizer.json",
        options={"max_batch_size": 8},
    )
    assert told.path == PEERS["bentoml"].path("minilm") == "/v2/models/minilm/infer"


def test_without_tokenizer_and_options_there_are_none(tmp_path: Path) -> None:
    command = command_of("bare", model="tiny", model_file=tmp_path / "m.onnx", port=1)
    told = Arguments.from_command(command[2:])
    assert (told.tokenizer, told.options) == (None, {})


@pytest.mark.parametrize("tokenizer", [None, Path("t.json")])
def test_processes_of_a_server_are_told_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Path | None
) -> None:
    variables: dict[str, str] = {}
    monkeypatch.setattr("os.environ", variables)
    monkeypatch.chdir(tmp_path)
    Arguments("tiny", Path("m.onnx"), 1, tokenizer, {"threads": 2}).export()
    # They may be started elsewhere.
    assert Arguments.from_environment() == Arguments(
        "tiny",
        tmp_path / "m.onnx",
        1,
        tokenizer and tmp_path / tokenizer,
        {"threads": 2},
    )


def test_options_stand_over_defaults_and_none_is_unknown() -> None:
    told = Arguments("tiny", Path("m.onnx"), 1, options={"wait_s": 2, "threads": 2})
    assert told.options_over({"wait_s": 1, "size": 3}) == {"wait_s": 2, "size": 3, "threads": 2}
    with pytest.raises(SystemExit, match="no such option: wait_s; there are threads, size"):
        told.options_over({"size": 3})


def test_nothing_of_another_python_reaches_a_peer(tmp_path: Path) -> None:
    base = {
        "PATH": "/usr/bin",
        "PYTHONPATH": "/elsewhere",
        "PYTHONHOME": "/elsewhere",
        "VIRTUAL_ENV": "/elsewhere",
        "RAYPRISM_BENCH_RUN": "1-2/mosec",
    }
    assert variables_of("mosec", base, tmp_path) == {
        "PATH": f"{tmp_path}/mosec/bin:/usr/bin",
        "PYTHONPATH": str(_ROOT),
        "RAYPRISM_BENCH_RUN": "1-2/mosec",
    }


def test_what_peers_share_needs_nothing_of_rayprism() -> None:
    code = (
        "import json, sys; import bench.peers.served; "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, check=True, text=True
    )
    assert not {"rayprism", "ray", "onnxruntime", "pydantic"} & set(json.loads(done.stdout))
