"""Runs batches of waiting requests on one loaded model.

The decisions are `rayprism.core.batching`'s; here are the clock, the futures and the thread. All
methods are called on one event loop; only the batch itself may run in the model's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rayprism.core.batching import BatchLimits, BatchQueue, Pending, ServiceRate, plan_pieces
from rayprism.core.memory import MemoryLimit
from rayprism.core.placement import Place, Placement
from rayprism.core.tensors import (
    Array,
    RaggedAxis,
    Tensors,
    batch_key,
    concatenate,
    ragged_length,
    split_rows,
)
from rayprism.errors import (
    DeadlineExceeded,
    ModelFailed,
    NotReady,
    OutOfMemory,
    Overloaded,
    RequestError,
    TooLarge,
)
from rayprism.serving.statistics import Statistics
from rayprism.telemetry.records import BatchRecord, RequestRecord

__all__ = ["BatchRunner", "Execution", "Job", "OnDone", "Scheduler"]

Execution = Literal["auto", "inline", "thread"]
OnDone = Callable[[Tensors | None, RequestError | None], None]
"""Gets the outputs of a request, or why there are none."""
OnBatch = Callable[[BatchRecord, int, int, Iterable[RequestRecord | None]], None]
logger = logging.getLogger("ray.serve.rayprism")


class BatchRunner(Protocol):
    """What the scheduler needs of a loaded model."""

    @property
    def measured_run_s(self) -> float:
        """How long the largest batch took while warming up, in seconds."""

    def run(self, batch: Tensors) -> Tensors:
        """Runs one batch; any exception means that it failed."""


class Job:
    """One request: its pieces, and who is told of its end."""

    __slots__ = (
        "arrival_s",
        "done",
        "is_done",
        "missing",
        "parts",
        "pieces",
        "record",
        "request_id",
        "rows",
        "started_s",
    )

    def __init__(
        self,
        rows: int,
        arrival_s: float,
        request_id: str,
        record: RequestRecord | None,
        done: OnDone,
    ) -> None:
        self.rows = rows
        self.arrival_s = arrival_s
        self.request_id = request_id
        self.record = record
        self.done = done
        self.is_done = False
        self.pieces: list[Pending] = []
        self.parts: list[Tensors | None] = []
        self.missing = 0
        self.started_s = 0.0


@dataclass(slots=True)
class _Piece:
    job: Job
    index: int
    tensors: Tensors


class Scheduler:
    """The queue of one replica, and the loop that feeds its model.

    Args:
        model: Runs the batches.
        limits: Bounds of batches and queue.
        ragged: Ragged axes by the runtime's input name.
        ragged_outputs: Outputs that are as long as the padded inputs, by name: the axis that is
            cut back to the request's own length.
        batched: Whether axis 0 is the row; otherwise every request runs by itself.
        execution: Where batches run.
        statistics: Counts what happens.
        on_batch: Called with each batch that has run, its cost, its padding, and its requests.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: BatchRunner,
        limits: BatchLimits,
        *,
        ragged: Mapping[str, RaggedAxis],
        ragged_outputs: Mapping[str, int] | None = None,
        batched: bool = True,
        execution: Execution = "auto",
        statistics: Statistics,
        on_batch: OnBatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._queue = BatchQueue(limits)
        self._limits = limits
        self._memory = MemoryLimit(bool(ragged))
        self.out_of_memory = 0
        """Batches that did not fit into the memory of the device."""
        self._rate = ServiceRate()
        self._ragged = dict(ragged)
        self._ragged_outputs = dict(ragged_outputs or {})
        self._batched = batched
        self._measured_run_s = model.measured_run_s
        self._statistics = statistics
        self._on_batch = on_batch
        self._batches = 0
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._pump_scheduled = False
        self._running: Sequence[Pending] = ()
        self._closed = False
        self._started_s = 0.0
        self._reserved_rows = 0
        self._backlog = False
        self.reconfigure(limits, execution)

    @property
    def place(self) -> Place:
        """Where batches run now."""
        return self._placement.place

    @property
    def inline(self) -> bool:
        """Whether batches run on the event loop."""
        return self.place is Place.INLINE

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queue.rows

    def queue_age_s(self) -> float:
        """How long the oldest request has been waiting; 0 where none waits."""
        arrival_s = self._queue.oldest_s()
        return 0.0 if arrival_s is None else max(0.0, self._clock() - arrival_s)

    @property
    def limit_share(self) -> float:
        """What memory leaves of the configured bound of a batch, more than 0 to 1."""
        return self._memory.share(self._limits)

    @property
    def is_behind(self) -> bool:
        """Whether more waits than the next batch could take."""
        return self._queue.rows > self._queue.limits.max_rows

    def reconfigure(self, limits: BatchLimits, execution: Execution) -> None:
        """Takes new bounds; what waits is kept."""
        self._limits = limits
        self._queue.limits = self._memory.bound(limits)
        self._placement = Placement(execution, self._measured_run_s)
        self._schedule_pump()

    @property
    def running_for_s(self) -> float:
        """How long the batch that runs in the thread has been running; 0 where none does."""
        return self._clock() - self._started_s if self._running else 0.0

    def now_s(self) -> float:
        """The time on the scheduler's clock."""
        return self._clock()

    @contextmanager
    def reserve(self, rows: int) -> Iterator[None]:
        """Keeps room in the queue for a request that is still being prepared.

        Raises:
            Overloaded, TooLarge, NotReady: As `infer`.
        """
        self._check_room(rows)
        self._reserved_rows += rows
        try:
            yield
        finally:
            self._reserved_rows -= rows

    async def infer(
        self,
        tensors: Tensors,
        rows: int,
        *,
        timeout_s: float,
        priority: int = 0,
        request_id: str = "",
        arrival_s: float | None = None,
        record: RequestRecord | None = None,
    ) -> Tensors:
        """Waits for its turn, and gives the outputs of one request.

        Args:
            tensors: Checked inputs of the runtime.
            rows: Their number of rows.
            timeout_s: From its arrival; what cannot be served by then is not run.
            priority: Smaller goes first.
            request_id: For the log.
            arrival_s: When it came, on the scheduler's clock; by default now.
            record: Gets the times of its batch.

        Raises:
            Overloaded: The queue is full.
            TooLarge: More rows than the queue could ever hold.
            DeadlineExceeded: The time is over.
            ModelFailed: The model raised on this request, with no others beside it.
            RequestError: Whatever of this kind the model raised on this request.
            NotReady: The replica is being taken down.
        """
        future: asyncio.Future[Tensors] = self._loop.create_future()

        def done(outputs: Tensors | None, error: RequestError | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif outputs is not None:
                future.set_result(outputs)

        job = self.submit(
            tensors,
            rows,
            timeout_s=timeout_s,
            priority=priority,
            request_id=request_id,
            arrival_s=arrival_s,
            record=record,
            done=done,
        )
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(job)
            raise

    def submit(
        self,
        tensors: Tensors,
        rows: int,
        *,
        timeout_s: float,
        priority: int,
        request_id: str,
        arrival_s: float | None,
        record: RequestRecord | None,
        done: OnDone,
    ) -> Job:
        """Lets a request wait for its turn, without a task that waits with it.

        Args:
            tensors: As for `infer`, and so are the others.
            rows: Likewise.
            timeout_s: Likewise.
            priority: Likewise.
            request_id: Likewise.
            arrival_s: Likewise.
            record: Likewise.
            done: Called once, later, with the outputs or with what `infer` would raise; never
                for a request that is cancelled.

        Raises:
            Overloaded, TooLarge, NotReady: As `infer`; then `done` is not called.
        """
        now_s = self._clock() if arrival_s is None else arrival_s
        limits = self._queue.limits
        self._check_room(rows)
        length = ragged_length(tensors, self._ragged) if self._ragged else 1
        key = batch_key(tensors, self._ragged)
        job = Job(rows, now_s, request_id, record, done)
        ranges = [(0, rows)]
        if rows > limits.max_rows or limits.max_cost is not None:
            ranges = plan_pieces(rows, length, limits)
        for index, (start, stop) in enumerate(ranges):
            part = tensors if len(ranges) == 1 else split_rows(tensors, start, stop)
            piece = Pending(
                _Piece(job, index, part),
                stop - start,
                now_s,
                now_s + timeout_s,
                priority,
                length,
                key,
            )
            job.pieces.append(piece)
            self._queue.push(piece)
        job.parts = [None] * len(ranges)
        job.missing = len(ranges)
        if self._running:
            self._wake_at(now_s + timeout_s - self._rate.floor_s)
        else:
            self._schedule_pump()
        return job

    def cancel(self, job: Job) -> None:
        """Takes a request back whose client has left: nobody would read the answer."""
        if job.is_done:
            return
        job.is_done = True
        for piece in job.pieces:
            self._queue.cancel(piece)
        self._statistics.failed("cancelled", self._clock() - job.arrival_s)

    async def close(self) -> None:
        """Refuses what waits, lets the running batch end, and gives the thread back."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for pending in self._queue.drain():
            self._fail(pending, NotReady("this replica is shutting down"))
        await asyncio.to_thread(self._executor.shutdown, True)

    def _check_room(self, rows: int) -> None:
        if self._closed:
            raise NotReady("this replica is shutting down")
        queue = self._queue
        if queue.has_room(rows + self._reserved_rows):
            return
        limit = queue.limits.max_queue_rows
        if rows > limit:
            raise TooLarge(
                f"{rows} rows in one request: the queue holds {limit}. Send fewer rows at once"
            )
        waiting = queue.rows + self._reserved_rows
        retry_after_s = self._rate.retry_after_s(waiting)
        self._statistics.failed(Overloaded.code, 0.0)
        raise Overloaded(
            f"the queue is full: {waiting} of {limit} rows wait. "
            f"Try again in {retry_after_s:.3g} s",
            retry_after_s,
        )

    def _schedule_pump(self) -> None:
        # Not at once: what else arrives in this turn of the loop can share the batch.
        if not self._pump_scheduled and not self._running:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        if self._closed:
            return
        now_s = self._clock()
        # An idle model may try anybody in time: the floor could be wrong, and only runs mend it.
        floor_s = self._rate.floor_s if self._running or self._backlog else 0.0
        decision = self._queue.decide(now_s, free=not self._running, floor_s=floor_s)
        for pending in decision.expired:
            self._expire(pending, now_s)
        if decision.batch:
            self._start(decision.batch, now_s)
        if decision.wake_s is not None:
            self._wake_at(decision.wake_s)
        ends_s = [pending.deadline_s for pending in self._running if not pending.cancelled]
        if ends_s:
            self._wake_at(min(ends_s))

    def _wake_at(self, wake_s: float) -> None:
        if self._timer is not None:
            if self._timer_s <= wake_s and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer_s = wake_s
        self._timer = self._loop.call_later(max(0.0, wake_s - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self._clock()
        for pending in self._running:
            if pending.deadline_s <= now_s:
                # It runs, but nobody needs the answer any more: say so now, not later.
                self._expire(pending, now_s)
        if not self._pump_scheduled:
            self._pump()

    def _start(self, batch: tuple[Pending, ...], now_s: float) -> None:
        if self._memory.cost is not None and self._halve_too_large(batch):
            self._schedule_pump()
            return
        for pending in batch:
            job = pending.item.job
            if not job.started_s:
                job.started_s = now_s
                if job.record is not None:
                    job.record.started_s = now_s
        if self.inline:
            self._finish(batch, self._outcome(batch))
            return
        self._running, self._started_s = batch, now_s
        self._executor.submit(self._run_in_thread, batch)

    def _outcome(self, batch: tuple[Pending, ...]) -> Any:
        # As a value: a future cannot carry every exception (StopIteration), and none may
        # escape into the event loop.
        try:
            return self._run(batch)
        except BaseException as error:
            return error

    def _run_in_thread(self, batch: tuple[Pending, ...]) -> None:
        self._loop.call_soon_threadsafe(self._on_thread_done, batch, self._outcome(batch))

    def _on_thread_done(self, batch: tuple[Pending, ...], outcome: Any) -> None:
        self._running = ()
        self._finish(batch, outcome)

    def _run(self, batch: tuple[Pending, ...]) -> tuple[list[Tensors], BatchRecord]:
        clock = self._clock
        record = self._record(batch, clock())
        joined = concatenate([pending.item.tensors for pending in batch], self._ragged)
        record.joined_s = clock()
        outputs = self._model.run(joined)
        record.ran_s = clock()
        shares = self._share_out(batch, outputs)
        record.ended_s = clock()
        return shares, record

    def _record(self, batch: tuple[Pending, ...], began_s: float) -> BatchRecord:
        self._batches += 1
        rows = sum([pending.rows for pending in batch])
        record = BatchRecord(self._batches, rows, len(batch), began_s)
        for pending in batch:
            request = pending.item.job.record
            if request is not None:
                request.batch = record
        return record

    def _share_out(self, batch: tuple[Pending, ...], outputs: Tensors) -> list[Tensors]:
        if not self._batched or len(batch) == 1:
            return [outputs]
        shares, start = [], 0
        for pending in batch:
            stop = start + pending.rows
            share = split_rows(outputs, start, stop)
            for name, axis in self._ragged_outputs.items():
                share[name] = _cut(share[name], axis, pending.length)
            shares.append(share)
            start = stop
        return shares

    def _finish(self, batch: tuple[Pending, ...], outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            self._on_batch_failed(batch, outcome)
        else:
            shares, record = outcome
            self._observe(batch, record)
            for pending, share in zip(batch, shares, strict=True):
                self._deliver(pending, share)
        self._backlog = len(self._queue) > 0
        if self._backlog:
            if self.inline:
                self._schedule_pump()
            else:
                self._pump()

    def _observe(self, batch: tuple[Pending, ...], record: BatchRecord) -> None:
        rows, joined_s, ran_s = record.rows, record.joined_s, record.ran_s
        times = (joined_s - record.began_s, ran_s - joined_s, record.ended_s - ran_s)
        run_s = record.ended_s - record.began_s
        self._rate.observe(rows, run_s)
        self._statistics.batch(rows, times)
        if self._memory.cost is not None and self._memory.ran(self._limits, self._clock()):
            self._queue.limits = self._memory.bound(self._limits)
        if self._on_batch is not None:
            cost, padding = self._cost(batch, rows)
            # Looked at only where requests are traced.
            requests = (pending.item.job.record for pending in batch)
            self._on_batch(record, cost, padding, requests)
        if self._placement.observe(run_s):
            self._measured_run_s = run_s  # what it was while warming up is refuted
            logger.warning(
                "Batches take too long for the event loop, the last one of %d rows %.1f ms; they "
                "run in a thread from now on.",
                rows,
                run_s * 1e3,
            )

    def _cost(self, batch: tuple[Pending, ...], rows: int) -> tuple[int, int]:
        """What a batch cost, and how much of that was padding."""
        if not self._ragged:
            return rows, 0
        cost = rows * max(pending.length for pending in batch)
        return cost, cost - sum(pending.rows * pending.length for pending in batch)

    def _on_batch_failed(self, batch: tuple[Pending, ...], error: BaseException) -> None:
        if self._closed and len(batch) > 1:
            for pending in batch:
                self._fail(pending, NotReady("this replica is shutting down"))
            return
        if isinstance(error, OutOfMemory):
            self._on_out_of_memory(batch, error)
            return
        culprit = self._queue.split_failed(batch)
        if culprit is None:
            logger.warning(
                "A batch of %d requests failed (%s); it is halved to find the one at fault.",
                len(batch),
                type(error).__name__,
            )
            return
        self._fail(culprit, self._failure(error, culprit.item.job.request_id))

    def _on_out_of_memory(self, batch: tuple[Pending, ...], error: OutOfMemory) -> None:
        self.out_of_memory += 1
        rows = sum(pending.rows for pending in batch)
        if rows == 1:
            self._fail(batch[0], self._failure(error, batch[0].item.job.request_id))
            return
        if self._memory.ran_out(self._cost(batch, rows)[0], self._clock()):
            self._queue.limits = self._memory.bound(self._limits)
            logger.warning(
                "A batch of %d rows does not fit into memory (%s); batches may cost %d at most for "
                "now, %.0f %% of what is configured.",
                rows,
                error,
                self._memory.cost,
                100 * self.limit_share,
            )
        self._halve(batch)

    def _halve_too_large(self, batch: tuple[Pending, ...]) -> bool:
        """Halves what was put together, or was cut, before the limit was lowered."""
        rows = sum(pending.rows for pending in batch)
        limit = self._memory.cost
        if limit is None or rows == 1 or self._cost(batch, rows)[0] <= limit:
            return False
        self._halve(batch)
        return True

    def _halve(self, batch: tuple[Pending, ...]) -> None:
        """Puts the halves of a batch, or of its only request, before anything else that waits."""
        if len(batch) > 1:
            self._queue.split_failed(batch)
        elif not batch[0].cancelled:
            first, second = self._halves_of(batch[0])
            self._queue.retry((first,), (second,))

    def _halves_of(self, pending: Pending) -> list[Pending]:
        """Cuts a piece of a request in two; the answer is put together of them all."""
        piece: _Piece = pending.item
        job, middle = piece.job, pending.rows // 2
        for other in job.pieces:
            if other.item.index > piece.index:
                other.item.index += 1
        halves = [
            Pending(
                _Piece(job, piece.index + place, split_rows(piece.tensors, start, stop)),
                stop - start,
                pending.arrival_s,
                pending.deadline_s,
                pending.priority,
                pending.length,
                pending.key,
            )
            for place, (start, stop) in enumerate(((0, middle), (middle, pending.rows)))
        ]
        where = job.pieces.index(pending)
        job.pieces[where : where + 1] = halves
        job.parts.insert(piece.index, None)
        job.missing += 1
        return halves

    def _failure(self, error: BaseException, request_id: str) -> RequestError:
        """What a client is told of what a model raised; the log has the rest."""
        if isinstance(error, RequestError) and not isinstance(error, ModelFailed):
            return error
        if isinstance(error, OutOfMemory):
            logger.error("A row of request %s does not fit into memory: %s", request_id, error)
            return OutOfMemory(
                "a single row of this request does not fit into the memory of the model's device; "
                f"the log of the replica has the details under request id {request_id}"
            )
        logger.error("The model failed on request %s.", request_id, exc_info=error)
        return ModelFailed(
            "the model failed on this request; the log of the replica has the details under "
            f"request id {request_id}"
        )

    def _deliver(self, pending: Pending, share: Tensors) -> None:
        piece: _Piece = pending.item
        job = piece.job
        if job.is_done:
            return
        job.parts[piece.index] = share
        job.missing -= 1
        if job.missing:
            return
        if len(job.parts) > 1:
            try:
                share = concatenate([part for part in job.parts if part is not None], {})
            except ValueError as error:
                self._fail(pending, self._failure(error, job.request_id))
                return
        now_s = self._clock()
        if job.record is not None:
            job.record.computed_s = now_s
        job.is_done = True
        self._statistics.served(job.rows, job.started_s - job.arrival_s, now_s - job.arrival_s)
        self._tell(job, share, None)

    def _tell(self, job: Job, outputs: Tensors | None, error: RequestError | None) -> None:
        try:
            job.done(outputs, error)
        except Exception:
            # The others of its batch get their answers all the same.
            logger.exception("The end of request %s could not be told.", job.request_id)

    def _expire(self, pending: Pending, now_s: float) -> None:
        waited_s = now_s - pending.arrival_s
        allowed_s = pending.deadline_s - pending.arrival_s
        self._fail(
            pending,
            DeadlineExceeded(
                f"not served within the {allowed_s:.3g} s that the request allowed: it waited "
                f"{waited_s:.3g} s, {self._queue.rows} rows still wait"
            ),
        )

    def _fail(self, pending: Pending, error: RequestError) -> None:
        job: Job = pending.item.job
        if job.is_done:
            return
        job.is_done = True
        self._statistics.failed(error.code, self._clock() - pending.arrival_s)
        for piece in job.pieces:
            self._queue.cancel(piece)
        self._tell(job, None, error)


def _cut(array: Array, axis: int, length: int) -> Array:
    return array[(slice(None),) * axis + (slice(0, length),)]
