"""Where to find what in a list of manifests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

Manifest = dict[str, Any]


def find(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one with this kind and name; a name may be followed by kustomize's hash."""
    [found] = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind
        and re.fullmatch(rf"{re.escape(name)}(-[a-z0-9]{{10}})?", manifest["metadata"]["name"])
    ]
    return found


def clusters(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """The specs of both Ray clusters, by name."""
    return {
        "rayprism": find(manifests, "RayService", "rayprism")["spec"]["rayClusterConfig"],
        "rayprism-batch": find(manifests, "RayCluster", "rayprism-batch")["spec"],
    }


def groups(cluster: Manifest) -> dict[str, Manifest]:
    """A cluster's groups of pods by name; the head is `head`."""
    named = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **named}


def container(group: Manifest) -> Manifest:
    """The one in which Ray runs."""
    [only] = group["template"]["spec"]["containers"]
    return dict(only)


def pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Of every pod, the cluster, the group and its template."""
    for cluster, spec in clusters(manifests).items():
        for name, group in groups(spec).items():
            yield cluster, name, group["template"]
