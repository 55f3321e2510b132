"""What has to be so before the traffic of a model is changed: every fault at once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import yaml

from rayprism.core.traffic import SLOTS
from rayprism.errors import ConfigInvalid, Fault, SetupError
from rayprism.fleet.edits import ABSENT, Edit, apply_edits, masked, value_at
from rayprism.fleet.model_fleet import TRAFFIC_PATH, ModelFleet, ServedVersion
from rayprism.models.manifest import Manifest
from rayprism.models.signature import signature_differences
from rayprism.serving.settings import ModelArgs

__all__ = ["PlanChecks", "VersionLookup", "snippet"]

VersionLookup: TypeAlias = Callable[[ModelArgs], Manifest]
"""Reads a version's manifest from its repository; raises RepositoryError or ConfigInvalid."""


class PlanChecks:
    """Collects what is wrong with a plan.

    Args:
        fleet: What serves the model.
        lookup: Reads manifests.
        allow_signature_change: Whether inputs and outputs may differ from the stable version's.
    """

    def __init__(self, fleet: ModelFleet, lookup: VersionLookup, allow: bool) -> None:
        self._fleet = fleet
        self._lookup = lookup
        self._allow = allow
        self._faults: list[Fault] = []
        self._manifests: dict[int, Manifest | None] = {}

    def fault(self, version: int, message: str) -> None:
        """One version cannot be what it is to be."""
        self._faults.append(Fault(f"version {version}", message))

    def finish(self, source: str) -> None:
        """Raises what was found.

        Raises:
            ConfigInvalid: Anything was.
        """
        if self._faults:
            raise ConfigInvalid(source, list(dict.fromkeys(self._faults)))

    def percent(self, version: int, value: float) -> bool:
        """Whether it is a share that can be given."""
        # Written so that NaN is out of bounds, too.
        if not 0 <= value <= 100:
            self.fault(version, f"got {value:g} %, allowed is 0 to 100")
        elif abs(value * 100 - round(value * 100)) > 1e-6:
            self.fault(version, f"got {value:g} %, allowed are two decimals, as in 0.25")
        else:
            return True
        return False

    def total(self, candidates: Sequence[Mapping[str, Any]]) -> None:
        """Checks that the candidates get no more than there is."""
        slots = sum(round(item["weight"] * 100) for item in candidates)
        if slots > SLOTS:
            each = ", ".join(f"{item['version']}={item['weight']:g}" for item in candidates)
            self._faults.append(
                Fault(
                    "candidates",
                    f"the weights are {slots / 100:g} % together ({each}), allowed are 100. "
                    "A candidate that is listed keeps its weight unless it is given another",
                )
            )

    def deployed(self, version: int) -> ServedVersion | None:
        """The application beside the stable one that serves a version."""
        fleet = self._fleet
        if version == fleet.stable.version:
            self.fault(version, "is the stable version: it gets what the candidates leave")
            return None
        found = fleet.beside(version)
        if found is None:
            known = ", ".join(f"{app.version} ({app.application})" for app in fleet.others)
            name = f"{fleet.model}-{version}"
            serves = fleet.elsewhere.get(name)
            other = f": application {name!r} serves {serves}" if serves else ""
            self.fault(
                version,
                f"is not deployed{other}. Deployed beside version {fleet.stable.version}: "
                f"{known or 'none'}. Add this to `applications` and deploy the file:\n"
                f"{snippet(fleet, version)}",
            )
        return found

    def running(self, app: ServedVersion) -> None:
        """Checks that a version is ready for requests."""
        if app.route_prefix is None:
            self.fault(
                app.version,
                f"its application {app.application!r} has no route, so no request reaches it. Give "
                f"it `route_prefix: {self._fleet.route_of(app.version)}`",
            )
        if app.status != "RUNNING":
            self.fault(
                app.version,
                f"its application {app.application!r} is {app.status}, and has to be RUNNING "
                "before it gets requests. `rayprism status` says why it is not",
            )

    def signature(self, version: int) -> bool:
        """Checks that a version can stand in for the stable one.

        Returns:
            Whether it differs, and may.
        """
        stable = self._fleet.stable.version
        other = self.manifest(version)
        if other is None:
            return False
        try:
            ours = self._lookup(self._args(stable))
        except SetupError as error:
            # Going on must be possible when the stable version is gone from the repository.
            if not self._allow:
                self.fault(
                    stable,
                    f"its inputs and outputs cannot be compared with those of version {version}: "
                    f"{error}. To go on without, give --allow-signature-change",
                )
            return self._allow
        found = signature_differences(ours, other)
        if found and not self._allow:
            self.fault(
                version,
                f"its inputs and outputs differ from those of version {stable}: "
                f"{'; '.join(found)}. Clients that know only version {stable} may fail; if none "
                "does, give --allow-signature-change",
            )
        return bool(found)

    def code(self, version: int) -> None:
        """Checks that the stable application may run what a version brings."""
        manifest = self.manifest(version)
        stable = self._fleet.stable
        if manifest is not None and manifest.runs_code and not stable.args.allow_code:
            self.fault(
                version,
                f"runs code that came with it, and application {stable.application!r} does not "
                "allow that. Read the code; to let it run, set `args.allow_code: true` there in "
                "the file and deploy it first",
            )

    def manifest(self, version: int) -> Manifest | None:
        """The version as the repository has it; None (and a fault) where it does not."""
        if version not in self._manifests:
            self._manifests[version] = None
            try:
                self._manifests[version] = self._lookup(self._args(version))
            except ConfigInvalid as error:
                self._faults.extend(error.faults)
            except SetupError as error:
                self.fault(version, str(error))
        return self._manifests[version]

    def _args(self, version: int) -> ModelArgs:
        return self._fleet.stable.args.model_copy(update={"version": version})


def snippet(fleet: ModelFleet, version: int) -> str:
    """An application that would serve a version beside the stable one, as YAML to paste.

    It is made like the stable one; secrets are masked.
    """
    taken = {*fleet.elsewhere, *(app.application for app in fleet.others)}
    name = f"{fleet.model}-{version}"
    while name in taken:
        name += "-beside"
    app = {**masked(fleet.stable_config), "name": name, "route_prefix": fleet.route_of(version)}
    path = TRAFFIC_PATH
    config = {"applications": [app]}
    apply_edits(config, [Edit(name, ("args", "version"), version), Edit(name, path, ABSENT)])
    if value_at(config, name, path[:-1]) == {}:
        apply_edits(config, [Edit(name, path[:-1], ABSENT)])
    first = ("name", "route_prefix", "import_path", "args")
    ordered = {key: app[key] for key in (*first, *app) if key in app}
    text = yaml.safe_dump([ordered], sort_keys=False, allow_unicode=True, width=1000)
    return textwrap.indent(text.rstrip(), "  ")
