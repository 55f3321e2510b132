"""A node that drains, dies or goes silent: two replicas are enough that no client sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.nodes.balancer import Balancer
from tests.nodes.clients import clients, front
from tests.nodes.cluster import Cluster, tiny
from tests.nodes.conftest import Figures
from tests.nodes.machines import Machine
from tests.support.models import mlp_example

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

_REPLICAS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Cluster]:
    """A head and three workers; on two of them a replica."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), models)
    try:
        cluster.start_head()
        for number in (2, 3, 4):
            cluster.start_worker(number)
        cluster.deploy([tiny(_REPLICAS)])
        cluster.wait(lambda: cluster.is_whole(_REPLICAS))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def balancer(cluster: Cluster, tmp_path: Path) -> Iterator[Balancer]:
    balancer = Balancer(tmp_path, [machine.address for machine in cluster.machines.values()])
    yield balancer
    balancer.stop()


def with_replica(cluster: Cluster) -> list[Machine]:
    """The workers: first those that have a replica, then those that have none."""
    addresses = set(cluster.replicas().values())
    return sorted(cluster.workers, key=lambda machine: machine.address not in addresses)


def test_replicas_spread_and_each_of_their_nodes_has_a_proxy(cluster: Cluster) -> None:
    nodes = [cluster.head, *with_replica(cluster)[:_REPLICAS]]
    for machine in nodes:
        assert "haproxy" in machine.run("ps -eo comm")
        url, _ = front(machine)
        answer = httpx.post(f"{url}/v2/models/tiny/infer", json=mlp_example())
        assert answer.status_code == 200, answer.text
        assert httpx.get(f"{url}/-/healthz").status_code == 200
    addresses = set(cluster.replicas().values())
    assert len(addresses) == _REPLICAS
    assert cluster.head.address not in addresses


def test_drained_node(cluster: Cluster, balancer: Balancer, figures: Figures) -> None:
    drained = with_replica(cluster)[0]
    node = cluster.nodes()[drained.address]
    with clients((balancer.url, balancer.grpc)) as loads:
        began_s = time.monotonic()
        cluster.ray(
            f"ray drain-node --node-id {node} --reason DRAIN_NODE_REASON_PREEMPTION "
            "--reason-message test --deadline-remaining-seconds 120"
        )
        cluster.wait(lambda: cluster.is_whole(_REPLICAS, without=drained))
        moved_s = time.monotonic() - began_s
        cluster.wait(lambda: drained.address not in cluster.nodes(), 150)
    figures.add("a node is drained", loads, "its replica is elsewhere", moved_s)
    drained.kill()
    cluster.start_worker(drained.number)


@pytest.mark.parametrize("event", ["kill", "cut_power"])
def test_lost_node(cluster: Cluster, balancer: Balancer, figures: Figures, event: str) -> None:
    lost, survivor = with_replica(cluster)[:2]
    with clients(front(survivor), (balancer.url, balancer.grpc)) as loads:
        began_s = time.monotonic()
        getattr(lost, event)()
        cluster.wait(lambda: cluster.is_whole(_REPLICAS, without=lost), 150)
        recovered_s = time.monotonic() - began_s
    what = {"kill": "a node is killed", "cut_power": "a node loses its power"}[event]
    figures.add(what, loads, "two replicas again", recovered_s)
    cluster.start_worker(lost.number)
