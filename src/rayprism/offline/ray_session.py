"""A connection to Ray for one job: a cluster that runs, or a Ray of its own on this machine."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import ray.data

from rayprism.errors import SetupError
from rayprism.offline.spec import JobSpec

__all__ = ["ray_session"]

_WATCH_EVERY_S = 1.0
_SILENT_S = 3.0
_SMALL_STORE_BYTES = 256 * 1024**2
_LARGEST_STORE_BYTES = 4 * 1024**3


@contextmanager
def ray_session(
    spec: JobSpec, *, local: bool, moves_rows: bool, say: Callable[[str], None]
) -> Iterator[None]:
    """Connects to Ray, and leaves it as it was.

    Args:
        spec: The job.
        local: Whether to start a Ray of its own, on this machine only.
        moves_rows: Whether rows go through Ray's object store.
        say: Tells the person.

    Raises:
        SetupError: There is no cluster, or none that could hold one actor.
    """
    # Explicit, or Ray decides by whether some other cluster once left a token behind.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Or Ray's core writes an error of every pool of actors, which is none, into the progress.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    started = not ray.is_initialized()
    if started:
        on_term = signal.getsignal(signal.SIGTERM)
        _connect(spec, local=local, moves_rows=moves_rows)
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler would end the process without a word.
            signal.signal(signal.SIGTERM, on_term)
    try:
        _quiet()
        _check_room(spec, local=local, say=say)
        with _watch_head(ray.get_runtime_context().gcs_address, say):
            yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _watch_head(address: str, say: Callable[[str], None]) -> Iterator[None]:
    """Tells where the head node does not answer any more.

    Ray waits a minute for it, in case it is started again, and then ends this process without a
    word that a person would see.
    """
    over = threading.Event()
    host, _, port = address.rpartition(":")

    def watch() -> None:
        silent_s = 0.0
        while not over.wait(_WATCH_EVERY_S):
            try:
                socket.create_connection((host, int(port)), timeout=_WATCH_EVERY_S).close()
                silent_s = 0.0
            except OSError as error:
                silent_s += _WATCH_EVERY_S
                if silent_s == _SILENT_S:
                    say(
                        f"Ray's head node at {address} does not answer: {error}. If it does not "
                        "come back within a minute, Ray ends this process. What is done stays; "
                        "the same command goes on"
                    )

    threading.Thread(target=watch, name="rayprism-watch-head", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _connect(spec: JobSpec, *, local: bool, moves_rows: bool) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not local:
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(address="auto", **options)
        except OSError as error:  # a ConnectionError of Ray's, too
            raise SetupError(
                f"no Ray cluster: {error}. Run it on this machine alone with --local, or submit "
                "it to a cluster: ray job submit --address http://HOST:8265 --working-dir . -- "
                "python batch/predict.py CONFIG"
            ) from None
        return
    # Workers that nobody needs yet would take the CPU from those that the job waits for.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    store = min(_LARGEST_STORE_BYTES, psutil.virtual_memory().total // 4)
    actors = math.ceil(spec.pool.min_actors * spec.pool.cpus)
    ray.init(
        address="local",
        # One CPU more where tasks prepare rows beside the actors.
        num_cpus=max(os.cpu_count() or 1, actors + moves_rows),
        include_dashboard=False,
        object_store_memory=store if moves_rows else _SMALL_STORE_BYTES,
        **options,
    )


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at an address, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        raise ConnectionError(f"RAY_ADDRESS is {address}, and there is {error}") from None


def _quiet() -> None:
    """The job tells its own progress, and what failed."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One shard's failure is its own: the next round has it again.
    context.max_errored_blocks = -1


def _check_room(spec: JobSpec, *, local: bool, say: Callable[[str], None]) -> None:
    pool = spec.pool
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": pool.cpus, "GPU": pool.gpus}
    if any(all(node.get(name, 0) >= need for name, need in wanted.items()) for node in nodes):
        return
    have = "; ".join(
        f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes
    )
    told = (
        f"no node can hold one actor: it needs {pool.cpus:g} CPUs and {pool.gpus:g} GPUs "
        f"(pool.cpus, pool.gpus), there are {have}"
    )
    if local:
        raise SetupError(told)
    say(f"{told}. Waiting for a node that can")
