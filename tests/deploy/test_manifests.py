"""The manifests are valid, complete and safe; and the check that says so notices what is not."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.offline.spec import load_spec
from rayprism.telemetry.rules import build_rules
from tests.deploy.manifests import clusters, container, find, groups, pods

ROOT = Path(__file__).resolve().parents[2]


def test_all_of_it_is_valid(kubernetes, capsys):
    assert kubernetes.main() == 0, capsys.readouterr().err
    assert "with redis and ingress" in capsys.readouterr().out


def change(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    at: Any = changed
    *parts, last = path.split(".")
    for part in parts:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[last] = value
    return changed


HEAD = "spec.rayClusterConfig.headGroupSpec"
POD = f"{HEAD}.template.spec"


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "rayprism-toolbox", "spec.replica", 1),
        ("Deployment", "rayprism-toolbox", "spec.replicas", "one"),
        ("NetworkPolicy", "ray", "spec.ingres", []),
        ("PodDisruptionBudget", "rayprism-workers", "spec.unhealthyPodEvictionPolicies", "x"),
        ("PodMonitor", "rayprism", "spec.podMetricEndpoints", []),
        ("PodMonitor", "rayprism", "spec.podMetricsEndpoints.0.intervall", "10s"),
        ("PodMonitor", "rayprism", "spec.podMetricsEndpoints.0.relabelings.0.action", "renamed"),
        ("PrometheusRule", "rayprism", "spec.groups.0.rules.0.alerts", "A"),
        ("RayService", "rayprism", "spec.serveConfig", ""),
        ("RayService", "rayprism", "spec.upgradeStrategy.type", "Rolling"),
        ("RayService", "rayprism", "spec.rayClusterConfig.workerGroupSpecs.0.replicas", 1),
        ("RayService", "rayprism", f"{HEAD}.rayStartParams.port", 6379),
        ("RayService", "rayprism", f"{POD}.nodeSelectors", {}),
        ("RayService", "rayprism", f"{POD}.containers.0.readinessProb", {}),
        ("RayService", "rayprism", f"{POD}.containers.0.volumeMounts.0.mountPaths", "/x"),
        (
            "RayService",
            "rayprism",
            "spec.rayClusterConfig.autoscalerOptions.securityContext.readOnly",
            True,
        ),
        ("RayService", "rayprism", "spec.serveConfigV2", "applications: [{name: x}]"),
        (
            "RayService",
            "rayprism",
            "spec.serveConfigV2",
            "applications: [{name: x, route_prefix: /v2/models/x, "
            "import_path: 'rayprism.serving.app:build', args: {model: x}}]",
        ),
        ("RayCluster", "rayprism-batch", "spec.workerGroupSpecs.0.maxReplica", 1),
    ],
)
def test_a_mistake_is_noticed(kubernetes, overlays, kind, name, path, value):
    manifest = find(overlays["cpu"], kind, name)
    assert kubernetes.faults(manifest) == []
    assert kubernetes.faults(change(manifest, path, value)) != []


def test_an_unknown_kind_is_not_passed_over(kubernetes):
    for api in ("ray.io/v1", "monitoring.coreos.com/v1", "example.com/v1"):
        manifest = {"apiVersion": api, "kind": "Unknown", "metadata": {"name": "x"}}
        assert kubernetes.faults(manifest) != []


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_serve_file_is_what_is_deployed(overlays, overlay):
    path = ROOT / "docker" / "kubernetes" / "overlays" / overlay / "serve.yaml"
    service = find(overlays[overlay], "RayService", "rayprism")
    assert service["spec"]["serveConfigV2"] == path.read_text(encoding="utf-8")
    assert not [m for m in overlays[overlay] if m["metadata"]["name"].startswith("serve-file")]


def test_serve_listens_where_the_pods_and_services_say(manifests):
    service = find(manifests, "RayService", "rayprism")["spec"]
    serve = yaml.safe_load(service["serveConfigV2"])
    for name, group in groups(service["rayClusterConfig"]).items():
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
        if name != "head":
            assert ports["grpc"] == serve["grpc_options"]["port"]
    # A pod is asked from outside of it.
    assert serve["http_options"]["host"] == "0.0.0.0"
    # A worker is ready by its own proxy.
    assert serve["proxy_location"] == "EveryNode"


def test_every_dashboard_is_there(manifests):
    files = {path.name: path.read_text() for path in (ROOT / "dashboards").glob("*.json")}
    found = {}
    for manifest in manifests:
        if manifest["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            found |= manifest["data"]
    assert found.keys() == files.keys()
    assert {name: json.loads(text) for name, text in found.items()} == {
        name: json.loads(text) for name, text in files.items()
    }
    # What `kubectl apply` can take along in an annotation, without --server-side.
    assert max(map(len, found.values())) < 256 * 1024


def test_every_rule_is_there(manifests):
    rule = find(manifests, "PrometheusRule", "rayprism")
    groups = [group for content in build_rules().values() for group in content["groups"]]
    assert rule["spec"]["groups"] == groups
    assert len({group["name"] for group in groups}) == len(groups)


def test_monitoring_has_the_jobs_and_labels_of_the_rules(manifests):
    monitor = find(manifests, "PodMonitor", "rayprism")
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        labels = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
        assert labels["job"]["replacement"] == (
            "haproxy" if endpoint["port"] == "haproxy" else "ray"
        )
        [source] = labels["cluster"]["sourceLabels"]
        assert source == "__meta_kubernetes_pod_label_app_kubernetes_io_instance"
    for cluster, _, template in pods(manifests):
        assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == cluster


def test_no_pod_may_more_than_it_needs(manifests):
    toolbox = find(manifests, "Deployment", "rayprism-toolbox")["spec"]["template"]
    templates = [template for _, _, template in pods(manifests)]
    for template in [*templates, toolbox]:
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        # Only the head asks Kubernetes for something.
        if template["metadata"]["labels"]["app.kubernetes.io/component"] != "head":
            assert spec["automountServiceAccountToken"] is False
        for one in spec["containers"]:
            _assert_confined(one["securityContext"])
            assert set(one["resources"]) == {"requests", "limits"}
            # Read-only, but for what is empty at the start.
            assert {"name": "tmp", "mountPath": "/tmp"} in one["volumeMounts"]
    for cluster in clusters(manifests).values():
        _assert_confined(cluster["autoscalerOptions"]["securityContext"])
        mounts = cluster["autoscalerOptions"]["volumeMounts"]
        assert {"name": "tmp", "mountPath": "/tmp"} in mounts


def _assert_confined(security: dict[str, Any]) -> None:
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_models_are_written_by_the_toolbox_alone(manifests):
    for _, name, template in pods(manifests):
        [mount] = [
            mount
            for mount in template["spec"]["containers"][0]["volumeMounts"]
            if mount["name"] == "models"
        ]
        assert (mount["mountPath"], mount.get("readOnly")) == ("/models", True), name


def test_nothing_secret_is_written_down(manifests):
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    example = ROOT / "docker" / "kubernetes" / "secrets.example.yaml"
    secrets = [s for s in yaml.safe_load_all(example.read_text(encoding="utf-8")) if s]
    assert {value for secret in secrets for value in secret["stringData"].values()} == {
        "REPLACE_ME"
    }
    names = {secret["metadata"]["name"] for secret in secrets}
    asked = {
        source["secretRef"]["name"]
        for _, _, template in pods(manifests)
        for source in template["spec"]["containers"][0]["envFrom"]
        if "secretRef" in source
    }
    assert asked < names


def test_gpu_workers_are_cpu_workers_but_for_the_gpu(overlays):
    workers = groups(clusters(overlays["gpu"])["rayprism"])
    cpu, gpu = copy.deepcopy(workers["cpu"]), copy.deepcopy(workers["gpu"])
    assert gpu["rayStartParams"] == cpu["rayStartParams"]
    pod = gpu["template"]["spec"]
    assert pod.pop("nodeSelector") == {"nvidia.com/gpu.present": "true"}
    [toleration] = pod.pop("tolerations")
    assert toleration["key"] == "nvidia.com/gpu"
    resources = pod["containers"][0].pop("resources")
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    assert resources["limits"] == resources["requests"]
    assert "gpu" in pod["containers"][0].pop("image")
    cpu["template"]["spec"]["containers"][0].pop("resources")
    cpu["template"]["spec"]["containers"][0].pop("image")
    assert gpu["template"] == cpu["template"]
    assert "gpu" not in groups(clusters(overlays["cpu"])["rayprism"])


def test_one_worker_stays_while_nodes_are_emptied(manifests):
    budget = find(manifests, "PodDisruptionBudget", "rayprism-workers")["spec"]
    workers = clusters(manifests)["rayprism"]["workerGroupSpecs"]
    assert budget["minAvailable"] < sum(group["minReplicas"] for group in workers)
    for group in workers:
        labels = group["template"]["metadata"]["labels"]
        assert budget["selector"]["matchLabels"].items() <= labels.items()
        for constraint in group["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()


def test_the_version_of_ray_is_the_projects(manifests):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [ray] = [line for line in project["dependencies"] if line.startswith("ray[")]
    for cluster in clusters(manifests).values():
        assert ray == f"ray[serve,data]=={cluster['rayVersion']}"


def test_the_job_asks_for_the_batch_cluster(manifests, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYPRISM_REPOSITORY", "/models")
    path = ROOT / "docker" / "kubernetes" / "batch" / "rayjob.yaml"
    job = yaml.safe_load(path.read_text(encoding="utf-8"))
    batch = find(manifests, "RayCluster", "rayprism-batch")["metadata"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": batch["name"]}
    assert job["metadata"]["namespace"] == batch["namespace"]
    # Without `name`: it can be created again.
    assert "name" not in job["metadata"]
    program, script, config = job["spec"]["entrypoint"].split()
    assert (program, (ROOT / script).is_file()) == ("python", True)
    # The driver runs on the head, which finds the job's file where it is mounted.
    head = groups(clusters(manifests)["rayprism-batch"])["head"]
    [mount] = [m for m in container(head)["volumeMounts"] if m["name"] == "jobs"]
    folder, _, name = config.rpartition("/")
    assert folder == mount["mountPath"]
    jobs = find(manifests, "ConfigMap", "rayprism-jobs")["data"]
    file = tmp_path / name
    file.write_text(jobs[name], encoding="utf-8")
    spec = load_spec(file, ())
    assert spec.pool.max_actors <= sum(
        int(container(group)["resources"]["requests"]["cpu"]) * group["maxReplicas"]
        for group in clusters(manifests)["rayprism-batch"]["workerGroupSpecs"]
    )
