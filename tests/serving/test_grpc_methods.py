"""The RPCs of a replica over a real model: answers, statuses, and what stays inside."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import NotReady, Overloaded, TooLarge
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.protocol import grpc as codec
from rayprism.serving.service import ModelService
from tests.serving.conftest import GrpcContext, serving, write_code
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving.grpc import GrpcMethods, ServerMethods, rpc

FAULTY = """
import threading
from rayprism.errors import InvalidInput

class Faulty:
    def __init__(self, folder, options):
        self.entered, self.open = threading.Event(), threading.Event()
        self.open.set()

    def predict(self, inputs):
        x = inputs["x"]
        self.entered.set()
        assert self.open.wait(20)
        if (x == 1).any():
            raise RuntimeError("secret: /srv/keys")
        if (x == 2).any():
            raise InvalidInput("x: not 2")
        return {"y": x}
"""

ROWS = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def faulty(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return push_model(
        repository,
        "faulty",
        write_code(tmp_path_factory.mktemp("faulty"), FAULTY),
        example={"x": [0.0, 0.5]},
        code="model.py:Faulty",
        inputs=[TensorSpec("x", Datatype.FP32, (-1,))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1,))],
        allow_code=True,
    ).version


@asynccontextmanager
async def methods_of(
    version: ModelVersion, **config: Any
) -> AsyncIterator[tuple[GrpcMethods, ModelService]]:
    async with serving(version, allow_code=True, **config) as (service, _):
        methods = GrpcMethods()
        methods.service = service
        yield methods, service


def infer_request(
    x: np.ndarray[Any, Any], model: str, version: str = "", name: str = "x", **fields: Any
) -> Any:
    request = codec.ModelInferRequest(model_name=model, model_version=version, **fields)
    request.inputs.add(name=name, datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.astype("<f4").tobytes())
    return request


def number(value: float, **fields: Any) -> Any:
    return infer_request(np.array([value], np.float32), "faulty", **fields)


async def call(methods: Any, method: str, request: Any) -> tuple[Any, GrpcContext]:
    context = GrpcContext()
    return await getattr(methods, method)(request, context), context


def parameters(**values: int) -> dict[str, Any]:
    return {name: codec.InferParameter(int64_param=value) for name, value in values.items()}


@async_test
async def test_rows_come_back_right(tiny: ModelVersion) -> None:
    async with methods_of(tiny) as (methods, _):
        request = infer_request(ROWS, "tiny", "1", id="mine")
        request.outputs.add(name="y")
        answer, context = await call(methods, "ModelInfer", request)
        assert context.code is None
        assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "mine")
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [5, 3])
        got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(5, 3)
        np.testing.assert_allclose(got, mlp_reference(ROWS), rtol=1e-4, atol=1e-5)


@async_test
async def test_values_may_come_as_a_list(tiny: ModelVersion) -> None:
    async with methods_of(tiny) as (methods, _):
        request = codec.ModelInferRequest(model_name="tiny")
        contents = codec.InferTensorContents(fp32_contents=ROWS.ravel().tolist())
        request.inputs.add(name="x", datatype="FP32", shape=[5, 4], contents=contents)
        answer, _ = await call(methods, "ModelInfer", request)
        got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(5, 3)
        np.testing.assert_allclose(got, mlp_reference(ROWS), rtol=1e-4, atol=1e-5)


@async_test
async def test_every_rpc_answers(tiny: ModelVersion) -> None:
    async with methods_of(tiny) as (methods, service):
        await call(methods, "ModelInfer", infer_request(ROWS, "tiny"))
        for name, version in (("tiny", ""), ("tiny", "1"), ("", "")):
            target = {"name": name, "version": version}
            answer, _ = await call(methods, "ModelReady", codec.ModelReadyRequest(**target))
            assert answer.ready
            answer, _ = await call(methods, "ModelMetadata", codec.ModelMetadataRequest(**target))
            assert (answer.name, list(answer.inputs[0].shape)) == ("tiny", [-1, 4])
            answer, _ = await call(methods, "ModelConfig", codec.ModelConfigRequest(**target))
            assert answer.config.max_batch_size == 64
            request = codec.ModelStatisticsRequest(**target)
            answer, context = await call(methods, "ModelStatistics", request)
            assert answer.model_stats[0].inference_count == 5
            assert context.code is None
        for method in ("ServerLive", "ServerReady"):
            answer, _ = await call(methods, method, getattr(codec, f"{method}Request")())
            assert answer.live if method == "ServerLive" else answer.ready
        service.reconfigure({"max_queue_row": 1})
        answer, _ = await call(methods, "RepositoryIndex", codec.RepositoryIndexRequest(ready=True))
        (entry,) = answer.models
        assert (entry.name, entry.version, entry.state) == ("tiny", "1", "READY")
        assert "max_queue_row" in entry.reason


ERRORS = [
    # what, request, code, a telling word
    ("model", infer_request(ROWS, "other"), "NOT_FOUND", "here is 'tiny' version 1"),
    ("version", infer_request(ROWS, "tiny", "2"), "NOT_FOUND", "version '2'"),
    ("input", infer_request(ROWS, "tiny", name="X"), "INVALID_ARGUMENT", "Did you mean 'x'"),
    ("shape", infer_request(ROWS[:, :3], "tiny"), "INVALID_ARGUMENT", "axis 1"),
    ("no rows", infer_request(ROWS[:0], "tiny"), "INVALID_ARGUMENT", "0 rows"),
    ("no inputs", codec.ModelInferRequest(model_name="tiny"), "INVALID_ARGUMENT", "is empty"),
    (
        "output",
        infer_request(
            ROWS, "tiny", outputs=[codec.ModelInferRequest.InferRequestedOutputTensor(name="z")]
        ),
        "INVALID_ARGUMENT",
        "'z'",
    ),
    (
        "priority",
        infer_request(ROWS, "tiny", parameters=parameters(priority=9)),
        "INVALID_ARGUMENT",
        "priority 9",
    ),
    (
        "sequence",
        infer_request(ROWS, "tiny", parameters=parameters(sequence_id=3)),
        "UNIMPLEMENTED",
        "sequence",
    ),
    (
        "too many rows",
        infer_request(np.zeros((101, 4)), "tiny"),
        "INVALID_ARGUMENT",
        "the queue holds 100",
    ),
    (
        "values of another size",
        infer_request(ROWS, "tiny", raw_input_contents=[b"more"]),
        "INVALID_ARGUMENT",
        "got 4 bytes",
    ),
]


@pytest.mark.parametrize(
    ("request_", "code", "word"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
def test_errors_have_their_status(tiny: ModelVersion, request_: Any, code: str, word: str) -> None:
    @async_test
    async def run() -> None:
        async with methods_of(tiny, max_queue_rows=100) as (methods, _):
            answer, context = await call(methods, "ModelInfer", request_)
            assert context.code == grpc.StatusCode[code], context.details
            assert word in context.details
            assert context.trailing == [("x-rayprism-version", "1")]
            assert answer.ByteSize() == 0
            good, context = await call(methods, "ModelInfer", infer_request(ROWS, "tiny"))
            assert context.code is None
            assert len(good.outputs) == 1

    run()


@pytest.mark.parametrize(
    "method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"]
)
@pytest.mark.parametrize(("name", "version"), [("other", ""), ("tiny", "2")])
def test_other_targets_are_not_found(
    tiny: ModelVersion, method: str, name: str, version: str
) -> None:
    @async_test
    async def run() -> None:
        async with methods_of(tiny) as (methods, _):
            request = getattr(codec, f"{method}Request")(name=name, version=version)
            answer, context = await call(methods, method, request)
            assert context.code == grpc.StatusCode.NOT_FOUND
            assert "is not served here" in context.details
            assert answer.ByteSize() == 0

    run()


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_loading_is_not_offered(tiny: ModelVersion, method: str) -> None:
    @async_test
    async def run() -> None:
        async with methods_of(tiny) as (methods, _):
            _, context = await call(methods, method, getattr(codec, f"{method}Request")())
            assert context.code == grpc.StatusCode.UNIMPLEMENTED
            assert "serve deploy" in context.details

    run()


@async_test
async def test_streams_are_not_offered() -> None:
    context = GrpcContext()
    answers = [answer async for answer in ServerMethods().ModelStreamInfer(object(), context)]
    assert answers == []
    assert context.code == grpc.StatusCode.UNIMPLEMENTED
    assert "ModelInfer" in context.details


def test_what_the_model_raises_stays_inside(
    faulty: ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        async with methods_of(faulty) as (methods, _):
            _, context = await call(methods, "ModelInfer", number(1))
            assert context.code == grpc.StatusCode.INTERNAL
            assert "secret" not in context.details
            assert "RuntimeError" not in context.details
            assert "r-1" in context.details, "the operator finds it in the log"
            _, context = await call(methods, "ModelInfer", number(2))
            assert (context.code, context.details) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "x: not 2",
            )
            _, context = await call(methods, "ModelInfer", number(0))
            assert context.code is None

    run()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "r-1" in record.getMessage()
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


@async_test
async def test_a_full_queue_says_when_to_come_back(faulty: ModelVersion) -> None:
    async with methods_of(faulty, max_queue_rows=1, execution="thread") as (methods, service):
        model: Any = service._model._runtime.run.__self__  # type: ignore[attr-defined]
        model.entered.clear()
        model.open.clear()
        runs = asyncio.create_task(call(methods, "ModelInfer", number(0)))
        await until(model.entered.is_set)
        waits = asyncio.create_task(call(methods, "ModelInfer", number(0)))
        await until(lambda: service.scheduler.queued_rows == 1)
        _, context = await call(methods, "ModelInfer", number(0))
        assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 of 1 rows wait" in context.details
        (_, (name, value)) = context.trailing
        assert name == "retry-after"
        assert int(value) >= 1
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        request = number(0, parameters=parameters(timeout=20_000))
        _, context = await call(methods, "ModelInfer", request)
        assert context.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.02 s" in context.details
        assert context.trailing == [("x-rayprism-version", "1")]
        model.open.set()
        _, context = await runs
        assert context.code is None


@async_test
async def test_a_replica_that_shuts_down_is_unavailable(tiny: ModelVersion) -> None:
    async with methods_of(tiny) as (methods, service):
        await service.close()
        _, context = await call(methods, "ModelInfer", infer_request(ROWS, "tiny"))
        assert context.code == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in context.details


@pytest.mark.parametrize(
    ("error", "code", "trailing"),
    [
        (Overloaded("full", 0.001), "RESOURCE_EXHAUSTED", [("retry-after", "1")]),
        (Overloaded("full", 7.2), "RESOURCE_EXHAUSTED", [("retry-after", "8")]),
        (Overloaded("full", float("nan")), "RESOURCE_EXHAUSTED", [("retry-after", "1")]),
        (NotReady("not yet"), "UNAVAILABLE", []),
        (TooLarge("too large"), "INVALID_ARGUMENT", []),
        (KeyError("secret"), "INTERNAL", []),
        (ValueError("secret"), "INTERNAL", []),
        (StopAsyncIteration("secret"), "INTERNAL", []),
        (ExceptionGroup("secret", [OSError("secret")]), "INTERNAL", []),
    ],
    ids=repr,
)
def test_what_an_rpc_raises_becomes_a_status(
    error: Exception, code: str, trailing: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Methods:
        @rpc
        async def Fails(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802 - an RPC
            raise error

    answer, context = asyncio.run(call(Methods(), "Fails", None))
    assert context.code == grpc.StatusCode[code]
    assert context.trailing == trailing
    assert answer.ByteSize() == 0
    internal = code == "INTERNAL"
    assert context.details == str(error) if not internal else "secret" not in context.details
    assert type(error).__name__ not in context.details
    assert ("secret" in caplog.text) == internal, "logged where the client is told nothing"


def test_an_error_of_another_version_is_passed_on_as_its_own() -> None:
    said = grpc.aio.Metadata(
        ("x-rayprism-version", "2"), ("retry-after", "3"), ("request_id", "other"), ("a", "b")
    )
    full = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), said, "full"
    )

    class Methods:
        @rpc
        async def Fails(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802 - an RPC
            grpc_context.set_trailing_metadata([("x-rayprism-version", "1")])
            raise full

    answer, context = asyncio.run(call(Methods(), "Fails", None))
    assert (context.code, context.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert context.trailing == [("x-rayprism-version", "2"), ("retry-after", "3")]
    assert answer.ByteSize() == 0


@async_test
async def test_who_answers_and_within_what_time(tiny: ModelVersion) -> None:
    """The metadata of split traffic means the same where no traffic is split."""
    async with methods_of(tiny) as (methods, _):
        for metadata, code in (
            ({"x_rayprism_version": "1"}, None),
            ({"x_rayprism_version": "2"}, grpc.StatusCode.NOT_FOUND),
            ({"x_rayprism_version": "two"}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"x_rayprism_timeout_s": "5"}, None),
            ({"x_rayprism_timeout_s": "0.000001"}, grpc.StatusCode.DEADLINE_EXCEEDED),
            ({"x_rayprism_timeout_s": "-1"}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            context = GrpcContext(**metadata)
            await methods.ModelInfer(infer_request(ROWS, "tiny"), context)
            assert context.code == code
            assert context.trailing == [("x-rayprism-version", "1")]


@async_test
async def test_a_cancelled_rpc_stays_cancelled() -> None:
    class Methods:
        @rpc
        async def Waits(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802 - an RPC
            await asyncio.sleep(60)

    context = GrpcContext()
    task = asyncio.create_task(Methods().Waits(None, context))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert context.code is None


@async_test
async def test_a_request_without_an_id_is_served(tiny: ModelVersion) -> None:
    async with methods_of(tiny) as (methods, _):
        context = GrpcContext(request_id=None)
        await methods.ModelInfer(infer_request(ROWS, "tiny"), context)
        assert context.code is None


def test_every_rpc_of_the_protocol_has_a_method() -> None:
    """Serve looks a method up by the name of the RPC."""
    text = (Path(codec.__file__).parent / "oip.proto").read_text()
    names = {line.split()[1].split("(")[0] for line in text.splitlines() if " rpc " in line}
    assert "ModelInfer" in names
    assert all(callable(getattr(GrpcMethods, name, None)) for name in names)
