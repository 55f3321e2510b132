"""The scheduler against models that the test controls: nothing is lost, and faults stay alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from rayprism.core.batching import BatchLimits
from rayprism.core.tensors import RaggedAxis, Tensors
from rayprism.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelFailed,
    NotReady,
    OutOfMemory,
    Overloaded,
    TooLarge,
)
from rayprism.serving.scheduler import Scheduler
from rayprism.serving.statistics import Statistics
from tests.support.asyncs import async_test, until

POISON = -1.0


class DoublingModel:
    """Doubles its input; raises on a poisoned row; can be held at a gate."""

    def __init__(self, measured_run_s: float = 1.0) -> None:
        self.measured_run_s = measured_run_s
        self.batches: list[np.ndarray[Any, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.threads: set[str] = set()

    def run(self, batch: Tensors) -> Tensors:
        self.threads.add(threading.current_thread().name)
        self.batches.append(batch["x"].copy())
        self.entered.set()
        assert self.gate.wait(10)
        if (batch["x"] == POISON).any():
            raise ValueError("poisoned")
        return {"y": batch["x"] * 2}


class SteppedModel(DoublingModel):
    """Runs one batch for each `permits.release()`."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.started = 0

    def run(self, batch: Tensors) -> Tensors:
        self.started += 1
        assert self.permits.acquire(timeout=10)
        return super().run(batch)


@asynccontextmanager
async def running(model: Any, **options: Any) -> AsyncIterator[Scheduler]:
    limits = {"max_rows": 8, "max_queue_rows": 100, **options.pop("limits", {})}
    scheduler = Scheduler(
        model,
        BatchLimits(**limits),
        ragged=options.pop("ragged", {}),
        statistics=options.pop("statistics", Statistics()),
        **options,
    )
    try:
        yield scheduler
    finally:
        if isinstance(model, DoublingModel):
            model.gate.set()
        await scheduler.close()


def rows_of(*values: float) -> Tensors:
    return {"x": np.array([[value] for value in values], np.float32)}


def infer(
    scheduler: Scheduler, *values: float, timeout_s: float = 30.0, priority: int = 0
) -> asyncio.Task[Tensors]:
    return asyncio.create_task(
        scheduler.infer(
            rows_of(*values), len(values), timeout_s=timeout_s, priority=priority, request_id="r"
        )
    )


async def hold(scheduler: Scheduler, model: DoublingModel) -> asyncio.Task[Tensors]:
    """Keeps the model busy with one request until the gate opens."""
    model.gate.clear()
    model.entered.clear()
    task = infer(scheduler, 99.0)
    await until(model.entered.is_set)
    model.batches.clear()
    return task


@async_test
async def test_every_request_gets_its_own_rows_back() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        blocker = await hold(scheduler, model)
        tasks = [infer(scheduler, *range(start, start + 3)) for start in (10, 20, 30)]
        await until(lambda: scheduler.queued_rows == 9)
        model.gate.set()
        for task, start in zip(tasks, (10, 20, 30), strict=True):
            assert (await task)["y"].ravel().tolist() == [2 * (start + i) for i in range(3)]
        await blocker
        assert [len(batch) for batch in model.batches] == [6, 3], "bound late, and in rows"


@async_test
async def test_a_request_larger_than_a_batch_is_split_and_put_together() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        outputs = await infer(scheduler, *range(20))
        assert outputs["y"].ravel().tolist() == [2 * value for value in range(20)]
        assert [len(batch) for batch in model.batches] == [8, 8, 4]


@async_test
async def test_only_the_request_at_fault_fails() -> None:
    model = DoublingModel()
    statistics = Statistics()
    async with running(model, statistics=statistics) as scheduler:
        blocker = await hold(scheduler, model)
        good = [infer(scheduler, float(value)) for value in range(1, 6)]
        bad = infer(scheduler, POISON)
        more = infer(scheduler, 7.0)
        await until(lambda: scheduler.queued_rows == 7)
        model.gate.set()
        with pytest.raises(ModelFailed, match="request id r"):
            await bad
        answers = [(await task)["y"][0, 0] for task in [*good, more]]
        assert answers == [2, 4, 6, 8, 10, 14]
        await blocker
        assert statistics.failures == {"model_failed": 1}


@async_test
async def test_the_model_s_own_words_for_a_bad_request_reach_it() -> None:
    class Picky(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            if (batch["x"] == POISON).any():
                raise InvalidInput("text 3 is empty")
            return super().run(batch)

    async with running(Picky()) as scheduler:
        with pytest.raises(InvalidInput, match="text 3 is empty"):
            await infer(scheduler, POISON)
        assert (await infer(scheduler, 1.0))["y"].tolist() == [[2.0]]


@async_test
async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    model = DoublingModel()
    async with running(model, limits={"max_queue_rows": 4}) as scheduler:
        blocker = await hold(scheduler, model)
        waiting = infer(scheduler, 1, 2, 3)
        await until(lambda: scheduler.queued_rows == 3)
        with pytest.raises(Overloaded, match="3 of 4 rows wait") as caught:
            await infer(scheduler, 4, 5)
        assert caught.value.retry_after_s > 0
        model.gate.set()
        assert len((await waiting)["y"]) == 3
        await blocker
        with pytest.raises(TooLarge, match="the queue holds 4"):
            await infer(scheduler, 1, 2, 3, 4, 5)


@async_test
async def test_what_is_late_is_answered_at_its_deadline_and_never_run() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        blocker = await hold(scheduler, model)
        late = infer(scheduler, 5.0, timeout_s=0.02)
        with pytest.raises(DeadlineExceeded, match=r"within the 0.02 s"):
            await late
        model.gate.set()
        await blocker
        assert (await infer(scheduler, 6.0))["y"].tolist() == [[12.0]]
        assert all((batch != 5.0).all() for batch in model.batches)


@async_test
async def test_running_requests_are_answered_at_their_deadlines_too() -> None:
    model = SteppedModel()
    async with running(model) as scheduler:
        blocker = infer(scheduler, 1.0)  # its time is what could mislead about the others'
        await until(lambda: model.started == 1)
        late = [infer(scheduler, 5.0, timeout_s=0.3), infer(scheduler, 6.0, timeout_s=0.6)]
        await until(lambda: scheduler.queued_rows == 2)
        model.permits.release()
        await blocker
        await until(lambda: model.started == 2)
        for task in late:
            with pytest.raises(DeadlineExceeded):
                await task
        assert len(model.batches) == 1, "answered while their batch was still running"
        model.permits.release()


@async_test
async def test_clients_that_left_are_not_run() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        blocker = await hold(scheduler, model)
        gone = infer(scheduler, 5.0)
        stays = infer(scheduler, 6.0)
        await until(lambda: scheduler.queued_rows == 2)
        gone.cancel()
        await until(gone.done)
        assert scheduler.queued_rows == 1
        model.gate.set()
        await stays
        await blocker
        assert [batch.ravel().tolist() for batch in model.batches] == [[6.0]]


@async_test
async def test_priority_goes_first() -> None:
    model = DoublingModel()
    async with running(model, limits={"max_rows": 1}) as scheduler:
        blocker = await hold(scheduler, model)
        tasks = [infer(scheduler, float(p), priority=p) for p in (3, 1, 2)]
        await until(lambda: scheduler.queued_rows == 3)
        model.gate.set()
        await asyncio.gather(blocker, *tasks)
        assert [batch[0, 0] for batch in model.batches] == [1.0, 2.0, 3.0]


@async_test
async def test_ragged_requests_are_padded_together_and_cut_apart() -> None:
    class Echo(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            super().run(batch)
            return {"y": batch["x"] * 10}

    model = Echo()
    async with running(model, ragged={"x": RaggedAxis(1, 7)}, ragged_outputs={"y": 1}) as scheduler:
        blocker = asyncio.create_task(
            scheduler.infer({"x": np.ones((1, 3), np.int64)}, 1, timeout_s=30)
        )
        model.gate.clear()
        await until(model.entered.is_set)
        model.batches.clear()
        short = asyncio.create_task(scheduler.infer({"x": np.array([[1, 2]])}, 1, timeout_s=30))
        long = asyncio.create_task(
            scheduler.infer({"x": np.array([[3, 4, 5, 6]])}, 1, timeout_s=30)
        )
        await until(lambda: scheduler.queued_rows == 2)
        model.gate.set()
        assert (await short)["y"].tolist() == [[10, 20]]
        assert (await long)["y"].tolist() == [[30, 40, 50, 60]]
        await blocker
        assert model.batches[0].tolist() == [[1, 2, 7, 7], [3, 4, 5, 6]]


@async_test
async def test_tiny_models_run_on_the_event_loop_and_others_do_not() -> None:
    here = threading.current_thread().name
    for measured_run_s, inline in ((0.0005, True), (0.5, False)):
        model = DoublingModel(measured_run_s)
        async with running(model) as scheduler:
            assert scheduler.inline is inline
            await infer(scheduler, 1.0)
            assert (here in model.threads) is inline
    forced = DoublingModel(measured_run_s=0.5)
    async with running(forced, execution="inline") as scheduler:
        await infer(scheduler, 1.0)
        assert here in forced.threads


@async_test
async def test_requests_of_one_turn_of_the_loop_share_an_inline_batch() -> None:
    model = DoublingModel(measured_run_s=0.0005)
    async with running(model) as scheduler:
        answers = await asyncio.gather(*(infer(scheduler, float(i)) for i in range(5)))
        assert [answer["y"][0, 0] for answer in answers] == [0, 2, 4, 6, 8]
        assert [len(batch) for batch in model.batches] == [5]


@async_test
async def test_inline_faults_are_bisected_too() -> None:
    model = DoublingModel(measured_run_s=0.0005)
    async with running(model) as scheduler:
        values = [1.0, POISON, 3.0, 4.0]
        answers = await asyncio.gather(
            *(infer(scheduler, value) for value in values), return_exceptions=True
        )
        assert isinstance(answers[1], ModelFailed)
        good = [answers[i]["y"][0, 0] for i in (0, 2, 3)]  # type: ignore[index]
        assert good == [2, 6, 8]


@async_test
async def test_a_model_that_turns_slow_leaves_the_event_loop() -> None:
    class Slow(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            threading.Event().wait(0.02)
            return super().run(batch)

    model = Slow(measured_run_s=0.0005)
    async with running(model) as scheduler:
        await infer(scheduler, 1.0)
        assert scheduler.inline, "one slow batch may be the machine's fault"
        for _ in range(4):
            await infer(scheduler, 1.0)
        assert not scheduler.inline
        assert (await infer(scheduler, 2.0))["y"].tolist() == [[4.0]]


@async_test
async def test_new_limits_hold_for_what_already_waits() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        blocker = await hold(scheduler, model)
        tasks = [infer(scheduler, float(i)) for i in range(4)]
        await until(lambda: scheduler.queued_rows == 4)
        scheduler.reconfigure(BatchLimits(max_rows=2, max_queue_rows=100), "auto")
        model.gate.set()
        await asyncio.gather(blocker, *tasks)
        assert [len(batch) for batch in model.batches] == [2, 2]


@async_test
async def test_closing_refuses_what_waits_and_finishes_what_runs() -> None:
    model = DoublingModel()
    async with running(model) as scheduler:
        blocker = await hold(scheduler, model)
        waiting = infer(scheduler, 1.0)
        await until(lambda: scheduler.queued_rows == 1)
        closing = asyncio.create_task(scheduler.close())
        with pytest.raises(NotReady):
            await waiting
        model.gate.set()
        await closing
        assert (await blocker)["y"].tolist() == [[198.0]]
        with pytest.raises(NotReady):
            await infer(scheduler, 1.0)


class Raising(DoublingModel):
    """Raises whatever it is told to, where a row is poisoned."""

    def __init__(self, error: BaseException, measured_run_s: float) -> None:
        super().__init__(measured_run_s)
        self.error = error

    def run(self, batch: Tensors) -> Tensors:
        if (batch["x"] == POISON).any():
            raise self.error
        return super().run(batch)


class FalsyError(Exception):
    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("measured_run_s", [0.0005, 1.0], ids=["inline", "thread"])
@pytest.mark.parametrize(
    "error",
    [StopIteration(), asyncio.CancelledError(), SystemExit(3), FalsyError(), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_no_exception_of_a_model_stops_the_replica(
    error: BaseException, measured_run_s: float
) -> None:
    @async_test
    async def run() -> None:
        async with running(Raising(error, measured_run_s)) as scheduler:
            with pytest.raises(ModelFailed):
                await infer(scheduler, POISON)
            assert (await infer(scheduler, 2.0))["y"].tolist() == [[4.0]]

    run()


@async_test
async def test_a_slow_first_batch_does_not_make_an_idle_model_refuse() -> None:
    """The floor of the batch time is a guess that only a run can mend."""
    now_s = 0.0

    class Timed(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            nonlocal now_s
            now_s += 0.5 if len(self.batches) == 0 else 0.001
            return super().run(batch)

    async with running(Timed(0.0005), clock=lambda: now_s, execution="inline") as scheduler:
        await infer(scheduler, 1.0)
        for value in range(3):
            assert (await infer(scheduler, float(value), timeout_s=0.2))["y"][0, 0] == 2 * value


@async_test
async def test_closing_while_a_batch_fails_leaves_nobody_waiting() -> None:
    model = SteppedModel()
    scheduler = Scheduler(model, BatchLimits(8, 100), ragged={}, statistics=Statistics())
    blocker = infer(scheduler, 9.0)
    await until(lambda: model.started == 1)
    tasks = [infer(scheduler, value) for value in (1.0, POISON, 3.0)]
    await until(lambda: scheduler.queued_rows == 3)
    model.permits.release()
    await blocker
    await until(lambda: model.started == 2)
    closing = asyncio.create_task(scheduler.close())
    await asyncio.sleep(0)
    model.permits.release()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    await closing
    assert all(isinstance(answer, NotReady) for answer in answers), answers


@async_test
async def test_pieces_that_do_not_fit_together_fail_alone() -> None:
    class Growing(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            super().run(batch)
            return {"y": np.zeros((len(batch["x"]), len(batch["x"])), np.float32)}

    async with running(Growing()) as scheduler:
        split = infer(scheduler, *range(12))
        single = infer(scheduler, 1.0)
        with pytest.raises(ModelFailed):
            await split
        assert len((await single)["y"]) == 1
        assert len((await infer(scheduler, 1.0))["y"]) == 1


@async_test
async def test_a_model_that_is_slow_now_and_then_leaves_the_event_loop() -> None:
    class Moody(DoublingModel):
        def run(self, batch: Tensors) -> Tensors:
            if batch["x"][0, 0] > 0:
                threading.Event().wait(0.01)
            return super().run(batch)

    async with running(Moody(measured_run_s=0.0005)) as scheduler:
        for turn in range(60):
            await infer(scheduler, float(turn % 2))
        assert not scheduler.inline


@async_test
async def test_room_is_kept_for_requests_that_are_being_prepared() -> None:
    model = DoublingModel()
    async with running(model, limits={"max_queue_rows": 4}) as scheduler:
        with scheduler.reserve(3):
            with pytest.raises(Overloaded, match="3 of 4 rows wait"):
                await infer(scheduler, 1.0, 2.0)
            await infer(scheduler, 1.0)
        await infer(scheduler, 1.0, 2.0)
        with pytest.raises(TooLarge), scheduler.reserve(5):
            pass


@async_test
async def test_a_delay_gathers_company_and_spares_the_deadline() -> None:
    model = DoublingModel()
    async with running(model, limits={"max_rows": 4, "max_delay_s": 30.0}) as scheduler:
        tasks = [infer(scheduler, float(value)) for value in range(4)]
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in model.batches] == [4], "a full batch does not wait"
        hurried = await infer(scheduler, 9.0, timeout_s=0.5)
        assert hurried["y"].tolist() == [[18.0]]


@async_test
async def test_a_storm_of_requests_loses_none() -> None:
    """Random sizes, poisons and deadlines: each request ends in exactly one way."""
    generator = np.random.default_rng(7)
    model = DoublingModel()
    outcomes: list[str] = []
    async with running(model, limits={"max_queue_rows": 100_000}) as scheduler:

        async def one(number: int) -> None:
            values = generator.integers(1, 1000, generator.integers(1, 20)).astype(float)
            poisoned = generator.random() < 0.1
            if poisoned:
                values[0] = POISON
            await asyncio.sleep(float(generator.random()) * 0.05)
            timeout_s = 0.001 if generator.random() < 0.1 else 20.0
            (answer,) = await asyncio.gather(
                infer(scheduler, *values, timeout_s=timeout_s), return_exceptions=True
            )
            if isinstance(answer, dict):
                assert not poisoned
                assert answer["y"].ravel().tolist() == [2 * value for value in values]
                outcomes.append("served")
            else:
                assert isinstance(answer, (ModelFailed, DeadlineExceeded, Overloaded))
                assert poisoned or not isinstance(answer, ModelFailed)
                outcomes.append(answer.code)

        await asyncio.gather(*(one(number) for number in range(400)))
        assert scheduler.queued_rows == 0
    assert len(outcomes) == 400
    assert set(outcomes) >= {"served", "model_failed"}


def submit(scheduler: Scheduler, ended: list[Any], *values: float, done: Any = None) -> Any:
    """Without a task: what comes of it is put into a list."""
    return scheduler.submit(
        rows_of(*values),
        len(values),
        timeout_s=30.0,
        priority=0,
        request_id="r",
        arrival_s=None,
        record=None,
        done=done or (lambda outputs, error: ended.append((outputs, error))),
    )


@async_test
async def test_the_end_of_a_submitted_request_is_told_once() -> None:
    model, ended = DoublingModel(), list[Any]()
    async with running(model) as scheduler:
        submit(scheduler, ended, 1.0, 2.0)
        submit(scheduler, ended, POISON)
        assert ended == []
        await until(lambda: len(ended) == 2)
        (outputs, nothing), (none, error) = sorted(ended, key=lambda end: end[0] is None)
        assert outputs["y"].tolist() == [[2.0], [4.0]]
        assert nothing is None
        assert none is None
        assert isinstance(error, ModelFailed)
        await infer(scheduler, 3.0)
    assert len(ended) == 2


@async_test
async def test_a_submitted_request_is_taken_back() -> None:
    statistics, ended = Statistics(), list[Any]()
    model = DoublingModel()
    async with running(model, statistics=statistics, execution="thread") as scheduler:
        held = await hold(scheduler, model)
        job = submit(scheduler, ended, 1.0)
        assert scheduler.queued_rows == 1
        scheduler.cancel(job)
        scheduler.cancel(job)
        assert scheduler.queued_rows == 0
        model.gate.set()
        await held
        await infer(scheduler, 2.0)
    assert ended == []
    assert [batch.tolist() for batch in model.batches] == [[[2.0]]]
    assert statistics.failures == {"cancelled": 1}


@async_test
async def test_who_cannot_be_told_keeps_no_other_from_its_answer() -> None:
    def broken(outputs: Any, error: Any) -> None:
        raise RuntimeError("nobody there")

    model, ended = DoublingModel(), list[Any]()
    async with running(model, execution="thread") as scheduler:
        held = await hold(scheduler, model)
        submit(scheduler, ended, 1.0, done=broken)
        submit(scheduler, ended, 2.0)
        model.gate.set()
        await held
        await until(lambda: len(ended) == 1)
        assert ended[0][0]["y"].tolist() == [[4.0]]
        assert (await infer(scheduler, 3.0))["y"].tolist() == [[6.0]]
    assert len(model.batches[0]) == 2, "they shared a batch"


# Memory that runs out


class TightModel(DoublingModel):
    """Has memory for so many elements, padding included, and notes those that did not fit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.refused: list[int] = []

    def run(self, batch: Tensors) -> Tensors:
        if batch["x"].size > self.most:
            self.entered.set()
            assert self.gate.wait(10)
            self.refused.append(batch["x"].size)
            raise OutOfMemory("tight 1: out of memory on cuda:0")
        return super().run(batch)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@async_test
async def test_a_batch_that_does_not_fit_is_halved_and_everybody_is_answered() -> None:
    model, statistics = TightModel(3), Statistics()
    async with running(model, statistics=statistics, limits={"max_rows": 16}) as scheduler:
        blocker = await hold(scheduler, model)
        tasks = [infer(scheduler, float(value)) for value in range(1, 13)]
        await until(lambda: scheduler.queued_rows == 12)
        model.gate.set()
        answers = [(await task)["y"].tolist() for task in tasks]
        assert answers == [[[2.0 * value]] for value in range(1, 13)]
        await blocker
        assert model.refused == [12, 6], "halves of what was known to be too large are not tried"
        assert [len(batch) for batch in model.batches] == [3, 3, 3, 3]
        assert statistics.failures == {}
        assert scheduler.out_of_memory == 2
        assert scheduler.limit_share == 3 / 16


@async_test
async def test_batches_after_it_are_smaller() -> None:
    model = TightModel(3)
    async with running(model, limits={"max_rows": 8}) as scheduler:
        assert len((await infer(scheduler, *range(8)))["y"]) == 8
        assert model.refused == [8, 4]
        model.batches.clear()
        blocker = await hold(scheduler, model)
        tasks = [infer(scheduler, float(value)) for value in range(6)]
        await until(lambda: scheduler.queued_rows == 6)
        model.gate.set()
        await asyncio.gather(blocker, *tasks)
        assert [len(batch) for batch in model.batches] == [2, 2, 2]
        assert model.refused == [8, 4]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7])
def test_a_request_of_many_rows_is_cut_and_put_together(most: int) -> None:
    """Whatever fits; two of them at once, so that pieces of one are not taken for the other's."""

    @async_test
    async def run() -> None:
        model = TightModel(most)
        async with running(model, limits={"max_rows": 8}) as scheduler:
            tasks = [infer(scheduler, *range(start, start + 19)) for start in (0, 100)]
            for task, start in zip(tasks, (0, 100), strict=True):
                given = (await task)["y"].ravel().tolist()
                assert given == [2 * (start + i) for i in range(19)]
            assert scheduler.queued_rows == 0
            assert (await infer(scheduler, 5.0))["y"].tolist() == [[10.0]]

    run()


def wide(length: int) -> Tensors:
    return {"x": np.ones((1, length), np.float32)}


@async_test
async def test_a_row_that_does_not_fit_fails_alone_and_changes_nothing() -> None:
    model, statistics = TightModel(16), Statistics()
    ragged = {"x": RaggedAxis(1)}
    async with running(model, ragged=ragged, statistics=statistics) as scheduler:
        blocker = await hold(scheduler, model)
        lengths = [3, 2, 40, 3]
        tasks = [
            asyncio.create_task(scheduler.infer(wide(n), 1, timeout_s=30, request_id=f"r{n}"))
            for n in lengths
        ]
        await until(lambda: scheduler.queued_rows == 4)
        model.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await blocker
        assert isinstance(answers[2], OutOfMemory)
        assert "a single row of this request does not fit" in str(answers[2])
        assert "request id r40" in str(answers[2])
        assert answers[2].code == "model_failed"
        assert [len(answer["y"]) for answer in answers if isinstance(answer, dict)] == [1, 1, 1]
        assert statistics.failures == {"model_failed": 1}
        share = scheduler.limit_share
        with pytest.raises(OutOfMemory):
            await scheduler.infer(wide(50), 1, timeout_s=30)
        assert scheduler.limit_share == share, "a long row is no reason for smaller batches"


@async_test
async def test_ragged_batches_are_bounded_by_their_padded_cost() -> None:
    model = TightModel(24)
    async with running(
        model, ragged={"x": RaggedAxis(1)}, limits={"max_rows": 64, "max_cost": 64}
    ) as scheduler:
        blocker = await hold(scheduler, model)
        tasks = [asyncio.create_task(scheduler.infer(wide(8), 1, timeout_s=30)) for _ in range(8)]
        await until(lambda: scheduler.queued_rows == 8)
        model.gate.set()
        await asyncio.gather(blocker, *tasks)
        assert model.refused == [64, 32]
        assert scheduler.limit_share == 16 / 64
        assert all(batch.size <= 16 for batch in model.batches)


@async_test
async def test_the_limit_rises_again_where_memory_came_back() -> None:
    model, clock = TightModel(4), Clock()
    async with running(model, clock=clock, execution="inline") as scheduler:
        await infer(scheduler, *range(8))
        assert scheduler.limit_share == 0.5
        model.most = 100
        for _ in range(20):
            clock.now_s += 61.0
            await infer(scheduler, 1.0)
        assert scheduler.limit_share == 1.0
        model.batches.clear()
        await infer(scheduler, *range(8))
        assert [len(batch) for batch in model.batches] == [8]


@async_test
async def test_what_is_configured_anew_stays_below_what_fits() -> None:
    model = TightModel(4)
    async with running(model) as scheduler:
        await infer(scheduler, *range(8))
        for rows, share in ((16, 0.25), (4, 1.0), (2, 1.0)):
            scheduler.reconfigure(BatchLimits(rows, 100), "thread")
            assert scheduler.limit_share == share
            model.batches.clear()
            await infer(scheduler, *range(8))
            assert max(len(batch) for batch in model.batches) == min(rows, 4)
        assert model.refused == [8]


@async_test
async def test_a_client_that_leaves_while_its_batch_runs_out_of_memory_is_not_run_again() -> None:
    model = TightModel(2)
    async with running(model) as scheduler:
        model.gate.clear()
        leaves = infer(scheduler, 1, 2, 3, 4)
        await until(model.entered.is_set)
        leaves.cancel()
        await until(leaves.done)
        model.gate.set()
        assert (await infer(scheduler, 5.0))["y"].tolist() == [[10.0]]
        assert model.refused == [4]
        assert [batch.ravel().tolist() for batch in model.batches] == [[5.0]]


@async_test
async def test_deadlines_hold_while_a_batch_is_halved() -> None:
    model, statistics = TightModel(1), Statistics()
    async with running(model, statistics=statistics) as scheduler:
        model.gate.clear()
        late = infer(scheduler, 1, 2, 3, 4, timeout_s=0.02)
        with pytest.raises(DeadlineExceeded):
            await late
        model.gate.set()
        assert (await infer(scheduler, 5.0))["y"].tolist() == [[10.0]]
        assert statistics.failures == {"deadline_exceeded": 1}
        assert scheduler.queued_rows == 0
