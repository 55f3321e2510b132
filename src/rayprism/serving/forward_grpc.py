"""gRPC requests that go to another version, as they came, and what counts as an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio

from rayprism.core.tensors import Tensors
from rayprism.protocol import grpc as codec
from rayprism.serving.links import Link, Links
from rayprism.serving.shadows import Copy, Reply, keep_copy
from rayprism.serving.traffic import (
    FORWARDED_HEADER,
    SHADOW_MARK,
    TIMEOUT_HEADER,
    VERSION_HEADER,
    NoAnswer,
    Target,
)

__all__ = ["GrpcAnswer", "GrpcCall", "grpc_shadow_copy"]

_REPLACED = frozenset(
    {
        VERSION_HEADER,
        TIMEOUT_HEADER,
        FORWARDED_HEADER,
        "application",
        "request_id",
        "user-agent",
        "te",
        "content-type",
    }
)
_CONTEXT = frozenset(("traceparent", "tracestate"))
_REASONS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "late",
    grpc.StatusCode.NOT_FOUND: "gone",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "overloaded",
    grpc.StatusCode.UNAVAILABLE: "unreachable",
    grpc.StatusCode.CANCELLED: "unreachable",
    grpc.StatusCode.INTERNAL: "error",
    grpc.StatusCode.UNKNOWN: "error",
    grpc.StatusCode.DATA_LOSS: "error",
    grpc.StatusCode.ABORTED: "error",
}

Context = Sequence[tuple[str, str]]


class GrpcAnswer:
    """Another version's answer, to be given to the client as it came.

    Args:
        data: The encoded message.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802  what Ray calls on every answer
        """The encoded message."""
        return self._data


class GrpcCall:
    """One request, to be sent on.

    Args:
        request: The message.
        metadata: As it came.
        request_id: Of the request; the other version logs the same.
        sender: The version that sends it on.
        target: The version that is to answer.
        context: W3C trace context, sent in the place of the client's; empty: that goes on.
    """

    __slots__ = ("_context", "_metadata", "_request", "_request_id", "_sender", "_target")

    def __init__(
        self,
        request: Any,
        metadata: Iterable[tuple[str, str]],
        request_id: str,
        sender: str,
        target: Target,
        context: Context = (),
    ) -> None:
        self._context = context
        self._request = request
        self._metadata = metadata
        self._request_id = request_id
        self._sender = sender
        self._target = target

    async def deliver(self, budget_s: float, links: Links, link: Link) -> GrpcAnswer:
        """Sends it.

        Raises:
            NoAnswer: It is not answered, or not by the version that is meant, or (unless the client
                named the version) with an error.
            grpc.aio.AioRpcError: The version that the client named gave this error.
        """
        metadata = _with_context(self._metadata, self._context)
        metadata = _metadata(metadata, link, self._request_id, self._sender, budget_s)
        data = self._request.SerializeToString()
        return GrpcAnswer(
            await _infer(links, data, metadata, budget_s, self._target.version, self._target.named)
        )


def _with_context(metadata: Iterable[tuple[str, str]], context: Context) -> list[tuple[str, str]]:
    """The metadata, with another trace context than the client's where there is one."""
    if not context:
        return list(metadata)
    return [*(item for item in metadata if item[0] not in _CONTEXT), *context]


def _metadata(
    metadata: Iterable[tuple[str, str]], link: Link, request_id: str, sender: str, budget_s: float
) -> list[tuple[str, str]]:
    kept = [
        (key, value)
        for key, value in metadata
        if key not in _REPLACED and not key.startswith(("grpc-", ":"))
    ]
    return [
        *kept,
        ("application", link.application),
        ("request_id", request_id),
        (FORWARDED_HEADER, sender),
        (TIMEOUT_HEADER, f"{budget_s:.6f}"),
    ]


async def _infer(
    links: Links,
    data: bytes,
    metadata: list[tuple[str, str]],
    budget_s: float,
    version: int,
    named: bool,
) -> bytes:
    forwarder = links.grpc
    if forwarder is None:
        raise NoAnswer("unreachable")
    if forwarder.is_busy:
        raise NoAnswer("busy")
    try:
        answer, trailing = await forwarder.infer(data, metadata, budget_s)
    except grpc.aio.AioRpcError as error:
        if (VERSION_HEADER, str(version)) not in tuple(error.trailing_metadata() or ()):
            # Of a proxy that cannot reach the version, or of another version.
            raise NoAnswer(_REASONS.get(error.code(), "refused")) from None
        if named:
            raise
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise NoAnswer("not_ready") from None
        raise NoAnswer(_REASONS.get(error.code(), "refused")) from None
    except Exception:
        # gRPC's own classes for what it cannot send are private. What remains is the metadata.
        raise NoAnswer("refused") from None
    if trailing.get(VERSION_HEADER) != str(version):
        raise NoAnswer("wrong_version")
    return answer


def grpc_shadow_copy(
    request: Any,
    metadata: Iterable[tuple[str, str]],
    request_id: str,
    sender: str,
    outputs: Tensors,
    timeout_s: float,
    context: Context = (),
) -> Copy:
    """A copy of a request that was answered here.

    Args:
        request: The message.
        metadata: As it came.
        request_id: Of the request.
        sender: The version that answered it.
        outputs: Its answer.
        timeout_s: How long the shadow may take.
        context: As for `GrpcCall`.
    """
    # The client may have named this version in the message; the shadow is another one.
    if request.model_version:
        message = codec.ModelInferRequest()
        message.CopyFrom(request)
        message.model_version = ""
        request = message
    data = request.SerializeToString()

    async def deliver(version: int, links: Links, link: Link) -> Reply:
        mark = sender + SHADOW_MARK
        kept = _with_context(metadata, context)
        sent = _metadata(kept, link, f"{request_id}-shadow", mark, timeout_s)
        answer = await _infer(links, data, sent, timeout_s, version, named=False)
        return Reply(len(answer), partial(_decode, answer))

    return keep_copy(len(data), outputs, deliver)


def _decode(answer: bytes) -> Tensors:
    return codec.decode_infer_response_grpc(codec.parse_infer_response(answer)).outputs
