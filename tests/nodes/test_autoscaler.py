"""Load makes replicas, replicas make nodes, idle takes them away; no request fails meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.nodes.balancer import Balancer
from tests.nodes.clients import reference
from tests.nodes.cloud import Cloud
from tests.nodes.cluster import Cluster, cluster_file, tiny
from tests.nodes.conftest import Figures
from tests.nodes.machines import address_of, gateway_of
from tests.support.load import Load

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

_ROOT = Path(__file__).resolve().parents[2]
_SMALLER = 4
"""Nodes have this share of the CPUs that cluster.yaml gives them."""
_MACHINES = range(2, 10)

# Requests take a fifth of a second, without any work: a batch is waited for.
_SLOW = {"max_delay_s": 0.2, "default_timeout_s": 30}
_AUTOSCALING = {
    "min_replicas": 2,
    "max_replicas": 4,
    "target_ongoing_requests": 3,
    "upscale_delay_s": 2,
    "downscale_delay_s": 10,
    "metrics_interval_s": 1,
    "look_back_period_s": 5,
}


def scaled_down(port: int) -> dict[str, Any]:
    """cluster.yaml as `ray up` hands it to the autoscaler, for small machines of ours."""
    config = prepare_config(cluster_file())
    for node_type in config["available_node_types"].values():
        node_type["resources"]["CPU"] //= _SMALLER
    config["provider"] = {
        "type": "external",
        "module": "tests.nodes.provider.MachineProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "head_node_type": config["head_node_type"],
        "launch_multiple": True,
        # Nothing is installed over ssh: the machines come with it.
        "disable_node_updaters": True,
        "endpoint": f"http://{gateway_of(1)}:{port}",
    }
    config |= {"auth": {}, "file_mounts": {}, "idle_timeout_minutes": 0.25}
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("autoscaler"), models)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def cloud(cluster: Cluster) -> Iterator[Cloud]:
    """The head is up, and the autoscaler has started the fewest workers that there may be."""
    cloud = Cloud(cluster, _MACHINES)
    config = scaled_down(cloud.port)
    cluster.start_head(
        config,
        # As `ray up` does it.
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
        RAY_NODE_TYPE_NAME=config["head_node_type"],
        # For the provider.
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        PYTHONPATH=f"{_ROOT / 'src'}:{_ROOT}",
    )
    try:
        yield cloud
    finally:
        cloud.stop()
        assert not cloud.faults


def test_nodes_follow_the_load(
    cluster: Cluster, cloud: Cloud, figures: Figures, tmp_path: Path
) -> None:
    types = cluster_file()["available_node_types"]
    fewest = Counter({name: kind["min_workers"] for name, kind in types.items()})
    cluster.wait(lambda: len(cluster.nodes()) == 1 + fewest.total())
    assert cloud.counts() == fewest
    cluster.deploy([tiny(None, each=1.5, autoscaling_config=_AUTOSCALING, user_config=_SLOW)])
    cluster.wait(lambda: len(set(cluster.replicas().values())) == 2)
    balancer = Balancer(tmp_path, [address_of(number) for number in (1, *_MACHINES)])

    def load(connections: int, rate: float) -> Load:
        front = (balancer.url, balancer.grpc)
        return Load(*front, "tiny", reference, connections=connections, rate=rate)

    began_s = time.monotonic()
    with load(1, 1) as few:
        few.wait_for(20)
        with load(8, 20) as many:
            cluster.wait(lambda: len(set(cluster.replicas().values())) == 4, 150)
            grown_s = time.monotonic() - began_s
            assert cloud.counts() >= fewest
            assert set(cloud.types.values()) <= {"cpu", "cpu_spot"}
            assert len(cloud.types) == 4
            many.wait_for(300)
        began_s = time.monotonic()
        cluster.wait(lambda: len(cluster.replicas()) == 2, 150)

        def needed() -> Counter[str]:
            """The fewest, and those on which Serve left a replica: which it stops is its choice."""
            nodes = cluster.nodes()
            used = {nodes[address] for address in cluster.replicas().values()}
            return fewest | Counter(cloud.types[node] for node in used)

        cluster.wait(lambda: cloud.counts() == needed(), 240)
        shrunk_s = time.monotonic() - began_s
        left = len(cloud.types)
        assert left < 4
        few.wait_for(50)
    balancer.stop()
    figures.add("load comes", [many], "4 replicas on 4 nodes, from 2 on 2", grown_s)
    figures.add("load goes", [few], f"2 replicas again, and {left} nodes", shrunk_s)
    assert [few.failures, many.failures] == [Counter(), Counter()]
