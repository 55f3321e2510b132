"""The client that sends requests on, against real servers, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvicorn
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.serving.forward import Answer, Busy, HttpForwarder, Unreachable, forwardable_headers
from tests.support.asyncs import async_test, until

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Script = Callable[[Reader, Writer], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def _event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "uvloop":
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield
    asyncio.set_event_loop_policy(None)


class Peer:
    """A server that does what a script says on each connection, and what it saw."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.port = 0
        self.connections = 0
        self.closed = 0
        self.requests: list[tuple[list[bytes], bytes]] = []

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        try:
            await self.script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def request(self, reader: Reader) -> bytes:
        """Reads one request; its head, by lines, and its body are kept."""
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
        (length,) = [line[16:] for line in head if line.startswith(b"content-length: ")]
        body = await reader.readexactly(int(length))
        self.requests.append((head, body))
        return body


@contextlib.asynccontextmanager
async def playing(script: Callable[[Peer, Reader, Writer], Awaitable[None]]) -> AsyncIterator[Peer]:
    async def run(reader: Reader, writer: Writer) -> None:
        await script(peer, reader, writer)

    peer = Peer(run)
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        server.close()
        await until(lambda: peer.closed == peer.connections)
        await server.wait_closed()


@contextlib.asynccontextmanager
async def forwarding(port: int, **options: Any) -> AsyncIterator[HttpForwarder]:
    """A client that must not leave a connection behind."""
    forwarder = HttpForwarder("127.0.0.1", port, **options)
    try:
        yield forwarder
    finally:
        forwarder.close()
        await until(lambda: forwarder.open_connections == 0)


async def post(forwarder: HttpForwarder, body: bytes = b"{}", timeout_s: float = 10) -> Answer:
    return await forwarder.post(b"/infer", [], body, timeout_s)


def sends(*pieces: bytes, then_close: bool = False) -> Any:
    """A script that answers every request with the same bytes, a packet each piece."""

    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        while True:
            await peer.request(reader)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            if then_close:
                return

    return script


async def echo(peer: Peer, reader: Reader, writer: Writer) -> None:
    while True:
        body = await peer.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


async def silent(peer: Peer, reader: Reader, writer: Writer) -> None:
    await peer.request(reader)
    await reader.read()


# What goes out


@async_test
async def test_the_request_on_the_wire() -> None:
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        headers = [(b"content-type", b"application/json"), (b"x-user-id", b"\xe4 b")]
        answer = await forwarder.post(b"/v2/models/f/infer?a=%20", headers, b"body", 10)
        bare = await forwarder.post(b"/", [], b"", 10)
        assert (answer.status, answer.body) == (200, b"body")
        assert answer.headers == {b"content-length": b"4"}
        assert bare.body == b""
        start, *lines = peer.requests[0][0]
        assert start == b"POST /v2/models/f/infer?a=%20 HTTP/1.1"
        assert sorted(lines) == [
            b"connection: keep-alive",
            b"content-length: 4",
            b"content-type: application/json",
            b"host: 127.0.0.1:%d" % peer.port,
            b"x-user-id: \xe4 b",
        ]
        assert len(peer.requests[1][0]) == 4


def test_only_what_is_meant_for_the_next_server_goes_on() -> None:
    came = [
        (b"host", b"public"),
        (b"Content-Type", b"a"),
        (b"content-length", b"3"),
        (b"connection", b"keep-alive, X-Hop"),
        (b"connection", b"close"),
        (b"keep-alive", b"timeout=5"),
        (b"x-hop", b"1"),
        (b"proxy-authorization", b"secret"),
        (b"Proxy-Connection", b"close"),
        (b"te", b"trailers"),
        (b"trailer", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"upgrade", b"websocket"),
        (b"expect", b"100-continue"),
        (b"x-user-id", b"7"),
        (b"x-user-id", b"8"),
    ]
    assert forwardable_headers(came) == [
        (b"Content-Type", b"a"),
        (b"x-user-id", b"7"),
        (b"x-user-id", b"8"),
    ]
    assert forwardable_headers(iter(())) == []


@async_test
async def test_headers_of_the_connection_cannot_be_smuggled_past_the_client() -> None:
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        headers = [(b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"0"), (b"Host", b"x")]
        assert (await forwarder.post(b"/", headers, b"body", 10)).body == b"body"
        assert len(peer.requests[0][0]) == 4


@pytest.mark.parametrize(
    ("path", "header"),
    [
        (b"/", (b"x", b"a\r\nhost: b")),
        (b"/", (b"x", b"a\n")),
        (b"/", (b"x", b"a\rb")),
        (b"/", (b"x", b"a\0")),
        (b"/", (b"x\r\ny", b"a")),
        (b"/", (b"x\0", b"a")),
        (b"/", (b" content-length", b"5")),
        (b"/", (b"content-length:", b"5")),
        (b"/", (b"", b"a")),
        (b"/ HTTP/1.1\r\nx: y", (b"x", b"y")),
        (b"/a b", (b"x", b"y")),
        (b"", (b"x", b"y")),
        (b"http://elsewhere/", (b"x", b"y")),
    ],
)
@async_test
async def test_what_would_arrive_as_something_else_is_refused(
    path: bytes, header: tuple[bytes, bytes]
) -> None:
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        for headers in ([header], [(b"a", b"b"), header, (b"c", b"d")]):
            with pytest.raises(ValueError, match=r"^(header|path) "):
                await forwarder.post(path, headers, b"", 10)
        assert peer.connections == 0
        assert (await post(forwarder)).status == 200


@pytest.mark.parametrize("host", ["", "a b", "a\r\nx: y", "a/b"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    with pytest.raises(ValueError, match="allowed is a name or an IP address"):
        HttpForwarder(host, 80)


@pytest.mark.parametrize("size", [0, 600, 64 << 10, (64 << 10) + 1, 5_000_000])
@async_test
async def test_bodies_of_all_sizes_there_and_back(size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        for _ in range(2):
            assert (await post(forwarder, body)).body == body
        assert peer.connections == 1


@async_test
async def test_a_small_request_is_one_packet() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        packets.append(await reader.read(1 << 20))
        writer.write(OK)
        await reader.read()

    packets: list[bytes] = []
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await post(forwarder, b"x" * 20_000)
        assert packets[0].endswith(b"\r\n\r\n" + b"x" * 20_000)


# What comes back


ANSWERS = {
    "empty header": (b"HTTP/1.1 200 OK\r\nX:\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
    "error": (b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno", 503, b"no"),
    "continue": (b"HTTP/1.1 100 Continue\r\nX-Early: y\r\n\r\n" + OK, 200, b"ok"),
    "twice": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n" + OK, 200, b"ok"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b""),
    "chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;x=y\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        200,
        b"ok",
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\nx-late: y\r\nx-later: z\r\n\r\n",
        200,
        b"ok",
    ),
    "1.0, kept": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        200,
        b"ok",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
@async_test
async def test_answers_that_leave_the_connection_open(name: str) -> None:
    raw, status, body = ANSWERS[name]
    async with playing(sends(raw)) as peer, forwarding(peer.port) as forwarder:
        first = await post(forwarder)
        assert (first.status, first.body) == (status, body)
        # Neither those of an answer before it, nor those behind its body.
        assert not {b"x-early", b"x-late", b"x-later"} & set(first.headers)
        assert await post(forwarder) == first
        assert peer.connections == 1
        assert forwarder.idle_connections == 1


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        # After the end of an answer:
        (OK + b"x", b"ok"),
        (OK + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nokk", b"ok"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", b""),
    ],
)
@async_test
async def test_answers_after_which_the_client_closes(raw: bytes, body: bytes) -> None:
    async with playing(sends(raw)) as peer, forwarding(peer.port) as forwarder:
        for _ in range(2):
            assert (await post(forwarder)).body == body
            assert forwarder.idle_connections == 0
        await until(lambda: peer.closed == 2)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@async_test
async def test_the_end_of_the_connection_is_the_end_of_an_answer_without_length(
    version: bytes,
) -> None:
    raw = b"HTTP/" + version + b" 200 OK\r\nx: y\r\n\r\n"
    async with (
        playing(sends(raw, b"o", b"k", then_close=True)) as peer,
        forwarding(peer.port) as forwarder,
    ):
        for _ in range(2):
            assert await post(forwarder) == Answer(200, {b"x": b"y"}, b"ok")
        assert peer.connections == 2


@async_test
async def test_repeated_headers_are_joined_and_names_are_lower_case() -> None:
    raw = b"HTTP/1.1 200 OK\r\nVary: a\r\nX-A: 1\r\nvary: b\r\nContent-Length: 0\r\n\r\n"
    async with playing(sends(raw)) as peer, forwarding(peer.port) as forwarder:
        answer = await post(forwarder)
        assert answer.headers == {b"vary": b"a, b", b"x-a": b"1", b"content-length": b"0"}


BROKEN = {
    b"": "closed the connection before it answered",
    b"HTTP/1.1 200": "in the middle of its answer",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok": "in the middle of its answer",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n": "in the middle",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok": "in the middle",
    b"HTTP/1.1 100 Continue\r\n\r\n": "in the middle of its answer",
    b"SSH-2.0-OpenSSH_9.2\r\n": "does not answer in HTTP",
    b"HTTP/1.1 abc\r\n\r\n": "does not answer in HTTP",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nok": "not answer in HTTP",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n": "not answer in",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n": "does not answer in HTTP",
    b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n": "another protocol",
    b"HTTP/1.1 101 Go\r\n\r\n": "another protocol",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n": "1001 bytes or more, allowed are 1000",
    b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001: "1001 bytes or more, allowed are 1000",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000: "more than 65536 bytes of headers",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 4000: "more than 65536 bytes of headers",
}


@pytest.mark.parametrize("raw", BROKEN)
@async_test
async def test_what_is_no_whole_answer(raw: bytes) -> None:
    async with (
        playing(sends(raw, then_close=True)) as peer,
        forwarding(peer.port, max_answer_bytes=1000) as forwarder,
    ):
        with pytest.raises(Unreachable, match=f"^127.0.0.1:{peer.port} .*{BROKEN[raw]}"):
            await post(forwarder)
        assert peer.connections == 1


@async_test
async def test_an_answer_of_just_the_allowed_size() -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
    async with (
        playing(sends(raw)) as peer,
        forwarding(peer.port, max_answer_bytes=1000) as forwarder,
    ):
        assert len((await post(forwarder)).body) == 1000


@pytest.mark.parametrize(
    ("greeting", "why"),
    [(b"", "closed the connection before it answered"), (b"220 ESMTP", "before it was asked")],
)
@async_test
async def test_a_server_that_does_not_wait_for_the_request(greeting: bytes, why: str) -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        writer.write(greeting)

    async def connect(*args: Any) -> Any:
        made = await create_connection(*args)
        await until(lambda: made[1].closing)
        return made

    loop: Any = asyncio.get_running_loop()
    create_connection = loop.create_connection
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        loop.create_connection = connect
        with pytest.raises(Unreachable, match=why):
            await post(forwarder)


@async_test
async def test_an_answer_before_the_end_of_the_request() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.wait_for(done.wait(), 10)

    done = asyncio.Event()
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        assert (await post(forwarder, bytes(50_000_000))).status == 413
        # The rest of the body would be taken for the next request.
        assert forwarder.idle_connections == 0
        done.set()


@pytest.mark.parametrize("size", [2, 50_000_000])
@async_test
async def test_a_server_that_closes_only_its_own_direction(size: int) -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if peer.connections == 1:
            writer.write(OK)
        writer.write_eof()
        await asyncio.wait_for(ended.wait(), 10)

    ended = asyncio.Event()
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        assert (await post(forwarder)).body == b"ok"
        await until(lambda: forwarder.open_connections == 0)
        with pytest.raises(Unreachable, match="closed the connection before it answered"):
            await post(forwarder, bytes(size))
        assert forwarder.idle_connections == 0
        ended.set()


@async_test
async def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with forwarding(port) as forwarder:
            with pytest.raises(Unreachable, match=f"^no connection to 127.0.0.1:{port}: "):
                await post(forwarder)
            assert forwarder.open_connections == 0


# Connections


@async_test
async def test_the_last_used_connection_is_used_first() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % peer.connections
        while True:
            await peer.request(reader)
            writer.write(raw)

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await asyncio.gather(*(post(forwarder) for _ in range(3)))
        assert forwarder.open_connections == forwarder.idle_connections == 3
        assert len({(await post(forwarder)).body for _ in range(5)}) == 1
        both = [answer.body for answer in await asyncio.gather(post(forwarder), post(forwarder))]
        assert len(set(both)) == 2
        assert (await post(forwarder)).body in both
        assert peer.connections == forwarder.idle_connections == 3


@async_test
async def test_a_hundred_at_a_time_each_get_their_own_answer() -> None:
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        for _ in range(3):
            bodies = [b"%d" % number * 50 for number in range(100)]
            answers = await asyncio.gather(*(post(forwarder, body) for body in bodies))
            assert [answer.body for answer in answers] == bodies
        assert forwarder.idle_connections == peer.connections <= 100


@async_test
async def test_more_than_may_be_on_their_way() -> None:
    async with playing(silent) as peer, forwarding(peer.port, max_connections=2) as forwarder:
        waiting = [asyncio.create_task(post(forwarder)) for _ in range(2)]
        await until(lambda: len(peer.requests) == 2)
        with pytest.raises(Busy, match=r"^2 requests to 127\.0\.0\.1:"):
            await post(forwarder)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        with pytest.raises(TimeoutError):
            await post(forwarder, timeout_s=0.05)


@async_test
async def test_idle_connections_that_the_server_closes_are_dropped_at_once() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        writer.write(OK)
        await asyncio.wait_for(close.wait(), 10)

    close = asyncio.Event()
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await asyncio.gather(*(post(forwarder) for _ in range(3)))
        assert forwarder.idle_connections == 3
        close.set()
        await until(lambda: forwarder.open_connections == 0)
        assert forwarder.idle_connections == 0


@async_test
async def test_idle_connections_on_which_something_comes_are_dropped() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        writer.write(OK)
        await asyncio.wait_for(speak.wait(), 10)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await reader.read()

    speak = asyncio.Event()
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        assert (await post(forwarder)).status == 200
        speak.set()
        await until(lambda: forwarder.open_connections == 0)
        assert (await post(forwarder)).status == 200


@async_test
async def test_idle_connections_are_closed_in_time() -> None:
    async with playing(echo) as peer, forwarding(peer.port, idle_s=0.05) as forwarder:
        # The time-out of the request is the later one here, and the earlier one below.
        await post(forwarder, timeout_s=20)
        await until(lambda: peer.closed == 1)
        await post(forwarder, timeout_s=0.02)
        assert forwarder.idle_connections == 1
        await until(lambda: peer.closed == 2)
        assert forwarder.idle_connections == forwarder.open_connections == 0


@pytest.mark.parametrize("how", ["close", "reset"])
@async_test
async def test_a_kept_connection_closed_by_then_is_tried_again(how: str) -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        writer.write(OK)
        if peer.connections <= 2:
            await peer.request(reader)
            if how == "reset":
                writer.transport.abort()
            return
        await reader.read()

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await asyncio.gather(post(forwarder), post(forwarder))
        # Of the two idle connections, only one is tried before a new one is made.
        assert (await post(forwarder, b"again")).body == b"ok"
        assert peer.connections == 3
        assert [body for _, body in peer.requests] == [b"{}", b"{}", b"again", b"again"]


@async_test
async def test_one_byte_of_an_answer_and_it_is_not_tried_again() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        writer.write(OK)
        await peer.request(reader)
        writer.write(b"H")

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await post(forwarder)
        with pytest.raises(Unreachable, match="in the middle of its answer"):
            await post(forwarder)
        assert peer.connections == 1


@async_test
async def test_a_new_connection_is_not_tried_again() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        if peer.connections == 1:
            writer.write(OK)
            await peer.request(reader)

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        await post(forwarder)
        with pytest.raises(Unreachable, match="closed the connection before it answered"):
            await post(forwarder)
        assert peer.connections == 2


@async_test
async def test_closed_while_a_request_is_on_its_way() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        await asyncio.wait_for(answer.wait(), 10)
        writer.write(OK)
        await reader.read()

    answer = asyncio.Event()
    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        asked = asyncio.create_task(post(forwarder))
        await until(lambda: peer.requests)
        forwarder.close()
        with pytest.raises(Unreachable, match="is closed"):
            await post(forwarder)
        answer.set()
        assert (await asked).body == b"ok"
        await until(lambda: peer.closed == 1)


# Nobody waits any more


@async_test
async def test_time_is_over_and_the_server_sees_it() -> None:
    async with playing(silent) as peer, forwarding(peer.port) as forwarder:
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.05 s"):
            await post(forwarder, timeout_s=0.05)
        await until(lambda: peer.closed == 1)
        assert forwarder.open_connections == 0


@async_test
async def test_time_is_over_in_the_middle_of_an_answer() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        await peer.request(reader)
        writer.write(OK)
        await peer.request(reader)
        writer.write(OK[:-1])
        await reader.read()

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        # The timer of the first request is for much later.
        await post(forwarder, timeout_s=20)
        with pytest.raises(TimeoutError):
            await post(forwarder, timeout_s=0.05)
        await until(lambda: peer.closed == 1)


@async_test
async def test_each_request_on_a_connection_has_its_whole_time() -> None:
    async def script(peer: Peer, reader: Reader, writer: Writer) -> None:
        while True:
            await peer.request(reader)
            await asyncio.sleep(0.06)
            writer.write(OK)

    async with playing(script) as peer, forwarding(peer.port) as forwarder:
        started = asyncio.get_running_loop().time()
        for _ in range(4):
            await post(forwarder, timeout_s=0.15)
        with pytest.raises(TimeoutError):
            await post(forwarder, timeout_s=0.03)
        assert asyncio.get_running_loop().time() - started > 0.25
        assert peer.connections == 1


@async_test
async def test_a_request_without_time_is_not_sent() -> None:
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        for timeout_s in (0, -1):
            with pytest.raises(TimeoutError):
                await post(forwarder, timeout_s=timeout_s)
        assert peer.connections == 0


@contextlib.contextmanager
def not_accepting() -> Iterator[int]:
    """A port where the system lets connections wait for ever."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@async_test
async def test_a_connection_that_does_not_come() -> None:
    with not_accepting() as port:
        async with forwarding(port, connect_timeout_s=0.05) as forwarder:
            with pytest.raises(Unreachable, match=r"^no connection to .*: not within 0\.05 s$"):
                await post(forwarder)
        async with forwarding(port) as forwarder:
            with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
                await post(forwarder, timeout_s=0.05)
            asked = asyncio.create_task(post(forwarder))
            await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked


@async_test
async def test_a_cancelled_request_closes_its_connection_and_no_other() -> None:
    async with playing(silent) as peer, forwarding(peer.port) as forwarder:
        first, second = (asyncio.create_task(post(forwarder)) for _ in range(2))
        await until(lambda: len(peer.requests) == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await until(lambda: peer.closed == 1)
        assert forwarder.open_connections == 1
        assert not second.done()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second


@async_test
async def test_an_answer_to_a_request_that_was_just_cancelled() -> None:
    async with playing(silent) as peer, forwarding(peer.port) as forwarder:
        asked = asyncio.create_task(post(forwarder))
        await until(lambda: peer.requests)
        (connection,) = forwarder._open
        asked.cancel()
        connection.data_received(OK)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert forwarder.idle_connections == 0
        await until(lambda: peer.closed == 1)


@pytest.mark.parametrize("victim", [0, 1])
@async_test
async def test_cancelled_at_any_moment(victim: int) -> None:
    """Whatever it was doing: nothing is left open, and no one gets another's answer.

    The first one finds an idle connection, the second one makes a new one.
    """
    async with playing(echo) as peer, forwarding(peer.port) as forwarder:
        for turns in range(12):
            await post(forwarder, b"before")
            for connection in forwarder._idle[1:]:
                connection.abandon()
            await until(lambda: forwarder.idle_connections == 1)
            asked = [
                asyncio.create_task(post(forwarder, b"mine %d" % number)) for number in range(2)
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            asked[victim].cancel()
            answers = await asyncio.gather(
                *asked, post(forwarder, b"third"), return_exceptions=True
            )
            for number in range(2):
                if number != victim or not isinstance(answers[number], asyncio.CancelledError):
                    assert getattr(answers[number], "body", None) == b"mine %d" % number
            assert getattr(answers[2], "body", None) == b"third"
        await until(lambda: forwarder.open_connections == forwarder.idle_connections)
        await until(lambda: peer.connections - peer.closed == forwarder.open_connections)


# Any answer, in any pieces


BODIES = st.lists(st.binary(max_size=40), max_size=5)
NAMES = st.from_regex(rb"[Xx]-[A-Za-z0-9!_]{1,8}", fullmatch=True)
VALUES = st.from_regex(rb"([!-~\x80-\xff]([ -~\x80-\xff]{0,10}[!-~\x80-\xff])?)?", fullmatch=True)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, Answer, bool]:
    """Bytes, what they mean, and whether their end is that of the connection."""
    status = draw(st.sampled_from([200, 204, 304, 400, 503]))
    chunks = [] if status in (204, 304) else draw(BODIES)
    headers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    framing = draw(st.sampled_from(["length", "chunked", "end"])) if chunks else "length"
    body = b"".join(chunks)
    content = body
    if framing == "length":
        headers.append((b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked":
        headers.append((b"transfer-encoding", b"chunked"))
        filled = [chunk for chunk in chunks if chunk]
        content = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in filled)
        content += b"0\r\n\r\n"
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    meant: dict[bytes, bytes] = {}
    for name, value in headers:
        key = name.lower()
        meant[key] = meant[key] + b", " + value if key in meant else value
    raw = interim + b"HTTP/1.1 %d Some reason\r\n" % status + lines + b"\r\n" + content
    return raw, Answer(status, meant, body), framing == "end"


def in_pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(raw) + 1) for cut in cuts} | {0, len(raw)})
    return [raw[start:end] for start, end in itertools.pairwise(places)]


def exchange(pieces: list[bytes], *, then_close: bool) -> tuple[Answer, int]:
    async def run() -> tuple[Answer, int]:
        async with (
            playing(sends(*pieces, then_close=then_close)) as peer,
            forwarding(peer.port) as forwarder,
        ):
            answer = await post(forwarder)
            return answer, forwarder.idle_connections

    return asyncio.run(asyncio.wait_for(run(), 10))


fuzzed = functools.partial(settings, deadline=None, max_examples=100)


@fuzzed()
@given(answers(), CUTS)
def _any_answer(made: tuple[bytes, Answer, bool], cuts: list[int]) -> None:
    raw, meant, ends = made
    assert exchange(in_pieces(raw, cuts), then_close=ends) == (meant, 0 if ends else 1)


def test_any_answer_in_any_pieces() -> None:
    _any_answer()


@fuzzed()
@given(answers().filter(lambda made: not made[2]), CUTS, st.integers(0, 1 << 16))
def _any_part(made: tuple[bytes, Answer, bool], cuts: list[int], end: int) -> None:
    raw = made[0][: end % len(made[0])]
    with pytest.raises(Unreachable):
        exchange(in_pieces(raw, cuts), then_close=True)


def test_no_part_of_an_answer_is_taken_for_the_whole() -> None:
    _any_part()


@fuzzed()
@given(answers(), CUTS, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4))
def _any_damage(made: tuple[bytes, Answer, bool], cuts: list[int], at: int, sign: bytes) -> None:
    at %= len(made[0])
    raw = made[0][:at] + sign + made[0][at + len(sign) :]
    with contextlib.suppress(Unreachable):
        assert isinstance(exchange(in_pieces(raw, cuts), then_close=True)[0], Answer)


def test_damage_ends_in_an_answer_or_in_unreachable() -> None:
    _any_damage()


# The server that replicas run


async def application(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = [(b"X-Path", scope["raw_path"]), (b"x-asked", dict(scope["headers"])[b"x-asked"])]
    if scope["path"] == "/sized":
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body), 7000):
        part = {"type": "http.response.body", "body": body[start : start + 7000]}
        await send(part | {"more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("http", ["httptools", "h11"])
@async_test
async def test_uvicorn(http: Any) -> None:
    config = uvicorn.Config(
        application, port=0, http=http, ws="none", lifespan="off", log_level="warning"
    )
    web = uvicorn.Server(config)
    serving = asyncio.create_task(web.serve())
    await until(lambda: web.started)
    port = web.servers[0].sockets[0].getsockname()[1]
    # Server and client share one loop here: on a busy machine a hundred connections at once take
    # the second that a connection may take.
    async with forwarding(port, connect_timeout_s=10) as forwarder:
        for path in (b"/sized", b"/chunked"):
            asked = [
                forwarder.post(path, [(b"x-asked", b"%d" % n)], b"%d" % n * 5000, 10)
                for n in range(100)
            ]
            for number, answer in enumerate(await asyncio.gather(*asked)):
                assert answer.status == 200
                assert answer.body == b"%d" % number * 5000
                assert answer.headers[b"x-asked"] == b"%d" % number
                assert answer.headers[b"x-path"] == path
                assert (b"transfer-encoding" in answer.headers) == (path == b"/chunked")
        assert forwarder.idle_connections == forwarder.open_connections <= 100
        web.should_exit = True
        await serving
        await until(lambda: forwarder.open_connections == 0)
        with pytest.raises(Unreachable, match="no connection"):
            await forwarder.post(b"/sized", [(b"x-asked", b"")], b"", 10)
