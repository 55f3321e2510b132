"""What is known of a local cluster: what it was asked to be, where it is, whether it lives.

Everything that belongs to a cluster follows from its state folder: the id, and with it the
temporary folder and the marker of its processes. So a cluster is found again even when its state
file is gone or its head was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rayprism.errors import ClusterError
from rayprism.fleet.processes import is_member

__all__ = [
    "DEFAULT_STATE_DIR",
    "ClusterSettings",
    "ClusterState",
    "Home",
    "find_address",
    "find_cluster",
    "find_head",
    "log_tail",
]

DEFAULT_STATE_DIR = Path(".rayprism")
_STATE_FILE = "cluster.json"
_LOG_FILE = "cluster.log"
_LOG_TAIL_LINES = 25
_SOCKET_PATH_LIMIT = 97
"""Longest path of a socket that HAProxy takes. It wants ten characters more for itself than the
107 of unix(7)."""
_LONGEST_SOCKET = "/h/" + "0" * 56 + "/m.sock"
"""Below the temporary folder: Serve puts the id of the node between."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a cluster was asked to be.

    Args:
        repository: The model repository, absolute.
        dashboard_port: Of the dashboard, which is also the address of `serve deploy`.
        num_cpus: CPUs that Ray hands out; by default those of the machine.
        haproxy: Whether HAProxy is Serve's proxy.
        drain_s: How long a replica that is stopped goes on answering; by default Serve's 30 s.
    """

    repository: str | None = None
    dashboard_port: int = 8265
    num_cpus: int | None = None
    haproxy: bool = True
    drain_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClusterState:
    """A cluster that was started, as it is written to `cluster.json`.

    Args:
        id: In the name of its temporary folder and in the environment of its processes.
        pid: Of the head, `ray start --block`.
        started: When, ISO 8601.
        dashboard_address: For a browser, for `serve deploy --address` and for `ray job submit`.
        ray_address: For RAY_ADDRESS.
        temp_dir: Ray's logs and sockets.
        log: What the head printed.
        settings: What was asked for.
        ports: Ports besides the dashboard's, by name.
        versions: Of rayprism, Ray and Python.
    """

    id: str
    pid: int
    started: str
    dashboard_address: str
    ray_address: str
    temp_dir: str
    log: str
    settings: ClusterSettings
    ports: dict[str, int]
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> ClusterState | None:
        """The state in a file; None where there is none, or none that can be read."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            settings = ClusterSettings(**raw.pop("settings"))
            return cls(settings=settings, **raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Writes it whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        part.replace(path)


@dataclass(frozen=True, slots=True)
class Home:
    """Where things of the cluster of one state folder are."""

    state_dir: Path

    @property
    def id(self) -> str:
        """The cluster's id, and the value of the marker of its processes."""
        # The user is part of it: /tmp is everybody's.
        text = f"{os.getuid()}:{self.state_dir}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def temp_dir(self) -> Path:
        """Short, for the paths of sockets in it have a limit."""
        name = f"rayprism-{self.id}"
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):
            if len(str(parent / name) + _LONGEST_SOCKET) <= _SOCKET_PATH_LIMIT:
                return parent.resolve() / name
        return Path("/tmp") / name

    @property
    def state_file(self) -> Path:
        """A `ClusterState` as JSON, from the start of a cluster to its end."""
        return self.state_dir / _STATE_FILE

    @property
    def log(self) -> Path:
        """What the head prints; kept after the end."""
        return self.state_dir / _LOG_FILE

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True)
            handle = (self.state_dir / "lock").open("w")
        except OSError as error:
            raise ClusterError(f"{self.state_dir} cannot be written: {error}") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ClusterError(
                    f"another `rayprism up` or `down` is at work on {self.state_dir}"
                ) from None
            yield


def find_cluster(state_dir: Path = DEFAULT_STATE_DIR) -> ClusterState | None:
    """The cluster of a state folder, if its head is alive."""
    home = Home(state_dir.resolve())
    state = ClusterState.read(home.state_file)
    if state is None or find_head(state) is None:
        return None
    return state


def find_address(state_dir: Path = DEFAULT_STATE_DIR) -> str | None:
    """The dashboard of a state folder's cluster; None where none was started.

    Raises:
        ClusterError: It was started, and has ended by itself.
    """
    cluster = find_cluster(state_dir)
    if cluster is not None:
        return cluster.dashboard_address
    gone = ClusterState.read(Home(state_dir.resolve()).state_file)
    if gone is None:
        return None
    raise ClusterError(
        f"the cluster of {state_dir} has ended: its head (pid {gone.pid}) is gone. The end of its "
        f"log:\n{log_tail(gone.log)}\n`rayprism down` clears up what is left"
    )


def find_head(state: ClusterState) -> psutil.Process | None:
    """The process of the head, if it is alive and not another one with its number."""
    try:
        process = psutil.Process(state.pid)
        # A number is given to another process once this one is gone.
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        if alive and is_member(process, state.id, Path(state.temp_dir)):
            return process
    except psutil.Error:
        pass
    return None


def log_tail(path: str) -> str:
    """The end of a log, indented, for an error."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"  (no log: {error})"
    return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:]) or "  (it is empty)"
