"""A kept-alive HTTP/1.1 connection of the fast lane, taken over from uvicorn.

uvicorn goes on to own it: what is no plain inference request (another path, a chunked body, an
upgrade, a time-out of Serve's, a full replica) goes back to it, byte for byte, and it answers.
Large bodies are read straight into the memory in which the runtime gets them.

Source: RFC 9112 for what a message is; the parser is uvicorn's own, llhttp.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import httptools
import numpy as np
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from rayprism.serving.asgi import Message, Receive, Scope, Send

__all__ = ["Accounts", "LaneConnection", "LaneState", "take_over"]

Body = bytes | memoryview
Headers = list[tuple[bytes, bytes]]
Reply = Callable[[int, Headers, bytes], None]
_DIRECT_FROM_BYTES = 32 * 1024
"""Bodies from this size are read into their own memory; below, the copy is cheaper."""
_SERVES_ONLY = frozenset(
    {
        b"expect",
        b"transfer-encoding",
        b"upgrade",
        # Serve's own: what they ask for is only in its own handling of a request.
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
    }
)
_REQUEST_ID = b"x-request-id"
_CLIENT_LEFT = 499
_ALIGNMENT = 64
_END = b"\r\n\r\n"
_MAX_LENGTH_DIGITS = 18
_FAILED = 500
_FAILURE = (
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 21\r\nconnection: close\r\n\r\n"
    b"Internal Server Error"
)
"""What uvicorn answers for an application that does not."""

logger = logging.getLogger("ray.serve.rayprism")


class Accounts(Protocol):
    """Who is told of each request."""

    def begin(self) -> bool:
        """Takes a slot; False where none is free."""

    def end(self, status: int, took_s: float) -> None:
        """Gives the slot back."""


class LaneState(Protocol):
    """What the connections share."""

    prefix: str
    paths: dict[bytes, str]

    @property
    def app(self) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Answers requests."""

    @property
    def infer_now(
        self,
    ) -> Callable[[str, Headers, Body, str, Reply], Callable[[], None] | None]:
        """Answers plain requests without a task: see `ModelApp.infer_now`."""

    @property
    def accounts(self) -> Accounts:
        """Who is told of each."""

    @property
    def max_body_bytes(self) -> int:
        """Longer bodies are uvicorn's to refuse."""

    @property
    def is_open(self) -> bool:
        """Whether the lane may be taken."""

    def new_request_id(self) -> bytes:
        """For a request that brings none."""


def take_over(send: Send, lane: LaneState) -> None:
    """Takes a connection over from uvicorn that has just sent a whole answer, where that can be.

    Args:
        send: uvicorn's own, of the request that was answered.
        lane: What the connections share.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not cycle.response_complete:
        return
    transport = cycle.transport
    protocol = transport.get_protocol()
    if (
        isinstance(protocol, HttpToolsProtocol)
        and not cycle.more_body
        # Nothing of a next request is here: uvicorn has a new scope from its first byte.
        and protocol.scope is cycle.scope
        and not transport.is_closing()
    ):
        LaneConnection(protocol, transport, lane).take()


class _Request:
    """What llhttp says of the head of one request."""

    __slots__ = ("head", "headers", "length", "path", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.path = ""
        self.length = 0
        self.head = b""

    @property
    def json_length(self) -> int:
        """How much of the body is JSON, where binary tensors follow it; else 0."""
        for name, value in self.headers:
            if name == b"inference-header-content-length":
                return int(value) if value.isdigit() and len(value) < 10 else 0
        return 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


class LaneConnection(asyncio.Protocol):
    """Reads inference requests, one at a time, and writes their answers.

    Args:
        web: uvicorn's protocol, which owns the connection.
        transport: The connection.
        lane: What the connections share.
    """

    def __init__(self, web: HttpToolsProtocol, transport: Any, lane: LaneState) -> None:
        self._web = web
        self._transport = transport
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._server: Any = web.server_state
        self._received = b""
        self._task: asyncio.Task[None] | None = None
        self._cancel: Callable[[], None] | None = None
        self._began_s = 0.0
        self._defaults: Any = None
        self._default_lines = b""
        self._closing = False
        self._idle_since_s = self._loop.time()
        self._idle: asyncio.TimerHandle | None = None

    def take(self) -> None:
        """Takes the connection from uvicorn; nothing is half read or half answered."""
        self._web._unset_keepalive_if_required()
        self._server.connections.discard(self._web)
        # So that uvicorn's server waits for its end, and says when it should be.
        self._server.connections.add(self)
        self._transport.set_protocol(self)
        self._check_idle()

    def _give_back(self, data: bytes) -> None:
        """Lets uvicorn answer what has come."""
        self._received = b""
        self._leave()
        self._server.connections.add(self._web)
        self._transport.set_protocol(self._web)
        self._web.data_received(data)
        if self._closing:
            # Said to this connection, while uvicorn had no part in it.
            self._web.shutdown()

    def _leave(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._server.connections.discard(self)

    @property
    def _is_answering(self) -> bool:
        """Whether the answer to a request is due, with a task or without."""
        return self._task is not None or self._cancel is not None

    @property
    def _is_idle(self) -> bool:
        """Whether nothing of a request is here: a body that is half read is something."""
        return (
            not self._is_answering
            and not self._received
            and self._transport.get_protocol() is self  # and not a _BodyReader
        )

    def _check_idle(self) -> None:
        """Closes the connection where it has been idle for as long as uvicorn allows."""
        limit_s, now_s = self._web.timeout_keep_alive, self._loop.time()
        left_s = float(limit_s)
        if self._is_idle:
            left_s = self._idle_since_s + limit_s - now_s
            if left_s <= 0:
                self._transport.close()
                return
        # One timer for a connection, not one for each request.
        self._idle = self._loop.call_later(left_s, self._check_idle)

    # What asyncio and uvicorn's server call

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, or of several."""
        if self._received:
            data, self._received = self._received + data, b""
        if not self._is_answering:
            self._read(data)
        else:
            # The next one, before the answer to this one is there.
            self._received = data
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """The client left: what it asked for is not worth doing any more."""
        self._closing = True
        self._leave()
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
            self._end(_CLIENT_LEFT)
        elif self._task is not None:
            # Not at once: a task that is cancelled before it begins would not give its slot back.
            self._loop.call_soon(self._task.cancel)
        self._web.connection_lost(error)

    def eof_received(self) -> None:
        """The client sends no more: the connection is closed."""

    def pause_writing(self) -> None:
        """The client does not read."""
        self._web.pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._web.resume_writing()

    def shutdown(self) -> None:
        """Called by uvicorn's server when it ends: after the answers that are due."""
        self._closing = True
        if self._is_idle:
            self._transport.close()

    # One request

    def _read(self, data: bytes) -> None:
        """Begins with the request at the start of what has come, once it is whole."""
        end = data.find(_END)
        body_at = end + len(_END)
        # Half a head is rare, and may be no HTTP at all: uvicorn refuses that before an end comes.
        request = self._read_head(data[:body_at]) if end >= 0 else None
        if request is None:
            self._give_back(data)
            return
        stop = body_at + request.length
        if len(data) >= stop:
            self._received = data[stop:]
            self.begin(request, data[body_at:stop], data)
        elif request.length < _DIRECT_FROM_BYTES:
            self._received = data
        else:
            _BodyReader(self, self._transport, request, data, body_at)

    def _read_head(self, head: bytes) -> _Request | None:
        """What the head says; None where uvicorn is to answer."""
        lane = self._lane
        if not lane.is_open:
            return None
        request = _Request()
        parser = httptools.HttpRequestParser(request)
        try:
            parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return None
        path = lane.paths.get(request.url)
        if (
            path is None
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or not parser.should_keep_alive()
        ):
            return None
        request.path = path
        length = -1
        for name, value in request.headers:
            if name == b"content-length":
                # One such header, of digits: llhttp saw to that, but not to how many.
                length = int(value) if len(value) <= _MAX_LENGTH_DIGITS else -1
            elif name in _SERVES_ONLY:
                return None
        # Without a body llhttp is past the end of the message, and has forgotten whether the
        # connection is to be closed.
        if not 0 < length <= lane.max_body_bytes:
            return None
        request.length = length
        return request

    def begin(self, request: _Request, body: Body, data: bytes | None = None) -> None:
        """Answers a request that is there as a whole.

        Args:
            request: Its head.
            body: Its body.
            data: All that has come, to give it back; None: the head and the body are all.
        """
        lane = self._lane
        if not lane.accounts.begin():
            if data is None:
                data = request.head + bytes(body)
            self._give_back(data)
            return
        self._began_s = time.perf_counter()
        headers = request.headers
        request_id = next((value for name, value in headers if name == _REQUEST_ID), None)
        if request_id is None:
            request_id = lane.new_request_id()
            headers.append((_REQUEST_ID, request_id))
        # What the client does not read has to be waited for, which takes a task.
        if not self._web.flow.write_paused:

            def reply(status: int, said: list[tuple[bytes, bytes]], answer: bytes) -> None:
                if self._cancel is None:
                    return  # the client has left
                self._cancel = None
                self._end(status)
                if not self._transport.is_closing():
                    self._write(status, said, request_id, answer)
                self._next()

            self._cancel = lane.infer_now(
                request.path, headers, body, request_id.decode("latin-1"), reply
            )
            if self._cancel is not None:
                return
        self._task = self._loop.create_task(self._answer(request, request_id, body))

    def _end(self, status: int) -> None:
        """Tells Serve's accounts that the request has ended."""
        self._lane.accounts.end(status, time.perf_counter() - self._began_s)

    async def _answer(self, request: _Request, request_id: bytes, body: Body) -> None:
        lane, headers = self._lane, request.headers
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": request.path,
            "root_path": lane.prefix,
            "headers": headers,
        }
        flow, transport = self._web.flow, self._transport
        status = 0

        async def receive() -> Message:
            nonlocal body
            given, body = body, b""
            return {"type": "http.request", "body": given, "more_body": False}

        start: Message = {}

        async def send(message: Message) -> None:
            nonlocal start, status
            if message["type"] == "http.response.start":
                start = message
                return
            if status:
                raise RuntimeError("a second answer to one request")
            if flow.write_paused:
                await flow.drain()
            if not transport.is_closing():
                self._write(start["status"], start["headers"], request_id, message["body"])
                status = start["status"]

        try:
            await lane.app(scope, receive, send)
            if not status:
                status = self._fail(status, None)
        except (Exception, asyncio.CancelledError) as error:
            status = self._fail(status, error)
        finally:
            self._end(status or _CLIENT_LEFT)
            self._task = None
        self._next()

    def _write(
        self, status: int, headers: list[tuple[bytes, bytes]], request_id: bytes, body: bytes
    ) -> None:
        transport = self._transport
        # uvicorn, too, answers all that it has of pipelined requests before it ends.
        is_last = self._closing and not self._received
        content = [STATUS_LINE[status], self._default_headers()]
        for name, value in headers:
            content += (name, b": ", value, b"\r\n")
        content += (b"x-request-id: ", request_id, b"\r\n")
        if is_last:
            content.append(b"connection: close\r\n")
        content.append(b"\r\n")
        if len(body) < _DIRECT_FROM_BYTES:
            content.append(body)
            transport.write(b"".join(content))
        else:
            transport.write(b"".join(content))
            transport.write(body)
        if is_last:
            transport.close()

    def _default_headers(self) -> bytes:
        """Date and server, which uvicorn makes anew every second."""
        defaults = self._server.default_headers
        if defaults is not self._defaults:
            self._defaults = defaults
            self._default_lines = b"".join(b"%b: %b\r\n" % header for header in defaults)
        return self._default_lines

    def _fail(self, status: int, error: BaseException | None) -> int:
        """Ends the connection where the application failed, as uvicorn does.

        Args:
            status: Of the answer that was sent; 0: none was.
            error: What it raised.

        Returns:
            The status of the answer; 0 where the client left before there was any.
        """
        transport = self._transport
        if transport.is_closing():
            return status
        logger.error("The application failed in a request.", exc_info=error)
        if not status:
            status = _FAILED
            content = [STATUS_LINE[status], self._default_headers(), _FAILURE]
            transport.write(b"".join(content))
        transport.close()
        return status

    def _next(self) -> None:
        transport = self._transport
        if transport.is_closing():
            return
        self._idle_since_s = self._loop.time()
        if self._received:
            data, self._received = self._received, b""
            transport.resume_reading()
            self._read(data)
        elif self._closing:
            transport.close()


class _BodyReader(asyncio.BufferedProtocol):
    """Reads the rest of a large body straight into the memory that the runtime gets.

    Args:
        connection: Goes on when the body is whole.
        transport: Of the connection.
        request: Whose body.
        data: What has come: the head, and the beginning of the body.
        body_at: Where in it that begins.
    """

    def __init__(
        self,
        connection: LaneConnection,
        transport: Any,
        request: _Request,
        data: bytes,
        body_at: int,
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._request = request
        request.head = data[:body_at]
        self._body = _aligned(request.length, request.json_length)
        self._filled = len(data) - body_at
        self._body[: self._filled] = memoryview(data)[body_at:]
        self._switch(self)

    def _switch(self, protocol: asyncio.BaseProtocol) -> None:
        # uvloop chooses how it reads when reading starts.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong; never more of them than the body has."""
        return self._body[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """They are there."""
        self._filled += nbytes
        if self._filled == len(self._body):
            # uvloop keeps this reader until the connection ends; the memory is not for so long.
            body, self._body = self._body, memoryview(b"")
            self._switch(self._connection)
            self._connection.begin(self._request, body.toreadonly())

    def connection_lost(self, error: Exception | None) -> None:
        """The client left in the middle."""
        self._connection.connection_lost(error)

    def eof_received(self) -> None:
        """The client sends no more: the connection is closed."""

    def pause_writing(self) -> None:
        """The client does not read."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._connection.resume_writing()


def _aligned(length: int, json_length: int) -> memoryview:
    """Memory for a body, in which the binary tensors after the JSON begin at a multiple of 64.

    So that a runtime can take them where they lie: NumPy calls an array aligned where its address
    is a multiple of its items' size.
    """
    memory = np.empty(length + _ALIGNMENT, np.uint8)
    start = -(memory.ctypes.data + json_length) % _ALIGNMENT
    return memoryview(memory.data)[start : start + length]
