"""A Ray cluster of one node on this machine: up, and down without leaving anything behind.

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
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rayprism.errors import ClusterError
from rayprism.fleet.environment import cluster_environment
from rayprism.fleet.processes import (
    end_processes,
    find_members,
    find_port,
    is_free,
    is_member,
    port_holder,
)
from rayprism.fleet.rest import ServeClient, token_header

__all__ = [
    "DEFAULT_STATE_DIR",
    "ClusterSettings",
    "ClusterState",
    "find_address",
    "find_cluster",
    "start_cluster",
    "stop_cluster",
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
_STOP_TIMEOUT_S = 30.0

Say = Callable[[str], None]


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
class _Home:
    """Where things of the cluster of one state folder are."""

    state_dir: Path

    @property
    def id(self) -> str:
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
        return self.state_dir / _STATE_FILE

    @property
    def log(self) -> Path:
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
    home = _Home(state_dir.resolve())
    state = ClusterState.read(home.state_file)
    if state is None or _head(state) is None:
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
    gone = ClusterState.read(_Home(state_dir.resolve()).state_file)
    if gone is None:
        return None
    raise ClusterError(
        f"the cluster of {state_dir} has ended: its head (pid {gone.pid}) is gone. The end of its "
        f"log:\n{_tail(gone.log)}\n`rayprism down` clears up what is left"
    )


def _head(state: ClusterState) -> psutil.Process | None:
    try:
        process = psutil.Process(state.pid)
        # A number is given to another process once this one is gone.
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        if alive and is_member(process, state.id, Path(state.temp_dir)):
            return process
    except psutil.Error:
        pass
    return None


def start_cluster(
    settings: ClusterSettings,
    state_dir: Path = DEFAULT_STATE_DIR,
    *,
    timeout_s: float = 120.0,
    say: Say = lambda _: None,
) -> tuple[ClusterState, bool]:
    """Starts a cluster, and waits until Serve can be deployed to.

    Args:
        settings: What it is to be.
        state_dir: Where its state and log are kept; one cluster a folder.
        timeout_s: How long the start may take.
        say: Is told what happens.

    Returns:
        The cluster, and whether it was started now (False: it was up already).

    Raises:
        ClusterError: It is up with other settings, a port is taken, or Ray did not start. Nothing
            is left running then.
    """
    home = _Home(state_dir.resolve())
    with home.lock():
        state = find_cluster(home.state_dir)
        if state is not None:
            _check_same(state, settings)
            return state, False
        leftovers = end_processes(home.id, home.temp_dir)
        if leftovers:
            say(f"ended {leftovers} processes that a cluster before this one had left")
        if not is_free(settings.dashboard_port):
            raise ClusterError(
                f"port {settings.dashboard_port} of the dashboard is taken"
                f"{port_holder(settings.dashboard_port)}. End that, or use --dashboard-port"
            )
        token_header()  # without a token, Ray would fail late and at length
        _make_temp_dir(home.temp_dir)
        try:
            return _launch(home, settings, timeout_s, say), True
        except BaseException:
            end_processes(home.id, home.temp_dir)
            shutil.rmtree(home.temp_dir, ignore_errors=True)
            home.state_file.unlink(missing_ok=True)
            raise


def _check_same(state: ClusterState, settings: ClusterSettings) -> None:
    differences = [
        f"{field.name} is {getattr(state.settings, field.name)!r}, asked for "
        f"{getattr(settings, field.name)!r}"
        for field in fields(ClusterSettings)
        if getattr(state.settings, field.name) != getattr(settings, field.name)
    ]
    if differences:
        raise ClusterError(
            f"a cluster is up at {state.dashboard_address} with other settings: "
            f"{'; '.join(differences)}. `rayprism down` ends it"
        )


def _make_temp_dir(path: Path) -> None:
    """An empty folder of our own. Its name can be guessed, so what lies there may not be ours."""
    if not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise ClusterError(f"{path} cannot be made: {error}. Remove what is there") from None


def _launch(home: _Home, settings: ClusterSettings, timeout_s: float, say: Say) -> ClusterState:
    ports: dict[str, int] = {}
    for name in ("gcs", "ray_client", "dashboard_agent"):
        ports[name] = find_port(taken=[settings.dashboard_port, *ports.values()])
    host = _node_address()
    repository = None if settings.repository is None else Path(settings.repository)
    environment = cluster_environment(
        home.id,
        home.temp_dir,
        repository,
        haproxy=settings.haproxy,
        drain_s=settings.drain_s,
    )
    say("starting Ray")
    with home.log.open("wb") as log:
        process = subprocess.Popen(
            _command(settings, home.temp_dir, host, ports),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    state = ClusterState(
        id=home.id,
        pid=process.pid,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        dashboard_address=f"http://127.0.0.1:{settings.dashboard_port}",
        ray_address=f"{host}:{ports['gcs']}",
        temp_dir=str(home.temp_dir),
        log=str(home.log),
        settings=settings,
        ports=ports
        | {
            name.removeprefix("RAY_SERVE_").removesuffix("_PORT").lower(): int(environment[name])
            for name in environment
            if name.startswith(("RAY_SERVE_HAPROXY_", "RAY_SERVE_FALLBACK_"))
            and name.endswith("_PORT")
        },
        versions={
            "rayprism": metadata.version("rayprism"),
            "ray": metadata.version("ray"),
            "python": platform.python_version(),
        },
    )
    # Before it answers: `down` has to find it also when this process dies now.
    state.write(home.state_file)
    _wait_until_up(state, process, timeout_s, say)
    return state


def _node_address() -> str:
    """A loopback address that Ray takes as it is.

    Ray replaces 127.0.0.1 by the address of a network interface, and then binds the dashboard
    agent, the runtime environment agent and the Ray Client server there: three doors through
    which the network could run code. Linux answers on all of 127.0.0.0/8, and those others Ray
    leaves alone. (GCS, raylet and workers listen on every interface whatever it is told.)
    """
    return "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def _command(
    settings: ClusterSettings, temp_dir: Path, host: str, ports: dict[str, int]
) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={host}",
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['ray_client']}",
        f"--dashboard-agent-listen-port={ports['dashboard_agent']}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={settings.dashboard_port}",
        "--disable-usage-stats",
        f"--temp-dir={temp_dir}",
        "--log-color=false",
    ]
    if settings.num_cpus is not None:
        command.append(f"--num-cpus={settings.num_cpus}")
    return command


def _wait_until_up(
    state: ClusterState, process: subprocess.Popen[bytes], timeout_s: float, say: Say
) -> None:
    client = ServeClient(state.dashboard_address, timeout_s=5.0)
    begin = time.monotonic()
    told_s = 0.0
    while True:
        waited_s = time.monotonic() - begin
        if process.poll() is not None:
            raise ClusterError(f"Ray did not start; its log ends with:\n{_tail(state.log)}")
        try:
            client.state()
            return
        except ClusterError as error:
            if "asks for a token" in str(error):
                raise
            if waited_s > timeout_s:
                raise ClusterError(
                    f"Ray did not answer at {state.dashboard_address} within {timeout_s:g} s; its "
                    f"log ends with:\n{_tail(state.log)}"
                ) from None
        if waited_s - told_s >= 5.0:
            told_s = waited_s
            say(f"waiting for the dashboard, {waited_s:.0f} s")
        time.sleep(0.2)


def _tail(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"  (no log: {error})"
    return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:]) or "  (it is empty)"


def stop_cluster(state_dir: Path = DEFAULT_STATE_DIR, *, say: Say = lambda _: None) -> bool:
    """Stops the cluster of a state folder, and whatever is left of it.

    Args:
        state_dir: As it was given to `start_cluster`.
        say: Is told what happens.

    Returns:
        Whether there was anything.

    Raises:
        ClusterError: Something could not be ended.
    """
    home = _Home(state_dir.resolve())
    if not home.state_dir.is_dir() and not find_members(home.id, home.temp_dir):
        return False
    with home.lock():
        state = ClusterState.read(home.state_file)
        head = None if state is None else _head(state)
        if head is not None:
            say("stopping Ray")
            with contextlib.suppress(psutil.Error):
                head.send_signal(signal.SIGTERM)
                head.wait(timeout=_STOP_TIMEOUT_S)
        leftovers = end_processes(home.id, home.temp_dir)
        if leftovers:
            say(f"ended {leftovers} processes that were left")
        remaining = find_members(home.id, home.temp_dir)
        if remaining:
            pids = ", ".join(str(process.pid) for process in remaining)
            raise ClusterError(f"these processes cannot be ended: {pids}")
        existed = home.temp_dir.is_dir() or state is not None
        if not home.temp_dir.is_symlink():
            shutil.rmtree(home.temp_dir, ignore_errors=True)
        home.state_file.unlink(missing_ok=True)
    return existed or bool(leftovers)
