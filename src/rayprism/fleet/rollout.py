"""How far Serve is with a change: told apart from how things were before it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayprism.errors import ClusterError
from rayprism.fleet.edits import Edit
from rayprism.fleet.rest import ApplicationState, parse_state
from rayprism.fleet.waiting import describe_application

__all__ = [
    "Mark",
    "describe_progress",
    "has_failed",
    "is_ready",
    "only_drains",
    "user_config_error",
]

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Mark:
    """What an application was like before a config was put.

    Args:
        deployed_s: When it was last put before, by Serve's clock; None where it was not there.
        leaving: Ids of the replicas that have to be gone after it.
    """

    deployed_s: float | None
    leaving: frozenset[str]

    @classmethod
    def of(cls, details: Mapping[str, Any], name: str, edits: Sequence[Edit]) -> Mark:
        """The mark of an application that is about to be changed.

        Args:
            details: What Serve says of itself.
            name: The application's.
            edits: What is going to be changed. Other `args` mean other replicas; all else is
                changed in place.
        """
        app = _raw(details, name)
        mine = [edit for edit in edits if edit.application == name]
        restarts = any(edit.path[:1] in ((), ("args",)) for edit in mine)
        leaving = frozenset(_replicas(app)) if restarts else frozenset()
        return cls(app.get("last_deployed_time_s"), leaving)


def is_ready(details: Mapping[str, Any], name: str, mark: Mark) -> bool:
    """Whether an application is as it should be, with nothing left of before.

    Args:
        details: What Serve says of itself.
        name: The application's.
        mark: From before the config was put. RUNNING may be from before, too.
    """
    state = _fresh_state(details, name, mark)
    return state is not None and state.is_running and not _left(details, name, mark)


def only_drains(details: Mapping[str, Any], name: str, mark: Mark) -> bool:
    """Whether all new replicas answer, and those of before only finish what they have taken.

    Serve calls such an application DEPLOYING still.

    Args:
        details: What Serve says of itself.
        name: The application's.
        mark: From before the config was put.
    """
    state = _fresh_state(details, name, mark)
    if state is None or not state.deployments:
        return False
    if not _left(details, name, mark):
        return False
    for deployment in state.deployments:
        replicas = _replicas(_raw(details, name), deployment.name)
        new = [replicas[id] for id in replicas if id not in mark.leaving]
        old = [replicas[id] for id in replicas if id in mark.leaving]
        if new.count("RUNNING") < max(1, deployment.target) or set(old) - {"STOPPING"}:
            return False
    return True


def has_failed(details: Mapping[str, Any], name: str, mark: Mark) -> str | None:
    """Why waiting longer would not help; None while it might.

    Args:
        details: What Serve says of itself.
        name: The application's.
        mark: From before the config was put.
    """
    state = _fresh_state(details, name, mark)
    # Not the deployments' own states: while an application is being built anew, they are those of
    # before.
    if state is None or state.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return None
    logs = [path for deployment in state.deployments for path in deployment.log_files]
    where = f"\n  log: <ray logs>{logs[-1]}" if logs else ""
    return f"application {name!r} is {state.status}: {state.cause or 'no reason given'}{where}"


def describe_progress(
    details: Mapping[str, Any], name: str, mark: Mark, *, reason: bool = False
) -> str:
    """`flights DEPLOYING (model 1/2 ready, 2 of before left)`; empty where Serve is not at it yet.

    Args:
        details: What Serve says of itself.
        name: The application's.
        mark: From before the config was put.
        reason: Whether Serve's explanation is added, if there is one.
    """
    state = _fresh_state(details, name, mark)
    if state is None:
        return f"Serve has not begun with {name}" if reason else ""
    line = _describe(details, state, mark)
    return f"{line}: {state.cause}" if reason and state.cause else line


def _describe(details: Mapping[str, Any], state: ApplicationState, mark: Mark) -> str:
    if not mark.leaving:
        return describe_application(state)
    app = _raw(details, state.name)
    parts = []
    for deployment in state.deployments:
        replicas = _replicas(app, deployment.name)
        ready = sum(
            replica == "RUNNING" for id, replica in replicas.items() if id not in mark.leaving
        )
        left = sum(id in mark.leaving for id in replicas)
        shown = f"{deployment.name} {ready}/{deployment.target} ready"
        parts.append(shown + (f", {left} of before left" if left else ""))
    return f"{state.name} {state.status}" + (f" ({'; '.join(parts)})" if parts else "")


def _fresh_state(details: Mapping[str, Any], name: str, mark: Mark) -> ApplicationState | None:
    """The state of an application, once it is that of the config that was put."""
    app = _raw(details, name)
    if not app or app.get("last_deployed_time_s") == mark.deployed_s:
        return None
    (state,) = parse_state({"applications": {name: app}}).applications
    return state


def _raw(details: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (details.get("applications") or {}).get(name) or {}
    return found


def _replicas(app: Mapping[str, Any], deployment: str | None = None) -> dict[str, str]:
    """The states of its replicas, by their ids."""
    return {
        str(replica.get("replica_id")): str(replica.get("state"))
        for name, found in (app.get("deployments") or {}).items()
        if deployment in (None, name)
        for replica in found.get("replicas") or []
    }


def _left(details: Mapping[str, Any], name: str, mark: Mark) -> frozenset[str]:
    return mark.leaving & frozenset(_replicas(_raw(details, name)))


def user_config_error(details: Mapping[str, Any], name: str) -> str:
    """What a replica of an application says is wrong with its `user_config`; empty: nothing.

    Args:
        details: What Serve says of itself.
        name: The application's.

    Raises:
        ClusterError: It cannot be asked from here.
    """
    address = parse_state(details).http_address
    route = _raw(details, name).get("route_prefix")
    if address is None or route is None:
        raise ClusterError("it has no HTTP address")
    root = (details.get("http_options") or {}).get("root_path") or ""
    url = f"{address}{root.rstrip('/')}{route.rstrip('/')}/config"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            parameters = json.loads(response.read())["parameters"]
            found = parameters.get("user_config_error", "")
    except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError) as error:
        raise ClusterError(f"GET {url} gave {error!r}") from None
    except AttributeError:
        raise ClusterError(f"GET {url} gave something that is not a model's") from None
    return str(found.get("string_value", "") if isinstance(found, Mapping) else found)
