"""Policies let through what is used, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.manifests import Manifest, clusters, container, find, groups

METRICS = {"metrics", "as-metrics", "dash-metrics", "haproxy"}
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"


def ports_of(rule: Manifest) -> set[range]:
    assert all(port.get("protocol", "TCP") == "TCP" for port in rule["ports"])
    return {range(port["port"], port.get("endPort", port["port"]) + 1) for port in rule["ports"]}


def one(port: int | str) -> range:
    return range(int(port), int(port) + 1)


@pytest.fixture
def policies(manifests) -> dict[str, dict[str, Any]]:
    return {
        manifest["metadata"]["name"]: manifest["spec"]
        for manifest in manifests
        if manifest["kind"] == "NetworkPolicy"
    }


@pytest.fixture
def named_ports(manifests) -> dict[str, set[int]]:
    """Ports of containers by name, over all pods."""
    found: dict[str, set[int]] = {}
    for cluster in clusters(manifests).values():
        for group in groups(cluster).values():
            for port in container(group)["ports"]:
                found.setdefault(port["name"], set()).add(port["containerPort"])
    assert all(len(ports) == 1 for ports in found.values())
    return found


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in wanted.items())


def test_nothing_is_allowed_by_default(policies):
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in [*policy.get("ingress", []), *policy.get("egress", [])]:
            # An empty list would mean everybody, or every port.
            assert rule["ports"], name
            assert rule.get("from") or rule.get("to"), name
            for peer in rule.get("from", []):
                assert "ipBlock" not in peer, name


def test_nodes_reach_the_ports_that_ray_and_serve_use(manifests, policies, named_ports):
    from ray.serve._private import constants

    environment = find(manifests, "ConfigMap", "rayprism-environment")["data"]
    used = {
        one(port) for name in ("gcs-server", "dashboard", "serve") for port in named_ports[name]
    }
    pinned = set()
    for cluster in clusters(manifests).values():
        for group in groups(cluster).values():
            start = group["rayStartParams"]
            used.add(range(int(start["min-worker-port"]), int(start["max-worker-port"]) + 1))
            pinned |= {
                int(start[name])
                for name in (
                    "node-manager-port",
                    "object-manager-port",
                    "runtime-env-agent-port",
                    "dashboard-agent-grpc-port",
                )
            }
            for probe in ("startupProbe", "livenessProbe"):
                used.add(one(container(group)[probe]["httpGet"]["port"]))
    used.add(range(min(pinned), max(pinned) + 1))
    assert len(pinned) == max(pinned) - min(pinned) + 1
    used |= {
        one(environment["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]),
        one(environment["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"]),
        range(
            constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT,
            constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT + 1,
        ),
        range(
            constants.RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT,
            constants.RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT + 1,
        ),
        # Linux' default for ports that the kernel chooses.
        range(32768, 61000),
    }
    policy = policies["ray"]
    [ingress], [egress] = policy["ingress"], policy["egress"]
    assert ports_of(ingress) == ports_of(egress) == used
    assert ingress["from"] == egress["to"] == [{"podSelector": policy["podSelector"]}]


def test_every_node_of_ray_is_among_them(manifests, policies):
    for cluster in clusters(manifests).values():
        for group in groups(cluster).values():
            labels = group["template"]["metadata"]["labels"]
            assert selects(policies["ray"]["podSelector"], labels)
            assert selects(policies["storage"]["podSelector"], labels)
    toolbox = find(manifests, "Deployment", "rayprism-toolbox")["spec"]["template"]["metadata"]
    assert not selects(policies["ray"]["podSelector"], toolbox["labels"])
    assert selects(policies["toolbox"]["podSelector"], toolbox["labels"])


def test_clients_reach_only_the_protocols_ports_of_workers(policies, named_ports):
    [rule] = policies["clients"]["ingress"]
    assert ports_of(rule) == {one(port) for name in ("serve", "grpc") for port in named_ports[name]}
    assert policies["clients"]["podSelector"]["matchLabels"][COMPONENT] == "worker"


def test_only_kuberay_and_the_toolbox_reach_the_dashboard(policies, named_ports):
    [rule] = policies["control"]["ingress"]
    assert ports_of(rule) == {
        one(port) for name in ("dashboard", "serve") for port in named_ports[name]
    }
    operator, toolbox = rule["from"]
    assert set(operator) == {"namespaceSelector", "podSelector"}
    assert selects(toolbox["podSelector"], {PART_OF: "rayprism", COMPONENT: "toolbox"})
    reaching = [
        name
        for name, policy in policies.items()
        for rule in policy.get("ingress", [])
        if any(8265 in ports for ports in ports_of(rule))
    ]
    assert sorted(reaching) == ["control", "ray"]


def test_prometheus_reaches_what_is_monitored(manifests, policies, named_ports):
    monitor = find(manifests, "PodMonitor", "rayprism")["spec"]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} == METRICS
    [rule] = policies["prometheus"]["ingress"]
    assert ports_of(rule) == {one(port) for name in METRICS for port in named_ports[name]}


def test_the_machines_own_metadata_stays_out_of_reach(policies):
    for policy in policies.values():
        for rule in policy.get("egress", []):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    assert peer["ipBlock"]["except"] == ["169.254.0.0/16"]
                    assert ports_of(rule) <= {one(443), one(6443)}
