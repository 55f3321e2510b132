"""Processes and ports of this machine: whose they are, and how they end."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

__all__ = [
    "MARKER_VARIABLE",
    "end_processes",
    "find_members",
    "find_port",
    "is_free",
    "is_member",
    "port_holder",
]

MARKER_VARIABLE = "RAYPRISM_CLUSTER"
"""Environment variable that every process of a local cluster inherits; its value is the id."""

_WORKER_PORTS = range(10002, 20000)
_INGRESS_PORTS = (range(30000, 31001), range(40000, 41001))
"""Ports that Ray gives to workers, and Serve to replicas.

Source: Ray 2.60, `ray start --help`; `RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT` and its siblings.
"""


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def find_port(preferred: int | None = None, *, taken: Iterable[int] = ()) -> int:
    """A port that is free on every interface: the preferred one, else any.

    Args:
        preferred: Taken where it is free.
        taken: Ports that were already given away.
    """
    given = set(taken)
    if preferred is not None and preferred not in given and is_free(preferred, "0.0.0.0"):
        return preferred
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("0.0.0.0", 0))
            port: int = probe.getsockname()[1]
        reserved = any(port in ports for ports in (_WORKER_PORTS, *_INGRESS_PORTS))
        if port not in given and not reserved:
            return port


def port_holder(port: int) -> str:
    """` by python3 (pid 123)` for who listens on a port; empty where that is hidden."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return f" by {process.name()} (pid {process.pid})"
    return ""


def is_member(process: psutil.Process, cluster: str, temp_dir: Path) -> bool:
    """Whether a process belongs to a cluster.

    Ray's agents write their title over their environment, so the marker is not all: whoever writes
    into the cluster's own folder belongs to it too.
    """
    with contextlib.suppress(psutil.Error):
        if process.environ().get(MARKER_VARIABLE) == cluster:
            return True
    with contextlib.suppress(psutil.Error):
        prefix = f"{temp_dir}/"
        return any(
            file.path.startswith(prefix) and getattr(file, "mode", "r") != "r"
            for file in process.open_files()
        )
    return False


def find_members(cluster: str, temp_dir: Path) -> list[psutil.Process]:
    """Every living process of a cluster, without this one and those that started it."""
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in spared or not is_member(process, cluster, temp_dir):
            continue
        found[process.pid] = process
        with contextlib.suppress(psutil.Error):
            for child in process.children(recursive=True):
                if child.pid not in spared:
                    found[child.pid] = child
    return [process for process in found.values() if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_processes(cluster: str, temp_dir: Path, *, grace_s: float = 5.0) -> int:
    """Ends what is left of a cluster: politely, then by force, until nothing is.

    Returns:
        How many processes there were.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + 20.0
    while members := find_members(cluster, temp_dir):
        fresh = [process for process in members if process.pid not in ended]
        for process in members:
            # One that was asked before and is still there does not listen.
            with contextlib.suppress(psutil.Error):
                process.terminate() if process in fresh else process.kill()
        ended.update(process.pid for process in members)
        psutil.wait_procs(members, timeout=grace_s if fresh else 1.0)
        if time.monotonic() > deadline:
            break
    return len(ended)
