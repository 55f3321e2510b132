"""An environment of its own for each server that rayprism is compared with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "PEERS",
    "Peer",
    "PeerUnavailable",
    "command_of",
    "environment_of",
    "is_ready",
    "variables_of",
    "versions_of",
]

_PEERS = Path(__file__).resolve().parent
_ROOT = _PEERS.parents[1]
_ENVIRONMENTS = _ROOT / ".bench" / "peers"
_INSTALL_TIMEOUT_S = 900.0
_LAST_LINES = 12
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)
_MODELS = ("tiny", "minilm", "images", "ragged")

Body = Literal["json", "binary", "grpc"]


class PeerUnavailable(Exception):
    """A peer cannot be installed, or not serve what is asked; says why."""


@dataclass(frozen=True)
class Peer:
    """A server in an environment of its own.

    Args:
        name: Of its folder beside this file, with `requirements.txt` and `server.py`.
        title: What it is called, without its version.
        package: Whose version is the peer's.
        bodies: What it reads.
        models: What it can serve, of `bench.models`.
    """

    name: str
    title: str
    package: str
    bodies: tuple[Body, ...] = ("json", "binary")
    models: tuple[str, ...] = _MODELS

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return _PEERS / self.name

    def path(self, model: str) -> str:
        """Where it takes requests."""
        return f"/v2/models/{model}/infer"


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            Peer("bare", "uvicorn + FastAPI + ONNX Runtime", "uvicorn"),
            Peer("mosec", "mosec", "mosec"),
            Peer("litserve", "LitServe", "litserve"),
            Peer("bentoml", "BentoML", "bentoml"),
            # Its REST server knows no binary data.
            Peer("mlserver", "MLServer", "mlserver", bodies=("json",)),
        )
    }
)


def environment_of(peer: str, root: Path = _ENVIRONMENTS) -> Path:
    """Makes the peer's virtual environment, unless it stands already with these requirements.

    Another process that makes the same one is waited for. What pip says is in `ROOT/NAME.log`.

    Args:
        peer: Of `PEERS`.
        root: Folder of all environments.

    Returns:
        The environment's folder.

    Raises:
        PeerUnavailable: There is no such peer, or pip could not install it.
    """
    found = _peer(peer)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{peer}.lock"):
        if not is_ready(peer, root):
            _make(found, root)
    return root / peer


def is_ready(peer: str, root: Path = _ENVIRONMENTS) -> bool:
    """Whether the environment stands, with the requirements as they are now."""
    stamp = _stamp(root / peer)
    return stamp.is_file() and stamp.read_text() == _digest(_peer(peer))


def versions_of(peer: str) -> dict[str, str]:
    """What the peer runs on: package -> version, of its requirements."""
    return dict(_PIN.findall((_peer(peer).folder / "requirements.txt").read_text()))


def command_of(
    peer: str,
    *,
    model: str,
    model_file: Path,
    port: int,
    tokenizer: Path | None = None,
    options: Mapping[str, Any] | None = None,
    root: Path = _ENVIRONMENTS,
) -> list[str]:
    """The command that serves a model at `http://127.0.0.1:PORT`, until it gets SIGTERM.

    Args:
        peer: Of `PEERS`; its environment has to stand.
        model: Of `bench.models`.
        model_file: ONNX.
        port: A free one.
        tokenizer: `tokenizer.json`, where the model takes text.
        options: Of the peer: see `main` of its `server.py`; all have `threads`, of a run of the
            model.
        root: Folder of all environments.

    Raises:
        PeerUnavailable: It cannot serve this model.
    """
    found = _peer(peer)
    if model not in found.models:
        raise PeerUnavailable(f"{found.title} does not serve {model} here")
    command = [
        *(str(_python(root / peer)), str(found.folder / "server.py")),
        *("--model", model, "--model-file", str(model_file), "--port", str(port)),
    ]
    if tokenizer is not None:
        command += ["--tokenizer", str(tokenizer)]
    if options:
        command += ["--options", json.dumps(options)]
    return command


def variables_of(peer: str, base: Mapping[str, str], root: Path = _ENVIRONMENTS) -> dict[str, str]:
    """The environment variables of that command.

    Args:
        peer: Of `PEERS`.
        base: Those of this process, or of the run: nothing of another Python is kept.
        root: Folder of all environments.
    """
    of_python = ("PYTHON", "VIRTUAL_ENV", "CONDA_")
    kept = {name: value for name, value in base.items() if not name.startswith(of_python)}
    path = os.pathsep.join([str(_python(root / peer).parent), base.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "PYTHONPATH": str(_ROOT)}


def _peer(name: str) -> Peer:
    try:
        return PEERS[name]
    except KeyError:
        raise PeerUnavailable(f"there is no peer {name!r}; there are {', '.join(PEERS)}") from None


def _make(peer: Peer, root: Path) -> None:
    folder, log = root / peer.name, root / f"{peer.name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    requirements = str(peer.folder / "requirements.txt")
    with log.open("w") as output:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(_python(folder)), *install, "-r", requirements],
        ):
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_INSTALL_TIMEOUT_S,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise PeerUnavailable(_reason(peer, error, log)) from None
    _stamp(folder).write_text(_digest(peer))


def _reason(peer: Peer, error: Exception, log: Path) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        what = f"took longer than {_INSTALL_TIMEOUT_S:g} s"
    elif isinstance(error, subprocess.CalledProcessError):
        what = f"failed with exit code {error.returncode}"
    else:
        what = f"could not be started: {error}"
    lines = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    said = "".join(f"\n  {line}" for line in lines)
    return f"{peer.title} cannot be installed: pip {what}; all it said is in {log}{said}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _stamp(folder: Path) -> Path:
    return folder / "requirements.sha256"


def _digest(peer: Peer) -> str:
    requirements = (peer.folder / "requirements.txt").read_bytes()
    # An environment belongs to one Python.
    return hashlib.sha256(requirements + sys.version.encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
