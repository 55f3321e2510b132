"""The little of HTTP that the applications share: bodies in, answers out, errors.

Raw ASGI, because on the path of a request a framework's routing and request objects cost more than
a small model takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from rayprism.errors import InvalidInput, NotFound, RequestError, TooLarge
from rayprism.protocol.compression import Encoding, choose_encoding, compress, decompress
from rayprism.protocol.status import error_body, http_status, retry_after_header

__all__ = [
    "AsgiApp",
    "ClientLeft",
    "Headers",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "answer_encoding",
    "answer_headers",
    "compressed_headers",
    "compresses_at_once",
    "error_to_tell",
    "header_length",
    "inflate_body",
    "read_body",
    "relative_path",
    "send_body",
    "send_error",
    "send_html",
    "send_json",
    "send_method_not_allowed",
    "unknown_path",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = dict[bytes, bytes]

_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_THREAD_FROM_BYTES = 64 * 1024
"""Bodies from this size are (de)compressed in a thread: zlib lets the event loop run meanwhile."""
_COMPRESS_FROM_BYTES = 1024
"""Smaller answers fit one packet anyway."""

logger = logging.getLogger("ray.serve.rayprism")


class ClientLeft(Exception):
    """The connection was closed before the body was there."""


class AsgiApp:
    """What the applications share: start-up messages, refusals, and errors as answers."""

    signature: tuple[tuple[bytes, bytes], ...] = ()
    """Headers of every error, which say who gives it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens."""
        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers: Headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        try:
            await self.answer(scope, receive, send, headers, request_id)
        except ClientLeft:
            return
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await send_error(send, error, request_id, self.signature)

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str
    ) -> None:
        """Answers one request, or raises what its answer is to be made of."""
        raise NotImplementedError


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return


def relative_path(scope: Scope) -> str:
    """The path below where the application is mounted, which ASGI calls `root_path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root):
        return path[len(root) :]
    return path


async def read_body(receive: Receive, headers: Headers, limit_bytes: int) -> bytes | memoryview:
    """Reads a whole body, as it was sent.

    Returns:
        A read-only view where the fast lane read it into memory of its own.

    Raises:
        TooLarge: It is over the limit; what is over it is not kept.
        ClientLeft: The client hung up before the end.
    """
    announced = headers.get(b"content-length")
    if announced is not None and len(announced) > 3:
        announced_bytes = _whole_number("Content-Length", announced)
        if announced_bytes > limit_bytes:
            raise _too_large(announced_bytes, limit_bytes)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientLeft
    body: bytes | memoryview = message.get("body", b"")
    if message.get("more_body", False):
        body = await _read_rest(receive, bytes(body), limit_bytes)
    elif len(body) > limit_bytes:
        raise _too_large(len(body), limit_bytes)
    return body


async def inflate_body(
    body: bytes | memoryview, headers: Headers, limit_bytes: int
) -> bytes | memoryview:
    """Inflates a body where the client compressed it.

    Raises:
        TooLarge: It is over the limit then; what is over it is not kept.
        InvalidInput: It cannot be inflated.
    """
    encoding = headers.get(b"content-encoding")
    if encoding is None:
        return body
    name = encoding.decode("latin-1")
    if len(body) < _THREAD_FROM_BYTES:
        return decompress(body, name, limit_bytes)
    return await asyncio.to_thread(decompress, body, name, limit_bytes)


async def _read_rest(receive: Receive, first: bytes, limit_bytes: int) -> bytes:
    chunks, size = [first], len(first)
    while True:
        if size > limit_bytes:
            raise _too_large(size, limit_bytes)
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        chunk: bytes = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if not message.get("more_body", False):
            if size > limit_bytes:
                raise _too_large(size, limit_bytes)
            return b"".join(chunks)


def _too_large(size_bytes: int, limit_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body has {size_bytes} bytes or more, allowed are {limit_bytes} "
        "(user_config.max_body_bytes). Send fewer rows at once"
    )


async def send_body(
    send: Send,
    body: bytes,
    request_headers: Headers,
    *,
    status: int = 200,
    json_length: int | None = None,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Sends an inference answer, compressed where the client asks for it.

    Args:
        send: ASGI's.
        body: The whole answer.
        request_headers: What the client accepts is in them.
        status: HTTP status.
        json_length: Length of the JSON before binary tensors; None where all of it is JSON.
        extra: More headers.
    """
    headers = answer_headers(json_length, extra)
    encoding = answer_encoding(body, request_headers)
    if encoding is not None:
        if compresses_at_once(body):
            body = compress(body, encoding)
        else:
            body = await asyncio.to_thread(compress, body, encoding)
        headers += compressed_headers(encoding)
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def compresses_at_once(body: bytes) -> bool:
    """Whether an answer is compressed on the event loop; larger ones are in a thread."""
    return len(body) < _THREAD_FROM_BYTES


def compressed_headers(encoding: Encoding) -> list[tuple[bytes, bytes]]:
    """What a compressed answer says of itself."""
    return [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]


def answer_headers(
    json_length: int | None, extra: tuple[tuple[bytes, bytes], ...]
) -> list[tuple[bytes, bytes]]:
    """Headers of an inference answer, but those that depend on how it is compressed.

    Args:
        json_length: Length of the JSON before binary tensors; None where all of it is JSON.
        extra: More headers.
    """
    headers = [_JSON if json_length is None else _BINARY, *extra]
    if json_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % json_length))
    return headers


def answer_encoding(body: bytes, request_headers: Headers) -> Encoding | None:
    """How an answer is to be compressed; None: not at all."""
    if len(body) < _COMPRESS_FROM_BYTES:
        return None
    accepted = request_headers.get(b"accept-encoding")
    return None if accepted is None else choose_encoding(accepted.decode("latin-1"))


async def send_json(
    send: Send,
    document: Any,
    *,
    status: int = 200,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Sends a document of the protocol."""
    await send_body(send, orjson.dumps(document), {}, status=status, extra=extra)


async def send_html(send: Send, page: str) -> None:
    """Sends a page for people. What it may load is said in the page itself."""
    body = page.encode()
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"x-content-type-options", b"nosniff"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send, error: Exception, request_id: str, signature: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Sends `{"error": ...}` with the status that belongs to the error: see `error_to_tell`."""
    error, signature = error_to_tell(error, request_id, signature)
    await send_body(send, error_body(error), {}, status=http_status(error), extra=signature)


def error_to_tell(
    error: Exception, request_id: str, signature: tuple[tuple[bytes, bytes], ...]
) -> tuple[RequestError, tuple[tuple[bytes, bytes], ...]]:
    """What a client is told of an error, and the headers of that answer.

    What is not an error of ours is logged with its trace, and the client is told only where.
    """
    if not isinstance(error, RequestError):
        logger.error("Request %s met an unexpected error.", request_id, exc_info=error)
        error = RequestError(
            f"unexpected error; the log of the replica has it under request id {request_id}"
        )
    retry_after = retry_after_header(error)
    if retry_after is not None:
        signature = (*signature, (b"retry-after", retry_after.encode()))
    return error, signature


async def send_method_not_allowed(
    send: Send, method: str, path: str, allowed: str, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Sends 405."""
    document = {"error": f"{method} {path}: allowed is {allowed}"}
    await send_json(send, document, status=405, extra=(*extra, (b"allow", allowed.encode())))


def unknown_path(path: str) -> NotFound:
    """The error for a path that means nothing."""
    return NotFound(f"nothing at {path!r}. What there is: /v2/docs")


def header_length(headers: Headers) -> int | None:
    """`Inference-Header-Content-Length`: the length of the JSON before binary tensors.

    Raises:
        InvalidInput: Not a whole number from 0.
    """
    value = headers.get(b"inference-header-content-length")
    return None if value is None else _whole_number("Inference-Header-Content-Length", value)


def _whole_number(name: str, value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise InvalidInput(
            f"header {name} is {value.decode('latin-1')[:40]!r}, allowed is a number of bytes"
        )
    return int(value)
