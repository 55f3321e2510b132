"""What runs in this Serve instance, read from its controller: for the front door."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, NotFound, NotReady, RequestError
from rayprism.protocol.metadata import ModelState
from rayprism.serving.settings import ModelArgs, parse_args

__all__ = ["MODEL_IMPORT_PATH", "FleetView", "ModelApplication", "explain_missing", "parse_details"]

MODEL_IMPORT_PATH = "rayprism.serving.app:build"
_STATES: dict[str, ModelState] = {
    "RUNNING": "READY",
    "DEPLOYING": "LOADING",
    "NOT_STARTED": "LOADING",
    "DELETING": "UNLOADING",
}

logger = logging.getLogger("ray.serve.rayprism")


@dataclass(frozen=True, slots=True)
class ModelApplication:
    """One application that serves a model version.

    Args:
        application: Its name, which gRPC clients send as metadata `application`.
        args: Which version.
        route_prefix: Where it is reached.
        status: Serve's word for its state.
        message: Serve's explanation, if any.
    """

    application: str
    args: ModelArgs
    route_prefix: str | None
    status: str
    message: str

    @property
    def state(self) -> ModelState:
        """In the words of the protocol's repository index."""
        return _STATES.get(self.status, "UNAVAILABLE")


def parse_details(details: Mapping[str, Any]) -> list[ModelApplication]:
    """The model applications in what Serve's controller says of itself."""
    found = []
    for name, application in details.get("applications", {}).items():
        config = application.get("deployed_app_config") or {}
        if config.get("import_path") != MODEL_IMPORT_PATH:
            continue
        try:
            args = parse_args(config.get("args", {}))
        except ConfigInvalid:
            continue  # it could not be built; Serve's status has the reason
        status = application.get("status", "")
        found.append(
            ModelApplication(
                application=name,
                args=args,
                route_prefix=application.get("route_prefix"),
                status=str(getattr(status, "value", status)),
                message=application.get("message", ""),
            )
        )
    return found


def explain_missing(
    applications: Sequence[ModelApplication], model: str, version: str | None
) -> RequestError:
    """Why a request for a model came to the front door and not to the model itself."""
    versions = [app for app in applications if app.args.model == model]
    if not versions:
        names = sorted({app.args.model for app in applications})
        return NotFound(
            f"model {model!r} is not served here.{suggest(model, names)} "
            f"Served: {', '.join(names) or 'none'}"
        )
    if version is not None:
        versions = [app for app in versions if str(app.args.version) == version]
        if not versions:
            known = sorted({app.args.version for app in applications if app.args.model == model})
            return NotFound(
                f"version {version!r} of model {model!r} is not served here. Served: "
                f"{', '.join(map(str, known))}"
            )
    waiting = [app for app in versions if app.state != "READY"]
    if waiting:
        app = waiting[0]
        return NotReady(f"model {model!r} version {app.args.version} is {app.status.lower()}")
    routes = ", ".join(str(app.route_prefix) for app in versions)
    return NotFound(f"model {model!r} has nothing at this path; it is served at {routes}")


class FleetView:
    """A recent view of the fleet, asked for at most once in a while.

    Args:
        fetch: Asks the controller; may block, and is called in a thread.
        max_age_s: How old an answer may be.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        fetch: Callable[[], Mapping[str, Any]],
        max_age_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._max_age_s = max_age_s
        self._clock = clock
        self._applications: list[ModelApplication] | None = None
        self._asked_s: float | None = None
        self._lock = asyncio.Lock()

    async def applications(self) -> list[ModelApplication]:
        """The model applications, by name; where the controller is away, the last that was known.

        Raises:
            NotReady: The controller does not answer, and never did.
        """
        async with self._lock:
            if self._asked_s is None or self._clock() - self._asked_s > self._max_age_s:
                await self._refresh()
            if self._applications is None:
                raise NotReady("Serve's controller does not answer yet")
            return self._applications

    async def _refresh(self) -> None:
        try:
            details = await asyncio.to_thread(self._fetch)
        except Exception as error:
            logger.warning("Serve's controller does not answer: %s", error)
        else:
            self._applications = parse_details(details)
        # Also after a failure, and from its end: a controller that is gone takes longer to be
        # given up than an answer lasts, and the next request should not wait for it, too.
        self._asked_s = self._clock()
