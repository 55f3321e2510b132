"""Connections that were taken over from uvicorn: what comes, what goes, and how they end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import re
import warnings
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asyncs import until
from tests.support.lane_server import (
    INFER,
    LOOPS,
    ROUTE,
    LaneServer,
    ScriptedApp,
    get,
    lane_server,
    on_both_loops,
    post,
    run_on,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving import lane_connection as module
    from rayprism.serving.lane_connection import LaneConnection

LARGE = bytes(range(256)) * 400
DIRECT = 32 * 1024


@pytest.fixture(autouse=True)
def _few_messages(caplog: pytest.LogCaptureFixture) -> None:
    # Serve makes one for each request, also where none is to be seen.
    caplog.set_level(logging.WARNING, "ray.serve")


async def same(
    ask: Callable[[LaneServer, ScriptedApp], Awaitable[Any]],
    work: Callable[[Any], Awaitable[bytes]] | None = None,
    app_class: type[ScriptedApp] = ScriptedApp,
    **options: Any,
) -> Any:
    """What comes of it, with and without the lane."""
    found = []
    for lane in (False, True):
        app = app_class(work)
        async with lane_server(app, lane=lane, **options) as server:
            found.append(await ask(server, app))
    assert found[1] == found[0]
    return found[1]


class Gate:
    """Work that waits until it may go on, for bodies that say so."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.waiting = 0

    async def __call__(self, body: Any) -> bytes:
        body = bytes(body)
        if body.startswith(b"wait"):
            self.waiting += 1
            await self.opened.wait()
        return body


# What comes


@pytest.mark.parametrize("size", [1, 2, DIRECT - 1, DIRECT, DIRECT + 1, len(LARGE)])
@on_both_loops
async def test_bodies_come_as_they_were_sent(size: int) -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        body = LARGE[:size]
        head, whole = post(body)[:-size], post(body)
        for pieces in (
            [whole],
            [head, body],
            [head + body[:1], body[1:]],
            [head + body[:-1], body[-1:] + whole],
            [whole + whole + whole],
        ):
            await client.send(*pieces)
            for _ in range(b"".join(pieces).count(head)):
                assert (await client.answer()).body == body
        assert app.bodies == [b"first"] + [body] * 8
        assert server.taken_by_serve == 1


@on_both_loops
async def test_a_body_that_comes_byte_by_byte() -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        for body, parts in ((b"slowly", 6), (LARGE, 50)):
            head = post(body)[: -len(body)]
            pieces = [body[at : at + 1] for at in range(parts)]
            assert (await client.ask(head, *pieces, body[parts:])).body == body
        assert server.taken_by_serve == 1


@on_both_loops
async def test_a_head_that_comes_byte_by_byte_is_uvicorns() -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        for taken, body in ((2, b"slowly"), (3, LARGE)):
            whole = post(body)
            pieces = [whole[at : at + 1] for at in range(90)]
            assert (await client.ask(*pieces, whole[90:])).body == body
            assert (await client.ask(post(b"next"))).body == b"next"
            assert server.taken_by_serve == taken


@pytest.mark.parametrize("bad", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\nhost: a\n\n", b"hi\n"])
@on_both_loops
async def test_what_will_never_be_a_head_is_refused_at_once(bad: bytes) -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        client = await server.client_in_lane()
        await client.send(bad)
        return undated(await client.rest())

    assert (await same(ask)).startswith(b"HTTP/1.1 400 ")


@on_both_loops
async def test_tensors_of_large_bodies_lie_at_multiples_of_64() -> None:
    addresses: list[int] = []

    async def work(body: Any) -> bytes:
        if len(body) >= DIRECT and header.endswith(str(json_length)):
            assert isinstance(body, memoryview)
            assert body.readonly
            tensor = np.frombuffer(body[json_length:], np.uint8)
            addresses.append(tensor.ctypes.data % 64)
        return b"done"

    app = ScriptedApp(work)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        for json_length in (0, 1, 63, 64, 100, 40_000):
            header = f"inference-header-content-length: {json_length}"
            await client.send(post(LARGE, header)[: -len(LARGE)])
            await until(lambda: not connection._is_idle)
            assert (await client.ask(LARGE)).body == b"done"
        assert addresses == [0] * 6
        for nonsense in ("", "-1", "ten", "9" * 40):
            header = f"inference-header-content-length: {nonsense}"
            await client.send(post(LARGE, header)[: -len(LARGE)])
            await until(lambda: not connection._is_idle)
            assert (await client.ask(LARGE)).body == b"done"
        assert server.taken_by_serve == 1


@on_both_loops
async def test_the_memory_of_a_body_goes_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    real = np.empty

    def empty(*args: Any) -> Any:
        memory = real(*args)
        made.append(weakref.ref(memory))
        return memory

    gate = Gate()
    app = ScriptedApp(gate)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        gc.disable()
        monkeypatch.setattr(module.np, "empty", empty)
        try:
            connection = server.connection
            whole = post(b"wait" + LARGE)
            await client.send(whole[:200])
            await until(lambda: not connection._is_idle)
            await client.send(whole[200:])
            await until(lambda: gate.waiting)
            assert made[0]() is not None
            gate.opened.set()
            await client.answer()
            app.bodies.clear()
            # The connection goes on, and no memory with it.
            await until(lambda: made[0]() is None)
            assert server.connection
        finally:
            gc.enable()


@on_both_loops
async def test_more_than_the_head_says_is_the_next_request() -> None:
    async with lane_server(ScriptedApp()) as server:
        client = await server.client_in_lane()
        # uvicorn by itself would refuse the second one before the first is answered.
        lie = post(b"{}").replace(b"length: 2", b"length: 1")
        assert (await client.ask(lie)).body == b"{"
        await client.send(b"\r\n\r\n")
        assert (await client.answer()).status == 400
        assert await client.rest() == b""


@pytest.mark.parametrize("size", [10, DIRECT + 1])
@on_both_loops
async def test_less_than_the_head_says_is_no_request(size: int) -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        await client.send(post(LARGE[:size])[:-1])
        client.writer.write_eof()
        assert await client.rest() == b""
        assert app.bodies == [b"first"]
        assert server.replica.metrics.begun == 1


@on_both_loops
async def test_a_long_head_is_uvicorns() -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        client = await server.client_in_lane()
        start = get(INFER, method="POST")[:-2]
        for _ in range(17):
            await client.send(b"x-long: " + b"y" * 4096 + b"\r\n" if start == b"" else start)
            start = b""
        return await client.ask(b"content-length: 4\r\n\r\nlong")

    assert (await same(ask)).body == b"long"


@on_both_loops
async def test_what_the_application_is_told() -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client()
        for _ in range(2):
            await client.ask(post(b"{}", "X-Request-Id: mine", "A: b", "a: c"))
        by_serve, by_lane = app.scopes
        for name in by_lane:
            assert by_lane[name] == by_serve[name], name
        assert {"type", "method", "path", "root_path", "headers"} == set(by_lane)
        assert (b"a", b"c") in by_lane["headers"]
        await client.ask(post(b"{}"))
        made = dict(app.scopes[2]["headers"])[b"x-request-id"]
        assert len(made) == 36


# What goes


@on_both_loops
async def test_a_client_that_does_not_read_gets_no_work_done() -> None:
    answer = b"a" * 1_000_000

    async def work(body: Any) -> bytes:
        return answer

    app = ScriptedApp(work)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        # What the client's stream and the two sockets hold is some of the answers.
        sending = asyncio.create_task(client.send(*(post(b"%d" % n) for n in range(60))))
        await until(lambda: connection._web.flow.write_paused)
        for _ in range(200):
            await asyncio.sleep(0)
        assert connection._web.flow.write_paused
        assert len(app.bodies) < 30
        assert server.replica.slots_taken == 1
        for _ in range(60):
            assert (await client.answer()).body == answer
        await sending
        assert [bytes(body) for body in app.bodies[1:]] == [b"%d" % n for n in range(60)]


@on_both_loops
async def test_a_client_leaves_that_did_not_read() -> None:
    async def work(body: Any) -> bytes:
        return b"a" * 10_000_000

    app = ScriptedApp(work)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        await client.send(*(post(b"%d" % n) for n in range(5)))
        await until(lambda: connection._web.flow.write_paused and connection._task is not None)
        await client.close()
        await until(lambda: not server.connections)
        await until(lambda: connection._task is None)
        server.lane.accounts._flush()
        counted = server.replica.metrics.counted
        assert counted["errors"].total() == 1
        assert counted["http"].total() == len(app.bodies)


@on_both_loops
async def test_what_comes_too_early_waits_where_it_is() -> None:
    gate = Gate()
    app = ScriptedApp(gate)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        await client.send(post(b"wait"))
        await until(lambda: gate.waiting)
        sending = asyncio.create_task(client.send(*[post(LARGE)] * 20))
        await until(lambda: connection._received)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not connection._transport.is_reading()
        assert len(connection._received) <= 256 * 1024
        gate.opened.set()
        assert (await client.answer()).body == b"wait"
        for _ in range(20):
            assert (await client.answer()).body == LARGE
        await sending


# How an application fails


class Failing(ScriptedApp):
    """What it does after `first` is its body's to say."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        how = bytes((await receive())["body"])
        self.bodies.append(how)
        if how == b"raise":
            raise ValueError("a bug")
        if how == b"cancelled":
            raise asyncio.CancelledError
        if how in (b"nothing", b""):
            return
        status = int(how) if how.isdigit() else 200
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if how == b"half":
            raise ValueError("a bug")
        await send({"type": "http.response.body", "body": b"ok"})
        if how == b"twice":
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": b"no"})
        if how == b"late":
            raise ValueError("a bug behind the answer")


def undated(raw: bytes) -> bytes:
    return re.sub(rb"date: [^\r]*\r\n", b"", raw)


@pytest.mark.parametrize("how", [b"raise", b"nothing"])
@on_both_loops
async def test_an_application_that_does_not_answer(
    how: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> bytes:
        client = await server.client_in_lane()
        await client.send(post(how))
        return undated(await client.rest())

    raw = await same(ask, app_class=Failing)
    assert raw.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert raw.endswith(b"connection: close\r\n\r\nInternal Server Error")
    messages = [record for record in caplog.records if record.name == "ray.serve.rayprism"]
    assert [record.levelno for record in messages] == [logging.ERROR]
    assert bool(messages[0].exc_info and messages[0].exc_info[0]) == (how == b"raise")


@pytest.mark.parametrize("how", [b"cancelled", b"half"])
@on_both_loops
async def test_no_connection_is_left_without_an_answer(how: bytes) -> None:
    """Serve gives none to what is cancelled inside, and half of one to what fails in between."""
    async with lane_server(Failing()) as server:
        client = await server.client_in_lane()
        await client.send(post(how))
        assert (await client.answer()).status == 500
        assert await client.rest() == b""
        server.lane.accounts._flush()
        found = {dict(tags)["status_code"] for tags in server.replica.metrics.counted["http"]}
        assert found == {"200", "500"}


@pytest.mark.parametrize("how", [b"twice", b"late"])
@on_both_loops
async def test_there_is_one_answer_to_a_request(how: bytes) -> None:
    async with lane_server(Failing()) as server:
        client = await server.client_in_lane()
        await client.send(post(how))
        assert (await client.answer()).body == b"ok"
        assert await client.rest() == b""
        server.lane.accounts._flush()
        assert server.replica.metrics.counted["requests"].total() == 2


@pytest.mark.parametrize("status", [b"201", b"299", b"404", b"499", b"599"])
@on_both_loops
async def test_any_status_can_be_sent(status: bytes) -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> list[bytes]:
        client = await server.client_in_lane()
        await client.send(post(status, "x-request-id: 1"))
        head = await client.reader.readuntil(b"\r\n\r\n")
        return [
            undated(head),
            await client.reader.readexactly(2),
            (await client.ask(post(b"x"))).body,
        ]

    head, *bodies = await same(ask, app_class=Failing)
    assert head.split()[1] == status
    assert bodies == [b"ok", b"ok"]


# Clients that leave


@pytest.mark.parametrize("how", ["close", "half"])
@on_both_loops
async def test_a_client_leaves_while_it_is_worked_for(how: str) -> None:
    gates: list[Gate] = []

    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        gate = Gate()
        gates.append(gate)
        app.work = gate
        client = await server.client_in_lane()
        await client.send(post(b"wait"))
        await until(lambda: gate.waiting)
        if how == "close":
            await client.close()
        else:
            # uvicorn takes a client that will send no more for one that has left.
            client.writer.write_eof()
            assert b"HTTP/1.1 200" not in await client.rest()
        await until(lambda: app.cancelled == 1)
        await until(lambda: not server.connections)
        return server.replica.metrics.begun

    assert await same(ask) == 2


@pytest.mark.parametrize("part", [3, 60, 100, 50_000])
@on_both_loops
async def test_a_client_leaves_in_the_middle_of_a_request(part: int) -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        await client.send(post(LARGE)[:part])
        await until(lambda: server.connections != {connection} or not connection._is_idle)
        await client.close()
        await until(lambda: not server.connections)
        assert app.bodies == [b"first"]
        assert connection._web.parser is None, "uvicorn knows of the end"


@on_both_loops
async def test_a_client_leaves_before_its_request_begins() -> None:
    """The slot is taken before the task runs: it has to be given back also where it never does."""
    gate = Gate()
    app = ScriptedApp(gate)
    async with lane_server(app) as server:
        await server.client_in_lane()
        connection = server.connection
        connection._transport.abort()
        connection.data_received(post(b"wait"))
        assert server.replica.slots_taken == 1
        await until(lambda: not server.connections)
        await until(lambda: server.replica.slots_taken == 0)


@on_both_loops
async def test_many_clients_leave_at_any_moment() -> None:
    app = ScriptedApp()
    async with lane_server(app) as server:
        for turns in range(12):
            clients = [await server.client_in_lane() for _ in range(3)]
            for client, body in zip(clients, (b"x", LARGE, b"y" * 20_000), strict=True):
                client.writer.write(post(body) + post(body)[:-1])
            for _ in range(turns):
                await asyncio.sleep(0)
            for client in clients:
                await client.close()
        await until(lambda: not server.connections)


# How uvicorn's server ends


@pytest.mark.parametrize("sent", ["nothing", "head", "body", "large body"])
@on_both_loops
async def test_the_server_ends(sent: str) -> None:
    """Whoever sent a whole head gets an answer, however long the body takes."""
    whole = post(LARGE if sent == "large body" else b"body")
    parts = {"nothing": 0, "head": 30, "body": len(whole) - 2, "large body": 50_000}

    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        client = await server.client_in_lane()
        part = parts[sent]
        if part:
            await client.send(whole[:part])
            await until(lambda: _is_half_read(server))
        ending = asyncio.create_task(server.web.shutdown())
        if "body" not in sent:
            found: Any = await client.rest()
        else:
            await until(lambda: server.connections and not server.web.servers[0].sockets)
            answer = await client.ask(whole[part:])
            found = (answer, await client.rest())
        await ending
        return found

    found = await same(ask)
    if "body" in sent:
        answer, rest = found
        assert answer.body == (LARGE if sent == "large body" else b"body")
        assert ("connection", "close") in answer.headers
        assert rest == b""
    else:
        assert found == b""


def _is_half_read(server: LaneServer) -> bool:
    (connection,) = server.connections
    if isinstance(connection, LaneConnection):
        return not connection._is_idle
    return connection.scope is not connection.cycle.scope or not connection.cycle.response_complete


@pytest.mark.parametrize("end", [b"end", LARGE[: DIRECT + 1]])
@on_both_loops
async def test_the_server_ends_while_requests_run(end: bytes) -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        gate = Gate()
        app.work = gate
        client = await server.client_in_lane()
        pipeline = post(b"wait") + post(b"pipelined") + post(end)
        await client.send(pipeline[:-1])
        await until(lambda: gate.waiting)
        if server.has_lane:
            await until(lambda: server.connection._received)
        else:
            await until(lambda: len(next(iter(server.connections)).pipeline) == 2)
        ending = asyncio.create_task(server.web.shutdown())
        await until(lambda: not server.web.servers[0].sockets)
        gate.opened.set()
        found = [await client.answer() for _ in range(2)]
        found.append(await client.ask(pipeline[-1:]))
        rest = await client.rest()
        await ending
        return found, rest

    found, rest = await same(ask)
    assert [answer.body for answer in found] == [b"wait", b"pipelined", end]
    assert [("connection", "close") in answer.headers for answer in found] == [False, False, True]
    assert rest == b""


@on_both_loops
async def test_the_server_ends_and_a_request_without_a_slot_is_answered() -> None:
    gate = Gate()
    app = ScriptedApp(gate)
    async with lane_server(app, max_ongoing_requests=1) as server:
        first, second = [await server.client_in_lane() for _ in range(2)]
        await first.send(post(b"wait"))
        await until(lambda: gate.waiting)
        await second.send(post(LARGE)[:1000])
        await until(lambda: any(not c._is_idle and c._task is None for c in server.connections))
        ending = asyncio.create_task(server.web.shutdown())
        await until(lambda: not server.web.servers[0].sockets)
        await second.send(post(LARGE)[1000:])
        await until(lambda: server.taken_by_serve == 3)
        gate.opened.set()
        for client, body in ((first, b"wait"), (second, LARGE)):
            assert (await client.answer()).body == body
            assert await client.rest() == b""
        await ending


# Time


@on_both_loops
async def test_an_idle_connection_is_closed_in_time() -> None:
    async def ask(server: LaneServer, app: ScriptedApp) -> Any:
        client = await server.client_in_lane()
        began_s = asyncio.get_running_loop().time()
        assert (await client.ask(post(b"second"))).body == b"second"
        assert await client.rest() == b""
        assert 0.09 < asyncio.get_running_loop().time() - began_s < 5

    await same(ask, keep_alive_s=0.1)


@pytest.mark.parametrize("size", [20, len(LARGE)])
@pytest.mark.parametrize("part", [0, 90, -2])
@on_both_loops
async def test_a_connection_is_not_idle_in_the_middle_of_a_request(part: int, size: int) -> None:
    gate = Gate()
    app = ScriptedApp(gate)
    async with lane_server(app) as server:
        client = await server.client_in_lane()
        connection = server.connection
        body = b"wait" + LARGE[:size]
        whole = post(body)
        await client.send(whole[: part or None])
        await until(lambda: gate.waiting if not part else not connection._is_idle)
        connection._idle_since_s -= 1000
        connection._check_idle()
        await client.send(whole[part:] if part else b"")
        gate.opened.set()
        assert (await client.answer()).body == body
        # Now it is, and its time begins with the answer.
        await until(lambda: connection._is_idle)
        connection._check_idle()
        assert not connection._transport.is_closing()
        connection._idle_since_s -= 1000
        connection._check_idle()
        assert await client.rest() == b""


@on_both_loops
async def test_a_connection_that_was_given_back_has_uvicorns_time() -> None:
    async with lane_server(ScriptedApp()) as server:
        client = await server.client_in_lane()
        connection = server.connection
        idle = connection._idle
        assert connection._web.timeout_keep_alive_task is None
        await client.ask(get("/elsewhere"))
        assert idle is not None
        assert idle.cancelled()
        assert server.connections == {connection._web}
        assert connection._web.timeout_keep_alive_task is not None


# Taking over


@pytest.mark.parametrize("size", [1, 60, None])
@pytest.mark.parametrize("body", [b"second", LARGE])
@on_both_loops
async def test_what_uvicorn_has_read_stays_with_it(size: int | None, body: bytes) -> None:
    async with lane_server(ScriptedApp()) as server:
        client = await server.client()
        second = post(body)
        early = second[:size]
        assert (await client.ask(post(b"first") + early)).body == b"first"
        assert (await client.ask(second[len(early) :])).body == body
        assert (await client.ask(post(b"third"))).body == b"third"
        assert server.connection


@on_both_loops
async def test_a_pipeline_that_uvicorn_has_begun_is_its_own() -> None:
    gate = Gate()
    async with lane_server(ScriptedApp(gate)) as server:
        client = await server.client()
        assert (await client.ask(post(b"first") + post(b"wait"))).body == b"first"
        await until(lambda: gate.waiting)
        await client.send(post(b"third"))
        (connection,) = server.connections
        assert not isinstance(connection, LaneConnection)
        gate.opened.set()
        assert [(await client.answer()).body for _ in range(2)] == [b"wait", b"third"]


@on_both_loops
async def test_a_body_is_no_request() -> None:
    """Also where uvicorn has its head, and the body could be taken for an inference request."""
    app = ScriptedApp()
    inner = post(b"inner")
    async with lane_server(app) as server:
        client = await server.client()
        outer = post(inner)
        await client.ask(post(b"first") + outer[: -len(inner)])
        assert (await client.ask(inner)).body == inner
        for _ in range(2):
            await client.send(outer[: -len(inner)])
            assert (await client.ask(inner)).body == inner
        assert app.bodies == [b"first", inner, inner, inner]


# Any requests, in any pieces


BODIES = st.sampled_from([b"{}", b"x", b"y" * 300, b"z" * (DIRECT - 1), b"w" * DIRECT, LARGE])
CHUNKS = st.lists(st.sampled_from([b"a", b"b" * 50, b"c" * 3000]), max_size=3)
HEADERS = st.lists(
    st.sampled_from(
        ["a: b", "expect: 100-continue", "connection: keep-alive", "x-request-timeout-seconds: 9"]
    ),
    max_size=2,
    unique=True,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    headers = [f"x-request-id: {draw(st.integers(0, 9))}", *draw(HEADERS)]
    kind = draw(st.sampled_from(["infer"] * 5 + ["chunked", "empty", "get", "head", "elsewhere"]))
    if kind == "infer":
        return post(draw(BODIES), *headers)
    if kind == "empty":
        return post(b"", *headers)
    if kind == "elsewhere":
        return post(draw(BODIES), *headers, path=f"{ROUTE}/ready")
    if kind == "chunked":
        chunks = [*draw(CHUNKS), b""]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        return get(INFER, *headers, "transfer-encoding: chunked", method="POST") + framed
    return get(INFER, *headers, method=kind.upper())


@pytest.mark.parametrize("loop_name", list(LOOPS))
def test_any_requests_in_any_pieces(loop_name: str) -> None:
    async def ask(server: LaneServer, pieces: list[bytes]) -> bytes:
        client = await server.client_in_lane()
        sending = asyncio.create_task(client.send(*pieces))
        raw = undated(await client.rest())
        await sending
        return raw

    async def compare(pieces: list[bytes]) -> None:
        async def run(server: LaneServer, app: ScriptedApp) -> Any:
            return await ask(server, pieces), [bytes(body) for body in app.bodies]

        raw, _ = await same(run)
        assert raw.count(b"connection: close\r\n") == 1

    @settings(max_examples=20)
    @given(
        st.lists(requests(), max_size=6),
        st.lists(st.integers(0, 1 << 20), max_size=8),
        st.lists(st.integers(0, 200), max_size=4),
    )
    def check(sent: list[bytes], far: list[int], near: list[int]) -> None:
        stream = b"".join(sent) + post(b"last", "x-request-id: 1", "connection: close")
        cuts = {cut % (len(stream) + 1) for cut in far + near} | {0, len(stream)}
        pieces = [stream[start:end] for start, end in itertools.pairwise(sorted(cuts))]
        run_on(loop_name, compare(pieces))

    check()
