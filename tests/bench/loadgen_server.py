"""An HTTP server in a thread whose answers, and the times that they take, are known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

__all__ = ["KnownServer", "Reply"]


@dataclass(frozen=True)
class Reply:
    """What becomes of a request.

    Args:
        status: None: nothing is ever answered.
        delay_s: Before the answer.
        headers: Beside content-length.
        body: Of the answer.
        raw: Sent instead of an answer, piece by piece.
        close: The connection is closed, after the answer if there is one; a `status` of None with
            it is a dropped connection.
        block_s: The whole server stands still before the answer.
    """

    status: int | None = 200
    delay_s: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b"{}"
    raw: tuple[bytes, ...] = ()
    close: bool = False
    block_s: float = 0.0


@dataclass
class Seen:
    """A request; times of `time.monotonic`."""

    number: int
    arrived: float
    reply: Reply
    body: bytes
    headers: bytes
    answered: float | None = None
    """Before the answer was written."""
    blocked: tuple[float, float] = field(default=(0.0, 0.0))


class KnownServer:
    """Answers request number n with `policy(n)`."""

    def __init__(self, policy: Callable[[int], Reply]) -> None:
        self._policy = policy
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self.port = 0
        self.seen: list[Seen] = []
        self.connections = 0
        self.transports: set[asyncio.Transport] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/infer"

    def statuses(self) -> Counter[int | None]:
        return Counter(seen.reply.status for seen in self.seen)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        loop = self._loop
        server = loop.run_until_complete(
            loop.create_server(lambda: _Protocol(self), "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        loop.run_forever()
        server.close()
        for transport in list(self.transports):
            transport.abort()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    def take(self, body: bytes, headers: bytes) -> Seen:
        number = len(self.seen)
        seen = Seen(number, time.monotonic(), self._policy(number), body, headers)
        self.seen.append(seen)
        return seen


class _Protocol(asyncio.Protocol):
    def __init__(self, server: KnownServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.transports.add(transport)
        self._server.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, rest = self._data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self._data = rest[length:]
        seen = self._server.take(rest[:length], head)
        reply = seen.reply
        if reply.block_s:
            begun = time.monotonic()
            time.sleep(reply.block_s)
            seen.blocked = (begun, time.monotonic())
        if reply.raw:
            self._send_pieces(seen, list(reply.raw))
        elif reply.status is not None:
            self._loop.call_later(reply.delay_s, self._answer, seen)
        elif reply.close:
            self._transport.abort()

    def _answer(self, seen: Seen) -> None:
        reply = seen.reply
        lines = [f"HTTP/1.1 {reply.status} Known", f"Content-Length: {len(reply.body)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers]
        seen.answered = time.monotonic()
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + reply.body)
        if reply.close:
            self._transport.close()

    def _send_pieces(self, seen: Seen, pieces: list[bytes]) -> None:
        self._transport.write(pieces.pop(0))
        if pieces:
            self._loop.call_later(0.005, self._send_pieces, seen, pieces)
        elif seen.reply.close:
            self._transport.close()
