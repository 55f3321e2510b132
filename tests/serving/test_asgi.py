"""Bodies in, answers out: the edges of the small HTTP layer."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
import zlib
from typing import Any

import httpx
import pytest

from rayprism.errors import InvalidInput, Overloaded, TooLarge
from rayprism.models.repository import ModelVersion
from rayprism.serving import asgi
from rayprism.serving.asgi import (
    AsgiApp,
    ClientLeft,
    Headers,
    header_length,
    inflate_body,
    read_body,
    relative_path,
    send_body,
)
from tests.serving.conftest import serving
from tests.support.asyncs import async_test

LIMIT = 2000
SECRET = "/srv/keys: 0xdeadbeef"


class Wire:
    """The client's side of one request: what it sends in turn, and what it got."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.received = 0
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        self.received += 1
        assert self.messages, "nothing more comes: it would wait for ever"
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> Headers:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def chunk(body: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


LEFT = {"type": "http.disconnect"}


# Bodies in


@pytest.mark.parametrize(
    "messages",
    [
        [chunk(b"abcdef")],
        [chunk(b"abc", more=True), chunk(b"def")],
        [chunk(b"", more=True), chunk(b"abcdef", more=True), chunk()],
        [*(chunk(bytes([c]), more=True) for c in b"abcdef"), chunk()],
        [{"type": "http.request", "more_body": True}, chunk(b"abcdef")],
    ],
    ids=["whole", "two", "empty ends", "bytes", "no body key"],
)
@async_test
async def test_chunks_are_put_together(messages: list[dict[str, Any]]) -> None:
    assert await read_body(Wire(*messages).receive, {}, LIMIT) == b"abcdef"


@async_test
async def test_no_body_at_all() -> None:
    assert await read_body(Wire({"type": "http.request"}).receive, {}, LIMIT) == b""


@pytest.mark.parametrize("length", [b"2000", b"02000", b"0", b"17"])
@async_test
async def test_lengths_within_the_limit_are_taken(length: bytes) -> None:
    wire = Wire(chunk(b"x" * 2000))
    assert len(await read_body(wire.receive, {b"content-length": length}, LIMIT)) == 2000


@pytest.mark.parametrize(
    ("length", "kind", "word"),
    [
        (b"2001", TooLarge, "2001 bytes"),
        (b"9" * 18, TooLarge, "999999999999999999 bytes"),
        (b"9" * 19, InvalidInput, "Content-Length"),
        (b"9" * 5000, InvalidInput, "'9999999999999999999999999999999999999999'"),
        (b"-1000", InvalidInput, "'-1000'"),
        (b"+1000", InvalidInput, "'+1000'"),
        (b"1e10", InvalidInput, "'1e10'"),
        (b"0x7d0", InvalidInput, "'0x7d0'"),
        (b"2 000", InvalidInput, "'2 000'"),
        (b"1000, 1000", InvalidInput, "'1000, 1000'"),
        (b"chunked", InvalidInput, "allowed is a number of bytes"),
        (b"\xb2\xb2\xb2\xb2", InvalidInput, "'²²²²'"),
        (b"10\x0000", InvalidInput, "allowed is a number of bytes"),
    ],
)
@async_test
async def test_lengths_that_cannot_be(length: bytes, kind: type[Exception], word: str) -> None:
    wire = Wire(chunk(b"x"))
    with pytest.raises(kind) as caught:
        await read_body(wire.receive, {b"content-length": length}, LIMIT)
    assert word in str(caught.value)
    assert len(str(caught.value)) < 200
    assert wire.received == 0, "told before a byte is read"


@pytest.mark.parametrize("length", [b"", b"-1", b"abc", b"5"])
@async_test
async def test_a_length_that_lies_does_no_harm(length: bytes) -> None:
    """What is short enough to be skipped is bounded by what really comes."""
    headers = {b"content-length": length}
    assert len(await read_body(Wire(chunk(b"x" * 99)).receive, headers, LIMIT)) == 99
    with pytest.raises(TooLarge):
        await read_body(Wire(chunk(b"x" * 2001)).receive, headers, LIMIT)


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([chunk(b"x" * 2001)], 1),
        ([chunk(b"x" * 2001, more=True), chunk(b"x")], 1),
        ([chunk(b"x" * 1000, more=True), chunk(b"x" * 1001)], 2),
        ([chunk(b"x" * 1000, more=True)] * 5, 3),
    ],
)
@async_test
async def test_the_limit_holds_without_a_length(messages: list[dict[str, Any]], read: int) -> None:
    wire = Wire(*messages)
    with pytest.raises(TooLarge, match=r"allowed are 2000 \(user_config.max_body_bytes\)"):
        await read_body(wire.receive, {}, LIMIT)
    assert wire.received == read, "what is over it is not read"


@async_test
async def test_exactly_the_limit_is_allowed() -> None:
    assert len(await read_body(Wire(chunk(b"x" * 2000)).receive, {}, LIMIT)) == 2000
    parts = [chunk(b"x" * 1000, more=True), chunk(b"x" * 1000, more=True), chunk()]
    assert len(await read_body(Wire(*parts).receive, {}, LIMIT)) == 2000


@pytest.mark.parametrize("before", [[], [chunk(b"x", more=True)], [chunk(b"x", more=True)] * 3])
@async_test
async def test_clients_that_leave_in_the_middle(before: list[dict[str, Any]]) -> None:
    with pytest.raises(ClientLeft):
        await read_body(Wire(*before, LEFT).receive, {}, LIMIT)


def raw_deflate(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(body) + deflater.flush()


@pytest.mark.parametrize(
    ("encoding", "squeeze"),
    [
        (b"gzip", gzip.compress),
        (b"GZIP", gzip.compress),
        (b"x-gzip", gzip.compress),
        (b"deflate", zlib.compress),
        (b"deflate", raw_deflate),
        (b"identity", bytes),
        (b"", bytes),
    ],
)
@async_test
async def test_the_limit_holds_after_inflating(encoding: bytes, squeeze: Any) -> None:
    headers = {b"content-encoding": encoding}

    async def read(size: int) -> bytes:
        squeezed = squeeze(b"x" * size)
        half = len(squeezed) // 2
        wire = Wire(chunk(squeezed[:half], more=True), chunk(squeezed[half:]))
        return await inflate_body(await read_body(wire.receive, headers, LIMIT), headers, LIMIT)

    assert await read(LIMIT) == b"x" * LIMIT
    with pytest.raises(TooLarge, match="2000"):
        await read(LIMIT + 1)
    with pytest.raises(TooLarge, match="2000"):
        await read(200_000)


@async_test
async def test_the_limit_holds_before_inflating() -> None:
    squeezed = gzip.compress(b"x", mtime=0) * 100
    assert len(squeezed) > LIMIT
    wire = Wire(chunk(squeezed))
    with pytest.raises(TooLarge, match=f"{len(squeezed)} bytes"):
        await read_body(wire.receive, {b"content-encoding": b"gzip"}, LIMIT)


@pytest.mark.parametrize(
    ("encoding", "body", "word"),
    [
        (b"br", b"x", "br"),
        (b"gzip, gzip", b"x", "'gzip, gzip'"),
        (b"\xff", b"x", "identity"),
        (b"gzip", b"plain", "gzip"),
        (b"gzip", b"", "too early"),
        (b"gzip", gzip.compress(b"x", mtime=0)[:-1], "too early"),
        (b"deflate", zlib.compress(b"x") + b"more", "4 bytes left over"),
    ],
)
@async_test
async def test_bodies_that_cannot_be_inflated(encoding: bytes, body: bytes, word: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await inflate_body(body, {b"content-encoding": encoding}, LIMIT)
    assert word in str(caught.value)


@pytest.fixture
def codec_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that bodies were (de)compressed in, in turn."""
    names: list[str] = []

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            names.append(threading.current_thread().name)
            return function(*args)

        return call

    for name in ("compress", "decompress"):
        monkeypatch.setattr(asgi, name, watched(getattr(asgi, name)))
    return names


@async_test
async def test_large_bodies_are_inflated_in_a_thread(codec_threads: list[str]) -> None:
    noise = bytes(range(256)) * 400
    headers = {b"content-encoding": b"gzip"}
    for level, size in ((1, "small"), (0, "large")):
        squeezed = gzip.compress(noise, level)
        assert (len(squeezed) > 64 * 1024) == (size == "large")
        assert await inflate_body(squeezed, headers, 10**6) == noise
    assert codec_threads[0] == threading.current_thread().name
    assert codec_threads[1] != threading.current_thread().name


@pytest.mark.parametrize(
    ("value", "want"),
    [(None, None), (b"0", 0), (b"17", 17), (b"9" * 18, int("9" * 18))],
)
def test_the_length_of_the_json(value: bytes | None, want: int | None) -> None:
    headers = {} if value is None else {b"inference-header-content-length": value}
    assert header_length(headers) == want


@pytest.mark.parametrize("value", [b"", b"-1", b"1.0", b" 1", b"ten", b"9" * 5000, b"\xb2"])
def test_lengths_of_the_json_that_cannot_be(value: bytes) -> None:
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length"):
        header_length({b"inference-header-content-length": value})


# Answers out


async def answered(body: bytes, accept: bytes | None = None, **options: Any) -> Wire:
    wire = Wire()
    headers = {} if accept is None else {b"accept-encoding": accept}
    await send_body(wire.send, body, headers, **options)
    assert [message["type"] for message in wire.sent] == [
        "http.response.start",
        "http.response.body",
    ]
    assert wire.headers[b"content-length"] == b"%d" % len(wire.body)
    assert len(wire.headers) == len(wire.sent[0]["headers"]), "no header twice"
    return wire


BODY = b"0123456789" * 500


@pytest.mark.parametrize(
    ("accept", "want"),
    [
        (None, None),
        (b"", None),
        (b"br", None),
        (b"identity", None),
        (b"gzip;q=0", None),
        (b"gzip", b"gzip"),
        (b"br, gzip;q=0.5", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip;q=0.1, deflate", b"deflate"),
        (b"*", b"gzip"),
        (b"\xff\xfe", None),
    ],
)
@async_test
async def test_answers_are_compressed_only_where_it_is_asked(
    accept: bytes | None, want: bytes | None
) -> None:
    wire = await answered(BODY, accept)
    assert wire.headers.get(b"content-encoding") == want
    assert wire.headers.get(b"vary") == (b"accept-encoding" if want else None)
    inflate: dict[bytes | None, Any] = {b"gzip": gzip.decompress, b"deflate": zlib.decompress}
    assert inflate.get(want, bytes)(wire.body) == BODY


@pytest.mark.parametrize(("size", "squeezed"), [(1023, False), (1024, True)])
@async_test
async def test_small_answers_are_left_alone(size: int, squeezed: bool) -> None:
    wire = await answered(b"x" * size, b"gzip")
    assert (b"content-encoding" in wire.headers) == squeezed


@async_test
async def test_large_answers_are_compressed_in_a_thread(codec_threads: list[str]) -> None:
    for size in (64 * 1024 - 1, 64 * 1024):
        wire = await answered(b"x" * size, b"gzip")
        assert gzip.decompress(wire.body) == b"x" * size
    here = threading.current_thread().name
    assert [name == here for name in codec_threads] == [True, False]


@async_test
async def test_the_content_type_says_whether_tensors_are_binary() -> None:
    plain = await answered(b"{}")
    assert plain.headers[b"content-type"] == b"application/json"
    assert b"inference-header-content-length" not in plain.headers
    for accept in (None, b"gzip"):
        binary = await answered(BODY, accept, json_length=17, extra=((b"x-more", b"1"),))
        assert binary.headers[b"content-type"] == b"application/octet-stream"
        assert binary.headers[b"inference-header-content-length"] == b"17", "before compression"
        assert binary.headers[b"x-more"] == b"1"
    assert (await answered(b"", status=418)).status == 418
    assert (await answered(BODY, json_length=0)).headers[b"inference-header-content-length"] == b"0"


# Applications


class Raising(AsgiApp):
    """Does what a test says."""

    def __init__(self, action: Any) -> None:
        self.action = action

    async def answer(
        self, scope: Any, receive: Any, send: Any, headers: Headers, request_id: str
    ) -> None:
        if isinstance(self.action, BaseException):
            raise self.action
        await self.action(receive, send)


def http_scope(path: str = "/", **changes: Any) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [], **changes}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET),
        KeyError(SECRET),
        OSError(2, SECRET),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
        StopAsyncIteration(SECRET),
        RecursionError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unexpected_errors_tell_nothing_but_where_to_look(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire()
    scope = http_scope(headers=[(b"x-request-id", b"r-\xe9")])
    asyncio.run(Raising(error)(scope, wire.receive, wire.send))
    assert wire.status == 500
    assert wire.headers[b"content-type"] == b"application/json"
    told = json.loads(wire.body)
    assert list(told) == ["error"]
    assert SECRET not in wire.body.decode()
    assert type(error).__name__ not in wire.body.decode()
    assert "r-é" in told["error"]
    (record,) = caplog.records
    assert "r-é" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@async_test
async def test_our_own_errors_are_told() -> None:
    wire = Wire()
    await Raising(Overloaded("the queue is full", 2.5))(http_scope(), wire.receive, wire.send)
    assert wire.status == 503
    assert wire.headers[b"retry-after"] == b"3"
    assert json.loads(wire.body) == {"error": "the queue is full"}
    wire = Wire()
    await Raising(InvalidInput("a lone \ud800"))(http_scope(), wire.receive, wire.send)
    assert (wire.status, json.loads(wire.body)) == (400, {"error": "a lone \\ud800"})
    assert b"retry-after" not in wire.headers


@async_test
async def test_nothing_is_sent_to_who_has_left() -> None:
    async def read(receive: Any, send: Any) -> None:
        await read_body(receive, {}, LIMIT)

    wire = Wire(chunk(b"x", more=True), LEFT)
    await Raising(read)(http_scope(), wire.receive, wire.send)
    assert wire.sent == []


@async_test
async def test_a_cancelled_request_stays_cancelled() -> None:
    wire = Wire()
    with pytest.raises(asyncio.CancelledError):
        await Raising(asyncio.CancelledError())(http_scope(), wire.receive, wire.send)
    assert wire.sent == []


@async_test
async def test_websockets_are_refused() -> None:
    wire = Wire({"type": "websocket.connect"})
    scope = {"type": "websocket", "path": "/v2/models/tiny/infer", "headers": []}
    await Raising(RuntimeError("not called"))(scope, wire.receive, wire.send)
    assert wire.sent == [{"type": "websocket.close"}]


@async_test
async def test_lifespan_is_answered_to_its_end() -> None:
    wire = Wire({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    await Raising(RuntimeError("not called"))({"type": "lifespan"}, wire.receive, wire.send)
    assert [message["type"] for message in wire.sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


@pytest.mark.parametrize(
    ("path", "root", "want"),
    [
        ("/v2/docs", "", "/v2/docs"),
        ("/v2/models/tiny/infer", "/v2/models/tiny", "/infer"),
        ("/v2/models/tiny", "/v2/models/tiny", ""),
        ("/v2/models/tiny/", "/v2/models/tiny", "/"),
        # Servers of an older reading of the specification leave the root out of the path.
        ("/infer", "/v2/models/tiny", "/infer"),
        # Another model's path is not taken for this one's.
        ("/v2/models/tiny2/infer", "/v2/models/tiny", "2/infer"),
        ("/v2/v2/docs", "/v2", "/v2/docs"),
    ],
)
def test_paths_below_the_mount_point(path: str, root: str, want: str) -> None:
    assert relative_path(http_scope(path, root_path=root)) == want
    if not root:
        assert relative_path(http_scope(path)) == want


# The whole way, through a real model


def document(rows: int) -> dict[str, Any]:
    data = [0.5] * (4 * rows)
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": data}]}


@async_test
async def test_head_is_get_without_surprises(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny", "/v2/docs"):
            got, head = await client.get(path), await client.head(path)
            assert head.status_code == got.status_code == 200
            for name in ("content-type", "content-length"):
                assert head.headers[name] == got.headers[name]
        assert (await client.head("/v2/models/other")).status_code == 404
        refused = await client.head("/v2/models/tiny/infer")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("mount", ["", "/v2/models/tiny", "/some/where"])
def test_a_model_answers_wherever_it_is_mounted(tiny: ModelVersion, mount: str) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (_, client):
            app = client._transport.app  # type: ignore[attr-defined]
            transport = httpx.ASGITransport(app=app, root_path=mount)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as mounted:
                for path in ("/infer", "/versions/1/infer"):
                    answer = await mounted.post(mount + path, json=document(2))
                    assert answer.status_code == 200, answer.text
                for path in ("/ready", "/config", "/stats", "/openapi.json", "/versions/1"):
                    assert (await mounted.get(mount + path)).status_code == 200, path
                assert (await mounted.get(f"{mount}/versions/2")).status_code == 404
                nonsense = await mounted.get(f"{mount}2/ready")
                assert nonsense.status_code == 404

    run()


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_page_finds_its_document(tiny: ModelVersion, slash: str) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (_, client):
            page = await client.get(f"/v2/models/tiny/docs{slash}")
            (url,) = re.findall(r'data-document="([^"]+)"', page.text)
            found = page.url.join(url)
            assert found.path == "/v2/models/tiny/openapi.json"
            assert (await client.get(found)).status_code == 200

    run()


@async_test
async def test_a_compressed_body_under_the_largest_limit(tiny: ModelVersion) -> None:
    async with serving(tiny, max_body_bytes=2**40) as (_, client):
        squeezed = gzip.compress(json.dumps(document(1)).encode())
        headers = {"content-encoding": "gzip"}
        answer = await client.post("/v2/models/tiny/infer", content=squeezed, headers=headers)
        assert answer.status_code == 200, answer.text


@async_test
async def test_clients_can_write_any_number_of_paths(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        for count in range(200):
            path = "/v2/models/tiny/ready" + "/" * count
            assert (await client.get(path)).status_code == 200
        app = client._transport.app  # type: ignore[attr-defined]
        assert len(app._endpoints) <= 64, "what is remembered is bounded"
