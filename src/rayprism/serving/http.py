"""The HTTP side of a model's replica: the Open Inference Protocol over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayprism.errors import RequestError, Unsupported
from rayprism.protocol import openapi as documentation
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.metadata import (
    ServedModel,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    repository_index,
    server_metadata,
)
from rayprism.serving.asgi import (
    AsgiApp,
    ClientLeft,
    Headers,
    Receive,
    Scope,
    Send,
    header_length,
    inflate_body,
    read_body,
    relative_path,
    send_body,
    send_html,
    send_json,
    send_method_not_allowed,
    unknown_path,
)
from rayprism.serving.direct import DirectCall, Reply, is_plain
from rayprism.serving.forward_http import forward_request, most_seconds, offer_copy, send_answer
from rayprism.serving.service import ModelService
from rayprism.serving.traffic import (
    FORWARDED_HEADER,
    VERSION_HEADER,
    Target,
    source_of,
)
from rayprism.telemetry.records import RequestRecord

__all__ = ["NO_LOADING", "Endpoint", "ModelApp", "parse_path", "server_document", "wrong_method"]

_MODEL_OPERATIONS = frozenset(
    {"", "infer", "ready", "config", "stats", "traffic", "docs", "openapi.json"}
)
_SERVER_PATHS = {
    "": "server",
    "health/live": "live",
    "health/ready": "server-ready",
    "models/stats": "stats",
    "repository/index": "index",
    "docs": "docs",
    "openapi.json": "openapi.json",
}
_POST_ONLY = frozenset({"infer", "index", "load"})
NO_LOADING = "models are loaded and unloaded by `serve deploy`, not by clients of the protocol"
_VERSION = VERSION_HEADER.encode()
_FORWARDED = FORWARDED_HEADER.encode()
_MAX_KNOWN_PATHS = 64
"""Parsed paths that are remembered; clients could write any number of slashes at the end."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a path means.

    Args:
        operation: `infer`, `ready`, `config`, ...
        model: The model that the path names; None where it is implied by the mount point.
        version: Likewise.
    """

    operation: str
    model: str | None = None
    version: str | None = None


def parse_path(path: str) -> Endpoint | None:
    """What a path below the mount point means; None where it means nothing.

    A model's application is usually mounted at `/v2/models/<model>`, and sees `/infer` or
    `/versions/<version>/infer`. Mounted at `/` it sees whole paths of the protocol.
    """
    path = path.rstrip("/")
    if path == "/v2" or path.startswith("/v2/"):
        rest = path[4:]
        operation = _SERVER_PATHS.get(rest)
        if operation is not None:
            return Endpoint(operation)
        if rest.startswith("repository/models/"):
            return Endpoint("load")
        if not rest.startswith("models/"):
            return None
        model, _, rest = rest[len("models/") :].partition("/")
        return _parse_model_path(rest, model) if model else None
    if path and not path.startswith("/"):
        return None
    return _parse_model_path(path[1:], None)


def _parse_model_path(rest: str, model: str | None) -> Endpoint | None:
    version: str | None = None
    if rest.startswith("versions/"):
        version, _, rest = rest[len("versions/") :].partition("/")
        if not version:
            return None
    if rest not in _MODEL_OPERATIONS:
        return None
    return Endpoint(rest or "model", model, version)


def wrong_method(endpoint: Endpoint, method: str) -> str | None:
    """The method that an endpoint takes, where a request came with another one."""
    if endpoint.operation in _POST_ONLY:
        return None if method == "POST" else "POST"
    return None if method in ("GET", "HEAD") else "GET"


def server_document(operation: str) -> Any:
    """The document of what depends on no model; None where there is none.

    Raises:
        Unsupported: Clients asked to load or unload a model.
    """
    if operation == "server":
        return server_metadata()
    if operation == "live":
        return {"live": True}
    if operation == "load":
        raise Unsupported(NO_LOADING)
    return None


class ModelApp(AsgiApp):
    """An ASGI application for one loaded model version.

    Args:
        service: The version.
    """

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._endpoints: dict[str, Endpoint] = {}
        self.signature = ((_VERSION, service.version.encode()),)
        self._own_route = f"/versions/{service.version}"
        self._own_infer = f"{self._own_route}/infer"

    @property
    def max_body_bytes(self) -> int:
        """Longer bodies are refused."""
        return self._service.config.max_body_bytes

    def infer_paths(self, prefix: str) -> tuple[str, ...]:
        """The paths of inference requests, where the application is mounted at a prefix."""
        model = f"/v2/models/{self._service.model_name}"
        return tuple(
            f"{prefix}{named}{version}/infer"
            for named in ("", model)
            for version in ("", self._own_route)
        )

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str
    ) -> None:
        """Answers one request."""
        endpoint = self._endpoint(relative_path(scope))
        if endpoint.operation == "infer" and scope["method"] == "POST":
            await self._infer(scope, receive, send, headers, request_id, endpoint)
            return
        allowed = wrong_method(endpoint, scope["method"])
        if allowed:
            method, path = scope["method"], scope["path"]
            await send_method_not_allowed(send, method, path, allowed, self.signature)
        elif endpoint.operation == "docs":
            beside = "../" if scope["path"].endswith("/") else ""
            await send_html(send, documentation.docs_page(f"{beside}openapi.json"))
        else:
            await send_json(send, self._document(endpoint.operation), extra=self.signature)

    def infer_now(
        self,
        path: str,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | memoryview,
        request_id: str,
        reply: Reply,
    ) -> Callable[[], None] | None:
        """Answers a plain inference request without a task, where nothing has to be awaited.

        Args:
            path: One of `infer_paths`.
            headers: Of the request.
            body: The whole of it.
            request_id: For the log.
            reply: Called once with the answer, but not before this returns.

        Returns:
            What takes the request back when its client leaves; None where the request is not as
            plain as that: then nothing has been done.
        """
        service, found = self._service, dict(headers)
        if not is_plain(service, found):
            return None
        record = self._begin(found, request_id)
        call = DirectCall(service, self.signature, headers, found, body, record, reply)
        call.begin(names_version=path.endswith(self._own_infer))
        return call.cancel

    async def _infer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Headers,
        request_id: str,
        endpoint: Endpoint,
    ) -> None:
        record = self._begin(headers, request_id)
        try:
            await self._answer_infer(scope, receive, send, headers, endpoint, record)
        except RequestError as error:
            record.reason = error.code
            raise
        except (ClientLeft, asyncio.CancelledError):
            record.reason = "cancelled"
            raise
        except Exception:
            record.reason = "internal"
            raise
        finally:
            self._service.telemetry.finish(record)

    def _begin(self, headers: Headers, request_id: str) -> RequestRecord:
        service = self._service
        forwarded = headers.get(_FORWARDED)
        source = source_of(None if forwarded is None else forwarded.decode("latin-1"))
        parent = state = None
        if service.telemetry.tracer is not None:
            parent, state = headers.get(b"traceparent"), headers.get(b"tracestate")
        return service.telemetry.begin(
            "http",
            source,
            request_id,
            service.now_s(),
            None if parent is None else parent.decode("latin-1"),
            None if state is None else state.decode("latin-1"),
        )

    async def _answer_infer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Headers,
        endpoint: Endpoint,
        record: RequestRecord,
    ) -> None:
        service = self._service
        request_id = record.request_id
        limit_bytes = service.config.max_body_bytes
        sent = await read_body(receive, headers, limit_bytes)
        record.began_s = arrival_s = service.now_s()
        most_s = most_seconds(headers)
        if service.traffic.is_split or _VERSION in headers:
            target = self._target(scope, endpoint, headers)
            if target is not None:
                answer = await forward_request(
                    service, target, scope["headers"], headers, sent, most_s, record
                )
                if answer is not None:
                    await send_answer(send, answer)
                    return
        body = await inflate_body(sent, headers, limit_bytes)
        request = decode_infer_request(body, header_length(headers))
        outputs = await service.infer(
            request, request_id, arrival_s=arrival_s, most_s=most_s, record=record
        )
        answer_body, json_length = encode_infer_response(
            service.model_name, service.version, request, outputs
        )
        await send_body(send, answer_body, headers, json_length=json_length, extra=self.signature)
        if service.shadows.is_on and _FORWARDED not in headers:
            offer_copy(service, scope["headers"], sent, record, request, outputs)

    def _target(self, scope: Scope, endpoint: Endpoint, headers: Headers) -> Target | None:
        if _FORWARDED in headers or endpoint.version is not None:
            return None
        if scope.get("root_path", "").endswith(self._own_route):
            return None  # this version's own address: whoever comes there means it
        traffic = self._service.traffic
        wanted = headers.get(_VERSION)
        key = traffic.sticky_key(headers)
        return traffic.target(None if wanted is None else wanted.decode("latin-1"), key)

    def _endpoint(self, path: str) -> Endpoint:
        known = self._endpoints.get(path)
        if known is not None:
            return known
        endpoint = parse_path(path)
        if endpoint is None:
            raise unknown_path(path)
        self._service.check_target(endpoint.model, endpoint.version)
        if len(self._endpoints) < _MAX_KNOWN_PATHS:
            self._endpoints[path] = endpoint
        return endpoint

    def _config(self, model: ServedModel) -> Any:
        service = self._service
        # Triton's place for whatever else there is to say of a model.
        said = {
            "device": service.device,
            "execution": str(service.scheduler.place),
            # What `batch/parity.py` compares with that of a job's output.
            "digest": service.manifest.digest,
        }
        if service.config_error is not None:
            said["user_config_error"] = service.config_error
        parameters = {name: {"string_value": value} for name, value in said.items()}
        return {**model_config(model), "parameters": parameters}

    def _document(self, operation: str) -> Any:
        known = server_document(operation)
        if known is not None:
            return known
        if operation == "server-ready":
            return {"ready": True}
        service = self._service
        model = service.served_model()
        if operation == "model":
            return model_metadata(model)
        if operation == "ready":
            return model_ready(model)
        if operation == "config":
            return self._config(model)
        if operation == "stats":
            return model_statistics([(model, service.statistics.snapshot())])
        if operation == "traffic":
            return {**service.traffic.document(), "shadows": service.shadows.document()}
        if operation == "index":
            return repository_index([(model, "READY", service.config_error or "")])
        if operation == "openapi.json":
            return documentation.openapi_document([model])
        raise unknown_path(operation)
