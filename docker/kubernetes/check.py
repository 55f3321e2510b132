"""Builds every overlay with kustomize, and checks strictly what comes out.

    python docker/kubernetes/check.py

Kubernetes' own kinds go through Kubernetes' own schemas, for the oldest and the newest version that
are supported, with unknown keys forbidden; Prometheus' operator's through models made from its own
definitions, likewise; Serve files through `rayprism check`, which asks Ray Serve's schema.

KubeRay's schemas are in no package registry. Its fields are checked by the models below, which know
those that are used here and no other, and every pod inside them by Kubernetes' schemas.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["COMPONENTS", "FOLDER", "KUBERNETES_VERSIONS", "OVERLAYS", "build", "faults", "main"]

FOLDER = Path(__file__).parent
OVERLAYS = ("cpu", "gpu")
COMPONENTS = ("batch", "redis", "ingress")
KUBERNETES_VERSIONS = ("1.32", "1.37")
"""The oldest and the newest that the manifests are for."""

_RAY_API = "ray.io/v1"
_MONITORING_API = "monitoring.coreos.com/v1"
_LOOSE_FILES = ("batch/rayjob.yaml", "secrets.example.yaml")
"""What is applied by hand, and is in no overlay."""

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send.

    Raises:
        RuntimeError: There is no kubectl, or kustomize refuses the folder.
    """
    scripts = sysconfig.get_path("scripts")
    kubectl = shutil.which("kubectl", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    if kubectl is None:
        raise RuntimeError("kubectl is not there: `make install` brings it")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.strip()}")
    return _load(done.stdout)


def build_with(overlay: str, *components: str) -> list[Manifest]:
    """What an overlay would be with components that it leaves to its user."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name).resolve()

        def relative(folder: Path) -> str:
            return os.path.relpath(folder.resolve(), path)

        kustomization = {
            "resources": [relative(FOLDER / "overlays" / overlay)],
            "components": [relative(FOLDER / component) for component in components],
        }
        (path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        return build(path)


def faults(manifest: Manifest) -> list[str]:
    """What is wrong with one resource; nothing where it is right."""
    api, kind = manifest.get("apiVersion"), manifest.get("kind")
    check: Callable[[Manifest], Iterator[str]] = _core_faults
    if api == _RAY_API:
        check = _ray_faults
    elif api == _MONITORING_API:
        check = _monitoring_faults
    return [f"{kind} {_name(manifest)}: {fault}" for fault in check(manifest)]


def _name(manifest: Manifest) -> str:
    metadata = manifest.get("metadata") or {}
    return str(metadata.get("name") or metadata.get("generateName"))


def _load(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest is not None]


def _core_faults(manifest: Manifest) -> Iterator[str]:
    import kubernetes_validate

    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            yield f"Kubernetes {version}: {path}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"Kubernetes {version}: {error}"


@cache
def _monitoring_models() -> dict[str, type[BaseModel]]:
    # Its models let unknown keys pass, unless they are told before they are made.
    import cloudcoil.pydantic

    cloudcoil.pydantic.BaseModel.model_config["extra"] = "forbid"
    from cloudcoil.models.prometheus_operator import v1

    return {"PodMonitor": v1.PodMonitor, "PrometheusRule": v1.PrometheusRule}


def _monitoring_faults(manifest: Manifest) -> Iterator[str]:
    model = _monitoring_models().get(manifest["kind"])
    if model is None:
        yield "there is no schema for this kind"
        return
    yield from _model_faults(model, manifest)


def _model_faults(model: type[BaseModel], value: Any) -> Iterator[str]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        for fault in error.errors():
            yield f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: str | None = None
    generateName: str | None = None  # noqa: N815
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Template(_Strict):
    """Of a pod; `_pods` says more."""

    metadata: _Metadata
    spec: dict[str, Any]


class _Group(_Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: _Template


class _Workers(_Group):
    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas has to be between minReplicas and maxReplicas")
        return self


class _Autoscaler(_Strict):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]  # noqa: N815
    idleTimeoutSeconds: int = Field(ge=0)  # noqa: N815
    securityContext: dict[str, Any]  # noqa: N815
    volumeMounts: list[dict[str, Any]]  # noqa: N815
    resources: dict[str, Any]


class _Credential(_Strict):
    valueFrom: dict[str, Any]  # noqa: N815


class _Redis(_Strict):
    redisAddress: str  # noqa: N815
    redisPassword: _Credential  # noqa: N815


class _ClusterSpec(_Strict):
    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: _Autoscaler  # noqa: N815
    gcsFaultToleranceOptions: _Redis | None = None  # noqa: N815
    headGroupSpec: _Group  # noqa: N815
    workerGroupSpecs: list[_Workers] = Field(min_length=1)  # noqa: N815


class _UpgradeStrategy(_Strict):
    type: Literal["NewCluster", "None"]


class _ServiceSpec(_Strict):
    serveConfigV2: str  # noqa: N815
    upgradeStrategy: _UpgradeStrategy  # noqa: N815
    rayClusterDeletionDelaySeconds: int = Field(ge=0)  # noqa: N815
    excludeHeadPodFromServeSvc: bool  # noqa: N815
    rayClusterConfig: _ClusterSpec  # noqa: N815


class _JobSpec(_Strict):
    clusterSelector: dict[str, str] = Field(min_length=1)  # noqa: N815
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]  # noqa: N815
    entrypoint: str


class _Resource(_Strict):
    apiVersion: str  # noqa: N815
    metadata: _Metadata


class _Service(_Resource):
    kind: Literal["RayService"]
    spec: _ServiceSpec


class _Cluster(_Resource):
    kind: Literal["RayCluster"]
    spec: _ClusterSpec


class _Job(_Resource):
    kind: Literal["RayJob"]
    spec: _JobSpec


_RAY_MODELS: dict[str, type[_Resource]] = {
    "RayService": _Service,
    "RayCluster": _Cluster,
    "RayJob": _Job,
}


def _ray_faults(manifest: Manifest) -> Iterator[str]:
    model = _RAY_MODELS.get(manifest["kind"])
    if model is None:
        yield "there is no schema for this kind"
        return
    found = list(_model_faults(model, manifest))
    yield from found
    if found or model is _Job:
        return
    spec = manifest["spec"]
    cluster = spec["rayClusterConfig"] if model is _Service else spec
    for name, pod in _pods(cluster):
        yield from (f"{name}: {fault}" for fault in _core_faults(pod))
    if model is _Service:
        yield from _serve_faults(spec["serveConfigV2"])


def _pods(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every pod that the cluster would have, as a template that Kubernetes knows.

    The autoscaler's container is put beside the head's, as KubeRay does.
    """
    head = cluster["headGroupSpec"]["template"]
    options = cluster["autoscalerOptions"]
    autoscaler = {
        "name": "autoscaler",
        "image": head["spec"]["containers"][0]["image"],
        **{key: options[key] for key in ("securityContext", "volumeMounts", "resources")},
    }
    containers = [*head["spec"]["containers"], autoscaler]
    yield "head", _pod_template(head | {"spec": head["spec"] | {"containers": containers}})
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], _pod_template(group["template"])


def _pod_template(template: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "pod"},
        "template": template,
    }


def _serve_faults(text: str) -> Iterator[str]:
    from rayprism.fleet.check import check_file
    from rayprism.models.fields import REPOSITORY_VARIABLE

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "serve.yaml"
        path.write_text(text, encoding="utf-8")
        # The models are in the cluster's repository, not in one that happens to be here.
        here = os.environ.pop(REPOSITORY_VARIABLE, None)
        try:
            report = check_file(path, verify=False)
        finally:
            if here is not None:
                os.environ[REPOSITORY_VARIABLE] = here
    for fault in report.faults:
        yield f"serveConfigV2: {fault.path}: {fault.message}"


def main() -> int:
    """Runs the command; see the module.

    Returns:
        The exit status: 0 where all is well.
    """
    built = {f"overlays/{overlay}": build(FOLDER / "overlays" / overlay) for overlay in OVERLAYS}
    built["overlays/cpu with redis and ingress"] = build_with("cpu", "redis", "ingress")
    for name in _LOOSE_FILES:
        built[name] = _load((FOLDER / name).read_text(encoding="utf-8"))
    wrong = 0
    for name, manifests in built.items():
        found = [fault for manifest in manifests for fault in faults(manifest)]
        wrong += len(found)
        for fault in found:
            print(f"{name}: {fault}", file=sys.stderr)
        if not found:
            print(f"{name}: {len(manifests)} resources are valid")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
