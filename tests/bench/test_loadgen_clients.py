"""The clients and loops, within one process: what a server may answer, and in how many pieces."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import uvloop

from bench.loadgen.connections import Client
from bench.loadgen.generator import Plan, drive, summarise
from bench.loadgen.grpc_client import GrpcClient
from bench.loadgen.http_client import HttpClient, request_bytes
from bench.loadgen.loops import OpenLoop
from bench.loadgen.records import BROKEN, CONNECT, GRPC, OK, STATUS, TIMEOUT, Records
from bench.loadgen.timer import Timer
from bench.models.bodies import Body
from bench.scenario import Arrivals
from tests.bench.loadgen_server import KnownServer, Reply


def ask(
    client: Client, times_s: list[float], *, connections: int = 1, timeout_s: float = 5.0
) -> Records:
    """Sends requests at times from now, and says what became of them."""

    async def run() -> Records:
        loop = OpenLoop(client, connections, timeout_s, times_s=times_s, first=0, step=1)
        await loop.prepare(1)
        start = time.monotonic()
        await loop.run(start)
        return loop.recorder.finish(loop.kind, start, 0.0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def http_client(server: KnownServer, content: bytes = b"{}") -> HttpClient:
    return HttpClient(server.url, {}, [([("content-type", "application/json")], content)])


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    b"6\r\n, worl\r\n1\r\nd\r\n0\r\n\r\n",
)
LONG = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhello, world"


@pytest.mark.parametrize(
    ("raw", "close"),
    [
        ((LONG,), False),
        ((LONG.replace(b"content-length", b"CONTENT-LENGTH"),), False),
        ((LONG[:5], LONG[5:25], LONG[25:45], LONG[45:]), False),
        ((LONG[:-1], LONG[-1:]), False),
        (CHUNKED, False),
        ((b"".join(CHUNKED),), False),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", LONG), False),
        ((b"HTTP/1.1 100 Continue\r\n\r\n" + LONG,), False),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False),
        ((LONG.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),), True),
        ((b"HTTP/1.1 200 OK\r\n\r\nuntil ", b"the end"), True),
        ((b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",), True),
    ],
)
def test_whole_answers_however_they_come(raw: tuple[bytes, ...], close: bool) -> None:
    with KnownServer(lambda number: Reply(raw=raw, close=close)) as server:
        records = ask(http_client(server), [0.0, 0.001, 0.002])
    assert records.reason.tolist() == [OK] * 3
    assert len(server.seen) == 3
    assert server.connections == (3 if close else 1) or close
    # Over one connection they come after each other.
    assert (np.diff(records.done_s) > 0).all()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ((LONG[:-1],), "in the middle of its answer"),
        ((CHUNKED[0],), "in the middle of its answer"),
        ((b"SSH-2.0-OpenSSH\r\n\r\n",), "no answer in HTTP/1.1"),
    ],
)
def test_broken_answers(raw: tuple[bytes, ...], said: str) -> None:
    with KnownServer(lambda number: Reply(raw=raw, close=True)) as server:
        records = ask(http_client(server), [0.0, 0.001])
    assert records.reason.tolist() == [BROKEN] * 2
    assert records.status.tolist() == [0, 0]
    assert said in records.samples[0][2]
    assert len(server.seen) == 2


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_refusal_and_what_it_says(pieces: int) -> None:
    raw = b"HTTP/1.1 503 Full\r\nRetry-After: 2\r\ncontent-length: 4\r\n\r\nfull"
    parts = (raw,) if pieces == 1 else (raw[:40], raw[40:])
    with KnownServer(lambda number: Reply(raw=parts)) as server:
        records = ask(http_client(server), [0.0])
    assert records.status.tolist() == [503]
    assert records.reason.tolist() == [STATUS]
    assert records.retry_after.tolist() == [True]
    assert records.samples == ((503, STATUS, "full"),)


def test_large_bodies_arrive_whole() -> None:
    content = np.random.default_rng(1).bytes(3_000_000)
    with KnownServer(lambda number: Reply(body=content)) as server:
        records = ask(http_client(server, content), [0.0, 0.0])
    assert records.reason.tolist() == [OK, OK]
    assert [seen.body for seen in server.seen] == [content, content]


def test_a_connection_that_the_server_closes_while_it_is_idle_costs_nothing() -> None:
    # Closed 5 ms after its answer, without having said so.
    with KnownServer(lambda number: Reply(raw=(LONG, b""), close=True)) as server:
        records = ask(http_client(server), [0.0, 0.2])
    assert records.reason.tolist() == [OK, OK]
    assert server.connections == 2


def test_connections_are_opened_as_they_are_needed_and_no_more() -> None:
    with KnownServer(lambda number: Reply(delay_s=0.1)) as server:
        records = ask(http_client(server), [0.0] * 9, connections=3)
    assert server.connections == 3
    assert records.waited.sum() >= 6
    in_order = np.sort(records.done_s)
    assert in_order[2] < in_order[3] - 0.05
    assert in_order[-1] >= 0.3


def test_requests_leave_at_their_times() -> None:
    times_s = [0.0031 * number for number in range(60)]
    with KnownServer(lambda number: Reply()) as server:
        records = ask(http_client(server), times_s, connections=8)
    assert (records.sent_s >= records.intended_s).all()
    assert (records.late_s >= 0).all()
    # An event loop's own timers have whole milliseconds. Tests' machines are busy: in the median.
    assert np.median(records.late_s) < 0.005


@pytest.mark.parametrize(
    ("url", "headers", "fault"),
    [
        ("https://127.0.0.1/x", [], "allowed is http://"),
        ("127.0.0.1:80", [], "allowed is http://"),
        ("http://127.0.0.1/", [("a", "b\r\nc: d")], "line break"),
    ],
)
def test_what_would_not_arrive_is_refused(
    url: str, headers: list[tuple[str, str]], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        request_bytes(url, headers, b"")


def test_a_request_as_it_goes_over_the_wire() -> None:
    made = request_bytes("http://h:81/a/b?c=d", [("x-y", "z")], b"{}")
    assert made == (
        b"POST /a/b?c=d HTTP/1.1\r\nhost: h:81\r\nx-y: z\r\ncontent-length: 2\r\n\r\n{}"
    )


def test_the_timer_calls_once_for_the_time_that_was_set_last() -> None:
    async def run() -> list[float]:
        called: list[float] = []
        there = asyncio.Event()

        def call() -> None:
            called.append(time.monotonic())
            there.set()

        timer = Timer(asyncio.get_running_loop(), call)
        begun = time.monotonic()
        timer.set(begun + 0.01)
        timer.set(begun + 0.0301)
        await there.wait()
        there.clear()
        timer.set(begun)  # over already
        await there.wait()
        timer.set(time.monotonic() + 0.01)
        timer.cancel()
        await asyncio.sleep(0.03)
        timer.close()
        return [moment - begun for moment in called]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        called = runner.run(run())
    assert len(called) == 2
    assert called[0] >= 0.0301


# gRPC


class _Calls(grpc.GenericRpcHandler):
    def __init__(self, answer: Callable[[int, grpc.ServicerContext], bytes]) -> None:
        self.bodies: list[bytes] = []
        self.metadata: list[dict[str, str]] = []
        self._answer = answer
        self._lock = threading.Lock()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != "/inference.GRPCInferenceService/ModelInfer":
            return None
        return grpc.unary_unary_rpc_method_handler(self._handle)

    def _handle(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
        return self._answer(number, context)


@contextmanager
def grpc_server(
    answer: Callable[[int, grpc.ServicerContext], bytes],
) -> Iterator[tuple[str, _Calls]]:
    calls = _Calls(answer)
    server = grpc.server(ThreadPoolExecutor(8), handlers=[calls])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", calls
    finally:
        server.stop(0).wait()


def refuse_some(number: int, context: grpc.ServicerContext) -> bytes:
    place = number % 5
    if place == 1:
        context.set_trailing_metadata([("retry-after", "1")])
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    if place == 2:
        context.abort(grpc.StatusCode.UNAVAILABLE, "the model is not ready")
    if place == 3:
        context.abort(grpc.StatusCode.INTERNAL, "it broke")
    return b"answer"


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_grpc_through_a_worker(loop: str) -> None:
    bodies = [Body(b"first"), Body(b"second")]
    with grpc_server(refuse_some) as (address, calls):
        plan = Plan(
            url=address,
            bodies=bodies,
            body_kind="grpc",
            headers={"application": "tiny"},
            loop="open" if loop == "open" else "closed",
            rate=100 if loop == "open" else None,
            arrivals=Arrivals(kind="constant"),
            connections=4,
            seconds=0.3,
            warm_up_s=0.0,
        )
        records = drive(plan, "loadgen-grpc")
    found = summarise(records, 0.3, None)
    count = len(calls.bodies)
    assert found["requests"] == count
    if loop == "open":
        assert count == 30
    by_place = [len(range(place, count, 5)) for place in range(5)]
    assert found["ok"] == by_place[0] + by_place[4]
    assert found["refused"]["count"] == by_place[1] + by_place[2]
    assert found["refused"]["with_retry_after"] == by_place[1]
    assert found["errors"] == {"grpc_INTERNAL": by_place[3]}
    assert found["example_error"] == "grpc_INTERNAL: INTERNAL: it broke"
    assert {*calls.bodies} == {b"first", b"second"}
    assert abs(calls.bodies.count(b"first") - calls.bodies.count(b"second")) <= 1
    assert all(metadata["application"] == "tiny" for metadata in calls.metadata)


def test_grpc_calls_that_take_too_long() -> None:
    over = threading.Event()

    def hang(number: int, context: grpc.ServicerContext) -> bytes:
        if number == 0:
            over.wait(10)
        return b""

    with grpc_server(hang) as (address, _):
        client = GrpcClient(address, {}, [b""])
        records = ask(client, [0.0, 0.6], timeout_s=0.5)
        over.set()
    assert records.reason.tolist() == [TIMEOUT, OK]
    assert records.status.tolist() == [0, GRPC]


def test_grpc_with_nobody_there() -> None:
    with grpc_server(lambda number, context: b"") as (address, _):
        pass
    records = ask(GrpcClient(address, {}, [b""]), [0.0, 0.1])
    assert records.reason.tolist() == [CONNECT, CONNECT]


def test_grpc_with_one_who_leaves() -> None:
    asked = threading.Event()

    def wait_in_vain(number: int, context: grpc.ServicerContext) -> bytes:
        asked.set()
        gone.wait(10)
        return b""

    gone = threading.Event()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_Calls(wait_in_vain)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    def leave() -> None:
        asked.wait(10)
        server.stop(0).wait()

    leaving = threading.Thread(target=leave)
    leaving.start()
    records = ask(GrpcClient(f"127.0.0.1:{port}", {}, [b""]), [0.0])
    leaving.join()
    gone.set()
    # What a server says to calls on their way as it leaves is its own affair.
    assert records.reason[0] in (BROKEN, STATUS)
