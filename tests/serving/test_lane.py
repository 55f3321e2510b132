"""The fast lane: the same answers and the same accounts as without it."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.errors import DeadlineExceeded, Overloaded
from rayprism.models.loader import load_model
from rayprism.models.repository import ModelVersion
from rayprism.serving.http import ModelApp
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig
from tests.support.asyncs import async_test, until
from tests.support.lane_server import (
    INFER,
    ROUTE,
    Answer,
    LaneServer,
    ReplicaStandIn,
    ScriptedApp,
    comparable,
    get,
    lane_server,
    on_both_loops,
    post,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from ray.serve._private.common import RequestProtocol
    from ray.serve.schema import LoggingConfig

    from rayprism.serving import lane as lane_module
    from rayprism.serving import lane_connection
    from rayprism.serving.lane import Lane, RayAccounts, middlewares

MAX_BODY = 1_000_000


@pytest.fixture(autouse=True)
def _few_messages(caplog: pytest.LogCaptureFixture) -> None:
    # Serve makes one for each request, also where none is to be seen.
    caplog.set_level(logging.WARNING, "ray.serve")


@pytest.fixture
def _counted_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "_FLUSH_S", 0.02)


@asynccontextmanager
async def serving(
    version: ModelVersion, *, lane: bool = True, **options: Any
) -> AsyncIterator[LaneServer]:
    """A model behind the server, with no room for requests whose id is `one-too-many`."""
    service = ModelService(
        load_model(version), UserConfig(max_body_bytes=MAX_BODY, max_queue_rows=100_000)
    )
    infer, submit = service.infer, service.submit

    def refuse(request: Any) -> None:
        if request.id == "one-too-many":
            raise Overloaded("the queue is full", 2.5)
        if request.id == "broken":
            raise RuntimeError("a bug")

    def alike(error: Any) -> Any:
        if not isinstance(error, DeadlineExceeded):
            return error
        return DeadlineExceeded(re.sub(r"[\d.e-]+ s,", "so long,", str(error)))

    async def infer_or_refuse(request: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(request)
        try:
            return await infer(request, *args, **kwargs)
        except DeadlineExceeded as error:
            raise alike(error) from None

    def submit_or_refuse(request: Any, record: Any, done: Any, **terms: Any) -> Any:
        refuse(request)
        return submit(request, record, lambda outputs, error: done(outputs, alike(error)), **terms)

    service.infer = infer_or_refuse  # type: ignore[method-assign]
    service.submit = submit_or_refuse  # type: ignore[method-assign]
    try:
        async with lane_server(ModelApp(service), lane=lane, **options) as server:
            yield server
    finally:
        await service.close()


def rows(count: int = 1, **changes: Any) -> bytes:
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [count, 4],
        "data": [round(number * 0.25, 2) for number in range(4 * count)],
    }
    return json.dumps({"inputs": [tensor | changes.pop("tensor", {})]} | changes).encode()


def binary(count: int, **changes: Any) -> tuple[bytes, str]:
    """A body of binary tensors that asks for such, and the header that belongs to it."""
    x = np.arange(4 * count, dtype="<f4").reshape(count, 4) / 16
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [count, 4],
        "parameters": {"binary_data_size": x.nbytes},
    }
    head = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
        | changes
    ).encode()
    return head + x.tobytes(), f"inference-header-content-length: {len(head)}"


def chunked(body: bytes, *headers: str) -> bytes:
    head = ["POST " + INFER + " HTTP/1.1", "host: test", *headers, "transfer-encoding: chunked"]
    chunks = [body[start : start + 50] for start in range(0, len(body), 50)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return "\r\n".join([*head, "", ""]).encode() + framed + b"0\r\n\r\n"


def incompressible(size: int) -> bytes:
    """A JSON document whose gzip has about as many bytes as asked for."""
    values = np.random.default_rng(0).standard_normal(size // 4 // 4 * 4).astype("<f4")
    return rows(len(values) // 4, tensor={"data": values.tolist()})


SMALL, SMALL_HEADER = binary(2)
LARGE, LARGE_HEADER = binary(37_500)
ZIPPED, LARGE_ZIPPED = (
    gzip.compress(rows(300), mtime=0),
    gzip.compress(incompressible(40_000), mtime=0),
)

TAKES_LANE: list[tuple[str, int, bytes]] = [
    ("JSON", 200, post(rows())),
    ("JSON with an id", 200, post(rows(3, id="mine"), "x-request-id: r-1")),
    ("empty request id", 200, post(rows(), "x-request-id:")),
    ("two request ids", 200, post(rows(), "x-request-id: a", "x-request-id: b")),
    ("request id of UTF-8", 200, post(rows(), "X-REQUEST-ID: \xc3\xa9")),
    ("by version", 200, post(rows(), path=f"{ROUTE}/versions/1/infer")),
    ("by model", 200, post(rows(), path=f"{ROUTE}{ROUTE}/infer")),
    ("small binary", 200, post(SMALL, SMALL_HEADER)),
    ("large binary", 200, post(LARGE, LARGE_HEADER)),
    ("large JSON", 200, post(rows(3000))),
    ("zipped", 200, post(ZIPPED, "content-encoding: gzip", "accept-encoding: gzip")),
    ("large zipped", 200, post(LARGE_ZIPPED, "content-encoding: gzip")),
    ("large, to be zipped", 200, post(LARGE, LARGE_HEADER, "accept-encoding: deflate")),
    ("no JSON", 400, post(b"{")),
    ("large, no JSON", 400, post(b"[" * 50_000)),
    ("large, no gzip", 400, post(b"x" * 50_000, "content-encoding: gzip")),
    ("large, cut JSON", 400, post(rows(3000), "inference-header-content-length: 1000")),
    (
        "JSON longer than the body",
        400,
        post(rows(3000), "inference-header-content-length: 999999999"),
    ),
    ("no number", 400, post(rows(3000), "inference-header-content-length: ten")),
    ("unknown input", 400, post(rows(tensor={"name": "X"}))),
    ("wrong dtype", 400, post(rows(tensor={"datatype": "FP64"}))),
    ("unsupported", 501, post(rows(parameters={"sequence_id": 3}))),
    ("unknown encoding", 400, post(rows(), "content-encoding: br")),
    ("overloaded", 503, post(rows(id="one-too-many"))),
    ("a bug", 500, post(rows(id="broken"), "x-request-id: r-2")),
    ("deadline", 504, post(rows(), "x-rayprism-timeout-s: 0.000001")),
    ("wrong deadline", 400, post(rows(), "x-rayprism-timeout-s: -1")),
    ("this version", 200, post(rows(), "x-rayprism-version: 1")),
    ("another version", 404, post(rows(), "x-rayprism-version: 2")),
    ("no version", 400, post(rows(), "x-rayprism-version: two")),
    (
        "inflates over the limit",
        413,
        post(gzip.compress(b" " * (MAX_BODY + 1), mtime=0), "content-encoding:gzip"),
    ),
]
GOES_TO_SERVE: list[tuple[str, int, bytes]] = [
    ("metadata", 200, get(ROUTE)),
    ("readiness", 200, get(f"{ROUTE}/ready")),
    ("no such path", 404, get(f"{ROUTE}/nonsense")),
    ("elsewhere", 404, get("/elsewhere")),
    ("Serve's own", 200, get("/-/routes")),
    ("wrong method", 405, get(INFER)),
    ("another method", 405, get(INFER, method="DELETE")),
    ("another method with a body", 405, post(rows()).replace(b"POST", b"PUT")),
    ("slash at the end", 200, post(rows(), path=f"{INFER}/")),
    ("another version's path", 404, post(rows(), path=f"{ROUTE}/versions/2/infer")),
    ("query", 200, post(rows(), path=f"{INFER}?a=b")),
    ("escaped", 200, post(rows(), path=INFER.replace("tiny", "t%69ny"))),
    ("absolute", 200, post(rows(), path=f"http://test{INFER}")),
    ("chunked", 200, chunked(rows())),
    ("large chunked", 200, chunked(SMALL, SMALL_HEADER)),
    ("no body", 400, get(INFER, method="POST")),
    ("empty body", 400, post(b"")),
    ("length of many digits", 400, post(rows()).replace(b"length: ", b"length: " + b"0" * 5000)),
    ("time-out of Serve's", 200, post(rows(), "x-request-timeout-seconds: 9")),
    ("Serve need not watch", 200, post(rows(), "x-request-disconnect-disabled: ?1")),
    ("upgrade", 400, post(rows(), "connection: upgrade", "upgrade: h2c")),
]


async def same(
    tiny: ModelVersion, ask: Callable[[LaneServer], Awaitable[Any]]
) -> tuple[Any, LaneServer]:
    """What comes of it, with and without the lane; and the server with it."""
    async with serving(tiny, lane=False) as server:
        without = await ask(server)
    async with serving(tiny) as server:
        with_lane = await ask(server)
        assert server.taken_by_serve > 0
    assert with_lane == without
    return with_lane, server


@on_both_loops
async def test_inference_requests_get_the_same_answers(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> dict[str, Answer]:
        found = {}
        for name, status, request in TAKES_LANE:
            client = await server.client_in_lane()
            taken = server.taken_by_serve
            found[name] = await client.ask(request)
            assert found[name].status == status, name
            assert await client.ask(request) == found[name], name
            if server.has_lane:
                assert server.taken_by_serve == taken, name
        return found

    await same(tiny, ask)


@on_both_loops
async def test_all_others_go_to_serve_and_the_connection_goes_on(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> dict[str, list[Answer]]:
        found = {}
        for name, status, request in GOES_TO_SERVE:
            client = await server.client_in_lane()
            taken = server.taken_by_serve
            found[name] = [
                await client.ask(request),
                await client.ask(post(rows())),
                await client.ask(request),
                await client.ask(post(rows())),
                await client.ask(post(rows(2))),
            ]
            statuses = [answer.status for answer in found[name]]
            assert statuses == [status, 200, status, 200, 200], name
            if server.has_lane:
                # What was answered by Serve leads back at once where its path is an inference
                # request's; else the next inference request does.
                assert server.taken_by_serve - taken in (2, 4), name
        return found

    await same(tiny, ask)


@on_both_loops
async def test_the_lane_is_left_for_a_body_over_the_limit(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> tuple[Answer, Answer]:
        client = await server.client_in_lane()
        # Answered from the head: nobody reads a megabyte to refuse it.
        head = get(INFER, f"content-length: {MAX_BODY + 1}", method="POST")
        refused = await client.ask(head)
        await client.send(b" " * (MAX_BODY + 1))
        return refused, await client.ask(post(rows()))

    (refused, after), server = await same(tiny, ask)
    assert (refused.status, after.status) == (413, 200)
    assert "allowed are 1000000" in refused.body.decode()
    assert server.taken_by_serve >= 2


@on_both_loops
async def test_a_client_that_waits_before_it_sends_its_body(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> list[Answer]:
        client = await server.client_in_lane()
        answers = []
        for body in (rows(), LARGE):
            whole = post(body, LARGE_HEADER if body is LARGE else "x-none: 0")
            head = whole[: -len(body)].replace(b"host", b"expect: 100-continue\r\nhost")
            answers += [await client.ask(head), await client.ask(body)]
        return answers

    answers, _ = await same(tiny, ask)
    assert [answer.status for answer in answers] == [100, 200, 100, 200]


@pytest.mark.parametrize("pieces", [1, 100])
@on_both_loops
async def test_a_pipeline_is_answered_in_order(tiny: ModelVersion, pieces: int) -> None:
    sent = [
        post(rows(1), "x-request-id: 1"),
        post(rows(2), "x-request-id: 2"),
        get(ROUTE, "x-request-id: 3"),
        post(LARGE, LARGE_HEADER, "x-request-id: 4"),
        post(b"{", "x-request-id: 5"),
        chunked(rows(3), "x-request-id: 6"),
        post(LARGE, LARGE_HEADER, "x-request-id: 7"),
        post(SMALL, SMALL_HEADER, "x-request-id: 8"),
    ]

    async def ask(server: LaneServer) -> list[Answer]:
        client = await server.client_in_lane()
        stream = b"".join(sent)
        size = len(stream) // pieces + 1
        parts = [stream[start : start + size] for start in range(0, len(stream), size)]
        sending = asyncio.create_task(client.send(*parts))
        answers = [await client.answer() for _ in sent]
        await sending
        return answers

    answers, server = await same(tiny, ask)
    assert [answer["x-request-id"] for answer in answers] == list("12345678")
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 400, 200, 200, 200]
    assert server.taken_by_serve < 1 + len(sent)


@on_both_loops
async def test_the_model_gets_the_memory_that_the_socket_filled(
    tiny: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[Any] = []
    aligned = lane_connection._aligned

    def kept(*args: Any) -> memoryview:
        filled.append(aligned(*args))
        return filled[-1]

    monkeypatch.setattr(lane_connection, "_aligned", kept)
    model = load_model(tiny)
    run, given = model.run, list[Any]()  # in pieces: a batch has no room for all rows

    def watched(batch: Any) -> Any:
        given.append(batch["x"])
        return run(batch)

    monkeypatch.setattr(model, "run", watched)
    service = ModelService(model, UserConfig(max_body_bytes=MAX_BODY, max_queue_rows=100_000))
    body, length = binary(37_500)
    try:
        async with lane_server(ModelApp(service)) as server:
            client = await server.client_in_lane()
            given.clear()
            answer = await client.ask(post(body, length))
            assert answer.status == 200
    finally:
        await service.close()
    assert len(body) > 600_000
    (memory,) = filled
    whole = np.frombuffer(memory, np.uint8)
    assert sum(len(rows) for rows in given) == 37_500
    assert all(np.shares_memory(rows, whole) for rows in given), "no copy after the socket"


@on_both_loops
async def test_head_requests_between_others(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> list[Answer]:
        client = await server.client_in_lane()
        answers = []
        for _ in range(2):
            answers.append(await client.ask(get(ROUTE, method="HEAD"), has_body=False))
            answers.append(await client.ask(get(INFER, method="HEAD"), has_body=False))
            answers += [await client.ask(post(rows())), await client.ask(post(rows(2)))]
        return answers

    answers, _ = await same(tiny, ask)
    assert [answer.status for answer in answers] == [200, 405, 200, 200] * 2


@on_both_loops
async def test_a_client_that_everyone_has(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> list[Any]:
        found: list[Any] = []
        address = f"http://127.0.0.1:{server.port}"
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=address, limits=limits) as client:
            for _ in range(2):
                for answer in (
                    await client.post(INFER, content=rows(), headers={"x-request-id": "mine"}),
                    await client.post(INFER, content=rows(500)),
                    await client.get(ROUTE),
                    await client.post(INFER, content=LARGE, headers=[LARGE_HEADER.split(": ")]),
                    await client.post(INFER, content=_stream(rows(3))),
                    await client.post(INFER, content=rows(id="one-too-many")),
                ):
                    headers = comparable(list(answer.headers.items()))
                    found.append((answer.status_code, headers, answer.content))
        return found

    found, _ = await same(tiny, ask)
    assert [status for status, _, _ in found] == [200, 200, 200, 200, 200, 503] * 2
    assert ("retry-after", "3") in found[5][1]


async def _stream(body: bytes) -> AsyncIterator[bytes]:
    yield body[:20]
    yield body[20:]


@on_both_loops
async def test_a_request_that_says_it_is_the_last(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> list[Any]:
        found: list[Any] = []
        for body in (rows(), b"", LARGE):
            client = await server.client_in_lane()
            header = LARGE_HEADER if body is LARGE else "x-none: 0"
            found += [
                await client.ask(post(body, header, "connection: close")),
                await client.rest(),
            ]
        for header in ("x-none: 0", "connection: keep-alive"):
            client = await server.client_in_lane()
            old = post(rows(), header).replace(b"HTTP/1.1", b"HTTP/1.0")
            found += [await client.ask(old), await client.rest()]
        return found

    found, _ = await same(tiny, ask)
    assert [answer.status for answer in found[::2]] == [200, 400, 200, 200, 200]
    assert all(("connection", "close") in answer.headers for answer in found[::2])
    assert found[1::2] == [b""] * 5


NO_HTTP = [
    b"POST / HTTP/9\r\n\r\n",
    b"nonsense\r\n\r\n",
    post(b"{}").replace(b"length: 2", b"length: 2\r\ncontent-length: 2"),
    post(b"{}").replace(b"length: 2", b"length: +2"),
    post(b"{}").replace(b"length: 2", b"length: 2, 2"),
    post(b"{}").replace(b"length: 2", b"length:"),
    post(b"{}").replace(b"length: 2", b"length : 2"),
    post(b"{}").replace(b"length: 2", b"length: 99999999999999999999999"),
    post(b"{}", "transfer-encoding: chunked"),
    post(b"{}").replace(b"host", b" host"),
    post(b"{}").replace(b"host: test\r\n", b"host: a\r\n b\r\n"),
    post(b"{}").replace(b"host: test\r\n", b"host: test\n"),
    post(b"\r\n\r\nPOST").replace(b"8\r\n\r\n", b"8\n\n"),
    post(b"{}").replace(b"test", b"t\x00st"),
    post(b"{}", "x-request-id: a\rb"),
]


@on_both_loops
async def test_what_is_no_http_is_refused_as_uvicorn_does(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> list[list[Any]]:
        found: list[list[Any]] = []
        for bad in NO_HTTP:
            client = await server.client_in_lane()
            taken = server.taken_by_serve
            before = await client.ask(post(rows()))
            found.append([before, await client.ask(bad), await client.rest()])
            assert [answer.status for answer in found[-1][:2]] == [200, 400], bad
            assert found[-1][2] == b"", bad
            if server.has_lane:
                assert server.taken_by_serve == taken, bad
        return found

    await same(tiny, ask)


# Accounts


@pytest.mark.usefixtures("_counted_soon")
@on_both_loops
async def test_serve_counts_the_same(tiny: ModelVersion) -> None:
    async def ask(server: LaneServer) -> Any:
        client = await server.client_in_lane()
        for _ in range(2):
            for _, _, request in TAKES_LANE:
                await client.ask(request)
        metrics = server.replica.metrics
        sent = 1 + 2 * len(TAKES_LANE)
        # Serve counts behind the answer; and those in the lane are counted here at first.
        await until(lambda: metrics.counted["requests"].total() == sent)
        assert metrics._user_code_time_accumulator.get_total() > 0
        assert metrics._max_processing_latency_trackers[ROUTE].get_max() > 0
        return metrics.counted

    counted, server = await same(tiny, ask)
    assert server.taken_by_serve == 1
    by_status = {dict(tags)["status_code"]: n for tags, n in counted["http"].items()}
    assert by_status["504"] == 2
    assert sum(by_status.values()) == 1 + 2 * len(TAKES_LANE)
    assert counted["http errors"].total() == sum(
        n for status, n in by_status.items() if status >= "400"
    )


@pytest.mark.usefixtures("_counted_soon")
@on_both_loops
async def test_serve_counts_clients_that_left_the_same() -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        client = await server.client()
        await client.ask(post(b"first"))
        await client.send(post(b"wait"))
        await until(lambda: app.bodies[1:])
        assert server.replica.metrics.ongoing == (1, 1)
        assert server.replica.slots_taken == 1
        await client.close()
        metrics = server.replica.metrics
        await until(lambda: metrics.counted["http"].total() == 2)
        assert app.cancelled == 1
        return metrics.counted

    async def work(body: bytes) -> bytes:
        if body == b"wait":
            await asyncio.Event().wait()
        return body

    found = []
    for lane in (False, True):
        app = ScriptedApp(work)
        async with lane_server(app, lane=lane) as server:
            found.append(await ask(server, app))
    assert found[0] == found[1]
    assert found[1]["errors"] == {
        frozenset({("route", ROUTE), ("exception_type", "CancelledError")}): 1
    }


@on_both_loops
async def test_a_request_without_a_slot_waits_for_one_at_serve() -> None:
    async def work(body: bytes) -> bytes:
        if body in gates:
            await gates[body].wait()
        return body

    gates = {name: asyncio.Event() for name in (b"a", b"b", b"c" * 100_000)}
    app = ScriptedApp(work)
    async with lane_server(app, max_ongoing_requests=1) as server:
        first, second, third = [await server.client_in_lane() for _ in range(3)]
        await first.send(post(b"a"))
        await until(lambda: app.bodies[3:])
        await second.send(post(b"b"))
        await until(lambda: server.taken_by_serve == 4)
        await third.send(post(b"c" * 100_000))
        await until(lambda: server.taken_by_serve == 5)
        # They wait in Serve's queue, and have not begun.
        assert app.bodies[3:] == [b"a"]
        assert server.replica.metrics.ongoing == (1, 1)
        assert server.replica._num_queued_requests == 2
        for name, client in zip(gates, (first, second, third), strict=True):
            gates[name].set()
            assert (await client.answer()).body == name
        # And go back to the lane.
        assert (await second.ask(post(b"a"))).body == b"a"
        assert server.taken_by_serve == 5


@on_both_loops
async def test_serves_full_queue_refuses_what_has_no_slot() -> None:
    async def work(body: bytes) -> bytes:
        if body == b"wait":
            await gate.wait()
        return body

    gate = asyncio.Event()
    app = ScriptedApp(work)
    async with lane_server(app, max_ongoing_requests=1) as server:
        clients = [await server.client_in_lane() for _ in range(3)]
        server.replica._deployment_config.max_queued_requests = 1
        for client in clients[:2]:
            await client.send(post(b"wait"))
        await until(lambda: server.replica._num_queued_requests == 1)
        assert (await clients[2].ask(post(b"no"))).status == 503
        gate.set()
        for client in clients[:2]:
            assert (await client.answer()).body == b"wait"


def accounts_of() -> tuple[RayAccounts, ReplicaStandIn]:
    replica = ReplicaStandIn(ScriptedApp(), max_ongoing_requests=2)
    return RayAccounts(replica), replica


@async_test
async def test_slots_are_serves_own() -> None:
    accounts, replica = accounts_of()
    semaphore = replica._semaphore
    assert [accounts.begin() for _ in range(3)] == [True, True, False]
    assert replica.metrics.ongoing == (2, 2)
    waiting = asyncio.create_task(semaphore.acquire())
    await asyncio.sleep(0)
    accounts.end(200, 0.1)
    # The one that waits at Serve comes first, also before it knows.
    assert not accounts.begin()
    assert await waiting
    assert not accounts.begin()
    semaphore.release()
    assert accounts.begin()
    for _ in range(2):
        accounts.end(200, 0.1)
    assert (replica.slots_taken, replica.metrics.ongoing) == (0, (0, 0))
    # More of them from one moment to the next: Serve changes it in place.
    replica._deployment_config.max_ongoing_requests = 3
    assert [accounts.begin() for _ in range(4)] == [True, True, True, False]
    for _ in range(3):
        accounts.end(200, 0.1)


def tags(**named: str) -> frozenset[tuple[str, str]]:
    return frozenset(named.items())


@pytest.mark.usefixtures("_counted_soon")
@async_test
async def test_counts_are_handed_over_by_status() -> None:
    accounts, replica = accounts_of()
    for status, took_s in ((200, 0.25), (200, 0.5), (404, 0.125), (503, 0.125), (499, 1.0)):
        assert accounts.begin()
        accounts.end(status, took_s)
    metrics = replica.metrics
    assert not metrics.counted["requests"]
    await until(lambda: metrics.counted["requests"])
    both = {"route": ROUTE, "method": "POST", "application": "tiny"}
    assert metrics.counted == {
        "requests": {tags(route=ROUTE): 4},
        "errors": {tags(route=ROUTE, exception_type="CancelledError"): 1},
        "http": {
            tags(**both, status_code="200"): 2,
            tags(**both, status_code="404"): 1,
            tags(**both, status_code="503"): 1,
            tags(**both, status_code="499"): 1,
        },
        "http errors": {tags(**both, error_code=code): 1 for code in ("404", "503", "499")},
        "deployment errors": {
            tags(**both, deployment="model", error_code=code): 1 for code in ("404", "503", "499")
        },
    }
    assert metrics._user_code_time_accumulator.get_total() == 2000
    assert metrics._max_processing_latency_trackers[ROUTE].get_max() == 1000
    # Nothing is counted twice, and the longest time is that of the newest half second.
    assert accounts.begin()
    accounts.end(200, 0.5)
    await until(lambda: metrics.counted["requests"][tags(route=ROUTE)] == 5)
    assert metrics.counted["http"][tags(**both, status_code="200")] == 3
    assert metrics._user_code_time_accumulator.get_total() == 2500


@async_test
async def test_where_the_proxy_counts_requests_the_replica_does_not() -> None:
    accounts, replica = accounts_of()
    replica.metrics._should_emit_request_ingress_metrics = lambda protocol: False
    replica.metrics._ingress_metrics.clear()
    assert accounts.begin()
    accounts.end(404, 0.1)
    accounts._flush()
    assert replica.metrics.counted["requests"] == {tags(route=ROUTE): 1}
    assert not replica.metrics.counted["http"]
    assert RequestProtocol.HTTP not in replica.metrics._ingress_metrics


def _deployment(**settings: Any) -> Callable[[ReplicaStandIn], None]:
    def change(replica: ReplicaStandIn) -> None:
        for name, value in settings.items():
            setattr(replica._deployment_config, name, value)

    return change


def _http(**settings: Any) -> Callable[[ReplicaStandIn], None]:
    return lambda replica: replica._http_options.__dict__.update(settings)


def _separate_thread(replica: ReplicaStandIn) -> None:
    replica._user_callable_wrapper._run_user_code_in_separate_thread = True


@pytest.mark.parametrize(
    ("change", "is_plain"),
    [
        (_deployment(), True),
        (_deployment(logging_config=None), False),
        (_deployment(logging_config={}), False),
        (_deployment(logging_config={"enable_access_log": True}), False),
        (_deployment(logging_config=LoggingConfig(enable_access_log=False).model_dump()), True),
        (_deployment(logging_config=LoggingConfig().model_dump()), False),
        (_deployment(max_queued_requests=1), True),
        (_http(request_timeout_s=30.0), False),
        (_http(root_path="/below"), False),
        (_separate_thread, False),
    ],
)
@async_test
async def test_what_serve_is_set_to_closes_the_lane(change: Any, is_plain: bool) -> None:
    accounts, replica = accounts_of()
    change(replica)
    assert accounts.is_plain is is_plain


@async_test
async def test_serves_tracing_closes_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts, _ = accounts_of()
    monkeypatch.setattr(lane_module, "is_tracing_enabled", lambda: True)
    assert not accounts.is_plain


@pytest.mark.parametrize(("route", "prefix"), [("/", ""), ("/a/b", "/a/b"), (None, ""), ("", "")])
@async_test
async def test_the_prefix_is_serves(route: str | None, prefix: str) -> None:
    accounts, replica = accounts_of()
    replica._route_prefix = route
    assert accounts.prefix == prefix


# Opening and closing


@async_test
async def test_settings_are_looked_at_four_times_a_second() -> None:
    now_s = [0.0]
    accounts = SimpleNamespace(is_plain=True, prefix="/a")
    lane = Lane(ScriptedApp(), accounts, lambda: now_s[0])  # type: ignore[arg-type]
    assert lane.leads_to("/a/infer")
    assert not lane.leads_to("/a/inferno")
    accounts.is_plain, accounts.prefix = False, "/b"
    now_s[0] = 0.2
    assert lane.leads_to("/a/infer")
    now_s[0] = 0.25
    assert not lane.leads_to("/a/infer")
    accounts.is_plain = True
    now_s[0] = 0.5
    assert not lane.leads_to("/a/infer")
    assert lane.leads_to("/b/infer")


@on_both_loops
async def test_the_lane_closes_and_opens_under_connections(
    tiny: ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    def accessed() -> int:
        return sum("POST" in record.message for record in caplog.records)

    caplog.set_level(logging.INFO, "ray.serve")
    async with serving(tiny) as server:
        client = await server.client_in_lane()
        inside = await client.ask(post(rows()))
        config = server.replica._deployment_config
        config.logging_config = {"enable_access_log": True}
        server.look_again()
        before = accessed()
        assert [await client.ask(post(rows())) for _ in range(2)] == [inside] * 2
        await until(lambda: accessed() == before + 2)
        assert server.taken_by_serve == 3
        config.logging_config = {"enable_access_log": False}
        server.look_again()
        # The first one leads back.
        assert [await client.ask(post(rows())) for _ in range(3)] == [inside] * 3
        assert server.taken_by_serve == 4
        assert server.connection


@on_both_loops
async def test_the_route_prefix_changes_in_place(tiny: ModelVersion) -> None:
    async with serving(tiny) as server:
        client = await server.client_in_lane()
        server.replica._route_prefix = "/elsewhere"
        server.look_again()
        assert (await client.ask(post(rows()))).status == 404
        assert server.taken_by_serve == 2
        for _ in range(3):
            answer = await client.ask(post(rows(), path="/elsewhere/infer"))
            assert answer.status == 200
        assert server.taken_by_serve == 3
        server.replica._route_prefix = "/"
        server.look_again()
        for _ in range(3):
            assert (await client.ask(post(rows()))).status == 200
        assert server.taken_by_serve == 3


@pytest.mark.parametrize(
    "break_it",
    [
        lambda replica: delattr(replica, "_semaphore"),
        lambda replica: delattr(replica, "_metrics_manager"),
        lambda replica: delattr(replica.metrics, "_error_counter"),
        lambda replica: delattr(replica, "_deployment_config"),
        lambda replica: setattr(replica, "_http_options", SimpleNamespace()),
        lambda replica: setattr(replica, "_user_callable_wrapper", SimpleNamespace()),
        lambda replica: setattr(lane_module, "RequestMetadata", lambda: None),
    ],
)
@async_test
async def test_another_ray_has_no_lane(
    break_it: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answered = 0

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        nonlocal answered
        answered += 1

    monkeypatch.setattr(lane_module, "RequestMetadata", lane_module.RequestMetadata)
    monkeypatch.setattr(lane_module, "_app", ScriptedApp())
    replica = ReplicaStandIn(ScriptedApp())
    (middleware,) = middlewares()
    switch = middleware.cls(SimpleNamespace(_app=replica._direct_ingress_asgi))
    switch._app = answer
    break_it(replica)
    for _ in range(3):
        await switch({"type": "http", "path": INFER}, None, None)
    assert answered == 3
    warned = [record for record in caplog.records if "no fast lane" in record.message]
    assert len(warned) == 1


@async_test
async def test_a_proxy_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve puts the middleware around its Python proxies, too."""
    asked: list[Any] = []

    class Proxy:
        async def __call__(self, *message: Any) -> None:
            asked.append(message)

    monkeypatch.setattr(lane_module, "_app", ScriptedApp())
    (middleware,) = middlewares()
    switch = middleware.cls(Proxy())
    message = ({"type": "http", "path": INFER}, object(), object())
    await switch(*message)
    assert asked == [message]
    assert switch._lane is None


@on_both_loops
async def test_requests_before_the_application_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        monkeypatch.setattr(lane_module, "_app", None)
        client = await server.client_in_lane()
        await client.ask(post(b"second"))
        assert server.taken_by_serve == 2
        lane_module.open_lane(app)
        for _ in range(3):
            assert (await client.ask(post(b"again"))).body == b"again"
        assert server.taken_by_serve == 3


@async_test
async def test_request_ids_are_new_and_random_uuids() -> None:
    lane = Lane(ScriptedApp(), SimpleNamespace())  # type: ignore[arg-type]
    ids = [lane.new_request_id().decode() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(comparable([("x-request-id", id)]) == (("x-request-id", "generated"),) for id in ids)
    other = Lane(ScriptedApp(), SimpleNamespace())  # type: ignore[arg-type]
    assert other.new_request_id().decode() not in ids
