"""What Serve finds in its environment is in Kubernetes what `rayprism up` gives it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayprism.fleet.environment import cluster_environment
from rayprism.fleet.processes import MARKER_VARIABLE
from rayprism.models.fields import DATA_VARIABLE
from tests.deploy.manifests import clusters, container, find, groups

LOCAL_ONLY = {
    "PATH",
    # The processes of `rayprism up` are found by it.
    MARKER_VARIABLE,
    # Where relative paths of batch jobs start. Here no folder of a node is theirs.
    DATA_VARIABLE,
}
OTHER_VALUES = {
    # One node has nowhere to drain to; many have.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    # By the number of CPUs of the machine.
    "RAY_SERVE_HAPROXY_NBTHREAD",
}
KUBERNETES_ONLY = {"HOME"}


@pytest.fixture
def environment(manifests) -> dict[str, str]:
    return dict(find(manifests, "ConfigMap", "rayprism-environment")["data"])


def test_it_sets_what_up_sets(environment):
    ports = {name: environment[name] for name in environment if name.endswith("_PORT")}
    up = cluster_environment("id", Path("/tmp/ray"), Path("/models"), base=ports)
    assert set(environment) - KUBERNETES_ONLY == set(up) - LOCAL_ONLY
    assert {name: environment[name] for name in up if name not in LOCAL_ONLY | OTHER_VALUES} == {
        name: value for name, value in up.items() if name not in LOCAL_ONLY | OTHER_VALUES
    }


def test_ports_are_those_that_serve_would_take(environment):
    from ray.serve._private import constants

    assert {name: int(value) for name, value in environment.items() if name.endswith("_PORT")} == {
        name: getattr(constants, name) for name in environment if name.endswith("_PORT")
    }


def test_every_pod_gets_it(manifests):
    name = find(manifests, "ConfigMap", "rayprism-environment")["metadata"]["name"]
    for cluster in clusters(manifests).values():
        for group in groups(cluster).values():
            assert {"configMapRef": {"name": name}} in container(group)["envFrom"]


def test_proxies_leave_half_of_the_cpus_to_models(manifests, environment):
    workers = [
        container(group)["resources"]["requests"]["cpu"]
        for name, group in groups(clusters(manifests)["rayprism"]).items()
        if name != "head"
    ]
    threads = int(environment["RAY_SERVE_HAPROXY_NBTHREAD"])
    assert 1 <= threads <= min(map(int, workers)) // 2


def test_paths_of_sockets_are_short_enough_for_haproxy(environment):
    paths = [value for value in environment.values() if value.endswith(".sock")]
    assert paths
    assert max(map(len, paths)) <= 97


def test_pods_have_the_time_to_drain(manifests, environment):
    drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    for name, group in groups(clusters(manifests)["rayprism"]).items():
        if name == "head":
            continue
        assert "env" not in container(group)
        [program, seconds] = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > drain_s + float(seconds)
        # What a replica that is replaced needs to give its connections back.
        assert drain_s > 30


def test_tests_do_not_depend_on_this_machines_environment():
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ
