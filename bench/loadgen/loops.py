"""The closed and the open loop: who sends the next request, and when."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from bench.loadgen.connections import Client, Connection
from bench.loadgen.records import CONNECT, NOT_SENT, TIMEOUT, Recorder
from bench.loadgen.timer import Timer

__all__ = ["ClosedLoop", "Loop", "OpenLoop"]

_PREPARE_TIMEOUT_S = 5.0
_CONNECT_AGAIN_S = 0.05
"""In a closed loop: a server that is not there would else be asked as fast as it can refuse."""
_AT_ONCE = 32
"""Open loop: requests that are sent before answers are looked at again."""
_LOOK_EVERY_S = 0.02
"""For requests whose time is over: this is how much more than it they may take."""


class Loop(ABC):
    """What both have in common: connections, and the end of a request's time.

    It is the listener of its connections.

    Args:
        client: Makes them.
        connections: The most that are opened.
        timeout_s: From when a request was meant to leave to the end of its answer.
    """

    kind: Literal["closed", "open"]

    def __init__(self, client: Client, connections: int, timeout_s: float) -> None:
        self.recorder = Recorder()
        self._client = client
        self._allowed = connections
        self._timeout_s = timeout_s
        self._connections: set[Connection] = set()
        self._free: list[Connection] = []
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer = Timer(asyncio.get_running_loop(), self._on_timer)

    async def prepare(self, connections: int) -> None:
        """Opens connections before the start; those that cannot be opened are tried again later."""
        async with asyncio.TaskGroup() as group:
            for _ in range(min(connections, self._allowed)):
                group.create_task(self._prepare_one())

    async def run(self, start: float) -> None:
        """Sends everything, and waits until all of it has come to its end.

        Args:
            start: Of measuring, on the clock of `time.monotonic`.
        """
        try:
            self._start(start)
            while not self._look(time.monotonic()):
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            await self._close()

    # A listener of connections

    def ended(
        self, connection: Connection, reason: int, status: int, retry_after: bool, text: str
    ) -> None:
        """A request has come to its end, rightly or not."""
        ticket = connection.ticket
        self.recorder.add(
            ticket.intended,
            ticket.late_s,
            ticket.sent,
            time.monotonic(),
            status,
            reason,
            retry_after,
            ticket.waited,
        )
        if text:
            self.recorder.sample(status, reason, text)
        self._request_ended(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        if connection not in self._connections:
            # Before anybody knew of it: whoever opened it sees that.
            return
        self._connections.remove(connection)
        if connection in self._free:
            self._free.remove(connection)
        self._connection_ended()

    # What a loop has of its own

    @abstractmethod
    def _start(self, start: float) -> None:
        """Begins to send."""

    @abstractmethod
    def _on_timer(self) -> None:
        """The time is there that `_timer` was set to."""

    @abstractmethod
    def _request_ended(self, connection: Connection) -> None:
        """A request has ended; its connection may be of no more use."""

    @abstractmethod
    def _connection_ended(self) -> None:
        """There is a connection less, or one that was to be there is not."""

    @abstractmethod
    def _connected(self, connection: Connection) -> None:
        """There is a connection more."""

    @abstractmethod
    def _not_connected(self, attempted: float, text: str) -> None:
        """There is not, and why."""

    @abstractmethod
    def _look(self, now: float) -> bool:
        """Ends requests whose time is over; says whether all have come to their end."""

    # Within

    def _open_one(self, delay_s: float = 0.0) -> None:
        self._opening += 1
        self._run_beside(self._open(delay_s))

    async def _open(self, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        attempted = time.monotonic()
        connection, text = None, ""
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._client.connect(self)
        except OSError as error:
            text = str(error) or f"no connection within {self._timeout_s:g} s"
        self._opening -= 1
        if connection is None:
            self._not_connected(attempted, text)
        elif connection.usable:
            self._connections.add(connection)
            self._connected(connection)
        else:
            self._connection_ended()

    async def _prepare_one(self) -> None:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(_PREPARE_TIMEOUT_S):
                connection = await self._client.connect(self)
            if connection.usable:
                self._connections.add(connection)
                self._free.append(connection)

    def _time_out(self, now: float) -> None:
        for connection in self._busy():
            if now - connection.ticket.intended > self._timeout_s:
                connection.abandon()
                self.ended(connection, TIMEOUT, 0, False, f"no answer within {self._timeout_s:g} s")

    def _busy(self) -> list[Connection]:
        return [connection for connection in self._connections if connection.busy]

    def _run_beside(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        self._timer.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._connections):
            connection.abandon()
        deadline = time.monotonic() + 1.0
        while self._connections and time.monotonic() < deadline:
            await asyncio.sleep(0.001)


class ClosedLoop(Loop):
    """Each connection sends its next request when it has its answer.

    Args:
        client: Makes the connections.
        connections: How many ask at once.
        timeout_s: See `Loop`.
        begin_s: When the first requests leave, relative to the start of measuring: not after it.
        end_s: From here on nothing is sent.
        first: Index of the first request.
        step: From one request's index to the next.
    """

    kind = "closed"

    def __init__(
        self,
        client: Client,
        connections: int,
        timeout_s: float,
        *,
        begin_s: float,
        end_s: float,
        first: int,
        step: int,
    ) -> None:
        super().__init__(client, connections, timeout_s)
        self._begin_s = begin_s
        self._end_s = end_s
        self._end = 0.0
        self._begun = False
        self._index = first
        self._step = step

    def _start(self, start: float) -> None:
        self._end = start + self._end_s
        # The event loop's own may be early: what is sent before measuring starts is not measured.
        self._timer.set(start + self._begin_s)

    def _on_timer(self) -> None:
        self._begun = True
        ready, self._free = self._free, []
        for connection in ready:
            self._send(connection)
        for _ in range(self._allowed - len(ready)):
            self._open_one()

    def _send(self, connection: Connection) -> None:
        now = time.monotonic()
        # Asked here and nowhere before: what is sent has left before the end by its own time.
        if now >= self._end:
            return
        connection.ticket.intended = connection.ticket.sent = now
        connection.send(self._index)
        self._index += self._step

    def _request_ended(self, connection: Connection) -> None:
        if connection.usable:
            self._send(connection)

    def _connected(self, connection: Connection) -> None:
        self._send(connection)

    def _connection_ended(self) -> None:
        if self._begun and time.monotonic() < self._end:
            self._open_one()

    def _not_connected(self, attempted: float, text: str) -> None:
        if attempted >= self._end:
            return
        self.recorder.add(attempted, 0.0, math.nan, time.monotonic(), 0, CONNECT, False, False)
        self.recorder.sample(0, CONNECT, text)
        self._open_one(_CONNECT_AGAIN_S)

    def _look(self, now: float) -> bool:
        self._time_out(now)
        return now >= self._end and not self._busy()


class OpenLoop(Loop):
    """Requests leave at their times, whatever the server does.

    One that finds no free connection waits for one, and is sent later: its latency counts from its
    own time all the same, so that a server that stalls cannot make the load wait for it.

    Args:
        client: Makes the connections; another is opened when a request finds none free.
        connections: The most that are opened.
        timeout_s: See `Loop`.
        times_s: When requests are meant to leave, in order, relative to the start of measuring.
        first: Index of the first request.
        step: From one request's index to the next.

    Source: Gil Tene, "How NOT to Measure Latency": coordinated omission.
    """

    kind = "open"

    def __init__(
        self,
        client: Client,
        connections: int,
        timeout_s: float,
        *,
        times_s: Sequence[float],
        first: int,
        step: int,
    ) -> None:
        super().__init__(client, connections, timeout_s)
        self._times_s = times_s
        self._times: list[float] = []
        self._next = 0
        self._first = first
        self._step = step
        self._waiting: deque[tuple[float, float, int, bool]] = deque()

    def _start(self, start: float) -> None:
        self._times = [start + time_s for time_s in self._times_s]
        self._on_timer()

    def _on_timer(self) -> None:
        times, number = self._times, self._next
        now = time.monotonic()
        # Not all that are due: answers have to be taken meanwhile.
        until = min(number + _AT_ONCE, len(times))
        while number < until and times[number] <= now:
            self._turn_to(number, times[number], now)
            number += 1
            now = time.monotonic()
        self._next = number
        if number < len(times):
            self._timer.set(times[number])

    def _turn_to(self, number: int, intended: float, now: float) -> None:
        index = self._first + number * self._step
        if self._free:
            self._send(self._free.pop(), intended, now - intended, index, False)
            return
        all_in_use = len(self._connections) + self._opening >= self._allowed
        self._waiting.append((intended, now - intended, index, all_in_use))
        self._open_for_waiting()

    def _send(
        self, connection: Connection, intended: float, late_s: float, index: int, waited: bool
    ) -> None:
        ticket = connection.ticket
        ticket.intended, ticket.late_s, ticket.waited = intended, late_s, waited
        ticket.sent = time.monotonic()
        connection.send(index)

    def _request_ended(self, connection: Connection) -> None:
        if connection.usable:
            self._connected(connection)

    def _connected(self, connection: Connection) -> None:
        if self._waiting:
            self._send(connection, *self._waiting.popleft())
        else:
            self._free.append(connection)

    def _connection_ended(self) -> None:
        self._open_for_waiting()

    def _not_connected(self, attempted: float, text: str) -> None:
        if self._waiting:
            self._fail(CONNECT)
            self.recorder.sample(0, CONNECT, text)
        self._open_for_waiting()

    def _open_for_waiting(self) -> None:
        while (
            self._opening < len(self._waiting)
            and len(self._connections) + self._opening < self._allowed
        ):
            self._open_one()

    def _fail(self, reason: int) -> None:
        """The request that has waited longest is given up."""
        intended, late_s, _, waited = self._waiting.popleft()
        self.recorder.add(intended, late_s, math.nan, time.monotonic(), 0, reason, False, waited)

    def _look(self, now: float) -> bool:
        self._time_out(now)
        while self._waiting and now - self._waiting[0][0] > self._timeout_s:
            self._fail(NOT_SENT)
        return self._next == len(self._times) and not self._waiting and not self._busy()
