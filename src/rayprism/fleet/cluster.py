"""A Ray cluster of one node on this machine: up, and down without leaving anything behind."""

from __future__ import annotations

import contextlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from rayprism.errors import ClusterError
from rayprism.fleet.environment import cluster_environment
from rayprism.fleet.processes import (
    end_processes,
    find_members,
    find_port,
    is_free,
    port_holder,
)
from rayprism.fleet.rest import ServeClient, token_header
from rayprism.fleet.state import (
    DEFAULT_STATE_DIR,
    ClusterSettings,
    ClusterState,
    Home,
    find_cluster,
    find_head,
    log_tail,
)

__all__ = ["start_cluster", "stop_cluster"]

_STOP_TIMEOUT_S = 30.0

Say = Callable[[str], None]


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
    home = Home(state_dir.resolve())
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


def _launch(home: Home, settings: ClusterSettings, timeout_s: float, say: Say) -> ClusterState:
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
            raise ClusterError(f"Ray did not start; its log ends with:\n{log_tail(state.log)}")
        try:
            client.state()
            return
        except ClusterError as error:
            if "asks for a token" in str(error):
                raise
            if waited_s > timeout_s:
                raise ClusterError(
                    f"Ray did not answer at {state.dashboard_address} within {timeout_s:g} s; its "
                    f"log ends with:\n{log_tail(state.log)}"
                ) from None
        if waited_s - told_s >= 5.0:
            told_s = waited_s
            say(f"waiting for the dashboard, {waited_s:.0f} s")
        time.sleep(0.2)


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
    home = Home(state_dir.resolve())
    if not home.state_dir.is_dir() and not find_members(home.id, home.temp_dir):
        return False
    with home.lock():
        state = ClusterState.read(home.state_file)
        head = None if state is None else find_head(state)
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
