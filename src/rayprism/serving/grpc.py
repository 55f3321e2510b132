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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from ray.serve.context import _get_serve_request_context

from rayprism.errors import Overloaded, RequestError, Unsupported
from rayprism.protocol import grpc as codec
from rayprism.protocol.status import (
    code_of_grpc,
    grpc_status,
    public_message,
    retry_after_header,
)
from rayprism.serving.forward_grpc import GrpcAnswer, GrpcCall, grpc_shadow_copy
from rayprism.serving.http import NO_LOADING
from rayprism.serving.service import ModelService
from rayprism.serving.traffic import (
    FORWARDED_HEADER,
    TIMEOUT_HEADER,
    VERSION_HEADER,
    Target,
    parse_timeout,
    source_of,
)
from rayprism.telemetry.records import RequestRecord

__all__ = ["GrpcMethods", "ServerMethods", "rpc"]

_DAY_S = 86_400.0
_RETURNED = frozenset({VERSION_HEADER, "retry-after"})
"""Trailing metadata of another version's error that its client gets."""

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
    if isinstance(error, grpc.aio.AioRpcError):
        # Of the version that the client named: its answer is this one.
        grpc_context.set_code(error.code())
        grpc_context.set_details(error.details() or "")
        trailing = error.trailing_metadata() or ()
        grpc_context.set_trailing_metadata([item for item in trailing if item[0] in _RETURNED])
        return
    if not isinstance(error, RequestError):
        logger.error("Request %s met an unexpected error.", _request_id(), exc_info=error)
        error = RequestError(
            f"unexpected error; the log of the replica has it under request id {_request_id()}"
        )
    grpc_context.set_code(getattr(grpc.StatusCode, grpc_status(error)))
    grpc_context.set_details(public_message(error))
    if isinstance(error, Overloaded):
        retry_after = ("retry-after", str(retry_after_header(error)))
        grpc_context.set_trailing_metadata([*grpc_context.trailing_metadata(), retry_after])


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
        """Inference, here or by the version that the request belongs to."""
        service = self.service
        began_s = service.now_s()
        metadata = grpc_context.invocation_metadata()
        said = dict(metadata)
        request_id = grpc_context.request_id() or _request_id()
        record = service.telemetry.begin(
            "grpc",
            source_of(said.get(FORWARDED_HEADER)),
            request_id,
            began_s,
            said.get("traceparent"),
            said.get("tracestate"),
        )
        try:
            return await self._answer_infer(request, grpc_context, metadata, said, record)
        except RequestError as error:
            record.reason = error.code
            raise
        except grpc.aio.AioRpcError as error:
            # Of the version that the client named.
            record.version = record.forwarded_to
            record.reason = code_of_grpc(error.code().name)
            raise
        except asyncio.CancelledError:
            record.reason = "cancelled"
            raise
        except Exception:
            record.reason = "internal"
            raise
        finally:
            service.telemetry.finish(record)

    async def _answer_infer(
        self,
        request: Any,
        grpc_context: Any,
        metadata: Sequence[tuple[str, str]],
        said: Mapping[str, str],
        record: RequestRecord,
    ) -> Any:
        service = self.service
        arrival_s, request_id = record.began_s, record.request_id
        grpc_context.set_trailing_metadata([(VERSION_HEADER, service.version)])
        most_s = parse_timeout(said.get(TIMEOUT_HEADER))
        target = self._target(request, said)
        if target is not None:
            answer = await self._send_on(request, metadata, target, most_s, record)
            if answer is not None:
                grpc_context.set_trailing_metadata([(VERSION_HEADER, str(target.version))])
                return answer
        else:
            service.check_target(request.model_name or None, request.model_version)
        decoded = codec.decode_infer_request_grpc(request)
        outputs = await service.infer(
            decoded, request_id, arrival_s=arrival_s, most_s=most_s, record=record
        )
        answer = codec.encode_infer_response_grpc(
            service.model_name, service.version, decoded, outputs
        )
        if service.shadows.is_on and FORWARDED_HEADER not in said:
            timeout_s = min(decoded.timeout_s or _DAY_S, service.config.default_timeout_s)
            trace = record.trace
            context = trace.headers(trace.traceparent) if trace else ()
            service.shadows.offer(
                lambda: grpc_shadow_copy(
                    request, metadata, request_id, service.version, outputs, timeout_s, context
                )
            )
        return answer

    def _target(self, request: Any, said: Mapping[str, str]) -> Target | None:
        """Where a request goes; None where it is answered, or refused, here."""
        service = self.service
        if FORWARDED_HEADER in said or request.model_name not in ("", service.model_name):
            return None
        if request.model_version == service.version:
            return None
        traffic = service.traffic
        key = said.get(traffic.sticky_header) if traffic.sticky_header is not None else None
        return traffic.target(
            request.model_version or said.get(VERSION_HEADER),
            key.encode("latin-1", "replace") if isinstance(key, str) else key,
        )

    async def _send_on(
        self,
        request: Any,
        metadata: Sequence[tuple[str, str]],
        target: Target,
        most_s: float | None,
        record: RequestRecord,
    ) -> GrpcAnswer | None:
        service = self.service
        allowed_s = codec.request_timeout_s_grpc(request) or service.config.default_timeout_s
        if most_s is not None and most_s < allowed_s:
            allowed_s = most_s
        budget_s = service.traffic.budget_s(target, allowed_s)
        trace = record.trace
        context = trace.headers(trace.forward_traceparent) if trace else ()
        call = GrpcCall(request, metadata, record.request_id, service.version, target, context)
        return await service.traffic.send(target, budget_s, call.deliver, record)
