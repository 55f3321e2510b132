"""The HTTP side of a replica, over a real model and without Ray."""

from __future__ import annotations

import gzip
import html
import json
import zlib
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.models.repository import ModelVersion
from rayprism.protocol.http import decode_infer_request
from rayprism.serving.http import Endpoint, ModelApp, parse_path
from tests.serving.conftest import serving
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_reference

INFER = "/v2/models/tiny/infer"


def body(rows: int = 1, **changes: Any) -> dict[str, Any]:
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [rows, 4],
        "data": [0.5] * (4 * rows),
    }
    document: dict[str, Any] = {"inputs": [tensor | changes.pop("tensor", {})]}
    return document | changes


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v2/models/tiny/infer", Endpoint("infer", "tiny", None)),
        ("/v2/models/tiny/versions/3/infer", Endpoint("infer", "tiny", "3")),
        ("/v2/models/tiny", Endpoint("model", "tiny", None)),
        ("/v2/models/tiny/", Endpoint("model", "tiny", None)),
        ("/v2/models/tiny/versions/3", Endpoint("model", "tiny", "3")),
        ("/v2/models/tiny/versions/3/ready", Endpoint("ready", "tiny", "3")),
        ("/infer", Endpoint("infer")),
        ("", Endpoint("model")),
        ("/versions/3/config", Endpoint("config", None, "3")),
        ("/v2", Endpoint("server")),
        ("/v2/health/live", Endpoint("live")),
        ("/v2/health/ready", Endpoint("server-ready")),
        ("/v2/models/stats", Endpoint("stats")),
        ("/v2/repository/index", Endpoint("index")),
        ("/v2/repository/models/tiny/load", Endpoint("load")),
        ("/v2/models", None),
        ("/v2/models//infer", None),
        ("/v2/models/tiny/versions//infer", None),
        ("/v2/models/tiny/nonsense", None),
        ("/v2x", None),
        ("/elsewhere", None),
    ],
)
def test_paths_mean_what_the_protocol_says(path: str, endpoint: Endpoint | None) -> None:
    assert parse_path(path) == endpoint


@async_test
async def test_rows_come_back_right(tiny: ModelVersion) -> None:
    x = np.random.default_rng(0).standard_normal((150, 4)).astype(np.float32)
    async with serving(tiny) as (_, client):
        document = body(150, tensor={"data": x.tolist()}, id="mine")
        answer = (await client.post(INFER, json=document)).json()
        assert answer["model_name"] == "tiny"
        assert answer["model_version"] == "1"
        assert answer["id"] == "mine"
        (output,) = answer["outputs"]
        assert output["shape"] == [150, 3]
        got = np.array(output["data"], np.float32).reshape(150, 3)
        np.testing.assert_allclose(got, mlp_reference(x), rtol=1e-4, atol=1e-5)


@async_test
async def test_every_path_of_the_protocol_answers(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        for path in (
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/tiny",
            "/v2/models/tiny/versions/1",
            "/v2/models/tiny/ready",
            "/v2/models/tiny/config",
            "/v2/models/tiny/stats",
            "/v2/models/stats",
            "/v2/openapi.json",
            "/v2/models/tiny/openapi.json",
            "/v2/docs",
        ):
            answer = await client.get(path)
            assert answer.status_code == 200, (path, answer.text)
        index = await client.post("/v2/repository/index")
        assert index.json() == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]


@async_test
async def test_statistics_count_what_was_answered(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        for rows in (1, 1, 5):
            await client.post(INFER, json=body(rows))
        await client.post(INFER, json=body(tensor={"name": "wrong"}))
        (stats,) = (await client.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert stats["inference_count"] == 7
        assert stats["execution_count"] == 3
        assert stats["inference_stats"]["success"]["count"] == 3
        assert {b["batch_size"]: b["compute_infer"]["count"] for b in stats["batch_stats"]} == {
            1: 2,
            5: 1,
        }


@pytest.mark.parametrize(
    ("encoding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_bodies_are_compressed_both_ways(tiny: ModelVersion, encoding: str, squeeze: Any) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (_, client):
            squeezed = squeeze(json.dumps(body(200)).encode())
            answer = await client.post(
                INFER,
                content=squeezed,
                headers={"content-encoding": encoding, "accept-encoding": encoding},
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-encoding"] == encoding
            assert len(answer.json()["outputs"][0]["data"]) == 600
            plain = await client.post(INFER, json=body(200), headers={"accept-encoding": "br"})
            assert "content-encoding" not in plain.headers

    run()


@async_test
async def test_binary_tensors_both_ways(tiny: ModelVersion) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype("<f4")
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [3, 4],
                    "parameters": {"binary_data_size": x.nbytes},
                }
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    async with serving(tiny) as (_, client):
        answer = await client.post(
            INFER,
            content=header + x.tobytes(),
            headers={"inference-header-content-length": str(len(header))},
        )
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["inference-header-content-length"])
        assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {
            "binary_data_size": 36
        }
        got = np.frombuffer(answer.content[length:], "<f4").reshape(3, 3)
        np.testing.assert_allclose(got, mlp_reference(x), rtol=1e-4, atol=1e-5)


BAD_REQUESTS: list[tuple[str, Any, int, str]] = [
    # what, body (or bytes), status, a telling word
    ("unknown input", body(tensor={"name": "X"}), 400, "Did you mean"),
    ("missing input", {"inputs": []}, 400, "inputs"),
    (
        "extra input",
        {"inputs": [*body()["inputs"], {**body()["inputs"][0], "name": "q"}]},
        400,
        "'q'",
    ),
    ("wrong dtype", body(tensor={"datatype": "FP64"}), 400, "FP64"),
    ("unknown dtype", body(tensor={"datatype": "FLOAT"}), 400, "FLOAT"),
    ("wrong width", body(tensor={"shape": [1, 3], "data": [1, 2, 3]}), 400, "[1, 3]"),
    ("wrong rank", body(tensor={"shape": [4]}), 400, "axes"),
    ("wrong count", body(tensor={"data": [1, 2, 3]}), 400, "3 values"),
    ("string for number", body(tensor={"data": ["a", 1, 2, 3]}), 400, "string"),
    ("true for number", body(tensor={"data": [True, 1, 2, 3]}), 400, "true"),
    ("out of range", body(tensor={"data": [1e300, 1, 2, 3]}), 400, "range"),
    ("0 rows", body(tensor={"shape": [0, 4], "data": []}), 400, "0 rows"),
    ("negative shape", body(tensor={"shape": [-1, 4]}), 400, "shape"),
    ("huge shape", body(tensor={"shape": [2**40, 4]}), 400, str(2**42)),
    ("unknown output", body(outputs=[{"name": "z"}]), 400, "'z'"),
    ("priority", body(parameters={"priority": 9}), 400, "priority 9"),
    ("timeout", body(parameters={"timeout": "soon"}), 400, "timeout"),
    ("sequence", body(parameters={"sequence_id": 3}), 501, "sequence"),
    ("no JSON", b"{", 400, "JSON"),
    ("not UTF-8", b"\xff\xfe", 400, "JSON"),
    ("empty body", b"", 400, "empty"),
    ("a list", b"[]", 400, "list"),
    ("deep nesting", b"[" * 100_000, 400, "JSON"),
]


@pytest.mark.parametrize(
    ("sent", "status", "word"),
    [case[1:] for case in BAD_REQUESTS],
    ids=[case[0] for case in BAD_REQUESTS],
)
def test_bad_requests_are_told_what_is_wrong(
    tiny: ModelVersion, sent: Any, status: int, word: str
) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (_, client):
            content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            answer = await client.post(INFER, content=content)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["error"]
            good = await client.post(INFER, json=body())
            assert good.status_code == 200, "the replica goes on"

    run()


BAD_HEADERS: list[tuple[str, dict[str, str], bytes, int, str]] = [
    ("header not a number", {"inference-header-content-length": "ten"}, b"{}", 400, "'ten'"),
    ("header negative", {"inference-header-content-length": "-1"}, b"{}", 400, "-1"),
    ("header too long", {"inference-header-content-length": "99"}, b"{}", 400, "99"),
    ("header cuts JSON", {"inference-header-content-length": "1"}, b"{}", 400, "JSON"),
    ("unknown encoding", {"content-encoding": "br"}, b"{}", 400, "br"),
    ("not gzip", {"content-encoding": "gzip"}, b"{}", 400, "gzip"),
    ("cut gzip", {"content-encoding": "gzip"}, gzip.compress(b"{}", mtime=0)[:-4], 400, "gzip"),
    (
        "gzip bomb",
        {"content-encoding": "gzip"},
        gzip.compress(b" " * 10_000_000, mtime=0),
        413,
        "100000",
    ),
    ("too large", {}, b" " * 200_000, 413, "max_body_bytes"),
]


@pytest.mark.parametrize(
    ("headers", "content", "status", "word"),
    [case[1:] for case in BAD_HEADERS],
    ids=[case[0] for case in BAD_HEADERS],
)
def test_bad_headers_and_bodies(
    tiny: ModelVersion, headers: dict[str, str], content: bytes, status: int, word: str
) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny, max_body_bytes=100_000) as (_, client):
            answer = await client.post(INFER, content=content, headers=headers)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["error"]

    run()


@async_test
async def test_a_body_without_a_length_is_bounded_too(tiny: ModelVersion) -> None:
    async def endless() -> Any:
        for _ in range(1000):
            yield b" " * 1000

    async with serving(tiny, max_body_bytes=100_000) as (_, client):
        answer = await client.post(INFER, content=endless())
        assert answer.status_code == 413
        assert "max_body_bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/v2/models/other/ready", 404, "'other'"),
        ("POST", "/v2/models/other/infer", 404, "here is 'tiny'"),
        ("POST", "/v2/models/tiny/versions/7/infer", 404, "version '7'"),
        ("POST", "/v2/models/../infer", 404, "infer"),
        ("POST", "/v2/models/%2e%2e%2ftiny/infer", 404, "nothing at"),
        ("GET", "/v2/nothing", 404, "/v2/nothing"),
        ("GET", "/v2/models/tiny/infer", 405, "POST"),
        ("POST", "/v2/models/tiny/config", 405, "GET"),
        ("DELETE", "/v2/models/tiny", 405, "GET"),
        ("GET", "/v2/repository/index", 405, "POST"),
        ("POST", "/v2/repository/models/tiny/unload", 501, "serve deploy"),
    ],
)
def test_wrong_places(tiny: ModelVersion, method: str, path: str, status: int, word: str) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (_, client):
            answer = await client.request(method, path)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["error"]

    run()


@async_test
async def test_nan_is_carried_as_null_and_said(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        literal = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[NaN,1,2,3]}]}'
        for sent in (literal, literal.replace(b"NaN", b"null")):
            (output,) = (await client.post(INFER, content=sent)).json()["outputs"]
            assert None in output["data"]
            assert output["parameters"] == {"non_finite_as_null": True}


@async_test
async def test_a_new_user_config_is_in_force_and_a_bad_one_is_not(tiny: ModelVersion) -> None:
    async with serving(tiny) as (service, client):
        assert service.reconfigure({"max_body_bytes": 2000})
        assert (await client.post(INFER, json=body(200))).status_code == 413
        assert not service.reconfigure({"max_body_bytes": "lots", "max_queue_row": 3})
        assert (await client.post(INFER, json=body(200))).status_code == 413, "the last good one"
        (entry,) = (await client.post("/v2/repository/index")).json()
        assert "max_queue_row" in entry["reason"]
        assert "max_queue_rows" in entry["reason"], "says what was meant"
        assert service.reconfigure(None)
        assert (await client.post(INFER, json=body(200))).status_code == 200


@async_test
async def test_unexpected_errors_tell_the_client_nothing(
    tiny: ModelVersion,
) -> None:
    async with serving(tiny) as (service, client):

        async def broken(*_: Any) -> Any:
            raise RuntimeError("secret path /srv/keys")

        service.infer = broken  # type: ignore[method-assign]
        answer = await client.post(INFER, json=body(), headers={"x-request-id": "r-1"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "r-1" in answer.json()["error"]


@async_test
async def test_who_answers_and_within_what_time(tiny: ModelVersion) -> None:
    """The headers of split traffic mean the same where no traffic is split."""
    async with serving(tiny) as (_, client):
        for wanted, status in (("1", 200), ("2", 404), ("two", 400)):
            headers = {"x-rayprism-version": wanted}
            answer = await client.post(INFER, json=body(), headers=headers)
            assert (answer.status_code, answer.headers["x-rayprism-version"]) == (status, "1")
        for seconds, status in (("5", 200), ("0.000001", 504), ("-1", 400)):
            headers = {"x-rayprism-timeout-s": seconds}
            answer = await client.post(INFER, json=body(), headers=headers)
            assert (answer.status_code, answer.headers["x-rayprism-version"]) == (status, "1")
        found = (await client.get("/v2/models/tiny/traffic")).json()
        assert found == {
            "model_name": "tiny",
            "model_version": "1",
            "weights": {"1": 100},
            "sticky": None,
            "shadow": {},
            "candidates": {},
            "shadows": {},
        }


@async_test
async def test_the_page_loads_nothing_from_elsewhere(tiny: ModelVersion) -> None:
    async with serving(tiny) as (_, client):
        answer: httpx.Response = await client.get("/v2/docs")
        assert "default-src 'none'" in html.unescape(answer.text)


@async_test
async def test_plain_requests_need_no_task(tiny: ModelVersion) -> None:
    async with serving(tiny) as (service, _):
        app, answers = ModelApp(service), list[Any]()

        def reply(*answer: Any) -> None:
            answers.append(answer)

        content = json.dumps(body()).encode()
        cancel = app.infer_now(INFER, [(b"content-type", b"application/json")], content, "r", reply)
        assert cancel is not None
        assert answers == [], "not before it returns"
        await until(lambda: len(answers) == 1)
        status, headers, text = answers[0]
        assert status == 200
        assert dict(headers)[b"x-rayprism-version"] == b"1"
        assert len(json.loads(text)["outputs"][0]["data"]) == 3
        cancel()  # too late, and no harm
        assert service.statistics.failures == {}
        assert app.infer_now(INFER, [], b"{", "r", reply) is not None
        await until(lambda: len(answers) == 2)
        assert answers[1][0] == 400


@pytest.mark.parametrize("header", [b"x-rayprism-version", b"content-encoding"])
def test_what_may_have_to_wait_needs_a_task(tiny: ModelVersion, header: bytes) -> None:
    @async_test
    async def run() -> None:
        async with serving(tiny) as (service, _):
            content = json.dumps(body()).encode()
            taken = ModelApp(service).infer_now(INFER, [(header, b"1")], content, "r", print)
            assert taken is None
            assert service.statistics.snapshot().success.count == 0

    run()


@async_test
async def test_a_client_that_leaves_takes_its_request_back(tiny: ModelVersion) -> None:
    async with serving(tiny, execution="thread") as (service, _):
        answers = list[Any]()
        cancel = ModelApp(service).infer_now(
            INFER, [], json.dumps(body()).encode(), "r", lambda *answer: answers.append(answer)
        )
        assert cancel is not None
        assert service.scheduler.queued_rows == 1
        cancel()
        assert service.scheduler.queued_rows == 0
        assert service.statistics.failures == {"cancelled": 1}
        await service.infer(decode_infer_request(json.dumps(body()).encode()), "r")
        assert answers == []
