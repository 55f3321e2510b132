"""A client of HTTP/1.1 that costs as little as Python allows.

Requests are whole bytes that were made before. An answer that comes in one piece, as almost all do,
is taken by its content-length without a parser; any other goes through httptools.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from bench.loadgen.connections import Listener, Ticket
from bench.loadgen.records import BROKEN, OK, STATUS

__all__ = ["HttpClient", "request_bytes"]

_SAMPLE_BYTES = 400
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n")
_FAILURE_FROM = 300


def request_bytes(url: str, headers: Iterable[tuple[str, str]], content: bytes) -> bytes:
    """A POST as it goes over the wire.

    Raises:
        ValueError: A URL that is none of HTTP, or a header that would not arrive as one.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"url {url!r}, allowed is http://HOST:PORT/PATH")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"POST {target} HTTP/1.1", f"host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += [f"content-length: {len(content)}"]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError(f"a header, or the url, has a line break: {lines}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


class HttpClient:
    """Connections to one address.

    Args:
        url: Where to POST.
        headers: Of all requests.
        bodies: Headers and content of each.

    Raises:
        ValueError: See `request_bytes`.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        bodies: Iterable[tuple[Sequence[tuple[str, str]], bytes]],
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), parts.port or 80
        self.requests = [
            request_bytes(url, [*headers.items(), *own], content) for own, content in bodies
        ]

    async def connect(self, listener: Listener) -> HttpConnection:
        """A new connection.

        Raises:
            OSError: Nobody answers there.
        """
        connection = HttpConnection(self.requests, listener)
        await asyncio.get_running_loop().create_connection(
            lambda: connection, self._host, self._port
        )
        return connection


class HttpConnection(asyncio.Protocol):
    """One connection, kept open as long as the server does.

    Nothing is ever sent twice: a connection that the server closes with a request on it counts as
    broken, whether or not the server had begun to answer.
    """

    def __init__(self, requests: Sequence[bytes], listener: Listener) -> None:
        self.ticket = Ticket()
        self.busy = False
        self.usable = False
        self._requests = requests
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None

    def send(self, index: int) -> None:
        """Sends a request; the connection is busy until its listener hears that it has ended."""
        self.busy = True
        self._transport.write(self._requests[index % len(self._requests)])  # type: ignore[union-attr]

    def abandon(self) -> None:
        """Closes it at once."""
        self.busy = self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        """An answer, or a part of one."""
        if not self.busy:
            # Nobody asked.
            self.abandon()
        elif self._answer is not None or not self._take_whole(data):
            self._take_part(data)

    def eof_received(self) -> None:
        """The server sends no more, which may be the end of an answer."""
        answer = self._answer
        if self.busy and answer is not None and answer.ends_with_connection:
            self.usable = False
            self._end(answer.status, answer.retry_after, answer.sample())

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self.usable = False
        if self.busy:
            self.busy = False
            begun = "in the middle of its answer" if self._answer else "before it answered"
            text = f"the server closed the connection {begun}" + (f": {exc}" if exc else "")
            self._answer = None
            self._listener.ended(self, BROKEN, 0, False, text)
        self._listener.lost(self)

    # Within

    def _take_whole(self, data: bytes) -> bool:
        """Takes an answer that is complete and has a length; False where it is another."""
        end = data.find(b"\r\n\r\n")
        if end < 0 or not data.startswith(b"HTTP/1.1 "):
            return False
        head = data[: end + 2].lower()
        length = _LENGTH.search(head)
        if length is None or end + 4 + int(length[1]) != len(data):
            return False
        status = int(data[9:12])
        if b"\r\nconnection: close\r\n" in head:
            self.usable = False
        if status < _FAILURE_FROM:
            self._end(status, False, b"")
        else:
            sample = data[end + 4 : end + 4 + _SAMPLE_BYTES]
            self._end(status, b"\r\nretry-after:" in head, sample)
        return True

    def _take_part(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            answer = self._answer = _Answer()
        try:
            answer.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.busy = self.usable = False
            self._answer = None
            text = f"no answer in HTTP/1.1: {error}: {data[:_SAMPLE_BYTES]!r}"
            self._listener.ended(self, BROKEN, 0, False, text)
            self.abandon()
            return
        if answer.complete:
            self.usable = self.usable and answer.keeps_alive
            self._end(answer.status, answer.retry_after, answer.sample())

    def _end(self, status: int, retry_after: bool, sample: bytes) -> None:
        self._answer = None
        self.busy = False
        if status < _FAILURE_FROM:
            self._listener.ended(self, OK, status, False, "")
        else:
            text = sample.decode("utf-8", "replace")
            self._listener.ended(self, STATUS, status, retry_after, text)
        if not self.usable:
            self.abandon()


class _Answer:
    """An answer that comes in pieces, or in chunks, or with the end of its connection."""

    def __init__(self) -> None:
        self.parser = HttpResponseParser(self)
        self.status = 0
        self.complete = self.keeps_alive = self.retry_after = False
        self._framed = False
        self._body = bytearray()

    @property
    def ends_with_connection(self) -> bool:
        return bool(self.status) and not self._framed

    def sample(self) -> bytes:
        return bytes(self._body[:_SAMPLE_BYTES])

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._framed |= name in (b"content-length", b"transfer-encoding")
        self.retry_after |= name == b"retry-after"

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        # 1xx come before the answer.
        self.status = status if status >= 200 else 0

    def on_body(self, body: bytes) -> None:
        if len(self._body) < _SAMPLE_BYTES:
            self._body += body[:_SAMPLE_BYTES]

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keeps_alive = self.parser.should_keep_alive()
