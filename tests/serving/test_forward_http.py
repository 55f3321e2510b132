"""Split traffic over HTTP: a stable version, candidates and shadows behind real ports."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.serving.http import ModelApp
from tests.serving.conftest import write_code
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_example, mlp_reference, save_mlp
from tests.support.versions import Hanging, Member, answer, fleet
from tests.support.ways import both_ways

__all__ = ["both_ways"]
pytestmark = pytest.mark.usefixtures("both_ways")

INFER = "/v2/models/split/infer"
X = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)

INFINITE = """
import numpy as np

class Model:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        x = inputs["x"]
        y = np.where(x == 7, np.float32(np.inf), x)
        return {"y": np.where(x == 8, np.float32(np.nan), y), "label": x.astype(str).astype(object)}
"""


@pytest.fixture(scope="module")
def versions(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    """Version 2 answers otherwise than 1, and 3 as 1."""
    folder = tmp_path_factory.mktemp("split")
    return [
        push_model(
            repository,
            "split",
            save_mlp(folder / f"{number}.onnx", seed=seed),
            example=mlp_example(),
        ).version
        for number, seed in ((1, 0), (2, 1), (3, 0))
    ]


@pytest.fixture(scope="module")
def infinite(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    """Two versions alike, whose answers hold infinities, NaN and strings."""
    return [
        push_model(
            repository,
            "infinite",
            write_code(tmp_path_factory.mktemp("infinite"), INFINITE + f"\n# {number}\n"),
            example=document(np.array([[0.5], [1.0]], np.float32)),
            code="model.py:Model",
            allow_code=True,
        ).version
        for number in (1, 2)
    ]


def splits(weight: float = 100, **traffic: Any) -> dict[str, Any]:
    return {"traffic": {"candidates": [{"version": 2, "weight": weight}], **traffic}}


def copies(*shadows: int, **traffic: Any) -> dict[str, Any]:
    return {"traffic": {"shadow": [{"version": v, "sample": 100} for v in shadows], **traffic}}


def document(x: Any = X, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [tensor]} | changes


def binary(x: Any = X) -> tuple[bytes, dict[str, str]]:
    """A body with its tensors behind the JSON, and the header for it."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    head = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    text = json.dumps(head).encode()
    return text + x.tobytes(), {"inference-header-content-length": str(len(text))}


async def post(
    member: Member, sent: Any = None, path: str = INFER, **headers: str
) -> tuple[int, str, Any]:
    """Status, the version that the header names, and the answer."""
    content = sent if isinstance(sent, bytes) else json.dumps(sent or document()).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    got = await member.client.post(path, content=content, headers=named)
    if got.headers["content-type"] != "application/json":
        return got.status_code, got.headers["x-rayprism-version"], got.content
    return got.status_code, got.headers["x-rayprism-version"], got.json()


async def answered_by(member: Member, **headers: str) -> int:
    """The version that answers, and answers rightly."""
    status, version, found = await post(member, **headers)
    assert status == 200, found
    assert found["model_version"] == version
    got = np.array(found["outputs"][0]["data"], np.float32).reshape(3, 3)
    want = mlp_reference(X, seed=1 if version == "2" else 0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return int(version)


# Which version


@async_test
async def test_weights_0_and_100_are_exact(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(0)) as (stable, proxy):
        assert {await answered_by(stable) for _ in range(20)} == {1}
        assert proxy.calls == []
        assert stable.service.reconfigure(splits(100))
        assert {await answered_by(stable) for _ in range(20)} == {2}
        assert len(proxy.calls) == 20
        assert stable.candidate(2)["answered"] == 20
        assert stable.service.statistics.snapshot().success.count == 20, "its own only"
        assert stable.service.reconfigure(None)
        assert await answered_by(stable) == 1


@async_test
async def test_without_traffic_nobody_asks_the_controller(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2]) as (stable, proxy):
        for _ in range(5):
            assert await answered_by(stable) == 1
        assert stable.service.reconfigure(splits(0))
        assert await answered_by(stable) == 1
        assert (proxy.asked, proxy.calls) == (0, [])


@async_test
async def test_requests_are_drawn(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(50)) as (stable, _):
        drawn = []
        for uniform in (0.0, 0.25, 0.5, 0.75):
            stable.draws(uniform)
            drawn.append(await answered_by(stable))
        assert sorted(drawn) == [1, 1, 2, 2]


@async_test
async def test_neither_splits_nor_copies_take_a_request_off_the_fast_lane(
    versions: list[ModelVersion],
) -> None:
    config = splits(50)
    config["traffic"]["shadow"] = [{"version": 3, "sample": 100}]
    async with fleet(versions, v1=config) as (stable, proxy):
        stable.draws(0.0, 0.25, 0.5, 0.75)
        content, replies = json.dumps(document()).encode(), list[Any]()
        for member, headers in (
            *[(stable, list[Any]())] * 4,
            (proxy.members[2], [(b"x-rayprism-forwarded", b"1"), (b"x-rayprism-timeout-s", b"9")]),
        ):
            cancel = member.app.infer_now(
                INFER, headers, content, "r", lambda *reply: replies.append(reply)
            )
            assert cancel is not None
        await until(lambda: len(replies) == 5)
        answered = sorted(dict(headers)[b"x-rayprism-version"] for _, headers, _ in replies)
        assert answered == [b"1", b"1", b"2", b"2", b"2"]
        await until(lambda: stable.shadow(3)["compared"] == 2)


@async_test
async def test_a_user_stays_at_one_version(versions: list[ModelVersion]) -> None:
    sticky = {"header": "X-User-Id"}
    async with fleet(versions[:2], v1=splits(50, sticky=sticky)) as (stable, proxy):
        stable.draws()  # none is drawn
        first = [await answered_by(stable, x_user_id=f"u{number}") for number in range(12)]
        assert set(first) == {1, 2}
        assert first == [await answered_by(stable, x_user_id=f"u{number}") for number in range(12)]
        assert proxy.calls[0].headers[b"x-user-id"].startswith(b"u"), "it travels"
        stable.draws(0.0, 0.5)
        both = {await answered_by(stable), await answered_by(stable, x_user_id="")}
        assert both == {1, 2}, "without one, requests are drawn"


@async_test
async def test_a_version_may_be_asked_for(versions: list[ModelVersion]) -> None:
    traffic = splits(100)
    traffic["traffic"]["candidates"][0]["weight"] = 0
    async with fleet(versions, v1=traffic) as (stable, proxy):
        assert await answered_by(stable, x_rayprism_version="2") == 2, "weight 0"
        assert await answered_by(stable, x_rayprism_version="3") == 3, "not in the file"
        assert await answered_by(stable, x_rayprism_version="1") == 1
        assert proxy.versions() == [2, 3]
        status, version, found = await post(stable, x_rayprism_version="9")
        assert (status, version) == (404, "1")
        assert "version '9'" in found["error"]
        status, version, found = await post(stable, x_rayprism_version="newest")
        assert (status, version) == (400, "1")
        assert "'newest'" in found["error"]
        assert stable.service.reconfigure(splits(100))
        assert await answered_by(stable, x_rayprism_version="1") == 1, "though all go to 2"


@async_test
async def test_a_version_in_the_path_is_never_split(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        for path in ("/v2/models/split/versions/1/infer", "/versions/1/infer"):
            for headers in ({}, {"x_rayprism_version": "2"}):
                status, version, _ = await post(stable, path=path, **headers)
                assert (status, version) == (200, "1")
        status, _, _ = await post(stable, path="/v2/models/split/versions/2/infer")
        assert status == 404, "it has an address of its own"
        assert proxy.calls == []


@pytest.mark.parametrize("root", ["/v2/models/split/versions/1", "/api/v2/models/split/versions/1"])
@async_test
async def test_nothing_is_split_at_the_address_of_a_version(
    versions: list[ModelVersion], root: str
) -> None:
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        transport = httpx.ASGITransport(app=stable.app, root_path=root)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for headers in ({}, {"x-rayprism-version": "2"}):
                answer = await client.post(f"{root}/infer", json=mlp_example(), headers=headers)
                assert answer.headers["x-rayprism-version"] == "1", answer.text
        assert proxy.calls == []


@async_test
async def test_two_versions_that_point_at_each_other(versions: list[ModelVersion]) -> None:
    back = {"traffic": {"candidates": [{"version": 1, "weight": 100}]}}
    async with fleet(versions[:2], v1=splits(100), v2=back) as (stable, proxy):
        assert await answered_by(stable) == 2
        assert await answered_by(proxy.members[2]) == 1
        assert await answered_by(stable, x_rayprism_version="2") == 2
        assert proxy.versions() == [2, 1, 2], "one step each"


@async_test
async def test_what_was_sent_on_is_answered_whatever_it_asks_for(
    versions: list[ModelVersion],
) -> None:
    async with fleet(versions[:2], v1=splits(100) | {}) as (stable, proxy):
        forwarded = {"x_rayprism_forwarded": "7", "x_rayprism_version": "2"}
        assert await answered_by(stable, **forwarded) == 1
        assert proxy.calls == []


# What travels


@async_test
async def test_every_answer_says_who_gave_it(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        for method, path in (
            ("GET", "/v2/models/split"),
            ("GET", "/v2/models/split/traffic"),
            ("GET", "/v2/health/live"),
            ("GET", "/v2/models/other"),
            ("GET", "/nothing"),
            ("DELETE", "/v2/models/split"),
            ("POST", "/v2/repository/models/split/load"),
            ("POST", INFER),
        ):
            got = await stable.client.request(method, path)
            assert got.headers["x-rayprism-version"] == "1", path


@async_test
async def test_headers_go_on_but_for_those_of_the_split(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        await post(
            stable,
            x_request_id="r-77",
            authorization="Bearer abc",
            x_rayprism_version="2",
            connection="keep-alive, x-rayprism-forwarded, x-hop",
            x_hop="not for others",
            x_rayprism_timeout_s="8",
        )
        (call,) = proxy.calls
        assert call.headers[b"x-request-id"] == b"r-77"
        assert call.headers[b"authorization"] == b"Bearer abc"
        assert call.headers[b"x-rayprism-forwarded"] == b"1", "whatever the client says"
        assert b"x-rayprism-version" not in call.headers
        assert b"x-hop" not in call.headers
        assert 0 < float(call.headers[b"x-rayprism-timeout-s"]) <= 8


@pytest.mark.parametrize("kind", ["json", "binary", "gzip", "deflate"])
def test_bodies_go_on_byte_for_byte(versions: list[ModelVersion], kind: str) -> None:
    body, headers = binary()
    if kind == "json":
        body, headers = json.dumps(document(id="ü", parameters={"a": 1}), indent=3).encode(), {}
    elif kind == "gzip":
        body, headers = gzip.compress(body), headers | {"content-encoding": "gzip"}
    elif kind == "deflate":
        body, headers = zlib.compress(body), headers | {"content-encoding": "deflate"}

    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
            got = await stable.client.post(INFER, content=body, headers=headers)
            assert got.status_code == 200, got.text
            assert got.headers["x-rayprism-version"] == "2"
            assert proxy.calls[0].body == body
            direct = await proxy.members[2].client.post(INFER, content=body, headers=headers)
            assert got.content == direct.content
            for name in ("content-type", "content-length", "inference-header-content-length"):
                assert got.headers.get(name) == direct.headers.get(name)
            assert stable.candidate(2)["fallbacks"] == {}

    run()


@async_test
async def test_compressed_answers_go_back_as_they_are(versions: list[ModelVersion]) -> None:
    many = document(np.repeat(X, 100, axis=0))
    async with fleet(versions[:2], v1=splits(100)) as (stable, _):
        for encoding in ("gzip", "deflate"):
            got = await stable.client.post(INFER, json=many, headers={"accept-encoding": encoding})
            assert got.headers["content-encoding"] == encoding
            assert got.headers["vary"] == "accept-encoding"
            assert len(got.content) > int(got.headers["content-length"])
            assert got.json()["model_version"] == "2"


# Time


async def slow(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(20)


@pytest.mark.parametrize(
    ("config", "sent", "headers", "most_s"),
    [
        ({}, document(parameters={"timeout": 800_000}), {}, 0.4),
        ({}, document(), {"x_rayprism_timeout_s": "0.8"}, 0.4),
        ({}, document(parameters={"timeout": 800_000}), {"x_rayprism_timeout_s": "30"}, 0.4),
        ({"default_timeout_s": 0.8}, document(), {}, 0.4),
        ({"candidate_timeout_s": 0.4}, document(), {}, 0.4),
        ({"default_timeout_s": 0.8}, document(parameters={"timeout": 0}), {}, 0.4),
    ],
)
def test_a_late_candidate_leaves_the_rest_of_the_time(
    versions: list[ModelVersion],
    config: dict[str, Any],
    sent: Any,
    headers: dict[str, str],
    most_s: float,
) -> None:
    traffic = {key: config[key] for key in config if key == "candidate_timeout_s"}
    others = {key: config[key] for key in config if key not in traffic}

    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=splits(100, **traffic) | others) as (stable, proxy):
            await answered_by(stable)  # where it is, is known now
            proxy.stand_ins[2] = hanging = Hanging()
            proxy.calls.clear()
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            status, version, found = await post(stable, sent, **headers)
            took_s = loop.time() - began_s
            assert (status, version) == (200, "1"), found
            assert most_s - 0.01 < took_s < 2 * most_s
            (call,) = proxy.calls
            assert float(call.headers[b"x-rayprism-timeout-s"]) == pytest.approx(most_s, abs=0.1)
            assert stable.candidate(2)["fallbacks"] == {"late": 1}
            await until(lambda: hanging.left == 1)

    run()


@async_test
async def test_a_time_out_longer_than_a_day_goes_on(versions: list[ModelVersion]) -> None:
    endless = document(parameters={"timeout": 10**15})
    async with fleet(versions[:2], v1=splits(100)) as (stable, _):
        assert (await post(stable, endless))[:2] == (200, "2")
        assert (await post(stable, endless, x_rayprism_version="2"))[:2] == (200, "2")
        assert stable.candidate(2)["fallbacks"] == {}


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "1e9"])
def test_a_time_out_that_is_none(versions: list[ModelVersion], value: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
            status, version, found = await post(stable, x_rayprism_timeout_s=value)
            assert (status, version) == (400, "1")
            assert "x-rayprism-timeout-s" in found["error"]
            assert proxy.calls == []

    run()


# No answer

VERSION_2 = {"x_rayprism_version": "2"}
FALLBACKS: list[tuple[str, Callable[..., Awaitable[None]], int]] = [
    # reason, what answers, what a client gets that named the version
    ("gone", answer(404, b"<html>", content_type="text/html"), 404),
    ("not_ready", answer(503, b"<html>", content_type="text/html"), 503),
    ("not_ready", answer(503, b"{}", content_type="application/json", **VERSION_2), 503),
    ("overloaded", answer(503, b"{}", retry_after="3", **VERSION_2), 503),
    ("late", answer(504, b"{}", **VERSION_2), 504),
    ("error", answer(500, b"{}", **VERSION_2), 500),
    ("error", answer(502, b"<html>"), 503),
    ("refused", answer(400, b"{}", **VERSION_2), 400),
    ("refused", answer(413, b"{}", **VERSION_2), 413),
    ("wrong_version", answer(200, b"{}", x_rayprism_version="3"), 404),
    ("wrong_version", answer(200, b"{}"), 404),
    ("error", answer(302, b"", location="/elsewhere"), 503),
]


@pytest.mark.parametrize(
    ("reason", "stand_in", "status"), FALLBACKS, ids=[f"{r}-{s}" for r, _, s in FALLBACKS]
)
def test_whatever_is_no_answer(
    versions: list[ModelVersion],
    reason: str,
    stand_in: Callable[..., Awaitable[None]],
    status: int,
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
            proxy.stand_ins[2] = stand_in
            for _ in range(2):
                assert await answered_by(stable) == 1, "the client sees nothing of it"
            assert stable.candidate(2)["fallbacks"] == {reason: 2}
            got = await stable.client.post(
                INFER, json=document(), headers={"x-rayprism-version": "2"}
            )
            assert got.status_code == status
            assert got.headers["x-rayprism-version"] in "12"
            assert "html" not in got.text, "a proxy's page means nothing to a client"
            if reason == "overloaded":
                assert got.headers["retry-after"] == "3"
            assert stable.candidate(2)["fallbacks"] == {reason: 2}

    run()


@async_test
async def test_nobody_at_the_address(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        port, proxy.http_port = proxy.http_port, 1
        stable.links.expect_changes()
        await until(lambda: stable.links._addresses.http_port == 1)
        assert await answered_by(stable) == 1
        assert stable.candidate(2)["fallbacks"] == {"unreachable": 1}
        proxy.http_port = port
        stable.links._clock = lambda: 1e9  # later than any pause
        assert await answered_by(stable) == 1
        await until(lambda: stable.links._addresses.http_port == port)
        assert await answered_by(stable) == 2, "asked the controller again"


@async_test
async def test_a_candidate_that_is_not_deployed(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1], v1=splits(100)) as (stable, _):
        assert await answered_by(stable) == 1
        assert stable.candidate(2)["fallbacks"] == {"not_deployed": 1}
        status, _, found = await post(stable, x_rayprism_version="2")
        assert status == 404
        assert "version '2'" in found["error"]


@async_test
async def test_too_many_on_their_way(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        await answered_by(stable)
        assert stable.links.http is not None
        stable.links.http._max_connections = 2
        proxy.stand_ins[2] = hanging = Hanging()
        held = [asyncio.create_task(post(stable)) for _ in range(2)]
        await until(lambda: hanging.entered == 2)
        assert await answered_by(stable) == 1
        assert stable.candidate(2)["fallbacks"] == {"busy": 1}
        status, _, found = await post(stable, x_rayprism_version="2")
        assert (status, "busy" in found["error"]) == (503, True)
        for one in held:
            one.cancel()
        await asyncio.gather(*held, return_exceptions=True)


@async_test
async def test_a_named_version_that_is_late(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2]) as (stable, proxy):
        proxy.stand_ins[2] = Hanging()
        status, version, found = await post(
            stable, x_rayprism_version="2", x_rayprism_timeout_s="0.1"
        )
        assert (status, version) == (504, "1")
        assert "version '2'" in found["error"]


@async_test
async def test_a_wrong_request_gets_the_stable_version_s_word(
    versions: list[ModelVersion],
) -> None:
    wrong = document(X[:, :3])
    async with fleet(versions[:2], v1=splits(100)) as (stable, _):
        status, version, found = await post(stable, wrong)
        assert (status, version) == (400, "1")
        assert "[3, 3]" in found["error"]
        assert stable.candidate(2)["fallbacks"] == {"refused": 1}
        status, version, _ = await post(stable, wrong, x_rayprism_version="2")
        assert (status, version) == (400, "2"), "it was asked by name"
        for _ in range(9):
            await post(stable, b"nonsense")
        assert not stable.candidate(2)["resting"], "clients' faults are not the candidate's"


@async_test
async def test_a_candidate_that_hangs_is_left_alone(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits(100, candidate_timeout_s=0.05)) as (stable, proxy):
        proxy.stand_ins[2] = hanging = Hanging()
        for _ in range(8):
            assert await answered_by(stable) == 1
        assert hanging.entered == 5
        found = stable.candidate(2)
        assert found["resting"]
        assert found["fallbacks"] == {"late": 5, "resting": 3}
        del proxy.stand_ins[2]
        stable.service.traffic._clock = lambda: 1e9  # later than any pause
        assert await answered_by(stable) == 2
        assert not stable.candidate(2)["resting"]


@pytest.mark.parametrize("named", [True, False])
def test_a_client_that_leaves(versions: list[ModelVersion], named: bool) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
            await answered_by(stable)
            proxy.stand_ins[2] = hanging = Hanging()
            headers = {"x_rayprism_version": "2"} if named else {}
            request = asyncio.create_task(post(stable, **headers))
            await until(lambda: hanging.entered == 1)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await until(lambda: hanging.left == 1)
            assert stable.candidate(2)["fallbacks"] == {}
            assert stable.candidate(2)["left"] == (0 if named else 1)
            del proxy.stand_ins[2]
            assert await answered_by(stable) == 2

    run()


@async_test
async def test_headers_that_cannot_be_sent_on(versions: list[ModelVersion]) -> None:
    """No server lets them in; should one, they must not count against the candidate."""
    async with fleet(versions[:2], v1=splits(100)) as (stable, proxy):
        for name, value in ((b"x a", b"1"), (b"x-a", b"1\r\nx-b: 2"), (b"x-a", b"1\0")):
            sent = [{"type": "http.request", "body": json.dumps(document()).encode()}]
            got: list[Any] = []

            async def receive(sent: Any = sent) -> Any:
                return sent.pop()

            async def send(message: Any, got: Any = got) -> None:
                got.append(message)

            scope = {"type": "http", "method": "POST", "path": INFER, "headers": [(name, value)]}
            await stable.app(scope, receive, send)
            assert got[0]["status"] == 200
        assert stable.candidate(2)["fallbacks"] == {"refused": 3}
        assert not stable.candidate(2)["resting"]
        assert proxy.calls == []


# Shadows


async def compared(stable: Member, version: int, count: int = 1) -> dict[str, Any]:
    """Counts of a shadow, once so many copies ended."""

    def ended() -> int:
        found = stable.shadow(version)
        return int(found["compared"] + sum(found["failed"].values()))

    await until(lambda: ended() == count)
    return stable.shadow(version)


@pytest.mark.parametrize("kind", ["json", "binary", "gzip", "wants gzip"])
def test_copies_are_compared(versions: list[ModelVersion], kind: str) -> None:
    body, headers = binary(np.repeat(X, 200, axis=0))
    if kind != "binary":
        body, headers = json.dumps(document(np.repeat(X, 200, axis=0))).encode(), {}
    if kind == "gzip":
        body, headers = gzip.compress(body), {"content-encoding": "gzip"}
    if kind == "wants gzip":
        headers = {"accept-encoding": "gzip"}
    headers["x-request-id"] = "r-9"

    @async_test
    async def run() -> None:
        async with fleet(versions, v1=copies(2, 3)) as (stable, proxy):
            got = await stable.client.post(INFER, content=body, headers=headers)
            assert got.headers["x-rayprism-version"] == "1"
            assert proxy.calls == [], "not before the answer"
            differs = await compared(stable, 2)
            agrees = await compared(stable, 3)
            assert differs["outputs"] == {"y": {"agreed": 0, "disagreed": 1}}
            assert agrees["outputs"] == {"y": {"agreed": 1, "disagreed": 0}}
            assert (differs["failed"], agrees["failed"]) == ({}, {})
            assert sorted(proxy.versions()) == [2, 3]
            for call in proxy.calls:
                assert call.body == body
                assert call.headers[b"x-request-id"] == b"r-9-shadow"
                assert call.headers[b"x-rayprism-forwarded"] == b"1;shadow"

    run()


@pytest.mark.parametrize("kind", ["json", "binary", "mixed"])
def test_infinities_and_nan(infinite: list[ModelVersion], kind: str) -> None:
    x = np.array([[7], [8], [1]], np.float32)
    body, headers = json.dumps(document(x)).encode(), {}
    if kind == "binary":
        body, headers = binary(x)
    elif kind == "mixed":
        outputs = [{"name": "y"}, {"name": "label", "parameters": {"binary_data": True}}]
        body = json.dumps(document(x, outputs=outputs)).encode()

    @async_test
    async def run() -> None:
        async with fleet(infinite, v1=copies(2)) as (stable, _):
            path = "/v2/models/infinite/infer"
            got = await stable.client.post(path, content=body, headers=headers)
            assert got.status_code == 200, got.text
            found = await compared(stable, 2)
            agreed = {"agreed": 1, "disagreed": 0}
            assert found["outputs"] == {"y": agreed, "label": agreed}

    run()


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (answer(200, b"nonsense", **VERSION_2), "unreadable"),
        (answer(200, b"{}", inference_header_content_length="x", **VERSION_2), "unreadable"),
        (answer(200, b"\x1f\x8b\x08", content_encoding="gzip", **VERSION_2), "unreadable"),
        (answer(200, b"{}", x_rayprism_version="3"), "wrong_version"),
        (answer(500, b"{}", **VERSION_2), "error"),
        (answer(400, b"{}", **VERSION_2), "refused"),
        (answer(503, b"{}", retry_after="1", **VERSION_2), "overloaded"),
        (answer(404), "gone"),
    ],
)
def test_shadows_that_give_no_answer(
    versions: list[ModelVersion], stand_in: Callable[..., Awaitable[None]], reason: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], v1=copies(2)) as (stable, proxy):
            proxy.stand_ins[2] = stand_in
            assert await answered_by(stable) == 1
            found = await compared(stable, 2)
            assert (found["failed"], found["compared"]) == ({reason: 1}, 0)

    run()


@async_test
async def test_who_is_copied(versions: list[ModelVersion]) -> None:
    both = splits(100, shadow=[{"version": 3, "sample": 100}])
    async with fleet(versions, v1=both, v2=copies(3)) as (stable, proxy):
        assert await answered_by(stable) == 2
        assert await answered_by(stable, x_rayprism_forwarded="3") == 1
        await post(stable, b"nonsense")
        proxy.stand_ins[2] = answer(500)
        assert await answered_by(stable) == 1, "in the candidate's place"
        assert await answered_by(stable, x_rayprism_version="1") == 1
        await compared(stable, 3, 2)
        assert [call.headers[b"x-rayprism-forwarded"] for call in proxy.calls if call.version == 3]
        assert proxy.members[2].traffic()["shadows"] == {
            "3": {"compared": 0, "dropped": {}, "failed": {}, "outputs": {}}
        }, "what was sent on is not copied there"


@async_test
async def test_shadows_that_hang_cost_clients_nothing(versions: list[ModelVersion]) -> None:
    traffic = copies(2, max_shadow_requests=3)
    async with fleet(versions[:2], v1=traffic) as (stable, proxy):
        proxy.stand_ins[2] = hanging = Hanging()
        for _ in range(3):
            assert await answered_by(stable) == 1
        await until(lambda: hanging.entered == 3)
        for _ in range(5):
            assert await answered_by(stable) == 1
        assert stable.shadow(2)["dropped"] == {"requests": 5}
        await stable.service.shadows.close()
        await until(lambda: hanging.left == 3)


def test_the_application_answers_only_its_own(versions: list[ModelVersion]) -> None:
    """Without traffic, a request touches neither the split nor the shadows."""

    @async_test
    async def run() -> None:
        async with fleet(versions[:1]) as (stable, _):
            service = stable.service
            service.traffic.target = None  # type: ignore[method-assign, assignment]
            service.shadows.offer = None  # type: ignore[method-assign, assignment]
            service.traffic.send = None  # type: ignore[method-assign, assignment]
            assert isinstance(stable.app, ModelApp)
            assert await answered_by(stable) == 1

    run()
