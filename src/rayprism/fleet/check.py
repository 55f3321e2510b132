"""Checks a Serve file before anything is deployed: no cluster, every fault at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayprism.errors import ConfigInvalid, Fault
from rayprism.fleet.check_models import ModelChecks
from rayprism.fleet.check_ray import ray_faults, ray_warnings
from rayprism.fleet.document import Document, load_document
from rayprism.serving.settings import REPOSITORY_VARIABLE

__all__ = ["CheckReport", "PlannedApplication", "check_file"]


@dataclass(frozen=True, slots=True)
class PlannedApplication:
    """What one application of the file would be.

    Args:
        name: Its name.
        route: Where it would answer; None: nowhere.
        model: The model, where it is one of ours.
        version: Its version.
        digest: Of the version's manifest, where a repository was looked at.
        replicas: As written: a number, a range, or empty for Serve's default.
    """

    name: str
    route: str | None
    model: str = ""
    version: str = ""
    digest: str = ""
    replicas: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What is to be said about one file.

    Args:
        source: The file's name.
        faults: What keeps it from working. None: it may be deployed.
        warnings: What will work, but hardly as it was meant.
        applications: What would be deployed.
    """

    source: str
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    applications: tuple[PlannedApplication, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """As `rayprism check --json` prints it."""
        return {
            "file": self.source,
            "ok": self.ok,
            "faults": [asdict(fault) for fault in self.faults],
            "warnings": [asdict(fault) for fault in self.warnings],
            "applications": [asdict(application) for application in self.applications],
        }


def check_file(path: Path, *, repository: Path | None = None, verify: bool = True) -> CheckReport:
    """Checks one file.

    Args:
        path: A YAML file for `serve deploy`.
        repository: Where versions are looked up for applications whose `args` name none; by
            default what RAYPRISM_REPOSITORY says.
        verify: Whether every file of every version is read and compared with its digest.
    """
    try:
        document = load_document(path)
    except ConfigInvalid as error:
        return CheckReport(error.source, error.faults)
    if repository is None and os.environ.get(REPOSITORY_VARIABLE):
        repository = Path(os.environ[REPOSITORY_VARIABLE])
    models = ModelChecks(document, repository, verify=verify)
    models.run()
    faults = [*document.faults, *ray_faults(document), *models.faults]
    warnings = [*ray_warnings(document), *models.warnings]
    return CheckReport(
        document.source,
        _by_line(faults),
        _by_line(warnings),
        tuple(_plan(document, models)),
    )


def _by_line(faults: list[Fault]) -> tuple[Fault, ...]:
    return tuple(sorted(dict.fromkeys(faults), key=lambda fault: fault.line or 0))


def _plan(document: Document, models: ModelChecks) -> list[PlannedApplication]:
    data = document.data
    applications = data.get("applications") if isinstance(data, dict) else None
    planned = []
    for index, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict):
            continue
        args = models.args.get(index)
        planned.append(
            PlannedApplication(
                name=str(application.get("name", "default")),
                route=application.get("route_prefix", "/"),
                model=args.model if args else "",
                version=str(args.version) if args else "",
                digest=models.digests.get(index, ""),
                replicas=_replicas(application),
            )
        )
    return planned


def _replicas(application: Mapping[str, Any]) -> str:
    deployments = application.get("deployments")
    shown = []
    for deployment in deployments if isinstance(deployments, list) else []:
        if not isinstance(deployment, dict):
            continue
        autoscaling = deployment.get("autoscaling_config")
        if isinstance(autoscaling, dict):
            low, high = autoscaling.get("min_replicas", 1), autoscaling.get("max_replicas", 1)
            shown.append(f"{low}-{high}")
        elif "num_replicas" in deployment:
            shown.append(str(deployment["num_replicas"]))
    return ", ".join(shown)
