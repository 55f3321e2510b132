"""Prometheus and Alertmanager beside a local cluster: up, watching it, and down.

They outlive the cluster: what was before its end can still be looked at, and the next one in the
same state folder is found by itself.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rayprism.errors import ClusterError
from rayprism.fleet.processes import MARKER_VARIABLE, find_port
from rayprism.fleet.rest import token_header
from rayprism.fleet.state import (
    DEFAULT_STATE_DIR,
    ClusterState,
    Home,
    find_address,
    find_cluster,
    log_tail,
)
from rayprism.telemetry.rules import (
    ALERTMANAGER_NOTE,
    build_alertmanager_config,
    build_prometheus_config,
    build_rules,
    to_yaml,
)

__all__ = ["MonitoringSettings", "MonitoringState", "start_monitoring", "stop_monitoring"]

MONITORING_VARIABLE = "RAYPRISM_MONITORING"
"""Environment variable of the processes that were started here; its value is the folder's id. Not
the cluster's marker, by which `rayprism down` would end them."""

_FOLDER = "monitoring"
_STATE_FILE = "monitoring.json"
_TOKEN_FILE = "ray_token"
_RECEIVERS_FILE = "alertmanager.yml"
"""Made once: people add who is to be told."""

_PROMETHEUS = ("prometheus",)
_ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
"""Names of the programs: Debian's first, then the project's own."""

_INSTALL = (
    "`apt install prometheus prometheus-alertmanager` brings both on Debian and Ubuntu; "
    "docker/monitoring.yaml runs them, and Grafana, in containers"
)
_RETENTION = re.compile(r"([0-9]+(ms|[smhdwy]))+")
_STOP_TIMEOUT_S = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MonitoringSettings:
    """What is asked for.

    Args:
        prometheus_port: On 127.0.0.1; where it is taken, another one.
        alertmanager_port: The same.
        retention: How long Prometheus keeps what it saw, as it writes times: `15d`.
        scrape_interval_s: How often it looks.
        scale: Less than 1 shrinks the windows of all rules, for tests; see
            `telemetry.rules.build_rules`.
    """

    prometheus_port: int = 9090
    alertmanager_port: int = 9093
    retention: str = "15d"
    scrape_interval_s: float = 10.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class MonitoringState:
    """What runs, as it is written to `monitoring.json`.

    Args:
        prometheus_pid: Of Prometheus.
        prometheus_port: On 127.0.0.1.
        alertmanager_pid: Of Alertmanager; None where it is not installed.
        alertmanager_port: On 127.0.0.1.
        folder: Configuration, data and logs.
        settings: What was asked for.
    """

    prometheus_pid: int
    prometheus_port: int
    alertmanager_pid: int | None
    alertmanager_port: int | None
    folder: str
    settings: MonitoringSettings

    @property
    def prometheus_address(self) -> str:
        """For a browser, and for Grafana."""
        return f"http://127.0.0.1:{self.prometheus_port}"

    @property
    def alertmanager_address(self) -> str | None:
        """For a browser; None where it does not run."""
        port = self.alertmanager_port
        return None if port is None else f"http://127.0.0.1:{port}"

    @property
    def pids(self) -> frozenset[int]:
        """Of both."""
        return frozenset({self.prometheus_pid, self.alertmanager_pid} - {None})  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> MonitoringState | None:
        """The state in a file; None where there is none, or none that can be read."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            settings = MonitoringSettings(**raw.pop("settings"))
            return cls(settings=settings, **raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def start_monitoring(
    settings: MonitoringSettings,
    state_dir: Path = DEFAULT_STATE_DIR,
    *,
    timeout_s: float = 30.0,
    say: Say = lambda _: None,
) -> tuple[MonitoringState, bool]:
    """Starts Prometheus and, where it is installed, Alertmanager for a state folder's cluster.

    Where they run already and the cluster has other ports now, they are told.

    Args:
        settings: What they are to be.
        state_dir: As it was given to `start_cluster`.
        timeout_s: How long each may take to be ready.
        say: Is told what happens.

    Returns:
        What runs, and whether it was started now.

    Raises:
        ClusterError: There is no cluster, a program is missing, or one did not start. Nothing is
            left running then.
    """
    if not _RETENTION.fullmatch(settings.retention):
        raise ClusterError(
            f"the retention {settings.retention!r} is not a time. Use a number with a unit: 12h, "
            "15d, 4w"
        )
    cluster = _need_cluster(state_dir)
    home = _monitoring_home(state_dir)
    with home.lock():
        state = MonitoringState.read(home.state_dir / _STATE_FILE)
        members = _find_members(home.id)
        if state is not None and state.pids <= {process.pid for process in members}:
            _follow(state, cluster, settings, say)
            return state, False
        if members:
            say(f"ending {len(members)} processes that were left of it")
            _end(members)
        programs = _find_programs(say)
        try:
            return _launch(home, cluster, settings, programs, timeout_s, say), True
        except BaseException:
            _end(_find_members(home.id))
            (home.state_dir / _STATE_FILE).unlink(missing_ok=True)
            raise


def stop_monitoring(state_dir: Path = DEFAULT_STATE_DIR, *, say: Say = lambda _: None) -> bool:
    """Stops what `start_monitoring` started, also where the cluster is gone. Data and logs stay.

    Args:
        state_dir: As it was given to `start_monitoring`.
        say: Is told what happens.

    Returns:
        Whether there was anything.

    Raises:
        ClusterError: Something could not be ended.
    """
    home = _monitoring_home(state_dir)
    if not home.state_dir.is_dir() and not _find_members(home.id):
        return False
    with home.lock():
        members = _find_members(home.id)
        if members:
            say("stopping Prometheus and Alertmanager")
        _end(members)
        remaining = _find_members(home.id)
        if remaining:
            pids = ", ".join(str(process.pid) for process in remaining)
            raise ClusterError(f"these processes cannot be ended: {pids}")
        (home.state_dir / _STATE_FILE).unlink(missing_ok=True)
    return bool(members)


def _monitoring_home(state_dir: Path) -> Home:
    """Its own lock and id: a cluster may come and go meanwhile."""
    return Home(state_dir.resolve() / _FOLDER)


def _need_cluster(state_dir: Path) -> ClusterState:
    cluster = find_cluster(state_dir)
    if cluster is None:
        find_address(state_dir)  # knows of one that has ended by itself
        raise ClusterError(
            f"no cluster of {state_dir} is up. `rayprism up` starts one; Prometheus for a cluster "
            "elsewhere is configured as in dashboards/prometheus/prometheus.yml"
        )
    return cluster


def _find_programs(say: Say) -> tuple[str, str | None]:
    prometheus, alertmanager = _which(_PROMETHEUS), _which(_ALERTMANAGER)
    if prometheus is None:
        raise ClusterError(f"the program prometheus is not in PATH. {_INSTALL}")
    if alertmanager is None:
        say(f"Alertmanager is not in PATH: alerts are shown by Prometheus only. {_INSTALL}")
    return prometheus, alertmanager


def _which(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _launch(
    home: Home,
    cluster: ClusterState,
    settings: MonitoringSettings,
    programs: tuple[str, str | None],
    timeout_s: float,
    say: Say,
) -> MonitoringState:
    folder = home.state_dir
    port = _take_port("Prometheus", settings.prometheus_port, say)
    alert_port = None
    if programs[1] is not None:
        alert_port = _take_port("Alertmanager", settings.alertmanager_port, say, taken=port)
    files = _render(cluster, settings, alert_port)
    if not (folder / _RECEIVERS_FILE).exists():
        files[_RECEIVERS_FILE] = to_yaml(build_alertmanager_config(), ALERTMANAGER_NOTE)
    _write_files(folder, files)
    alertmanager = None
    if programs[1] is not None and alert_port is not None:
        say("starting Alertmanager")
        command = [
            programs[1],
            f"--config.file={folder / _RECEIVERS_FILE}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{alert_port}",
            # One alone has nobody to gossip with, and the port for it would be open to all.
            "--cluster.listen-address=",
        ]
        alertmanager = _start("alertmanager", command, home)
    say("starting Prometheus")
    command = [
        programs[0],
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--storage.tsdb.retention.time={settings.retention}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    prometheus = _start("prometheus", command, home)
    state = MonitoringState(
        prometheus_pid=prometheus.pid,
        prometheus_port=port,
        alertmanager_pid=None if alertmanager is None else alertmanager.pid,
        alertmanager_port=alert_port,
        folder=str(folder),
        settings=settings,
    )
    text = json.dumps(asdict(state), indent=2) + "\n"
    _write_files(folder, {_STATE_FILE: text})
    if alertmanager is not None and alert_port is not None:
        _wait_until_ready("alertmanager", alertmanager, alert_port, folder, timeout_s)
    _wait_until_ready("prometheus", prometheus, port, folder, timeout_s)
    return state


def _take_port(name: str, wanted: int, say: Say, *, taken: int | None = None) -> int:
    port = find_port(wanted, taken=() if taken is None else (taken,))
    if port != wanted:
        say(f"port {wanted} is taken: {name} gets {port}")
    return port


def _start(name: str, command: list[str], home: Home) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != MARKER_VARIABLE}
    environment[MONITORING_VARIABLE] = home.id
    with (home.state_dir / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _render(
    cluster: ClusterState, settings: MonitoringSettings, alert_port: int | None
) -> dict[str, str]:
    """The files that follow from the cluster, by their names."""
    token = token_header().get("Authorization", "").removeprefix("Bearer ")
    prometheus = build_prometheus_config(
        sd_urls=[f"{cluster.dashboard_address}/api/prometheus/sd"],
        haproxy_port=cluster.ports.get("haproxy_metrics") if cluster.settings.haproxy else None,
        alertmanager=None if alert_port is None else f"127.0.0.1:{alert_port}",
        scrape_interval_s=settings.scrape_interval_s,
        # A node that has just come is there with the next scrape.
        refresh_s=settings.scrape_interval_s,
        token_file=_TOKEN_FILE if token else None,
    )
    note = "Made by `rayprism monitoring up`, which makes it again."
    contents = {
        **build_rules(settings.scale),
        "prometheus.yml": prometheus,
    }
    files = {name: to_yaml(content, note) for name, content in contents.items()}
    return {_TOKEN_FILE: token, **files} if token else files


def _write_files(folder: Path, files: dict[str, str]) -> bool:
    """Writes those that differ; whether any did."""
    changed = False
    for name, text in files.items():
        path = folder / name
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                continue
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        # The token is nobody else's business.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
        changed = True
    return changed


def _follow(
    state: MonitoringState, cluster: ClusterState, asked: MonitoringSettings, say: Say
) -> None:
    """Brings what runs up to date, where the cluster was started again with other ports."""
    files = _render(cluster, state.settings, state.alertmanager_port)
    if _write_files(Path(state.folder), files):
        os.kill(state.prometheus_pid, signal.SIGHUP)
        say(f"Prometheus now watches {cluster.dashboard_address}")
    if asked != state.settings:
        say("it goes on as it was started; for other options, `rayprism monitoring down` first")


def _wait_until_ready(
    name: str, process: subprocess.Popen[bytes], port: int, folder: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    log = str(folder / f"{name}.log")
    while True:
        ready = _is_ready(port)
        # First, or whoever else answers at the port would be taken for it.
        if process.poll() is not None:
            raise ClusterError(f"{name} did not start; its log ends with:\n{log_tail(log)}")
        if ready:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{name} did not answer at port {port} within {timeout_s:g} s; its log ends with:\n"
                f"{log_tail(log)}"
            )
        time.sleep(0.1)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _find_members(marker: str) -> list[psutil.Process]:
    """Every living process that was started for a folder, also where its state file is gone."""
    return list(_iterate_members(marker))


def _iterate_members(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get(MONITORING_VARIABLE) == marker
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                yield process


def _end(members: list[psutil.Process]) -> None:
    """Politely, which lets Prometheus write what it has; then by force."""
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(members, timeout=_STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)
