"""A model version behind real HTTP and gRPC ports, without Ray: what the clients talk to."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn

from rayprism.models.loader import load_model
from rayprism.models.repository import ModelVersion
from rayprism.protocol.grpc import add_GRPCInferenceServiceServicer_to_server
from rayprism.serving.http import ModelApp
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving.grpc import GrpcMethods


class _Context:
    """What Ray's context has beyond gRPC's own."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def request_id(self) -> str:
        return "local"


class _Methods(GrpcMethods):
    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802 - the RPC
        return await super().ModelInfer(request, _Context(grpc_context))


@dataclass
class Server:
    """Where it listens."""

    url: str = ""
    grpc_url: str = ""


@contextmanager
def serve_version(version: ModelVersion, *, allow_code: bool = False) -> Iterator[Server]:
    """Serves a version from a thread of its own."""
    server = Server()
    started, stop = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_serve(version, allow_code, server, started, stop))
        except BaseException as error:
            failure.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(60)
    try:
        if failure:
            raise failure[0]
        yield server
    finally:
        stop.set()
        thread.join(30)


async def _serve(
    version: ModelVersion,
    allow_code: bool,
    server: Server,
    started: threading.Event,
    stop: threading.Event,
) -> None:
    service = ModelService(load_model(version, allow_code=allow_code), UserConfig())
    methods = _Methods()
    methods.service = service
    rpcs = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(methods, rpcs)
    server.grpc_url = f"127.0.0.1:{rpcs.add_insecure_port('127.0.0.1:0')}"
    await rpcs.start()
    web = uvicorn.Server(
        uvicorn.Config(
            ModelApp(service),
            host="127.0.0.1",
            port=0,
            log_level="warning",
            lifespan="off",
            ws="none",
        )
    )
    serving = asyncio.create_task(web.serve())
    while not web.started:
        await asyncio.sleep(0.01)
    port = web.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    started.set()
    await asyncio.to_thread(stop.wait)
    web.should_exit = True
    await serving
    await rpcs.stop(None)
    await service.close()
