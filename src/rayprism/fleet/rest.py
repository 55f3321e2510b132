"""A client for the Serve REST API of a Ray dashboard: what runs, in what state, and changing it."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprism.errors import ClusterError

__all__ = [
    "DEFAULT_ADDRESS",
    "ApplicationState",
    "DeploymentState",
    "ServeClient",
    "ServeState",
    "parse_state",
    "token_header",
]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_PATH = "/api/serve/applications/"
_MAX_ERROR_BYTES = 64 * 1024
_MAX_SHOWN = 2000
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """One deployment, as Serve sees it.

    Args:
        name: Its name.
        status: HEALTHY, UPDATING, UPSCALING, DOWNSCALING, UNHEALTHY or DEPLOY_FAILED.
        message: Serve's explanation; holds the traceback of a replica that could not start.
        running: Replicas that are running.
        target: Replicas that there should be.
        log_files: Of the newest replicas, below the cluster's log folder.
    """

    name: str
    status: str
    message: str
    running: int
    target: int
    log_files: tuple[str, ...] = ()

    @property
    def cause(self) -> str:
        """The last line of the replica's traceback, or Serve's message."""
        return _cause(self.message)


@dataclass(frozen=True, slots=True)
class ApplicationState:
    """One application, as Serve sees it.

    Args:
        name: Its name.
        status: RUNNING, DEPLOYING, NOT_STARTED, DELETING, UNHEALTHY or DEPLOY_FAILED.
        message: Serve's explanation; holds the traceback of an application builder that raised.
        route_prefix: Where it answers, once it does.
        deployments: Its deployments.
    """

    name: str
    status: str
    message: str
    route_prefix: str | None
    deployments: tuple[DeploymentState, ...]

    @property
    def is_running(self) -> bool:
        """Whether it and all of it are as they should be."""
        # An application stays RUNNING while its replicas are scaled or updated in place.
        return self.status == "RUNNING" and all(
            deployment.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
            for deployment in self.deployments
        )

    @property
    def has_failed(self) -> bool:
        """Whether waiting longer would not help by itself."""
        states = [self.status, *(deployment.status for deployment in self.deployments)]
        return any(state in ("DEPLOY_FAILED", "UNHEALTHY") for state in states)

    @property
    def cause(self) -> str:
        """Why it is not running, in one line, as far as Serve says."""
        causes = [deployment.cause for deployment in self.deployments if deployment.message]
        if causes:
            return "; ".join(causes)
        return _cause(self.message)


@dataclass(frozen=True, slots=True)
class ServeState:
    """A Serve instance.

    Args:
        started: Whether Serve runs in the cluster at all; the first deploy starts it.
        http_address: Where HTTP clients connect.
        grpc_address: Where gRPC clients connect, where gRPC is on.
        applications: By name.
    """

    started: bool
    http_address: str | None = None
    grpc_address: str | None = None
    applications: tuple[ApplicationState, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether every application is; False where there is none."""
        return bool(self.applications) and all(app.is_running for app in self.applications)


class ServeClient:
    """Talks to the Serve REST API.

    Args:
        address: Of the dashboard, as `serve deploy --address` takes it.
        timeout_s: Of one request.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float = 10.0) -> None:
        self.address = address.rstrip("/")
        self._timeout_s = timeout_s
        if not self.address.startswith(("http://", "https://")):
            raise ClusterError(
                f"the address {address!r} is not an HTTP URL. It is the dashboard's, as in "
                f"{DEFAULT_ADDRESS}"
            )

    def state(self) -> ServeState:
        """What runs.

        Raises:
            ClusterError: Nobody answers there, or not as Serve's API does.
        """
        return parse_state(self.details())

    def details(self) -> dict[str, Any]:
        """Everything that Serve says of itself, unparsed.

        Raises:
            ClusterError: Nobody answers there, or not as Serve's API does.
        """
        url = f"{self.address}{_PATH}"
        try:
            found = json.loads(self._send(urllib.request.Request(url), self._timeout_s))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ClusterError(
                f"no Serve API at {self.address} ({_reason(error)}). Is the cluster up "
                "(`rayprism up`), and is this its dashboard's address?"
            ) from None
        if not isinstance(found, dict) or "applications" not in found:
            raise ClusterError(f"{url} answered something that is not Serve's API")
        return found

    def put(self, config: Mapping[str, Any], timeout_s: float = 60.0) -> None:
        """Brings the whole config into force, as `serve deploy` does. Does not wait for it.

        Applications that Serve has from an earlier config and that are not in this one are
        deleted.

        Args:
            config: Plain JSON values.
            timeout_s: How long Serve may take to answer.

        Raises:
            ClusterError: Nobody answers there, or Serve refused it, with its reason. Where no
                answer came in time, Serve may have taken it all the same.
        """
        request = urllib.request.Request(
            f"{self.address}{_PATH}",
            data=json.dumps(config, allow_nan=False).encode(),
            headers={"Content-Type": "application/json"},
            method="PUT",
        )
        try:
            self._send(request, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(
                f"{self.address} did not answer to the new config ({_reason(error)}). Whether "
                "Serve took it is not known: see `rayprism status`"
            ) from None

    def _send(self, request: urllib.request.Request, timeout_s: float) -> bytes:
        for name, value in token_header().items():
            request.add_header(name, value)
        # Proxies of the environment are for the internet, not for a cluster's own dashboard.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout_s) as response:
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            with error:
                text = _plain(error.read(_MAX_ERROR_BYTES).decode(errors="replace"))
            shown = _cause(text)[-_MAX_SHOWN:]
            hint = _hint(error.code, request.get_method())
            raise ClusterError(f"{request.full_url} answered {error.code}: {hint}{shown}") from None


def _reason(error: Exception) -> object:
    return getattr(error, "reason", None) or error


def _hint(code: int, method: str) -> str:
    if code in (401, 403):
        return (
            "the cluster asks for a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH. "
        )
    if code == 400 and method == "PUT":
        return "Serve refused the config: "
    return ""


def token_header() -> dict[str, str]:
    """The header with the token, where RAY_AUTH_MODE is `token`.

    Raises:
        ClusterError: There is no token.

    Source: Ray, "Token authentication": RAY_AUTH_TOKEN, then the file at RAY_AUTH_TOKEN_PATH, then
    ~/.ray/auth_token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
        try:
            token = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ClusterError(
                f"RAY_AUTH_MODE is token, but {path} cannot be read: {error.strerror}. Make a "
                "token with `ray get-auth-token --generate`"
            ) from None
    return {"Authorization": f"Bearer {token}"}


def parse_state(details: Mapping[str, Any]) -> ServeState:
    """Reads what the REST API says."""
    http = details.get("http_options") or {}
    grpc = details.get("grpc_options") or {}
    host = http.get("host") or "127.0.0.1"
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return ServeState(
        # Before the first deploy the API answers, but there is no controller and no proxy.
        started=bool(details.get("controller_info")),
        http_address=f"http://{shown}:{http['port']}" if "port" in http else None,
        grpc_address=f"{shown}:{grpc['port']}" if grpc.get("grpc_servicer_functions") else None,
        applications=tuple(
            _application(name, item)
            for name, item in sorted((details.get("applications") or {}).items())
        ),
    )


def _application(name: str, item: Mapping[str, Any]) -> ApplicationState:
    return ApplicationState(
        name=name,
        status=str(item.get("status", "")),
        message=_plain(item.get("message")),
        route_prefix=item.get("route_prefix"),
        deployments=tuple(
            _deployment(key, value)
            for key, value in sorted((item.get("deployments") or {}).items())
        ),
    )


def _deployment(name: str, item: Mapping[str, Any]) -> DeploymentState:
    replicas = item.get("replicas") or []
    dead = item.get("recent_dead_replicas") or []
    logs = [replica.get("log_file_path") for replica in [*replicas, *dead]]
    return DeploymentState(
        name=name,
        status=str(item.get("status", "")),
        message=_plain(item.get("message")),
        running=sum(replica.get("state") == "RUNNING" for replica in replicas),
        target=int(item.get("target_num_replicas") or 0),
        log_files=tuple(str(path) for path in logs if path),
    )


def _plain(message: Any) -> str:
    return _ANSI.sub("", message or "").strip()


def _cause(message: str) -> str:
    """Of a message with a traceback the exception itself, which may span lines."""
    lines = message.splitlines()
    if "Traceback (most recent call last):" not in message:
        return message
    start = max(index for index, line in enumerate(lines) if line.startswith("  "))
    return "\n".join(lines[start + 1 :]).strip() or message
