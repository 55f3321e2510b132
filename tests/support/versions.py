"""Versions of one model behind a proxy on real ports, without Ray: who gets split traffic."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import httpx
import uvicorn

from rayprism.models.loader import load_model
from rayprism.models.repository import ModelVersion
from rayprism.protocol import grpc as codec
from rayprism.serving.http import ModelApp
from rayprism.serving.links import Links
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig, parse_user_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving.grpc import GrpcMethods

NODE = "here"
Headers = dict[bytes, bytes]


def application(model: str, version: int, route: str | None, **fields: Any) -> dict[str, Any]:
    """What Serve's controller says of one application."""
    config = {
        "import_path": "rayprism.serving.app:build",
        "args": {"model": model, "version": version, "repository": "/models"},
    }
    return {"deployed_app_config": config, "route_prefix": route, "status": "RUNNING"} | fields


@dataclass
class Call:
    """One request that reached the proxy."""

    version: int
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    metadata: dict[str, Any] = field(default_factory=dict)
    message: Any = None


class Proxy:
    """Serve's proxy: sends requests on to versions, and records them.

    `stand_ins` answer in place of a version: ASGI applications, or RPC methods under the key
    `(version, "grpc")`.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.members: dict[int, Member] = {}
        self.stand_ins: dict[Any, Callable[..., Awaitable[Any]]] = {}
        self.deployed: set[int] = set()
        """What the controller knows of."""
        self.calls: list[Call] = []
        self.asked = 0
        self.http_port = 0
        self.grpc_port: int | None = None

    def details(self) -> dict[str, Any]:
        """What the controller says."""
        self.asked += 1
        applications = {
            f"{self.model}-{version}": application(self.model, version, self.route(version))
            for version in self.deployed
        }
        functions = [] if self.grpc_port is None else ["add_servicer"]
        return {
            "http_options": {"host": "127.0.0.1", "port": self.http_port},
            "grpc_options": {"port": self.grpc_port, "grpc_servicer_functions": functions},
            "proxies": {NODE: {"node_ip": "127.0.0.1", "status": "HEALTHY"}},
            "applications": applications,
        }

    def route(self, version: int) -> str:
        return f"/v2/models/{self.model}/versions/{version}"

    def versions(self) -> list[int]:
        """Which versions got requests, in their order."""
        return [call.version for call in self.calls]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        version = int(scope["path"].partition("/versions/")[2].partition("/")[0])
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.calls.append(Call(version, dict(scope["headers"]), body))
        sent = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return sent.pop() if sent else await receive()

        app = self.stand_ins.get(version)
        if app is None and version in self.members:
            app = self.members[version].app
        await (app or answer(404, b"<html>no such route</html>"))(scope, replay, send)

    async def infer(self, request: Any, context: Any) -> Any:
        """The RPC."""
        metadata = dict(context.invocation_metadata())
        version = int(metadata["application"].rpartition("-")[2])
        self.calls.append(Call(version, metadata=metadata, message=request))
        method = self.stand_ins.get((version, "grpc"))
        if method is None and version in self.members:
            method = self.members[version].methods.ModelInfer
        if method is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such application")
        assert method is not None
        return await method(request, _Context(context, metadata))


class _Context:
    """What Ray's context has beyond gRPC's own."""

    def __init__(self, context: Any, metadata: dict[str, Any]) -> None:
        self._context = context
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def request_id(self) -> str | None:
        return self._metadata.get("request_id")


@dataclass
class Member:
    """One version, called in process: what comes to it is what its own address gets."""

    service: ModelService
    app: ModelApp
    methods: GrpcMethods
    client: httpx.AsyncClient
    links: Links

    def traffic(self) -> dict[str, Any]:
        """What became of the requests."""
        return {**self.service.traffic.document(), "shadows": self.service.shadows.document()}

    def candidate(self, version: int) -> dict[str, Any]:
        found: dict[str, Any] = self.traffic()["candidates"][str(version)]
        return found

    def shadow(self, version: int) -> dict[str, Any]:
        found: dict[str, Any] = self.traffic()["shadows"][str(version)]
        return found

    def draws(self, *values: float) -> None:
        """What the next draws of the split give."""
        drawn = iter(values)
        self.service.traffic._draw = lambda: next(drawn)


@asynccontextmanager
async def fleet(
    versions: Iterable[ModelVersion], *, rpcs: bool = False, **configs: Any
) -> AsyncIterator[tuple[Member, Proxy]]:
    """The first version, and the proxy through which it reaches the others.

    Args:
        versions: Of one model.
        rpcs: Whether the proxy has a port for gRPC.
        configs: `user_config` by version: `v1`, `v2`, ...; `v1` is the first one's.
    """
    versions = list(versions)
    proxy = Proxy(versions[0].manifest.model)
    proxy.deployed = {version.manifest.version for version in versions}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_http(proxy))
        if rpcs:
            await stack.enter_async_context(_grpc(proxy))
        for version in versions:
            number = version.manifest.version
            config = parse_user_config(configs.get(f"v{number}"))
            proxy.members[number] = await stack.enter_async_context(_member(version, proxy, config))
        yield proxy.members[versions[0].manifest.version], proxy


@asynccontextmanager
async def _member(version: ModelVersion, proxy: Proxy, config: UserConfig) -> AsyncIterator[Member]:
    model = await asyncio.to_thread(load_model, version, allow_code=True)
    links = Links(proxy.model, proxy.details, NODE)
    service = ModelService(model, config, links)
    app, methods = ModelApp(service), GrpcMethods()
    methods.service = service
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Member(service, app, methods, client, links)
    await service.close()


@asynccontextmanager
async def _http(proxy: Proxy) -> AsyncIterator[None]:
    config = uvicorn.Config(
        proxy,
        host="127.0.0.1",
        port=0,
        log_level="critical",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    web = uvicorn.Server(config)
    serving = asyncio.create_task(web.serve())
    while not web.started:
        await asyncio.sleep(0.001)
    proxy.http_port = web.servers[0].sockets[0].getsockname()[1]
    try:
        yield
    finally:
        web.should_exit = True
        await serving


@asynccontextmanager
async def _grpc(proxy: Proxy) -> AsyncIterator[None]:
    server = grpc.aio.server()

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                proxy.infer,
                request_deserializer=codec.ModelInferRequest.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )

    server.add_generic_rpc_handlers((Handler(),))
    proxy.grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def answer(status: int, body: bytes = b"", **headers: str) -> Callable[..., Awaitable[None]]:
    """An ASGI application that always gives this answer."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", b"%d" % len(body)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    return app


class Hanging:
    """Stands for a version that takes requests and never answers, over HTTP or gRPC."""

    def __init__(self) -> None:
        self.entered = 0
        self.left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.entered += 1
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left += 1

    async def infer(self, request: Any, context: Any) -> Any:
        self.entered += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1
