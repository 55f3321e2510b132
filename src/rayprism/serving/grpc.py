"""The gRPC side of a replica: `inference.GRPCInferenceService` as methods of the ingress class.

Ray Serve calls the method of the ingress class that is named like the RPC. An error is put on the
context and an empty answer returned: an exception would reach the client alike, but Ray would
write a stack trace into the log for each mistake of a client.
"""

# ruff: noqa: N802  the methods have the names of the RPCs

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from ray.serve.context import _get_serve_request_context

from rayprism.errors import Overloaded, RequestError, Unsupported
from rayprism.protocol import grpc as codec
from rayprism.protocol.status import grpc_status, public_message, retry_after_header
from rayprism.serving.http import NO_LOADING
from rayprism.serving.service import ModelService

__all__ = ["GrpcMethods", "ServerMethods", "rpc"]

logger = logging.getLogger("ray.serve.rayprism")
_Method = Callable[[Any, Any, Any], Awaitable[Any]]


def rpc(method: _Method) -> _Method:
    """Turns what a method raises into a status of the RPC."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, grpc_context: Any) -> Any:
        try:
            return await method(self, request, grpc_context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _fail(grpc_context, error)
            return codec.ModelInferResponse()  # empty on the wire, whatever the RPC answers

    return answer


def _fail(grpc_context: Any, error: Exception) -> None:
    if not isinstance(error, RequestError):
        logger.error("Request %s met an unexpected error.", _request_id(), exc_info=error)
        error = RequestError(
            f"unexpected error; the log of the replica has it under request id {_request_id()}"
        )
    grpc_context.set_code(getattr(grpc.StatusCode, grpc_status(error)))
    grpc_context.set_details(public_message(error))
    if isinstance(error, Overloaded):
        grpc_context.set_trailing_metadata([("retry-after", str(retry_after_header(error)))])


def _request_id() -> str:
    return str(_get_serve_request_context().request_id)


class ServerMethods:
    """The RPCs that belong to no model, and refusals of those that rayprism does not offer."""

    @rpc
    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:
        """The process answers."""
        return codec.ServerLiveResponse(live=True)

    @rpc
    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:
        """What is served here is loaded."""
        return codec.ServerReadyResponse(ready=True)

    @rpc
    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:
        """Name, version and extensions."""
        return codec.server_metadata_grpc()

    async def ModelStreamInfer(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Not offered."""
        _fail(grpc_context, Unsupported("rayprism does not offer streams; use ModelInfer"))
        return
        yield  # makes it a generator, which Ray wants for a stream

    @rpc
    async def RepositoryModelLoad(self, request: Any, grpc_context: Any) -> Any:
        """Not offered."""
        raise Unsupported(NO_LOADING)

    @rpc
    async def RepositoryModelUnload(self, request: Any, grpc_context: Any) -> Any:
        """Not offered."""
        raise Unsupported(NO_LOADING)


class GrpcMethods(ServerMethods):
    """The RPCs of one loaded version. The replica sets `service`."""

    service: ModelService

    @rpc
    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:
        """Whether the version is ready: it is, or this replica would not be reached."""
        self.service.check_target(request.name or None, request.version)
        return codec.ModelReadyResponse(ready=True)

    @rpc
    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:
        """Inputs and outputs."""
        self.service.check_target(request.name or None, request.version)
        return codec.model_metadata_grpc(self.service.served_model())

    @rpc
    async def ModelConfig(self, request: Any, grpc_context: Any) -> Any:
        """Triton's model configuration."""
        self.service.check_target(request.name or None, request.version)
        return codec.model_config_grpc(self.service.served_model())

    @rpc
    async def ModelStatistics(self, request: Any, grpc_context: Any) -> Any:
        """Counts of this replica."""
        service = self.service
        service.check_target(request.name or None, request.version)
        return codec.model_statistics_grpc(
            [(service.served_model(), service.statistics.snapshot())]
        )

    @rpc
    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:
        """The one version that is served here."""
        service = self.service
        return codec.repository_index_grpc(
            [(service.served_model(), "READY", service.config_error or "")],
            ready_only=request.ready,
        )

    @rpc
    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:
        """Inference."""
        service = self.service
        service.check_target(request.model_name or None, request.model_version)
        decoded = codec.decode_infer_request_grpc(request)
        outputs = await service.infer(decoded, grpc_context.request_id() or _request_id())
        return codec.encode_infer_response_grpc(
            service.model_name, service.version, decoded, outputs
        )
