"""`import_path: rayprism.serving.front:build` makes the front door of a fleet.

Models are reached at their own routes, straight from the proxy. The front door takes what belongs
to no model: the server's metadata, health and index, the documentation, and good errors for models
that are not there.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve import Application

from rayprism.errors import (
    ConfigInvalid,
    Fault,
    NotFound,
    RequestError,
    SetupError,
    Unsupported,
)
from rayprism.models.repository import Repository
from rayprism.protocol import grpc as codec
from rayprism.protocol import openapi as documentation
from rayprism.protocol.metadata import ModelState, ServedModel, repository_index
from rayprism.serving.asgi import (
    AsgiApp,
    Headers,
    Receive,
    Scope,
    Send,
    relative_path,
    send_html,
    send_json,
    send_method_not_allowed,
    unknown_path,
)
from rayprism.serving.controller import ask_controller
from rayprism.serving.fleet_view import FleetView, ModelApplication, explain_missing
from rayprism.serving.grpc import ServerMethods, rpc
from rayprism.serving.http import Endpoint, parse_path, server_document, wrong_method
from rayprism.serving.service import served_model

__all__ = ["FrontApp", "FrontDoor", "build"]


class FrontApp(AsgiApp):
    """An ASGI application for what belongs to no single model.

    Args:
        fleet: What is served.
    """

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet
        self._models: dict[tuple[str, str, int], ServedModel] = {}

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str
    ) -> None:
        """Answers one request."""
        path, method = relative_path(scope), scope["method"]
        root = scope.get("root_path", "")
        # Mounted at `/v2`, its own root is the protocol's path of the server's metadata.
        at_root = path in ("", "/") and not root.endswith("/v2")
        endpoint = Endpoint("docs") if at_root else parse_path(_below_v2(path))
        if endpoint is None:
            raise unknown_path(scope["path"])
        if endpoint.model is not None:
            applications = await self._fleet.applications()
            raise explain_missing(applications, endpoint.model, endpoint.version)
        allowed = wrong_method(endpoint, method)
        if allowed:
            await send_method_not_allowed(send, method, scope["path"], allowed)
        elif endpoint.operation == "docs":
            url = f"{root.removesuffix('/v2')}/v2/openapi.json"
            await send_html(send, documentation.docs_page(url))
        elif endpoint.operation == "server-ready":
            waiting = not_ready(await self._fleet.applications())
            document: dict[str, Any] = {"ready": not waiting}
            if waiting:
                document["waiting_for"] = waiting
            await send_json(send, document, status=503 if waiting else 200)
        else:
            await send_json(send, await self._document(endpoint.operation))

    async def _document(self, operation: str) -> Any:
        # First what needs no controller: whether this process lives does not depend on one.
        known = server_document(operation)
        if known is not None:
            return known
        applications = await self._fleet.applications()
        if operation == "index":
            return repository_index(index_of(applications))
        if operation == "openapi.json":
            served = await asyncio.to_thread(self._served, applications)
            return documentation.openapi_document(served)
        names = ", ".join(sorted({app.args.model for app in applications})) or "none"
        raise Unsupported(
            f"statistics are kept by each model: GET /v2/models/<model>/stats. Served: {names}"
        )

    def _served(self, applications: list[ModelApplication]) -> list[ServedModel]:
        """The manifests' side of it; a version never changes, so it is read once."""
        found = []
        for application in applications:
            args = application.args
            try:
                root = args.repository_path()
                key = (str(root), args.model, args.version)
                if key not in self._models:
                    manifest = Repository(root).version(args.model, args.version).manifest
                    self._models[key] = served_model(manifest)
                found.append(self._models[key])
            except SetupError:
                continue  # its own application says what is wrong with it
        return found


def _below_v2(path: str) -> str:
    """The whole path of the protocol, also where the front door is mounted at `/v2` itself."""
    return path if path == "/v2" or path.startswith("/v2/") else f"/v2{path}"


def not_ready(applications: list[ModelApplication]) -> list[str]:
    """Applications that do not serve yet, or not any more."""
    return [app.application for app in applications if app.state != "READY"]


def matching(
    applications: list[ModelApplication], model: str, version: str
) -> list[ModelApplication]:
    """The applications that serve a model; an empty version means any."""
    return [
        app
        for app in applications
        if app.args.model == model and version in ("", str(app.args.version))
    ]


def index_of(
    applications: list[ModelApplication],
) -> list[tuple[ServedModel, ModelState, str]]:
    """What the repository index lists: what is deployed, not what lies in the repository."""
    return [
        (ServedModel(app.args.model, str(app.args.version), (), ()), app.state, app.message)
        for app in applications
    ]


class FrontDoor(ServerMethods):
    """The replica of the front door: HTTP by its ASGI application, gRPC by its methods."""

    def __init__(self) -> None:
        self._fleet = FleetView(ask_controller)

    def __serve_build_asgi_app__(self) -> FrontApp:
        """Called by Serve once the replica is constructed."""
        return FrontApp(self._fleet)

    @rpc
    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Whether every deployed version is ready."""
        return codec.ServerReadyResponse(ready=not not_ready(await self._fleet.applications()))

    @rpc
    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """What is deployed."""
        return codec.repository_index_grpc(
            index_of(await self._fleet.applications()), ready_only=request.ready
        )

    @rpc
    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Only says where the model is: Serve routes gRPC by metadata, not by the model's name."""
        raise await self._misrouted(request.model_name, request.model_version)

    @rpc
    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Whether a version is ready, wherever it is served."""
        found = matching(await self._fleet.applications(), request.name, request.version)
        return codec.ModelReadyResponse(ready=any(app.state == "READY" for app in found))

    @rpc
    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Only says where the model is."""
        raise await self._misrouted(request.name, request.version)

    @rpc
    async def ModelConfig(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Only says where the model is."""
        raise await self._misrouted(request.name, request.version)

    @rpc
    async def ModelStatistics(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Only says where the model is."""
        raise await self._misrouted(request.name, request.version)

    async def _misrouted(self, model: str, version: str) -> RequestError:
        applications = await self._fleet.applications()
        found = matching(applications, model, version)
        if not found:
            return explain_missing(applications, model, version or None)
        return NotFound(
            f"model {model!r} is served by the application {found[0].application!r}: send it as "
            f"gRPC metadata, application={found[0].application}"
        )


_Deployment = serve.deployment(
    name="front",
    max_ongoing_requests=1024,
    max_surge_percent=100,
    # It answers from memory; a whole CPU would only keep models from getting one.
    ray_actor_options={"num_cpus": 0.1},
)(serve.ingress()(FrontDoor))


def build(args: dict[str, Any]) -> Application:
    """The application of the front door. It takes no `args`.

    Raises:
        ConfigInvalid: There are some.
    """
    if args:
        raise ConfigInvalid(
            "args", [Fault(name, "unknown key; the front door takes none") for name in args]
        )
    return _Deployment.bind()
