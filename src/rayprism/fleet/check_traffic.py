"""Whether the `traffic` of a Serve file fits the applications beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayprism.errors import ConfigInvalid, RepositoryError
from rayprism.models.repository import ModelVersion
from rayprism.models.signature import signature_differences
from rayprism.serving.fleet_view import MODEL_IMPORT_PATH
from rayprism.serving.settings import Candidate, Shadow, TrafficConfig

__all__ = ["LookUp", "PlannedVersion", "TrafficChecks"]

LookUp = Callable[[Path, str, int], ModelVersion | RepositoryError | ConfigInvalid]
"""Finds a version in a repository, or says why it cannot be had."""


@dataclass(frozen=True, slots=True)
class PlannedVersion:
    """One application of the file that would serve a version.

    Args:
        name: The application's.
        path: Where it is in the file.
        route: Where it answers; None: nowhere.
        model: The model's name.
        version: Its version.
        repository: Where its version was looked up; None where it was not.
        traffic: Who else gets its requests, if anybody.
        traffic_path: Where that is in the file.
    """

    name: str
    path: str
    route: str | None
    model: str
    version: int
    repository: Path | None = None
    traffic: TrafficConfig | None = None
    traffic_path: str = ""

    @property
    def shares_requests(self) -> bool:
        """Whether it names any candidate or shadow."""
        return self.traffic is not None and bool(self.traffic.candidates or self.traffic.shadow)

    @property
    def is_at_version_route(self) -> bool:
        """Whether requests that come to it ask for one version."""
        return self.route is not None and self.route.startswith(_version_route(self.model, ""))


class TrafficChecks:
    """Compares what `traffic` names with what the file serves.

    Args:
        applications: Those of the file that serve versions, in its order.
        look_up: Finds versions.
        unclear: Whether there are applications of which nobody knows what they would serve.
    """

    def __init__(
        self, applications: Sequence[PlannedVersion], look_up: LookUp, *, unclear: bool
    ) -> None:
        self.faults: list[tuple[str, str]] = []
        """Path and message of each."""
        self.warnings: list[tuple[str, str]] = []
        self._applications = applications
        self._look_up = look_up
        self._unclear = unclear

    def run(self) -> None:
        """Checks the applications."""
        self._served_twice()
        self._split_twice()
        for app in self._applications:
            if app.traffic is None or not app.shares_requests:
                continue
            if app.is_at_version_route:
                self._warn(
                    app.traffic_path,
                    f"has no effect here: requests that come to {app.route} are for that version. "
                    f"Write it in the application at {_stable_route(app.model)}",
                )
                continue
            for key in ("candidates", "shadow"):
                for place, entry in enumerate(getattr(app.traffic, key)):
                    self._entry(app, entry, f"{app.traffic_path}.{key}[{place}].version")
            self._both(app.traffic, app.traffic_path)

    def _fault(self, path: str, message: str) -> None:
        self.faults.append((path, message))

    def _warn(self, path: str, message: str) -> None:
        self.warnings.append((path, message))

    def _served_twice(self) -> None:
        first: dict[tuple[str, int], PlannedVersion] = {}
        for app in self._applications:
            known = first.setdefault((app.model, app.version), app)
            if known is app:
                continue
            counts = self._reached(app.model, app.version) or known
            self._warn(
                f"{app.path}.args.version",
                f"application {known.name!r} serves version {app.version} of {app.model!r} too; "
                f"where `traffic` names that version, {counts.name!r} is meant. Take one of them "
                "out; one application can have more replicas",
            )

    def _split_twice(self) -> None:
        first: dict[str, PlannedVersion] = {}
        for app in self._applications:
            if not app.shares_requests or app.is_at_version_route:
                continue
            known = first.setdefault(app.model, app)
            if known is not app:
                self._fault(
                    app.traffic_path,
                    f"application {known.name!r} shares out the requests for {app.model!r} "
                    "already, and only one can be the stable one. Take `traffic` out of one of "
                    "them",
                )

    def _both(self, traffic: TrafficConfig, path: str) -> None:
        candidates = {candidate.version for candidate in traffic.candidates}
        for place, shadow in enumerate(traffic.shadow):
            if shadow.version in candidates:
                self._warn(
                    f"{path}.shadow[{place}].version",
                    f"version {shadow.version} is a candidate too: it gets copies beside requests "
                    "of its own, and what is measured of it is of both. Take it out of one list",
                )

    def _entry(self, app: PlannedVersion, entry: Candidate | Shadow, path: str) -> None:
        if entry.version == app.version:
            role = "candidate" if isinstance(entry, Candidate) else "shadow"
            self._fault(
                path,
                f"got {entry.version}, which is what this application serves itself: a {role} is "
                "another version. Take it out, or change the number",
            )
            return
        target = self._reached(app.model, entry.version)
        if target is None and not self._unclear:
            self._unreached(app, entry.version, path)
        if not entry.allow_signature_change:
            self._signature(app, target, entry.version, path)

    def _reached(self, model: str, version: int) -> PlannedVersion | None:
        """The application that gets the requests for a version, as replicas choose it."""
        found = [app for app in self._serving(model, version) if app.route is not None]
        own = [app for app in found if app.route == _version_route(model, version)]
        return next(iter([*own, *found]), None)

    def _serving(self, model: str, version: int) -> list[PlannedVersion]:
        return [app for app in self._applications if (app.model, app.version) == (model, version)]

    def _unreached(self, app: PlannedVersion, version: int, path: str) -> None:
        model, route = app.model, _version_route(app.model, version)
        mute = self._serving(model, version)
        if mute:
            self._fault(
                path,
                f"application {mute[0].name!r} serves version {version}, but requests cannot be "
                f"sent to it, for its route_prefix is null. Give it {route}",
            )
            return
        served = [f"{a.version} ({a.name!r})" for a in self._applications if a.model == model]
        told = [
            f"no application of this file serves version {version} of {model!r}",
            f"it serves {', '.join(served)}",
        ]
        told += [
            f"application {other.name!r} serves version {version} of another model, {other.model!r}"
            for other in self._applications
            if other.version == version
        ][:1]
        found = app.repository and self._look_up(app.repository, model, version)
        taken = next((other for other in self._applications if other.route == route), None)
        if isinstance(found, RepositoryError):
            mend = f"Nor can one be added: {found}"
        elif taken is not None:
            mend = (
                f"Application {taken.name!r} has the route for it, but serves version "
                f"{taken.version} of {taken.model!r}: change its `args`"
            )
        else:
            mend = (
                f"Add one: name: {model}-{version}, route_prefix: {route}, import_path: "
                f"{MODEL_IMPORT_PATH}, args: {{model: {model}, version: {version}}}"
            )
        self._fault(path, f"{'; '.join(told)}. {mend}")

    def _signature(
        self, app: PlannedVersion, target: PlannedVersion | None, version: int, path: str
    ) -> None:
        root = app.repository if target is None else target.repository
        if app.repository is None or root is None:
            return
        stable = self._look_up(app.repository, app.model, app.version)
        other = self._look_up(root, app.model, version)
        if not isinstance(stable, ModelVersion) or not isinstance(other, ModelVersion):
            return  # said where that version is served, or is missed
        differences = signature_differences(stable.manifest, other.manifest)
        if differences:
            self._fault(
                path,
                f"the signature of version {version} is not that of version {app.version}, which "
                f"clients know: {'; '.join(differences)}. If they can do with both, write "
                "`allow_signature_change: true` beside it",
            )


def _stable_route(model: str) -> str:
    return f"/v2/models/{model}"


def _version_route(model: str, version: int | str) -> str:
    return f"{_stable_route(model)}/versions/{version}"
