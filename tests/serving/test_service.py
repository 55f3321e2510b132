"""One loaded version without Ray: preparing, bounds, deadlines, and what clients hear of faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec
from rayprism.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    SetupError,
    TooLarge,
)
from rayprism.models.loader import load_model
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.protocol.messages import InferRequest, RequestedOutput
from rayprism.serving.links import Links
from rayprism.serving.service import ModelService, batch_limits, served_model
from rayprism.serving.settings import UserConfig
from tests.serving.conftest import serving, write_code
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_example, mlp_reference, save_mlp

X = TensorSpec("x", Datatype.FP32, (-1, 4))
Y = TensorSpec("y", Datatype.FP32, (-1, 3))

# The first value of a row says what goes wrong: 101 and so on while a request is prepared,
# 201 and so on while its batch runs. Both steps can be held at a gate.
FAULTS = """
import threading
from rayprism.errors import InvalidInput, NotFound

FAULTS = [
    StopIteration("secret"),
    RuntimeError("secret"),
    InvalidInput("x: larger than the 100 that this model was trained on"),
    TimeoutError("secret"),
    SystemExit("secret"),
    KeyError("secret"),
]

class Gate:
    def __init__(self):
        self.seen, self.entered, self.open = [], threading.Event(), threading.Event()
        self.open.set()

    def pass_through(self, value):
        self.seen.append(value)
        self.entered.set()
        assert self.open.wait(20)

    def hold(self):
        self.seen.clear()
        self.entered.clear()
        self.open.clear()

def fail(x, base):
    number = int(x[:, 0].max()) - base
    if 1 <= number <= len(FAULTS):
        raise FAULTS[number - 1]
"""

PROCESSOR = f"""
{FAULTS}
class Processor:
    def __init__(self, folder, options):
        self.preparing, self.running = Gate(), Gate()

    def preprocess(self, inputs):
        x = inputs["x"]
        self.preparing.pass_through(float(x[0, 0]))
        fail(x, 100)
        if x[0, 0] == 150:
            return None
        if x[0, 0] == 151:
            return {{"features": x[:0]}}
        if x[0, 0] == 152:
            return {{"nonsense": x}}
        return {{"features": x}}

    def postprocess(self, inputs, outputs):
        x = inputs["features"]
        self.running.pass_through(len(x))
        fail(x, 200)
        return {{"y": outputs["scores"]}}
"""

MODEL = f"""
{FAULTS}
class Model:
    def __init__(self, folder, options):
        self.running = Gate()

    def predict(self, inputs):
        a, b = inputs["a"], inputs["b"]
        self.running.pass_through(len(a))
        fail(a, 200)
        return {{"y": a.sum(axis=1) - b.sum(axis=1), "rows": a[:, :1]}}
"""


@pytest.fixture(scope="module")
def prepared(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """The MLP as ONNX, with Python code around it."""
    folder = tmp_path_factory.mktemp("prepared")
    save_mlp(folder / "model.onnx", x="features", y="scores")
    (folder / "processor.py").write_text(PROCESSOR)
    return push_model(
        repository,
        "prepared",
        folder,
        example=mlp_example(),
        file="model.onnx",
        code="processor.py:Processor",
        inputs=[X],
        outputs=[Y],
        allow_code=True,
    ).version


@pytest.fixture(scope="module")
def pairs(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """A Python model of two inputs that differ in width."""
    return push_model(
        repository,
        "pairs",
        write_code(tmp_path_factory.mktemp("pairs"), MODEL),
        example={"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]},
        code="model.py:Model",
        inputs=[
            TensorSpec("a", Datatype.FP32, (-1, -1)),
            TensorSpec("b", Datatype.FP32, (-1, -1)),
        ],
        outputs=[
            TensorSpec("y", Datatype.FP32, (-1,)),
            TensorSpec("rows", Datatype.FP32, (-1, 1)),
        ],
        allow_code=True,
    ).version


@asynccontextmanager
async def running(
    version: ModelVersion, **config: Any
) -> AsyncIterator[tuple[ModelService, httpx.AsyncClient, Any]]:
    """The application of a version with code, and the object that the code made."""
    async with serving(version, allow_code=True, **config) as (service, client):
        model = service._model
        step = model._preprocess or model._runtime.run
        code = step.__self__  # type: ignore[attr-defined]
        code.running.seen.clear()
        try:
            yield service, client, code
        finally:
            code.running.open.set()
            if hasattr(code, "preparing"):
                code.preparing.open.set()


def rows(*firsts: float) -> np.ndarray[Any, Any]:
    return np.array([[first, 0.5, -0.5, 1.0] for first in firsts], np.float32)


def request(*firsts: float, **fields: Any) -> InferRequest:
    return InferRequest({"x": rows(*firsts)}, **fields)


def post(
    client: httpx.AsyncClient, *firsts: float, path: str = "infer", **parameters: Any
) -> asyncio.Task[httpx.Response]:
    x = rows(*firsts)
    document = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}],
        "parameters": parameters,
    }
    headers = {"x-request-id": "r-7"}
    return asyncio.create_task(
        client.post(f"/v2/models/prepared/{path}", json=document, headers=headers)
    )


async def works(client: httpx.AsyncClient, count: int = 1) -> bool:
    """Whether so many rows are answered, and rightly."""
    answer = await post(client, *[0.25] * count)
    assert answer.status_code == 200, answer.text
    got = np.array(answer.json()["outputs"][0]["data"], np.float32).reshape(count, 3)
    np.testing.assert_allclose(got, mlp_reference(rows(*[0.25] * count)), rtol=1e-4, atol=1e-5)
    return True


# Preparing


@async_test
async def test_every_request_gets_its_own_rows_back(prepared: ModelVersion) -> None:
    async with running(prepared) as (service, _, _):
        requests = [request(*np.arange(1 + n % 5) + n) for n in range(40)]
        answers = await asyncio.gather(*(service.infer(asked, "r") for asked in requests))
        for asked, outputs in zip(requests, answers, strict=True):
            want = mlp_reference(asked.tensors["x"])
            np.testing.assert_allclose(outputs["y"], want, rtol=1e-4, atol=1e-4)


@async_test
async def test_the_event_loop_runs_while_a_request_is_prepared(prepared: ModelVersion) -> None:
    async with running(prepared) as (_, client, code):
        code.preparing.hold()
        waiting = post(client, 1)
        await until(code.preparing.entered.is_set)
        assert (await client.get("/v2/models/prepared/ready")).status_code == 200
        assert not waiting.done()
        code.preparing.open.set()
        assert (await waiting).status_code == 200


@async_test
async def test_what_is_being_prepared_counts_as_queued(prepared: ModelVersion) -> None:
    async with running(prepared, max_queue_rows=4) as (service, client, code):
        code.preparing.hold()
        taken = [post(client, 1, 1), post(client, 2, 2)]
        await until(code.preparing.entered.is_set)
        refused = await post(client, 3)
        assert refused.status_code == 503
        assert "4 of 4 rows wait" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1
        assert 3.0 not in code.preparing.seen, "refused before it costs anything"
        assert (await post(client, *[1] * 5)).status_code == 413
        code.preparing.open.set()
        assert [(await task).status_code for task in taken] == [200, 200]
        assert await works(client, 4), "all the room is given back"
        assert service.statistics.failures["overloaded"] == 1


@async_test
async def test_the_queue_never_holds_more_than_its_rows(prepared: ModelVersion) -> None:
    """While a batch runs: prepared requests fill the queue up to its limit, and not beyond."""
    async with running(prepared, max_queue_rows=6, execution="thread") as (service, client, code):
        code.running.hold()
        blocker = post(client, 0.25)
        await until(code.running.entered.is_set)
        tasks = [post(client, n, n) for n in range(8)]
        await until(lambda: sum(task.done() for task in tasks) == 5)
        await until(lambda: service.scheduler.queued_rows == 6)
        code.running.open.set()
        statuses = [(await task).status_code for task in tasks]
        assert sorted(statuses) == [200] * 3 + [503] * 5
        assert (await blocker).status_code == 200


@pytest.mark.parametrize("execution", ["inline", "thread"])
@pytest.mark.parametrize("base", [100, 200], ids=["preprocess", "postprocess"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(1, 500), (2, 500), (3, 400), (4, 500), (5, 500), (6, 500)],
    ids=["StopIteration", "RuntimeError", "InvalidInput", "TimeoutError", "SystemExit", "KeyError"],
)
def test_what_code_raises_is_its_own_request_s_fault(
    prepared: ModelVersion, base: int, number: int, status: int, execution: str
) -> None:
    @async_test
    async def run() -> None:
        async with running(prepared, execution=execution, max_queue_rows=8) as (
            service,
            client,
            _,
        ):
            bad = post(client, base + number)
            good = [post(client, 0.25) for _ in range(3)]
            answer = await bad
            assert answer.status_code == status, answer.text
            said = answer.json()["error"]
            if status == 400:
                assert said == "x: larger than the 100 that this model was trained on"
            else:
                assert "secret" not in answer.text
                assert "Error" not in said.replace("error", "")
                assert "r-7" in said, "the operator finds it in the log"
            assert [(await task).status_code for task in good] == [200] * 3
            assert await works(client, 8), "the replica goes on, with all of its room"
            code = "invalid_input" if status == 400 else "model_failed"
            assert service.statistics.failures == {code: 1}

    run()


@pytest.mark.parametrize("first", [150, 151, 152], ids=["None", "rows lost", "another name"])
def test_preprocessing_that_returns_what_the_runtime_cannot_take(
    prepared: ModelVersion, first: float
) -> None:
    @async_test
    async def run() -> None:
        async with running(prepared) as (_, client, _):
            answer = await post(client, first)
            assert answer.status_code == 500
            assert "features" not in answer.text
            assert "pre-processing failed" in answer.json()["error"]
            assert await works(client)

    run()


@pytest.mark.parametrize("first", [102, 202], ids=["preprocess", "postprocess"])
def test_the_log_has_what_the_client_is_not_told(
    prepared: ModelVersion, first: float, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        async with running(prepared) as (_, client, _):
            await post(client, first)

    run()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "r-7" in record.getMessage()
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


@async_test
async def test_the_deadline_covers_preparing(prepared: ModelVersion) -> None:
    async with running(prepared, max_queue_rows=4) as (service, client, code):
        code.preparing.hold()
        blocker = post(client, 1)
        await until(code.preparing.entered.is_set)
        late = await post(client, 2, timeout=50_000)
        assert late.status_code == 504
        assert "0.05 s" in late.json()["error"]
        assert "pre-processing" in late.json()["error"]
        assert not blocker.done()
        code.preparing.open.set()
        assert (await blocker).status_code == 200
        assert await works(client, 4)
        assert 2.0 not in code.preparing.seen, "nobody waits for it, so it is not prepared"
        assert service.statistics.failures == {"deadline_exceeded": 1}


@async_test
async def test_the_time_of_preparing_is_not_given_twice(prepared: ModelVersion) -> None:
    async with running(prepared, execution="thread") as (service, client, code):
        time_s = 1000.0
        service.scheduler._clock = lambda: time_s
        code.preparing.hold()
        waiting = post(client, 1, timeout=5_000_000)
        await until(code.preparing.entered.is_set)
        time_s += 5.5  # on the scheduler's clock only: the time-out of preparing has not struck
        code.preparing.open.set()
        answer = await waiting
        assert answer.status_code == 504
        assert "it waited 5.5 s" in answer.json()["error"]
        assert await works(client)


@async_test
async def test_the_default_time_out_is_the_user_config_s(prepared: ModelVersion) -> None:
    async with running(prepared, default_timeout_s=0.05) as (_, client, code):
        code.preparing.hold()
        long = post(client, 1, timeout=20_000_000)
        await until(code.preparing.entered.is_set)
        assert "0.05 s" in (await post(client, 2)).json()["error"]
        assert not long.done(), "a request's own goes first"
        code.preparing.open.set()
        assert (await long).status_code == 200


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"priority": 4}, "priority 4: allowed are 1 (first) to 3, and 0 for the default"),
        ({"outputs": (RequestedOutput("Y"),)}, "Did you mean 'y'"),
        ({"tensors": {"x": np.zeros((1, 3), np.float32)}}, "axis 1"),
        ({"tensors": {"x": np.zeros((0, 4), np.float32)}}, "0 rows"),
    ],
    ids=["priority", "output", "shape", "no rows"],
)
def test_what_can_be_refused_is_refused_before_preparing(
    prepared: ModelVersion, fields: dict[str, Any], word: str
) -> None:
    @async_test
    async def run() -> None:
        async with running(prepared) as (service, client, code):
            code.preparing.seen.clear()
            asked = InferRequest(**{"tensors": {"x": rows(1)}, **fields})
            with pytest.raises(InvalidInput) as caught:
                await service.infer(asked, "r")
            assert word in str(caught.value)
            assert code.preparing.seen == []
            assert await works(client)

    run()


@async_test
async def test_clients_that_leave_while_they_are_prepared(prepared: ModelVersion) -> None:
    async with running(prepared, max_queue_rows=4) as (service, client, code):
        code.preparing.hold()
        first, second = post(client, 1, 1), post(client, 2, 2)
        await until(code.preparing.entered.is_set)
        assert (await post(client, 3)).status_code == 503
        for task in (first, second):
            task.cancel()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
        third = post(client, 3, 3, 3, 3)
        await asyncio.sleep(0.01)
        assert not third.done(), "it has their room already"
        code.preparing.open.set()
        assert (await third).status_code == 200
        assert code.preparing.seen == [1.0, 3.0], "the one that waited is not prepared any more"
        assert 2 not in code.running.seen, "and nothing of the two runs"
        assert service.statistics.failures == {"overloaded": 1, "cancelled": 2}


@async_test
async def test_closing_refuses_who_is_being_prepared(prepared: ModelVersion) -> None:
    async with running(prepared) as (service, client, code):
        code.preparing.hold()
        waiting = [post(client, 1), post(client, 2)]
        await until(code.preparing.entered.is_set)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        during = await post(client, 3)
        code.preparing.open.set()
        await closing
        after = await post(client, 4)
        for answer in (*[await task for task in waiting], during, after):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"] == "this replica is shutting down"
            assert "retry-after" not in answer.headers


@async_test
async def test_closing_ends_what_runs_and_refuses_what_waits(prepared: ModelVersion) -> None:
    async with running(prepared, execution="thread") as (service, client, code):
        code.running.hold()
        runs = post(client, 1)
        await until(code.running.entered.is_set)
        waits = post(client, 2)
        await until(lambda: service.scheduler.queued_rows == 1)
        closing = asyncio.create_task(service.close())
        assert (await waits).status_code == 503
        assert not closing.done()
        code.running.open.set()
        await closing
        assert (await runs).status_code == 200
        await service.close()  # twice does no harm


# The model itself


def pair(*firsts: float, width: int = 2, swapped: bool = False) -> InferRequest:
    a = np.array([[first] * width for first in firsts], np.float32)
    b = np.array([[1] * 3 for _ in firsts], np.float32)
    return InferRequest({"b": b, "a": a} if swapped else {"a": a, "b": b})


async def hold_model(service: ModelService, code: Any) -> asyncio.Task[Any]:
    """Keeps the model busy until the gate opens."""
    code.running.hold()
    blocker = asyncio.create_task(service.infer(pair(1), "blocker"))
    await until(code.running.entered.is_set)
    code.running.seen.clear()
    return blocker


@async_test
async def test_the_order_of_inputs_keeps_nobody_out_of_a_batch(pairs: ModelVersion) -> None:
    async with running(pairs, execution="thread") as (service, _, code):
        blocker = await hold_model(service, code)
        tasks = [
            asyncio.create_task(service.infer(pair(n, swapped=n % 2 == 1), "r")) for n in range(6)
        ]
        await until(lambda: service.scheduler.queued_rows == 6)
        code.running.open.set()
        for n, task in enumerate(tasks):
            assert (await task)["y"].tolist() == [2 * n - 3]
        await blocker
        assert code.running.seen == [6]


@async_test
async def test_other_shapes_do_not_share_a_batch(pairs: ModelVersion) -> None:
    async with running(pairs, execution="thread") as (service, _, code):
        blocker = await hold_model(service, code)
        tasks = [
            asyncio.create_task(service.infer(pair(n, width=2 + n % 2), "r")) for n in range(4)
        ]
        await until(lambda: service.scheduler.queued_rows == 4)
        code.running.open.set()
        for n, task in enumerate(tasks):
            assert (await task)["y"].tolist() == [(2 + n % 2) * n - 3]
        await blocker
        assert code.running.seen == [2, 2]


@async_test
async def test_outputs_come_as_they_were_asked_for(pairs: ModelVersion) -> None:
    async with running(pairs) as (service, _, _):
        assert list(await service.infer(pair(1), "r")) == ["y", "rows"]
        for names in (["rows"], ["rows", "y"]):
            asked = pair(1)
            asked.outputs = tuple(RequestedOutput(name) for name in names)
            assert list(await service.infer(asked, "r")) == names


@pytest.mark.parametrize("execution", ["inline", "thread"])
@pytest.mark.parametrize("number", [1, 2, 3, 5], ids=["Stop", "Runtime", "Invalid", "Exit"])
def test_a_model_that_raises_fails_its_own_request_only(
    pairs: ModelVersion, number: int, execution: str
) -> None:
    @async_test
    async def run() -> None:
        async with running(pairs, execution=execution) as (service, _, _):
            firsts = [1, 2, 200 + number, 3]
            outcomes = await asyncio.gather(
                *(service.infer(pair(first), f"r-{first}") for first in firsts),
                return_exceptions=True,
            )
            assert [type(outcome).__name__ for outcome in outcomes] == [
                "dict",
                "dict",
                "InvalidInput" if number == 3 else "ModelFailed",
                "dict",
            ]
            assert "secret" not in str(outcomes[2])
            assert number == 3 or f"r-{firsts[2]}" in str(outcomes[2])
            assert (await service.infer(pair(4), "r"))["y"].tolist() == [5]

    run()


@async_test
async def test_errors_of_the_bounds(pairs: ModelVersion) -> None:
    async with running(pairs, execution="thread", max_queue_rows=2) as (service, _, code):
        blocker = await hold_model(service, code)
        waits = asyncio.create_task(service.infer(pair(1, 2), "r"))
        await until(lambda: service.scheduler.queued_rows == 2)
        with pytest.raises(Overloaded, match="2 of 2 rows wait") as full:
            await service.infer(pair(1), "r")
        assert full.value.retry_after_s > 0
        with pytest.raises(TooLarge, match="holds 2"):
            await service.infer(pair(1, 2, 3), "r")
        late = pair(1)
        late.timeout_s = 0.02
        assert service.reconfigure({"max_queue_rows": 3, "execution": "thread"})
        with pytest.raises(DeadlineExceeded, match=r"0\.02 s"):
            await service.infer(late, "r")
        code.running.open.set()
        await waits
        await blocker
        await service.close()
        with pytest.raises(NotReady, match="shutting down"):
            await service.infer(pair(1), "r")


# Health


@pytest.mark.parametrize("step", ["running", "preparing"])
def test_a_step_that_hangs_makes_the_replica_unhealthy(prepared: ModelVersion, step: str) -> None:
    @async_test
    async def run() -> None:
        async with running(prepared, execution="thread") as (service, client, code):
            time_s = 1000.0
            service.scheduler._clock = lambda: time_s
            service.check_health()
            getattr(code, step).hold()
            waiting = post(client, 1)
            await until(getattr(code, step).entered.is_set)
            service.check_health()
            time_s += 599
            service.check_health()
            time_s += 2
            with pytest.raises(SetupError, match="hang"):
                service.check_health()
            assert service.reconfigure({"default_timeout_s": 70, "execution": "thread"})
            service.check_health()  # who may wait for long is given longer
            time_s += 100
            with pytest.raises(SetupError, match="hang"):
                service.check_health()
            getattr(code, step).open.set()
            await waiting
            service.check_health()

    run()


@async_test
async def test_an_idle_replica_is_healthy_for_ever(prepared: ModelVersion) -> None:
    async with running(prepared) as (service, client, _):
        assert await works(client)
        time_s = service.scheduler.now_s() + 1e6
        service.scheduler._clock = lambda: time_s
        service.check_health()


# What is in force


def with_batching(version: ModelVersion, **batching: Any) -> Any:
    return version.manifest.model_copy(update={"batching": Batching(**batching)})


RAGGED = {"ragged": {"x": RaggedAxis(1)}, "max_cost": 512}


@pytest.mark.parametrize(
    ("batching", "config", "want"),
    [
        ({}, {}, {"max_rows": 64, "max_queue_rows": 2048, "max_cost": None, "max_delay_s": 0.0}),
        ({"max_rows": 8}, {}, {"max_rows": 8}),
        ({"max_rows": 8}, {"max_batch_rows": 32}, {"max_rows": 32}),
        ({"max_rows": 8}, {"max_batch_rows": 1}, {"max_rows": 1}),
        ({"max_delay_s": 0.5}, {}, {"max_delay_s": 0.5}),
        ({"max_delay_s": 0.5}, {"max_delay_s": 0}, {"max_delay_s": 0.0}),
        ({"max_delay_s": 0.5}, {"max_delay_s": 0.1}, {"max_delay_s": 0.1}),
        ({}, {"max_queue_rows": 7}, {"max_queue_rows": 7}),
        (RAGGED, {}, {"max_cost": 512}),
        (RAGGED, {"max_batch_cost": 99}, {"max_cost": 99}),
        ({}, {"max_batch_cost": 99}, {"max_cost": None}),
        ({**RAGGED, "max_padding_share": 0.2}, {}, {"max_padding_share": 0.2}),
        ({"batched": False, "max_rows": 1}, {"max_batch_rows": 32}, {"max_rows": 1}),
    ],
)
def test_the_user_config_goes_before_the_manifest(
    tiny: ModelVersion, batching: dict[str, Any], config: dict[str, Any], want: dict[str, Any]
) -> None:
    limits = batch_limits(with_batching(tiny, **batching), UserConfig(**config))
    assert {name: getattr(limits, name) for name in want} == want


@async_test
async def test_new_bounds_are_in_force_at_once(pairs: ModelVersion) -> None:
    async with running(pairs, execution="thread", max_batch_rows=2) as (service, _, code):
        for config, batches in (({}, [2, 2]), ({"max_batch_rows": 3}, [3, 1]), (None, [4])):
            assert service.reconfigure(
                None if config is None else {"max_batch_rows": 2, "execution": "thread", **config}
            )
            code.running.seen.clear()
            await service.infer(pair(1, 2, 3, 4), "r")
            assert code.running.seen == batches


@async_test
async def test_where_batches_run_can_be_said(tiny: ModelVersion) -> None:
    async with serving(tiny) as (service, _):
        assert service.scheduler.inline, "it takes microseconds"
        assert service.reconfigure({"execution": "thread"})
        assert not service.scheduler.inline
        assert service.reconfigure({})
        assert service.scheduler.inline


@async_test
async def test_a_faulty_user_config_changes_nothing(tiny: ModelVersion) -> None:
    async with serving(tiny, max_queue_rows=5) as (service, client):
        before = service.config
        assert not service.reconfigure({"max_queue_rows": 9, "max_batch_rows": 0})
        assert service.config is before
        assert service.config_error is not None
        assert "max_batch_rows" in service.config_error
        document = (await client.get("/v2/models/tiny/config")).json()
        told = document["parameters"]["user_config_error"]["string_value"]
        assert told == service.config_error
        assert service.reconfigure({"max_queue_rows": 9})
        assert service.config_error is None
        parameters = (await client.get("/v2/models/tiny/config")).json()["parameters"]
        assert parameters.keys() == {"device", "execution", "digest"}
        assert parameters["digest"]["string_value"] == service.manifest.digest
        assert parameters["execution"]["string_value"] == service.scheduler.place


@async_test
async def test_default_priority_is_what_zero_means(pairs: ModelVersion) -> None:
    config = {"priority_levels": 5, "default_priority": 4, "max_batch_rows": 1}
    async with running(pairs, execution="thread", **config) as (service, _, code):
        blocker = await hold_model(service, code)
        order: list[int] = []

        async def ask(priority: int) -> None:
            asked = pair(1)
            asked.priority = priority
            await service.infer(asked, "r")
            order.append(priority)

        tasks = [asyncio.create_task(ask(priority)) for priority in (5, 0, 3, 4, 1)]
        await until(lambda: service.scheduler.queued_rows == 5)
        code.running.open.set()
        await asyncio.gather(blocker, *tasks)
        assert order == [1, 3, 0, 4, 5]
        with pytest.raises(InvalidInput, match="to 5, and 0 for the default, which is 4"):
            await ask(6)


@async_test
async def test_the_target_is_checked(tiny: ModelVersion) -> None:
    async with serving(tiny) as (service, _):
        for model, version in (
            (None, None),
            ("tiny", None),
            ("tiny", "1"),
            (None, "1"),
            (None, ""),
        ):
            service.check_target(model, version)
        with pytest.raises(NotFound, match="here is 'tiny' version 1"):
            service.check_target("other", None)
        with pytest.raises(NotFound, match="version '2' of model 'tiny'"):
            service.check_target("tiny", "2")
        assert (service.model_name, service.version, service.device) == ("tiny", "1", "cpu")


def test_a_served_model_says_what_is_in_force(tiny: ModelVersion) -> None:
    manifest = tiny.manifest.model_copy(update={"metadata": {"description": "Digits"}})
    served = served_model(
        manifest,
        UserConfig(
            max_batch_rows=16,
            max_delay_s=0.01,
            default_timeout_s=3,
            priority_levels=9,
            default_priority=7,
        ),
    )
    assert (served.name, served.version, served.description) == ("tiny", "1", "Digits")
    assert (served.platform, served.backend) == ("onnxruntime_onnx", "onnxruntime")
    assert (served.max_rows, served.max_delay_s) == (16, 0.01)
    assert (served.default_timeout_s, served.priority_levels, served.default_priority) == (3, 9, 7)
    assert [spec.name for spec in served.inputs] == ["x"]
    assert served.example is not None
    assert served.example["x"].shape == (3, 4)
    plain = served_model(tiny.manifest)
    assert (plain.max_rows, plain.default_timeout_s, plain.description) == (64, 60, "")


@async_test
async def test_the_documents_follow_the_user_config(prepared: ModelVersion) -> None:
    async with running(prepared) as (service, client, _):
        assert service.reconfigure({"max_batch_rows": 5})
        document = (await client.get("/v2/models/prepared/config")).json()
        assert document["max_batch_size"] == 5
        assert service.served_model().max_rows == 5


def test_a_service_leaves_no_thread_behind(prepared: ModelVersion) -> None:
    before = set(threading.enumerate())
    services: list[ModelService] = []  # closed, not collected as garbage

    @async_test
    async def run() -> None:
        async with running(prepared, execution="thread") as (service, client, _):
            services.append(service)
            assert await works(client)

    run()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # closing does not wait for the one that prepares
        assert not thread.is_alive(), thread.name


@async_test
async def test_code_of_its_own_never_runs_on_the_event_loop_by_itself(pairs: ModelVersion) -> None:
    async with running(pairs) as (service, _, _):
        assert service.scheduler.place == "thread", "however fast it was while warming up"
    async with running(pairs, execution="inline") as (service, _, _):
        assert service.scheduler.place == "inline", "unless the operator says so"


# Traffic


@async_test
async def test_traffic_follows_the_user_config(tiny: ModelVersion) -> None:
    async with serving(tiny) as (service, client):
        assert (service.traffic.is_split, service.shadows.is_on) == (False, False)
        traffic = {
            "candidates": [{"version": "2", "weight": 5}, {"version": "1", "weight": 60}],
            "shadow": [{"version": "3", "sample": 10}, {"version": "1", "sample": 100}],
        }
        assert service.reconfigure({"traffic": traffic})
        assert service.traffic.is_split
        found = (await client.get("/v2/models/tiny/traffic")).json()
        assert found["weights"] == {"1": 95, "2": 5}, "its own version is no candidate"
        assert list(found["candidates"]) == ["2"]
        assert list(found["shadows"]) == ["3"]
        assert not service.reconfigure({"traffic": {"candidates": [{"version": "2"}]}})
        assert service.traffic.is_split, "the last good one"
        assert service.reconfigure(None)
        assert (service.traffic.is_split, service.shadows.is_on) == (False, False)
        found = (await client.get("/v2/models/tiny/traffic")).json()
        assert found["weights"] == {"1": 100}
        assert list(found["candidates"]) == ["2"], "its counts stay"


@async_test
async def test_shadows_wait_while_more_waits_than_a_batch_takes(pairs: ModelVersion) -> None:
    async with running(pairs, max_batch_rows=1, execution="thread") as (service, _, code):
        is_busy = service.shadows._is_busy
        runs = await hold_model(service, code)
        waits = [asyncio.create_task(service.infer(pair(1.0), "r"))]
        await until(lambda: service.scheduler.queued_rows == 1)
        assert not is_busy(), "one batch waits always, where there is work at all"
        waits.append(asyncio.create_task(service.infer(pair(1.0), "r")))
        await until(lambda: service.scheduler.queued_rows == 2)
        assert is_busy()
        code.running.open.set()
        await asyncio.gather(runs, *waits)
        assert not is_busy()


@async_test
async def test_closing_lets_go_of_the_other_versions(tiny: ModelVersion) -> None:
    before = asyncio.all_tasks()
    asked = threading.Event()
    answer = threading.Event()

    def fetch() -> dict[str, Any]:
        asked.set()
        answer.wait(20)
        return {}

    links = Links("tiny", fetch)
    config = UserConfig.model_validate({"traffic": {"candidates": [{"version": 2, "weight": 100}]}})
    service = ModelService(await asyncio.to_thread(load_model, tiny), config, links)
    await asyncio.to_thread(asked.wait, 20)
    await service.close()
    assert asyncio.all_tasks() == before
    assert (links.http, links.grpc) == (None, None)
    answer.set()
