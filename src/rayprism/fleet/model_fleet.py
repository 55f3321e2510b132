"""What serves one model: the stable version, those beside it, and who gets which requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayprism.core.tensors import suggest
from rayprism.errors import ClusterError
from rayprism.fleet.edits import ABSENT, value_at
from rayprism.serving.fleet_view import ModelApplication, parse_details
from rayprism.serving.settings import (
    DEPLOYMENT_NAME,
    ModelArgs,
    TrafficConfig,
    parse_user_config,
)

__all__ = ["TRAFFIC_PATH", "ModelFleet", "ServedVersion", "find_model"]

TRAFFIC_PATH = ("deployments", DEPLOYMENT_NAME, "user_config", "traffic")
"""Where an application says who else gets its requests."""


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """An application that serves a version of the model.

    Args:
        application: Its name.
        version: What it serves.
        args: All that it was given.
        route_prefix: Where it answers; None: nowhere.
        status: Serve's word for its state.
    """

    application: str
    version: int
    args: ModelArgs
    route_prefix: str | None
    status: str


@dataclass(frozen=True, slots=True)
class ModelFleet:
    """All that serves one model.

    Args:
        model: Its name.
        stable: What answers at the model's own address.
        others: The versions beside it.
        traffic: What the stable application says of traffic.
        raw_traffic: The same as it was written.
        stable_config: The config of the stable application, as it was deployed.
        elsewhere: What other applications serve, by their names.
    """

    model: str
    stable: ServedVersion
    others: tuple[ServedVersion, ...]
    traffic: TrafficConfig | None = None
    raw_traffic: Mapping[str, Any] | None = None
    stable_config: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def beside(self, version: int) -> ServedVersion | None:
        """The application beside the stable one that serves a version; None where none does.

        Of several, the one at the version's own address: that is where requests are sent on to.
        """
        found = [app for app in self.others if app.version == version]
        own = self.route_of(version)
        found.sort(key=lambda app: (app.route_prefix != own, app.route_prefix is None))
        return found[0] if found else None

    def route_of(self, version: int) -> str:
        """The address of a version beside the stable one."""
        return f"/v2/models/{self.model}/versions/{version}"


def find_model(details: Mapping[str, Any], model: str) -> ModelFleet:
    """What serves a model.

    The stable application is the one at the model's own address, `/v2/models/<model>`; where there
    is none, the only one that is not at the address of its version.

    Args:
        details: What Serve's API says of itself.
        model: The model's name.

    Raises:
        ClusterError: The model is not served, or it is not clear which application is the stable
            one.
        ConfigInvalid: The stable application's `traffic` has faults.
    """
    served = [
        ServedVersion(app.application, app.args.version, app.args, _route(details, app), app.status)
        for app in parse_details(details)
        if app.args.model == model
    ]
    if not served:
        names = sorted({app.args.model for app in parse_details(details)})
        raise ClusterError(
            f"model {model!r} is not served.{suggest(model, names)} "
            f"Served: {', '.join(names) or 'none'}"
        )
    stable = _stable(model, served)
    config = _config(details, stable.application)
    named = {"applications": [{**config, "name": stable.application}]}
    found = value_at(named, stable.application, TRAFFIC_PATH)
    raw = None if found is ABSENT else found
    where = f"{stable.application}.{'.'.join(TRAFFIC_PATH[:-1])}"
    return ModelFleet(
        model,
        stable,
        tuple(version for version in served if version is not stable),
        parse_user_config({"traffic": raw}, where).traffic,
        raw,
        config,
        _elsewhere(details, {version.application for version in served}),
    )


def _route(details: Mapping[str, Any], app: ModelApplication) -> str | None:
    # Serve knows a route only once the application has been built.
    return app.route_prefix or _config(details, app.application).get("route_prefix")


def _config(details: Mapping[str, Any], application: str) -> Mapping[str, Any]:
    config: Mapping[str, Any] = details["applications"][application]["deployed_app_config"]
    return config


def _stable(model: str, served: Sequence[ServedVersion]) -> ServedVersion:
    home = f"/v2/models/{model}"
    at_home = [version for version in served if version.route_prefix == home]
    outside = [
        version
        for version in served
        if version.route_prefix != f"{home}/versions/{version.version}"
    ]
    for choice in (at_home, outside):
        if len(choice) == 1:
            return choice[0]
    there = ", ".join(f"{app.application} at {app.route_prefix}" for app in served)
    raise ClusterError(
        f"no application of {model!r} answers at {home}, and it is not clear which one is the "
        f"stable one: {there}. Give the one that clients use `route_prefix: {home}` and deploy "
        "the file again"
    )


def _elsewhere(details: Mapping[str, Any], own: set[str]) -> dict[str, str]:
    serves = {
        app.application: f"{app.args.model} version {app.args.version}"
        for app in parse_details(details)
    }
    names = [name for name in details["applications"] if name not in own]
    return {name: serves.get(name, "no model of rayprism's") for name in names}
