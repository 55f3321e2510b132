"""What an action of a scenario changes in the Serve config of a rayprism server."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from bench.scenario import Action
from bench.servers.base import ActionFailed
from rayprism.fleet.edits import ABSENT, Edit
from rayprism.fleet.model_fleet import TRAFFIC_PATH
from rayprism.serving.settings import DEPLOYMENT_NAME

__all__ = ["edits_for"]

_VERSION_PATH = ("args", "version")
_REPLICAS_PATH = ("deployments", DEPLOYMENT_NAME, "num_replicas")
_AUTOSCALING_PATH = ("deployments", DEPLOYMENT_NAME, "autoscaling_config")


def edits_for(action: Action, name: str, original: Mapping[str, Any]) -> list[Edit]:
    """The changes of the stable version's application.

    A promotion takes what is said of traffic with it, as `rayprism promote` does. A rollback brings
    back version and traffic that were deployed in the beginning.

    Args:
        action: Any but `kill-replica`, which is no matter of the config.
        name: The application's.
        original: As it was deployed first.

    Raises:
        ActionFailed: The action's value is not one that it can take.
    """
    match action.do:
        case "promote":
            return [Edit(name, _VERSION_PATH, "2"), Edit(name, TRAFFIC_PATH, ABSENT)]
        case "rollback":
            (deployment,) = original["deployments"]
            traffic = deployment.get("user_config", {}).get("traffic")
            return [
                Edit(name, _VERSION_PATH, str(original["args"]["version"])),
                Edit(name, TRAFFIC_PATH, ABSENT if traffic is None else deepcopy(traffic)),
            ]
        case "traffic":
            if action.value is not None and not isinstance(action.value, Mapping):
                raise ActionFailed(
                    f"traffic takes what stands in user_config.traffic, got {action.value!r}"
                )
            return [Edit(name, TRAFFIC_PATH, action.value or ABSENT)]
        case "scale":
            if type(action.value) is not int or action.value < 1:
                raise ActionFailed(f"scale takes a number of replicas, got {action.value!r}")
            return [
                Edit(name, _AUTOSCALING_PATH, ABSENT),
                Edit(name, _REPLICAS_PATH, action.value),
            ]
        case "kill-replica":
            raise ActionFailed("kill-replica changes no config")
