"""What it costs a replica to send a request on: CPU time of HTTP clients, side by side.

`python -m bench.forwarding` posts 600 bytes to a server in another process, which answers 200, and
counts the CPU time of this process alone, the kernel's share of it included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.connection import Connection

import aiohttp
import httpx
import uvloop

from bench.machine import describe
from rayprism.serving.forward import HttpForwarder

__all__ = ["main"]

_BODY = b"x" * 600
_ANSWER_BYTES = 200
_PATH = "/v2/models/flights/versions/4/infer"
_TIMEOUT_S = 10.0
_HEADERS = {
    "accept": "*/*",
    "accept-encoding": "gzip, deflate",
    "content-type": "application/json",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "user-agent": "client/1.0",
    "x-forwarded-for": "10.0.0.1",
    "x-request-id": "0f9e2c3d-8a61-4f0e-9a57-0d4c1c6f2b11",
    "x-user-id": "u-123456",
}
"""About what HAProxy hands to a replica."""

Post = Callable[[], Awaitable[int]]
"""Sends one request; how many bytes the body of its answer has."""


class _Server(asyncio.Protocol):
    """Answers as soon as a whole request is there, and looks at nothing but its length."""

    _answer = (
        b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % _ANSWER_BYTES
    ) + b"y" * _ANSWER_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._got = b""

    def data_received(self, data: bytes) -> None:
        self._got += data
        _head, end, body = self._got.partition(b"\r\n\r\n")
        if end and len(body) >= len(_BODY):
            self._got = b""
            self._transport.write(self._answer)


def _serve(pipe: Connection) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


@contextlib.contextmanager
def _server() -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


@contextlib.asynccontextmanager
async def _forwarder(port: int) -> AsyncIterator[Post]:
    forwarder = HttpForwarder("127.0.0.1", port)
    headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def post() -> int:
        answer = await forwarder.post(_PATH.encode(), headers, _BODY, _TIMEOUT_S)
        return len(answer.body)

    yield post
    forwarder.close()


@contextlib.asynccontextmanager
async def _aiohttp(port: int) -> AsyncIterator[Post]:
    url = f"http://127.0.0.1:{port}{_PATH}"
    limits = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=limits, auto_decompress=False) as session:

        async def post() -> int:
            async with session.post(url, data=_BODY, headers=_HEADERS) as answer:
                return len(await answer.read())

        yield post


@contextlib.asynccontextmanager
async def _httpx(port: int) -> AsyncIterator[Post]:
    url = f"http://127.0.0.1:{port}{_PATH}"
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:

        async def post() -> int:
            return len((await client.post(url, content=_BODY, headers=_HEADERS)).content)

        yield post


class _BareConnection(asyncio.Protocol):
    """Writes and reads what a client would, and understands none of it."""

    def __init__(self) -> None:
        self.waiter: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert self.waiter is not None
        self.waiter.set_result(_ANSWER_BYTES)


@contextlib.asynccontextmanager
async def _nothing(port: int) -> AsyncIterator[Post]:
    loop = asyncio.get_running_loop()
    lines = [f"POST {_PATH} HTTP/1.1", f"host: 127.0.0.1:{port}", f"content-length: {len(_BODY)}"]
    lines += [f"{name}: {value}" for name, value in _HEADERS.items()]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + _BODY
    idle: list[_BareConnection] = []

    async def post() -> int:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(_BareConnection, "127.0.0.1", port)
        connection.waiter = loop.create_future()
        connection.transport.write(request)
        size = await connection.waiter
        idle.append(connection)
        return size

    yield post
    for connection in idle:
        connection.transport.close()


_CLIENTS = {
    "rayprism": _forwarder,
    "aiohttp": _aiohttp,
    "httpx": _httpx,
    "no HTTP at all": _nothing,
}


async def _drive(post: Post, requests: int, connections: int) -> tuple[float, float]:
    """CPU time and time of one request. Units: microseconds."""
    left = iter(range(requests))

    async def work() -> None:
        for _ in left:
            if await post() != _ANSWER_BYTES:
                raise RuntimeError("not the answer that the server gives")

    started, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(connections)))
    return (
        (time.process_time() - used) / requests * 1e6,
        (time.perf_counter() - started) / requests * 1e6,
    )


async def _measure(
    port: int, rounds: int, requests: int, connections: int
) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in _CLIENTS}
    async with contextlib.AsyncExitStack() as stack:
        posts = {
            name: await stack.enter_async_context(client(port)) for name, client in _CLIENTS.items()
        }
        for post in posts.values():
            await _drive(post, requests // 4, connections)
        names = list(posts)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(await _drive(posts[name], requests, connections))
    return found


def main() -> None:
    """Measures in interleaved rounds, and prints a table of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=4000, help="of each client in each round")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    given = parser.parse_args()
    about = describe()
    versions = about["versions"]
    print(f"{about['date']}, {about['machine']['cores']} cores ({about['machine']['cpu']})")
    print(f"Python {versions['python']}, uvloop {versions['uvloop']}, ", end="")
    print(f"aiohttp {aiohttp.__version__}, httpx {httpx.__version__}")
    with _server() as port:
        for connections in given.connections:
            found = uvloop.run(_measure(port, given.rounds, given.requests, connections))
            print(f"\n{connections} connections: CPU of a request (least to most), its time; us")
            for name, samples in found.items():
                cpu = [sample[0] for sample in samples]
                took = statistics.median(sample[1] for sample in samples)
                middle = statistics.median(cpu)
                print(f"{name:16} {middle:7.1f} ({min(cpu):.1f} to {max(cpu):.1f}) {took:9.1f}")


if __name__ == "__main__":
    main()
