"""The head goes away. With Redis as Ray's store workers answer on, and it comes back to them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.clients import clients, front
from tests.nodes.cluster import Cluster, tiny
from tests.nodes.conftest import Figures
from tests.nodes.machines import Machine

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

_AWAY_S = 75.0
"""Longer than Ray's nodes wait by default (60 s), before they end themselves."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Redis on a machine of its own; gives what the head has to be told of it."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (apt install redis-server)")
    machine = Machine(9, tmp_path / "redis")
    machine.run("redis-server --daemonize yes --bind 0.0.0.0 --protected-mode no --save ''")
    yield {
        "RAY_REDIS_ADDRESS": f"{machine.address}:6379",
        "RAY_external_storage_namespace": "rayprism",
    }
    machine.kill()


@pytest.fixture
def cluster(tmp_path: Path, models: Path, store: dict[str, str]) -> Iterator[Cluster]:
    """A head and two workers, each with a replica."""
    cluster = Cluster(tmp_path, models)
    try:
        cluster.start_head(**store)
        for number in (2, 3):
            cluster.start_worker(number)
        cluster.deploy([tiny(2)])
        cluster.wait(lambda: cluster.is_whole(2))
        yield cluster
    finally:
        cluster.stop()


def test_head_is_lost(cluster: Cluster, store: dict[str, str], figures: Figures) -> None:
    replicas = cluster.replicas()
    with clients(*(front(worker) for worker in cluster.workers)) as loads:
        cluster.head.kill()
        time.sleep(_AWAY_S)
        for load in loads:
            load.wait_for(100)
        began_s = time.monotonic()
        cluster.start_head(**store)
        cluster.wait(lambda: cluster.replicas() == replicas and cluster.is_whole(2), 150)
        recovered_s = time.monotonic() - began_s
        # It rules again: a replica that dies is replaced, and a change reaches all of them. In this
        # order, as a change takes replicas out one by one, and of two the other one must live then.
        lost = cluster.workers[0]
        # Brackets, or the shell would find itself.
        lost.run("kill -9 $(pgrep -f 'ray::[S]erveReplica:tiny')")
        cluster.wait(lambda: cluster.replicas() != replicas and cluster.is_whole(2))
        replicas = cluster.replicas()
        cluster.deploy([tiny(2, user_config={"max_queue_rows": 99})])
        assert cluster.replicas() == replicas
    figures.add(
        f"the head is away for {_AWAY_S:.0f} s",
        loads,
        "same replicas under the new head",
        recovered_s,
    )
