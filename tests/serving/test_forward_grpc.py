"""Split traffic over gRPC: a stable version, candidates and shadows behind a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.protocol import grpc as codec
from tests.serving.conftest import GrpcContext
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_example, mlp_reference, save_mlp
from tests.support.versions import Hanging, Member, fleet

X = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
VERSION = "x-rayprism-version"


@pytest.fixture(scope="module")
def versions(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    """Version 2 answers otherwise than 1, and 3 as 1."""
    folder = tmp_path_factory.mktemp("rpc")
    return [
        push_model(
            repository,
            "rpc",
            save_mlp(folder / f"{number}.onnx", seed=seed),
            example=mlp_example(),
        ).version
        for number, seed in ((1, 0), (2, 1), (3, 0))
    ]


def splits(weight: float = 100, **traffic: Any) -> dict[str, Any]:
    return {"traffic": {"candidates": [{"version": 2, "weight": weight}], **traffic}}


def copies(*shadows: int) -> dict[str, Any]:
    return {"traffic": {"shadow": [{"version": version, "sample": 100} for version in shadows]}}


def message(x: Any = X, model: str = "rpc", **fields: Any) -> Any:
    request = codec.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.astype("<f4").tobytes())
    return request


def timeout_us(value: int) -> dict[str, Any]:
    return {"parameters": {"timeout": codec.InferParameter(int64_param=value)}}


class Context(GrpcContext):
    """With metadata of any key and value."""

    def __init__(self, metadata: dict[str, Any], request_id: str | None = "r-1") -> None:
        super().__init__(request_id)
        self._metadata = list(metadata.items())

    @property
    def version(self) -> str:
        """Who answers, by the trailing metadata."""
        (version,) = (value for key, value in self.trailing if key == VERSION)
        return version


async def infer(member: Member, request: Any = None, **metadata: Any) -> tuple[Any, Context]:
    """The answer as it comes over the wire, and its context."""
    context = Context({name.replace("_", "-"): value for name, value in metadata.items()})
    answer = await member.methods.ModelInfer(request or message(), context)
    return codec.ModelInferResponse.FromString(answer.SerializeToString()), context


async def answered_by(member: Member, request: Any = None, **metadata: Any) -> int:
    """The version that answers, and answers rightly."""
    answer, context = await infer(member, request, **metadata)
    assert context.code is None, context.details
    assert answer.model_version == context.version
    got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(3, 3)
    want = mlp_reference(X, seed=1 if context.version == "2" else 0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return int(context.version)


def fails(code: grpc.StatusCode, version: int | None = 2, **trailing: str) -> Callable[..., Any]:
    """An RPC that fails; as the version's own word, unless that is None."""

    async def rpc(request: Any, context: Any) -> Any:
        said = [] if version is None else [(VERSION, str(version))]
        said += [(key.replace("_", "-"), value) for key, value in trailing.items()]
        context.set_trailing_metadata(said)
        context.set_code(code)
        context.set_details("as it says")
        return codec.ModelInferResponse()

    return rpc


# Which version


@async_test
async def test_weights_0_and_100_are_exact(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], rpcs=True, v1=splits(0)) as (stable, proxy):
        assert {await answered_by(stable) for _ in range(10)} == {1}
        assert proxy.calls == []
        assert stable.service.reconfigure(splits(100))
        assert {await answered_by(stable) for _ in range(10)} == {2}
        assert stable.candidate(2) == {
            "answered": 10,
            "left": 0,
            "fallbacks": {},
            "resting": False,
        }


@pytest.mark.parametrize(
    ("header", "key", "value"),
    [
        ("X-User-Id", "x-user-id", "u{}"),
        ("user-bin", "user-bin", "bytes"),  # a key of gRPC whose values are bytes
        ("0a", "0a", "{}"),
    ],
)
def test_a_user_stays_at_one_version(
    versions: list[ModelVersion], header: str, key: str, value: str
) -> None:
    @async_test
    async def run() -> None:
        sticky = splits(50, sticky={"header": header})
        async with fleet(versions[:2], rpcs=True, v1=sticky) as (stable, _):
            stable.draws()  # none is drawn
            users: list[Any] = [value.format(number) for number in range(12)]
            if value == "bytes":
                users = [b"\x00\xff" + bytes([number]) for number in range(12)]
            first = [await answered_by(stable, **{key: user}) for user in users]
            assert set(first) == {1, 2}
            assert first == [await answered_by(stable, **{key: user}) for user in users]
            stable.draws(0.0, 0.5)
            assert {await answered_by(stable), await answered_by(stable, other="u1")} == {1, 2}

    run()


@async_test
async def test_a_user_may_have_a_name_that_is_not_ascii(versions: list[ModelVersion]) -> None:
    """Python's gRPC sends no such value, but other clients' may come in."""
    sticky = splits(50, sticky={"header": "session"})
    async with fleet(versions[:2], rpcs=True, v1=sticky) as (stable, _):
        stable.draws()
        for user in ("ü", "\u4e2d"):
            assert await answered_by(stable, session=user * 3) in (1, 2)


@async_test
async def test_http_and_grpc_agree_on_a_user(versions: list[ModelVersion]) -> None:
    sticky = splits(50, sticky={"header": "x-user-id"})
    async with fleet(versions[:2], rpcs=True, v1=sticky) as (stable, _):
        for number in range(12):
            key = f"user {number}"
            body = mlp_example()
            headers = {"x-user-id": key}
            got = await stable.client.post("/v2/models/rpc/infer", json=body, headers=headers)
            assert got.headers[VERSION] == str(await answered_by(stable, x_user_id=key))


@async_test
async def test_a_version_may_be_asked_for(versions: list[ModelVersion]) -> None:
    async with fleet(versions, rpcs=True, v1=splits(100)) as (stable, proxy):
        by_message = [message(model_version=version) for version in ("1", "2", "3")]
        assert [await answered_by(stable, request) for request in by_message] == [1, 2, 3]
        by_metadata = [{VERSION: version} for version in ("1", "2", "3")]
        assert [await answered_by(stable, **metadata) for metadata in by_metadata] == [1, 2, 3]
        assert await answered_by(stable, message(model_version="3"), x_rayprism_version="2") == 3
        own = message(model_version="1")
        assert await answered_by(stable, own, x_rayprism_version="2") == 1, "never split"
        for request, code, word in (
            (message(model_version="9"), "NOT_FOUND", "version '9'"),
            (message(model_version="newest"), "INVALID_ARGUMENT", "'newest'"),
            (message(model="other", model_version="2"), "NOT_FOUND", "'other'"),
        ):
            answer, context = await infer(stable, request)
            assert context.code is grpc.StatusCode[code]
            assert word in context.details
            assert (answer.ByteSize(), context.version) == (0, "1")
        _, context = await infer(stable, x_rayprism_version="newest")
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert proxy.versions() == [2, 3, 2, 3, 3]


@async_test
async def test_two_versions_that_point_at_each_other(versions: list[ModelVersion]) -> None:
    back = {"traffic": {"candidates": [{"version": 1, "weight": 100}]}}
    async with fleet(versions[:2], rpcs=True, v1=splits(100), v2=back) as (stable, proxy):
        assert await answered_by(stable) == 2
        assert await answered_by(proxy.members[2]) == 1
        assert await answered_by(stable, message(model_version="2")) == 2
        assert proxy.versions() == [2, 1, 2], "one step each"
        forwarded = {"x_rayprism_forwarded": "7", "x_rayprism_version": "2"}
        assert await answered_by(stable, **forwarded) == 1


# What travels


@async_test
async def test_metadata_goes_on_but_for_that_of_the_split(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
        sent: dict[str, Any] = {
            "authorization": "Bearer abc",
            "trace-bin": b"\x00\x01",
            "application": "rpc",
            "x-rayprism-forwarded-by": "me",
            "grpc-timeout": "1S",
            "user-agent": "mine",
            VERSION: "2",
            "x-rayprism-timeout-s": "8",
        }
        context = Context(sent, "r-77")
        request = message(id="mine")
        request.outputs.add(name="y")
        await stable.methods.ModelInfer(request, context)
        assert context.version == "2"
        (call,) = proxy.calls
        assert call.message == request
        assert call.metadata["authorization"] == "Bearer abc"
        assert call.metadata["trace-bin"] == b"\x00\x01"
        assert call.metadata["application"] == "rpc-2"
        assert call.metadata["request_id"] == "r-77"
        assert call.metadata["x-rayprism-forwarded"] == "1"
        assert call.metadata["user-agent"] != "mine"
        assert 0 < float(call.metadata["x-rayprism-timeout-s"]) <= 8
        assert VERSION not in call.metadata
        assert "grpc-timeout" not in call.metadata


@pytest.mark.parametrize("metadata", [{"a": "é"}, {"a": "x\ny"}, {"A b": "x"}])
def test_metadata_that_cannot_be_sent_on(
    versions: list[ModelVersion], metadata: dict[str, str]
) -> None:
    """What a stricter gRPC than the client's refuses is no failure of the candidate."""

    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, _):
            for _ in range(7):
                assert await answered_by(stable, **metadata) == 1
            found = stable.candidate(2)
            assert (found["fallbacks"], found["resting"]) == ({"refused": 7}, False)
            _, context = await infer(stable, x_rayprism_version="2", **metadata)
            assert context.code is grpc.StatusCode.UNAVAILABLE

    run()


# Time


@pytest.mark.parametrize(
    ("config", "fields", "metadata"),
    [
        ({}, timeout_us(800_000), {}),
        ({}, {}, {"x_rayprism_timeout_s": "0.8"}),
        ({}, timeout_us(800_000), {"x_rayprism_timeout_s": "30"}),
        ({"default_timeout_s": 0.8}, {}, {}),
        ({"candidate_timeout_s": 0.4}, {}, {}),
    ],
)
def test_a_late_candidate_leaves_the_rest_of_the_time(
    versions: list[ModelVersion],
    config: dict[str, Any],
    fields: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    traffic = {key: config[key] for key in config if key == "candidate_timeout_s"}
    others = {key: config[key] for key in config if key not in traffic}

    @async_test
    async def run() -> None:
        v1 = splits(100, **traffic) | others
        async with fleet(versions[:2], rpcs=True, v1=v1) as (stable, proxy):
            await answered_by(stable)  # where it is, is known now
            hanging = Hanging()
            proxy.stand_ins[2, "grpc"] = hanging.infer
            proxy.calls.clear()
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            assert await answered_by(stable, message(**fields), **metadata) == 1
            assert 0.35 < loop.time() - began_s < 0.8
            (call,) = proxy.calls
            assert float(call.metadata["x-rayprism-timeout-s"]) == pytest.approx(0.4, abs=0.1)
            assert stable.candidate(2)["fallbacks"] == {"late": 1}
            await until(lambda: hanging.left == 1)

    run()


@pytest.mark.parametrize("value", ["soon", "0", "nan"])
def test_a_time_out_that_is_none(versions: list[ModelVersion], value: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
            _, context = await infer(stable, x_rayprism_timeout_s=value)
            assert context.code is grpc.StatusCode.INVALID_ARGUMENT
            assert (context.version, proxy.calls) == ("1", [])

    run()


# No answer

Code = grpc.StatusCode
FALLBACKS: list[tuple[str, Callable[..., Any], Any]] = [
    # reason, what answers, what a client gets that named the version
    ("gone", fails(Code.NOT_FOUND, None), Code.NOT_FOUND),
    ("gone", fails(Code.NOT_FOUND), Code.NOT_FOUND),
    ("not_ready", fails(Code.UNAVAILABLE), Code.UNAVAILABLE),
    ("unreachable", fails(Code.UNAVAILABLE, None), Code.UNAVAILABLE),
    ("overloaded", fails(Code.RESOURCE_EXHAUSTED, retry_after="3"), Code.RESOURCE_EXHAUSTED),
    ("overloaded", fails(Code.RESOURCE_EXHAUSTED, None), Code.UNAVAILABLE),
    ("late", fails(Code.DEADLINE_EXCEEDED), Code.DEADLINE_EXCEEDED),
    ("error", fails(Code.INTERNAL), Code.INTERNAL),
    ("error", fails(Code.UNKNOWN, None), Code.UNAVAILABLE),
    ("refused", fails(Code.INVALID_ARGUMENT), Code.INVALID_ARGUMENT),
    ("refused", fails(Code.UNIMPLEMENTED, None), Code.UNAVAILABLE),
    ("wrong_version", fails(Code.OK, 3), Code.NOT_FOUND),
    ("wrong_version", fails(Code.OK, None), Code.NOT_FOUND),
]


@pytest.mark.parametrize(
    ("reason", "stand_in", "code"), FALLBACKS, ids=[f"{r}-{c.name}" for r, _, c in FALLBACKS]
)
def test_whatever_is_no_answer(
    versions: list[ModelVersion], reason: str, stand_in: Callable[..., Any], code: Any
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
            proxy.stand_ins[2, "grpc"] = stand_in
            for _ in range(2):
                assert await answered_by(stable) == 1, "the client sees nothing of it"
            assert stable.candidate(2)["fallbacks"] == {reason: 2}
            for named in ({VERSION: "2"}, {}):
                request = message(model_version="" if named else "2")
                answer, context = await infer(stable, request, **named)
                assert (context.code, answer.ByteSize()) == (code, 0)
                own = context.details != "as it says"
                assert context.version == ("1" if own else "2"), "who says so"
                if reason == "overloaded" and not own:
                    assert ("retry-after", "3") in context.trailing
            assert stable.candidate(2)["fallbacks"] == {reason: 2}

    run()


@async_test
async def test_nobody_at_the_address(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
        port = proxy.grpc_port
        for nowhere in (1, None):
            proxy.grpc_port = nowhere
            stable.links.expect_changes()
            await until(lambda p=nowhere: stable.links._addresses.grpc_port == p)  # type: ignore[misc]
            assert await answered_by(stable) == 1
        assert stable.candidate(2)["fallbacks"] == {"unreachable": 2}
        _, context = await infer(stable, x_rayprism_version="2")
        assert context.code is Code.UNAVAILABLE
        proxy.grpc_port = port
        stable.links.expect_changes()
        await until(lambda: stable.links._addresses.grpc_port == port)
        assert await answered_by(stable) == 2


@async_test
async def test_too_many_on_their_way(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
        await answered_by(stable)
        assert stable.links.grpc is not None
        stable.links.grpc._max_requests = 2
        hanging = Hanging()
        proxy.stand_ins[2, "grpc"] = hanging.infer
        held = [asyncio.create_task(infer(stable)) for _ in range(2)]
        await until(lambda: hanging.entered == 2)
        assert await answered_by(stable) == 1
        assert stable.candidate(2)["fallbacks"] == {"busy": 1}
        for one in held:
            one.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await until(lambda: hanging.left == 2)
        assert not stable.links.grpc.is_busy


@async_test
async def test_a_wrong_request_gets_the_stable_version_s_word(
    versions: list[ModelVersion],
) -> None:
    async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, _):
        wrong = message(X[:, :3])
        _, context = await infer(stable, wrong)
        assert (context.code, context.version) == (Code.INVALID_ARGUMENT, "1")
        assert "[3, 3]" in context.details
        assert stable.candidate(2)["fallbacks"] == {"refused": 1}
        _, context = await infer(stable, wrong, x_rayprism_version="2")
        assert (context.code, context.version) == (Code.INVALID_ARGUMENT, "2")


@pytest.mark.parametrize("named", [True, False])
def test_a_client_that_leaves(versions: list[ModelVersion], named: bool) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits(100)) as (stable, proxy):
            await answered_by(stable)
            hanging = Hanging()
            proxy.stand_ins[2, "grpc"] = hanging.infer
            request = message(model_version="2" if named else "")
            task = asyncio.create_task(infer(stable, request))
            await until(lambda: hanging.entered == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: hanging.left == 1)
            found = stable.candidate(2)
            assert (found["fallbacks"], found["left"]) == ({}, 0 if named else 1)

    run()


# Shadows


async def compared(stable: Member, version: int, count: int = 1) -> dict[str, Any]:
    def ended() -> int:
        found = stable.shadow(version)
        return int(found["compared"] + sum(found["failed"].values()))

    await until(lambda: ended() == count)
    return stable.shadow(version)


@pytest.mark.parametrize("named", [True, False])
def test_copies_are_compared(versions: list[ModelVersion], named: bool) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions, rpcs=True, v1=copies(2, 3)) as (stable, proxy):
            request = message(model_version="1" if named else "", id="mine")
            before = request.SerializeToString()
            assert await answered_by(stable, request) == 1
            assert proxy.calls == [], "not before the answer"
            assert request.SerializeToString() == before
            differs = await compared(stable, 2)
            agrees = await compared(stable, 3)
            assert differs["outputs"] == {"y": {"agreed": 0, "disagreed": 1}}
            assert agrees["outputs"] == {"y": {"agreed": 1, "disagreed": 0}}
            for call in proxy.calls:
                assert call.message == message(id="mine")
                assert call.metadata["request_id"] == "r-1-shadow"
                assert call.metadata["x-rayprism-forwarded"] == "1;shadow"
            assert await answered_by(stable, x_rayprism_forwarded="2") == 1
            _, context = await infer(stable, message(X[:, :3]))
            assert context.code is Code.INVALID_ARGUMENT
            assert await answered_by(stable) == 1
            await compared(stable, 3, 2)

    run()


async def nonsense(request: Any, context: Any) -> Any:
    class Bytes:
        def SerializeToString(self) -> bytes:  # noqa: N802  as of a message
            return b"\xff\xff"

    context.set_trailing_metadata([(VERSION, "2")])
    return Bytes()


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (nonsense, "unreadable"),
        (fails(Code.OK), "unreadable"),  # an empty answer
        (fails(Code.OK, 3), "wrong_version"),
        (fails(Code.INTERNAL), "error"),
        (fails(Code.INVALID_ARGUMENT), "refused"),
        (fails(Code.NOT_FOUND, None), "gone"),
        (fails(Code.UNAVAILABLE), "not_ready"),
    ],
)
def test_shadows_that_give_no_answer(
    versions: list[ModelVersion], stand_in: Callable[..., Any], reason: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=copies(2)) as (stable, proxy):
            proxy.stand_ins[2, "grpc"] = stand_in
            assert await answered_by(stable) == 1
            found = await compared(stable, 2)
            assert (found["failed"], found["compared"]) == ({reason: 1}, 0)

    run()


@async_test
async def test_a_shadow_has_no_more_time_than_the_request(versions: list[ModelVersion]) -> None:
    v1 = copies(2) | {"default_timeout_s": 5}
    async with fleet(versions[:2], rpcs=True, v1=v1) as (stable, proxy):
        for fields in (timeout_us(2_000_000), timeout_us(60_000_000), {}):
            await answered_by(stable, message(**fields))
        await compared(stable, 2, 3)
        allowed = [call.metadata["x-rayprism-timeout-s"] for call in proxy.calls]
        assert [float(value) for value in allowed] == [2, 5, 5]
