"""Waiting until what was deployed runs, or until it is clear that it will not."""

from __future__ import annotations

import time
from collections.abc import Callable

from rayprism.errors import ClusterError
from rayprism.fleet.rest import ApplicationState, ServeClient, ServeState

__all__ = ["describe_application", "wait_until_running"]

_POLL_S = 0.5


def wait_until_running(
    client: ServeClient,
    *,
    timeout_s: float,
    say: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> ServeState:
    """Waits until every application is running.

    Args:
        client: Of the cluster.
        timeout_s: How long at most.
        say: Is told of each change, a line at a time.
        sleep: Waits between two questions.
        clock: Seconds, monotonic.

    Raises:
        ClusterError: One has failed (with the reason), nothing is deployed, or the time is over.
    """
    deadline = clock() + timeout_s
    told: dict[str, str] = {}
    while True:
        state = client.state()
        for app in state.applications:
            line = describe_application(app)
            if told.get(app.name) != line:
                told[app.name] = line
                say(line)
        if state.is_running:
            return state
        failed = [app for app in state.applications if app.has_failed]
        settled = all(app.is_running or app.has_failed for app in state.applications)
        # The others are waited for: one look should tell the state of all of them.
        if failed and settled:
            raise ClusterError("\n".join(_explain(app) for app in failed))
        if clock() >= deadline:
            raise ClusterError(_too_late(state, timeout_s))
        sleep(_POLL_S)


def describe_application(app: ApplicationState) -> str:
    """`flights RUNNING (model 2/2)`."""
    parts = ", ".join(
        f"{deployment.name} {deployment.running}/{deployment.target}"
        + ("" if deployment.status == "HEALTHY" else f" {deployment.status}")
        for deployment in app.deployments
    )
    return f"{app.name} {app.status}" + (f" ({parts})" if parts else "")


def _explain(app: ApplicationState) -> str:
    logs = [path for deployment in app.deployments for path in deployment.log_files]
    where = f"\n  log: <ray logs>{logs[-1]}" if logs else ""
    return f"application {app.name!r} is {app.status}: {app.cause or 'no reason given'}{where}"


def _too_late(state: ServeState, timeout_s: float) -> str:
    if not state.applications:
        return f"nothing was deployed within {timeout_s:g} s. `serve deploy FILE` does"
    waiting = [app for app in state.applications if not app.is_running]
    lines = [describe_application(app) + (f": {app.cause}" if app.cause else "") for app in waiting]
    return f"not running after {timeout_s:g} s:\n  " + "\n  ".join(lines)
