"""Sends requests on to another application: a small HTTP/1.1 client for the path of a request.

A stable replica sends its candidates' share from its own event loop, so what counts is the CPU time
of a request: one future and one write each, a timer that is seldom moved, no task, no URL and no
request object. What came in goes out as it is, body and headers, to one address.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

__all__ = ["Answer", "Busy", "HttpForwarder", "Unreachable", "forwardable_headers"]

_ONE_WRITE_BYTES = 64 * 1024
"""Up to here, copying a body behind its head is cheaper than handing over two buffers."""
_MAX_HEAD_BYTES = 64 * 1024
_EARLY_S = 0.001
"""uvloop's clock has whole milliseconds: a timer may come this much before its time."""
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"/[!-~\x80-\xff]*")
_HOST = re.compile(r"[0-9A-Za-z._\-:%]+")
_STAY = frozenset(
    (
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Headers of one connection, and those that the next sender writes itself.

Source: RFC 9110, section 7.6.1. `expect` is met by sending the body at once.
"""

Header = tuple[bytes, bytes]


class Unreachable(Exception):
    """Nobody there, broken off before the whole answer, or not an answer in HTTP: it says which."""


class Busy(Exception):
    """As many requests are on their way already as are allowed."""


class _Unanswered(Unreachable):
    """The other side closed the connection before it answered anything."""


class _Refused(Exception):
    """Stops the parser; why is in the connection."""


@dataclass(slots=True)
class Answer:
    """A whole answer, whatever its status.

    Args:
        status: HTTP status, 200 or more.
        headers: By lower-case name; repeated ones joined with a comma. They are as they came: pass
            them through `forwardable_headers` before sending them on.
        body: Without chunks' framing, but still compressed where the headers say so.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class HttpForwarder:
    """Posts to one address over connections that are kept open.

    It belongs to the event loop that it is first used on.

    Args:
        host: Name or IP address.
        port: TCP port.
        max_connections: Requests that may be on their way at a time.
        idle_s: How long a connection is kept without a request.
        connect_timeout_s: For a new connection.
        max_answer_bytes: Of an answer's body.

    Raises:
        ValueError: A host that is no name or address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_connections: int = 256,
        idle_s: float = 30.0,
        connect_timeout_s: float = 1.0,
        max_answer_bytes: int = 1 << 30,
    ) -> None:
        if not _HOST.fullmatch(host):
            raise ValueError(f"host {host!r}, allowed is a name or an IP address")
        self._name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._idle_s = idle_s
        self._max_answer_bytes = max_answer_bytes
        self._closed = False
        # The last one used is the first one to be used again: a few connections stay warm, and
        # those that a burst needed run out of time.
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._host = host
        self._port = port
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._on_their_way = 0
        self._after_path = (
            f" HTTP/1.1\r\nhost: {self._name}\r\nconnection: keep-alive\r\ncontent-length: "
        ).encode()

    @property
    def open_connections(self) -> int:
        """Connections there are, idle or not."""
        return len(self._open)

    @property
    def idle_connections(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    async def post(
        self, path: bytes, headers: Sequence[Header], body: bytes | memoryview, timeout_s: float
    ) -> Answer:
        """Sends one request and waits for its whole answer.

        Where a kept connection turns out to be closed before the answer began, the request goes
        once more over a new one: inference may be repeated. Cancelling closes the connection, so
        that the other side sees that nobody waits.

        Args:
            path: Starts with a slash, percent-encoded, with the query if there is one.
            headers: As they came in. Those of `forwardable_headers` go out, with `host`,
                `content-length` and `connection` of this client.
            body: Sent as it is.
            timeout_s: From now to the last byte of the answer.

        Raises:
            Unreachable: There is no answer, or none that can be understood.
            TimeoutError: The time is over; the connection is closed.
            Busy: `max_connections` requests are on their way.
            ValueError: A path or a header that would not arrive as one.
        """
        head = self._head(path, headers, len(body))
        if self._on_their_way >= self._max_connections:
            raise Busy(
                f"{self._max_connections} requests to {self._name} are on their way, more are not "
                "allowed at a time"
            )
        if self._closed:
            raise Unreachable(f"the client for {self._name} is closed")
        if timeout_s <= 0:
            raise _too_late(self._name, timeout_s)
        due = asyncio.get_running_loop().time() + timeout_s
        self._on_their_way += 1
        try:
            if self._idle:
                try:
                    return await self._idle.pop().exchange(head, body, due, timeout_s)
                except _Unanswered:
                    pass
            connection = await self._connect(due, timeout_s)
            return await connection.exchange(head, body, due, timeout_s)
        finally:
            self._on_their_way -= 1

    def close(self) -> None:
        """Takes no more requests.

        Idle connections are closed now, those with a request when it has ended: a candidate that
        leaves the split still answers what it was sent.
        """
        self._closed = True
        while self._idle:
            self._idle.pop().abandon()

    async def _connect(self, due: float, timeout_s: float) -> _Connection:
        loop = asyncio.get_running_loop()
        connection = _Connection(self, loop)
        until = min(due, loop.time() + self._connect_timeout_s)
        try:
            async with asyncio.timeout_at(until):
                await loop.create_connection(lambda: connection, self._host, self._port)
        except (OSError, UnicodeError) as error:
            # A TimeoutError is an OSError, of ours or of the system's.
            if loop.time() >= due - _EARLY_S:
                raise _too_late(self._name, timeout_s) from None
            why = str(error) or f"not within {self._connect_timeout_s:g} s"
            raise Unreachable(f"no connection to {self._name}: {why}") from error
        # Not in connection_made: uvloop closes a connection that comes as its request is cancelled
        # without ever calling connection_lost.
        if not connection.closing:
            self._open.add(connection)
        return connection

    def _head(self, path: bytes, headers: Iterable[Header], length: int) -> bytes:
        if not _TARGET.fullmatch(path):
            raise ValueError(
                f"path {path!r}, allowed is one that starts with a slash and has no spaces or "
                "control characters: percent-encode it"
            )
        lines = [b": ".join(header) for header in forwardable_headers(headers)]
        block = b"\r\n".join(lines)
        breaks = len(lines) - 1
        # Counting in the whole block is cheaper than looking into each value.
        if block.count(b"\r") != breaks or block.count(b"\n") != breaks or b"\0" in block:
            _refuse_breaks(lines)
        end = b"\r\n\r\n" if lines else b"\r\n"
        return b"POST %b%b%d\r\n%b%b" % (path, self._after_path, length, block, end)


class _Connection(asyncio.Protocol):
    """One connection: one request at a time, and the parser of its answer.

    It has one timer, for the end of the request as well as for the end of being idle. Both move
    later most of the time, so the timer stays where it is and looks again when it comes.
    """

    def __init__(self, owner: HttpForwarder, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self.closing = False
        self._waiter: asyncio.Future[Answer] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._due = 0.0
        self._timeout_s = 0.0
        self._fault = ""
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._status = self._size = self._head_bytes = 0
        self._begun = self._complete = self._keep = False

    # What the forwarder asks for

    async def exchange(
        self, head: bytes, body: bytes | memoryview, due: float, timeout_s: float
    ) -> Answer:
        """Sends a request and waits for its answer, until `due` of the loop's clock."""
        transport = self._transport
        if transport is None or self.closing:
            fault = self._fault or "closed the connection before it answered"
            raise Unreachable(f"{self._owner._name} {fault}")
        self._expect()
        self._timeout_s = timeout_s
        self._wake_at(due)
        waiter: asyncio.Future[Answer] = self._loop.create_future()
        self._waiter = waiter
        if len(body) <= _ONE_WRITE_BYTES:
            transport.write(head + body)
        else:
            transport.writelines((head, body))
        try:
            return await waiter
        except asyncio.CancelledError:
            # Where the answer was first, the connection may be another request's by now.
            if waiter.cancelled():
                self.abandon()
            raise

    def abandon(self) -> None:
        """Closes the connection, without sending what is left to send."""
        self.closing = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """A part of an answer, or what nobody asked for."""
        waiter = self._waiter
        if waiter is None or self._parser is None:
            self._fault = "sent something before it was asked"
            self._leave()
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self._complete:
                fault = self._fault or f"does not answer in HTTP/1.1: {error}"
                self._end(Unreachable(f"{self._owner._name} {fault}"))
                return
            self._keep = False
        if self._complete:
            self._finish(waiter)
        elif self._status == 0:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                fault = f"answers with more than {_MAX_HEAD_BYTES} bytes of headers"
                self._end(Unreachable(f"{self._owner._name} {fault}"))

    def eof_received(self) -> None:
        """The other side sends no more, which may be the end of an answer."""
        waiter = self._waiter
        if waiter is None:
            self._leave()
        elif (
            self._status
            and b"content-length" not in self._headers
            and b"transfer-encoding" not in self._headers
        ):
            self._keep = False
            self._finish(waiter)
        else:
            # Not left to the transport: it would first send what is left of the request.
            self._break_off("")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self._leave()
        self._owner._open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        # Parser and connection hold each other.
        self._parser = None
        if self._waiter is not None:
            self._break_off("" if exc is None else f": {exc}")

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """First byte of an answer."""
        if self._complete:
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those behind the body are of no use to anyone."""
        if self._status:
            return
        name = name.lower()
        headers = self._headers
        headers[name] = headers[name] + b", " + value if name in headers else value

    def on_headers_complete(self) -> None:
        """The end of the headers."""
        status = self._parser.get_status_code()  # type: ignore[union-attr]
        if status < 200:
            if status == 101:
                self._refuse("wants to speak another protocol than HTTP")
            self._headers = {}
            return
        self._status = status
        length = self._headers.get(b"content-length")
        if length is not None and int(length) > self._owner._max_answer_bytes:
            self._refuse_size(int(length))

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._size += len(body)
        if self._size > self._owner._max_answer_bytes:
            self._refuse_size(self._size)
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """The end of an answer, or of a `100 Continue` before it."""
        if self._status:
            self._complete = True
            self._keep = self._parser.should_keep_alive()  # type: ignore[union-attr]

    # Within

    def _expect(self) -> None:
        self._headers = {}
        self._chunks = []
        self._status = self._size = self._head_bytes = 0
        self._begun = self._complete = self._keep = False

    def _finish(self, waiter: asyncio.Future[Answer]) -> None:
        """The whole answer is there."""
        chunks = self._chunks
        if waiter.done():
            self._end(None)
            return
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        waiter.set_result(Answer(self._status, self._headers, body))
        self._waiter = None
        owner = self._owner
        # An answer before the end of the request: its rest is still to be sent.
        unsent = self._transport.get_write_buffer_size()  # type: ignore[union-attr]
        if self._keep and not unsent and not owner._closed:
            self._wake_at(self._loop.time() + owner._idle_s)
            owner._idle.append(self)
        else:
            self.abandon()

    def _end(self, error: Exception | None) -> None:
        """The request ends without its answer, and the connection with it."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and error is not None and not waiter.done():
            waiter.set_exception(error)
        self.abandon()

    def _break_off(self, why: str) -> None:
        """The other side closed the connection with a request on it."""
        name = self._owner._name
        if self._begun:
            self._end(Unreachable(f"{name} broke off in the middle of its answer{why}"))
        else:
            self._end(_Unanswered(f"{name} closed the connection before it answered{why}"))

    def _leave(self) -> None:
        """Not to be used again."""
        if self in self._owner._idle:
            self._owner._idle.remove(self)
        self.abandon()

    def _refuse(self, fault: str) -> None:
        self._fault = fault
        raise _Refused

    def _refuse_size(self, size_bytes: int) -> None:
        limit = self._owner._max_answer_bytes
        self._refuse(f"answers with {size_bytes} bytes or more, allowed are {limit}")

    def _wake_at(self, due: float) -> None:
        self._due = due
        if self._timer is None or due < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due = due
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._due - self._loop.time() > _EARLY_S:
            self._wake_at(self._due)
        elif self._waiter is None:
            self._leave()
        else:
            self._end(_too_late(self._owner._name, self._timeout_s))


def forwardable_headers(scope_headers: Iterable[Header]) -> list[Header]:
    """The headers that may be sent on to another server, in their order.

    Left out are those of one connection, what `connection` names, `host`, `content-length` and
    `expect`.

    Raises:
        ValueError: A name that is none.
    """
    kept = []
    named: set[bytes] = set()
    for header in scope_headers:
        if _goes_on(header[0]):
            kept.append(header)
        elif header[0].lower() == b"connection":
            named.update(name.strip().lower() for name in header[1].split(b","))
    if named:
        return [header for header in kept if header[0].lower() not in named]
    return kept


@functools.lru_cache(maxsize=256)
def _goes_on(name: bytes) -> bool:
    if not _TOKEN.fullmatch(name):
        raise ValueError(
            f"header name {name!r}, allowed are letters, digits and any of !#$%&'*+-.^_`|~"
        )
    name = name.lower()
    return name not in _STAY and not name.startswith(b"proxy-")


def _refuse_breaks(lines: Iterable[bytes]) -> None:
    for line in lines:
        name, _, value = line.partition(b": ")
        if any(sign in value for sign in b"\r\n\0"):
            raise ValueError(
                f"header {name.decode('latin-1')} is {value!r}: a value must not have line breaks "
                "or NUL in it"
            )


def _too_late(name: str, timeout_s: float) -> TimeoutError:
    return TimeoutError(f"{name} did not answer within {timeout_s:g} s")
