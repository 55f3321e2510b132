"""Sends what a recorder has to the metrics agent of Ray on this node, every few seconds.

The agent adds up what all processes of its node send, and Prometheus asks the agent. Not with
`ray.util.metrics`: it gives each series a label for the process, and the agent keeps at most 2000
series of a metric for as long as it lives.

Nothing here may harm who uses it: failures are logged and the points kept, every wait is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from rayprism.telemetry.otlp import RequestBuilder
from rayprism.telemetry.recorder import Point

__all__ = ["Backlog", "Exporter", "Sender", "Source", "export_in_thread", "send_once"]

logger = logging.getLogger("ray.serve.rayprism")

_METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_ANSWER_S = 30.0
"""For an answer. Long, since nobody can tell whether what got none was counted."""
_QUIET_S = 30.0
"""Failures that are over by then are not told: the agent starts later than the node."""
_TELL_EVERY_S = 60.0
_LOOK_EVERY_S = 60.0
"""For an agent that was not there for a while."""
_LAST_S = 2.0
"""For the last points, at the end of a process."""

FindAddress = Callable[[], str | None]
OpenChannel = Callable[[str], grpc.Channel]
_Call = Callable[..., object]


class Source(Protocol):
    """Has points: a `Recorder`, or what guards one."""

    def take(self) -> list[Point]:
        """What changed since the last time, and every gauge."""


class Backlog:
    """Points that are not sent yet: one for each series, however long it takes."""

    def __init__(self) -> None:
        self._added: dict[tuple[str, object], Point] = {}
        self._gauges: list[Point] = []

    def add(self, points: Sequence[Point]) -> None:
        """Adds to counters what came; of gauges only the newest count."""
        self._gauges = [point for point in points if point.kind == "gauge"]
        for point in points:
            # One NaN would make the agent's sum NaN until the agent ends.
            if point.kind == "gauge" or not math.isfinite(point.value):
                continue
            key = point.name, point.labels
            before = self._added.get(key)
            if before is not None:
                point = point._replace(value=before.value + point.value)
            self._added[key] = point

    def points(self) -> list[Point]:
        """All of them."""
        return [*self._added.values(), *self._gauges]

    def clear(self) -> None:
        """They are sent."""
        self._added, self._gauges = {}, []


class Sender:
    """Sends points, and keeps them where that fails. One thread at a time may use it.

    Args:
        find_address: Of the agent; None where there is none. It may block.
        open_channel: By default as Ray does it in this cluster.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        find_address: FindAddress,
        *,
        open_channel: OpenChannel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find_address = find_address
        self._open_channel = open_channel or _open_as_ray_does
        self._clock = clock
        self._backlog = Backlog()
        self._builder = RequestBuilder()
        self._log = _Log(clock)
        self._channel: grpc.Channel | None = None
        self._call: _Call | None = None
        self._absent_since_s: float | None = None
        self._looked_s = -math.inf
        self._closed = False

    def send(self, points: Sequence[Point], timeout_s: float = _ANSWER_S) -> bool:
        """Sends these, and what could not be sent before.

        Args:
            points: Of one `take`.
            timeout_s: For the answer.

        Returns:
            Whether the agent has them. If not, they are kept for the next time; but not where it
            took them without an answer in time: they would count twice if it did have them.
        """
        self._backlog.add(points)
        try:
            call = self._connected()
            if call is None:
                return False
            call(self._builder.build(self._backlog.points()), timeout=timeout_s)
        except Exception as error:
            self._disconnect()
            if _may_have_arrived(error):
                self._backlog.clear()
            if not self._closed:
                self._log.failed(error)
            return False
        self._backlog.clear()
        self._log.went_well()
        return True

    def close(self) -> None:
        """Ends the channel, and what is still being sent. From any thread."""
        self._closed = True
        self._disconnect()

    def _connected(self) -> _Call | None:
        if self._call is None and not self._closed:
            address = self._look()
            if address is not None:
                self._channel = self._open_channel(address)
                # Not with the generated stub, which refuses other releases of grpcio.
                self._call = self._channel.unary_unary(
                    _METHOD,
                    request_serializer=ExportMetricsServiceRequest.SerializeToString,
                    response_deserializer=ExportMetricsServiceResponse.FromString,
                )
        return self._call

    def _look(self) -> str | None:
        now_s = self._clock()
        absent_s = 0.0 if self._absent_since_s is None else now_s - self._absent_since_s
        if absent_s >= _QUIET_S and now_s - self._looked_s < _LOOK_EVERY_S:
            return None
        self._looked_s = now_s
        address = self._find_address()
        if address is not None:
            self._absent_since_s = None
            return address
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        elif absent_s >= _QUIET_S:
            self._log.absent()
        return None

    def _disconnect(self) -> None:
        channel, self._channel, self._call = self._channel, None, None
        if channel is not None:
            with suppress(Exception):
                channel.close()


class Exporter:
    """Sends what a recorder has, from an event loop, which is never kept waiting.

    Args:
        recorder: Of the loop's thread.
        find_address: As for `Sender`; called in another thread.
        every_s: Pause between two times.
        open_channel: As for `Sender`.
    """

    def __init__(
        self,
        recorder: Source,
        find_address: FindAddress,
        *,
        every_s: float = 5.0,
        open_channel: OpenChannel | None = None,
    ) -> None:
        self._recorder = recorder
        self._every_s = every_s
        self._sender = Sender(find_address, open_channel=open_channel)
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, on the running loop: at once, and then every few seconds."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self, within_s: float = _LAST_S) -> None:
        """Sends the last points, and ends.

        Args:
            within_s: What is not sent by then is lost.
        """
        if self._task is None or self._closing.is_set():
            self._sender.close()
            return
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        self._closing.set()
        # What is on its way has to arrive first.
        await asyncio.wait({self._task}, timeout=within_s)
        if self._task.done():
            left_s = max(0.0, until_s - loop.time())
            last = loop.create_task(self._export(left_s))
            await asyncio.wait({last}, timeout=left_s)
            last.cancel()
        self._task.cancel()
        self._sender.close()

    async def _run(self) -> None:
        while not self._closing.is_set():
            await self._export(_ANSWER_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._every_s)

    async def _export(self, timeout_s: float) -> None:
        points = _take(self._recorder)
        if points is not None:
            await _in_thread(lambda: self._sender.send(points, timeout_s))


@contextmanager
def export_in_thread(
    source: Source,
    find_address: FindAddress,
    *,
    every_s: float = 5.0,
    within_s: float = _LAST_S,
    open_channel: OpenChannel | None = None,
) -> Iterator[None]:
    """Sends what a source has while the block runs, and the last points after it.

    Args:
        source: Asked from another thread.
        find_address: As for `Sender`.
        every_s: Pause between two times.
        within_s: For the last points: what is not sent by then is lost.
        open_channel: As for `Sender`.
    """
    sender = Sender(find_address, open_channel=open_channel)
    over = threading.Event()

    def run() -> None:
        while True:
            last = over.is_set()
            points = _take(source)
            if points is not None:
                sender.send(points, within_s if last else _ANSWER_S)
            if last:
                return
            over.wait(every_s)

    thread = threading.Thread(target=run, name="rayprism-export", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(within_s)
        sender.close()


def send_once(
    points: Sequence[Point],
    find_address: FindAddress,
    *,
    within_s: float = _LAST_S,
    open_channel: OpenChannel | None = None,
) -> bool:
    """Sends points from a process that is about to end.

    Args:
        points: All that it has.
        find_address: As for `Sender`.
        within_s: Longest that it waits.
        open_channel: As for `Sender`.

    Returns:
        Whether the agent has them.
    """
    sender = Sender(find_address, open_channel=open_channel)
    sent = False

    def run() -> None:
        nonlocal sent
        sent = sender.send(points, within_s)

    # Looking for the agent has no bound of its own.
    thread = threading.Thread(target=run, name="rayprism-export-once", daemon=True)
    thread.start()
    thread.join(within_s)
    sender.close()
    return sent


class _Log:
    """Tells of failures, and not often."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._told_s = -math.inf
        self._told_absent = False

    def failed(self, error: Exception) -> None:
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
        failing_s = now_s - self._since_s
        if failing_s >= _QUIET_S and now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            logger.warning(
                "Metrics could not be sent to Ray's agent for %.0f s; they are sent when it "
                "answers: %s",
                failing_s,
                _brief(error),
            )

    def absent(self) -> None:
        if not self._told_absent:
            self._told_absent = True
            logger.info(
                "Ray's metrics agent of this node is not there: metrics are kept, and sent when "
                "it is. Looking for it once a minute."
            )

    def went_well(self) -> None:
        self._since_s = None


def _open_as_ray_does(address: str) -> grpc.Channel:
    from rayprism.telemetry.ray_agent import open_channel

    return open_channel(address)


def _may_have_arrived(error: Exception) -> bool:
    """Whether the agent may have counted what it gave no answer to."""
    return (
        isinstance(error, grpc.RpcError)
        and isinstance(error, grpc.Call)
        and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    )


def _brief(error: Exception) -> str:
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {str(error)[:500]}"


def _take(source: Source) -> list[Point] | None:
    try:
        return source.take()
    except Exception:
        # Of a function that reads a gauge: what it spoils is one time.
        logger.warning("Metrics could not be collected.", exc_info=True)
        return None


async def _in_thread(call: Callable[[], object]) -> None:
    """Runs a call in a thread of its own, which nothing waits for when the process ends."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        try:
            call()
        finally:
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="rayprism-export", daemon=True).start()
    await done.wait()
