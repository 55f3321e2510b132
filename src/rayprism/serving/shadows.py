"""Sends copies of requests to shadow versions, and counts how far their answers agree.

A copy is made after the real answer is on its way, and is sent when the replica has time for it.
What it gives is compared and thrown away: clients never see it, wait for it, or suffer from it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rayprism.core.compare import Tolerance, compare_outputs
from rayprism.core.tensors import Array, Tensors
from rayprism.core.traffic import ShadowBudget
from rayprism.errors import RequestError
from rayprism.serving.links import Link, Links
from rayprism.serving.settings import TrafficConfig
from rayprism.serving.traffic import LOST, NoAnswer

__all__ = ["Copy", "Reply", "ShadowState", "Shadows", "keep_copy"]

_PAUSE_S = 0.002
"""Between two looks at whether there is time for copies."""
_MOST_AT_ONCE = 4
"""Copies that are sent at one look; what they cost together is what a client may wait for them."""
_LATE_LOOP_S = 0.002
"""An event loop that is later than this has enough to do."""
_OLDEST_S = 1.0
"""Copies that found no time for so long are dropped."""
_THREAD_FROM_BYTES = 256 * 1024

logger = logging.getLogger("ray.serve.rayprism")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a shadow answered.

    Args:
        size_bytes: Of its body.
        decode: Gives its outputs; raises RequestError where it cannot be read.
    """

    size_bytes: int
    decode: Callable[[], Tensors]


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered, to be sent to a shadow as well.

    Args:
        size_bytes: Of its body and of the outputs.
        outputs: What the client got.
        deliver: Sends it to a version; raises NoAnswer where there is no answer.
        json_names: Outputs that the reply has in JSON.
    """

    size_bytes: int
    outputs: Tensors
    deliver: Callable[[int, Links, Link], Awaitable[Reply]]
    json_names: frozenset[str] = frozenset()


def keep_copy(
    body_bytes: int,
    outputs: Tensors,
    deliver: Callable[[int, Links, Link], Awaitable[Reply]],
    json_names: frozenset[str] = frozenset(),
) -> Copy:
    """A copy that keeps no more in memory than its size says.

    Args:
        body_bytes: Of the request.
        outputs: As the model gave them: often views of a whole batch's.
        deliver: As for `Copy`.
        json_names: Likewise.
    """
    kept = {name: _own(array) for name, array in outputs.items()}
    size_bytes = body_bytes + sum(_size_bytes(array) for array in kept.values())
    return Copy(size_bytes, kept, deliver, json_names)


def _own(array: Array) -> Array:
    base = array.base
    if isinstance(base, np.ndarray) and base.nbytes > 2 * array.nbytes:
        return array.copy()
    return array


def _size_bytes(array: Array) -> int:
    # Of strings numpy counts the pointers only.
    strings = sum(map(len, array.flat)) if array.dtype.kind == "O" else 0
    return array.nbytes + strings


@dataclass(slots=True)
class ShadowState:
    """One version that gets copies, and what became of them."""

    share: float = 0.0
    budget: ShadowBudget = field(default_factory=lambda: ShadowBudget(1, 1))
    compared: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    disagreed: Counter[str] = field(default_factory=Counter)


class Shadows:
    """The copies of one replica.

    Args:
        version: What answers here: no copies of it are sent to itself.
        tolerance: When two answers agree.
        links: Where the other versions are; None where there are none to be found.
        is_busy: Whether real requests have to wait.
        draw: Uniform from 0 up to, but not including, 1; by default of a generator of its own,
            since models seed the common one.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        version: int,
        tolerance: Tolerance,
        links: Links | None,
        is_busy: Callable[[], bool],
        draw: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._version = version
        self._tolerance = tolerance
        self._links = links
        self._is_busy = is_busy
        self._draw = draw or random.Random().random
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        # Of no request, or the one that began to look would be held, and named in the log, for as
        # long as there is something to look at.
        self._context = contextvars.Context()
        self._shadows: dict[int, ShadowState] = {}
        self._active: list[tuple[int, ShadowState]] = []
        self._waiting: deque[tuple[float, int, Copy]] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._look_s = 0.0
        self._at_once = 1
        self.is_on = False
        """Whether copies are wanted at all."""

    def reconfigure(self, config: TrafficConfig | None) -> None:
        """Takes new samples and bounds. Counts are kept, and so is what waits or is on its way."""
        config = config or TrafficConfig()
        wanted = [
            shadow for shadow in config.shadow if shadow.sample and shadow.version != self._version
        ]
        self._active = []
        for shadow in wanted:
            entry = self._shadows.setdefault(shadow.version, ShadowState())
            entry.share = shadow.sample / 100
            # To each a part of its own: one that hangs would soon hold all of it.
            entry.budget.max_requests = max(1, config.max_shadow_requests // len(wanted))
            entry.budget.max_bytes = config.max_shadow_bytes // len(wanted)
            self._active.append((shadow.version, entry))
        self.is_on = bool(self._active) and self._links is not None

    def offer(self, make: Callable[[], Copy]) -> None:
        """Draws, for a request that was answered, who gets a copy of it. Never raises.

        Args:
            make: Makes the copy; called only where one is wanted and may be kept.
        """
        copy: Copy | None = None
        for version, shadow in self._active:
            if self._draw() >= shadow.share:
                continue
            budget = shadow.budget
            if budget.requests >= budget.max_requests:
                shadow.dropped["requests"] += 1
                continue
            try:
                copy = copy or make()
            except Exception:
                shadow.dropped["internal"] += 1
                logger.exception("A request could not be copied for version %d.", version)
                continue
            refused = budget.admit(copy.size_bytes)
            if refused:
                shadow.dropped[refused] += 1
                continue
            self._waiting.append((self._clock(), version, copy))
            if self._look is None:
                self._look_later()

    def _look_later(self) -> None:
        self._look_s = self._clock() + _PAUSE_S
        self._look = self._loop.call_later(_PAUSE_S, self._on_look, context=self._context)

    def _on_look(self) -> None:
        self._look = None
        now_s = self._clock()
        if now_s - self._look_s > _LATE_LOOP_S or self._is_busy():
            self._at_once = 1
            self._drop_old(now_s)
        else:
            for _ in range(min(self._at_once, len(self._waiting))):
                self._start(*self._waiting.popleft()[1:])
            # More as long as the loop keeps its time: it tells what the last ones cost.
            self._at_once = min(self._at_once + 1, _MOST_AT_ONCE)
        if self._waiting:
            self._look_later()

    def _drop_old(self, now_s: float) -> None:
        while self._waiting and now_s - self._waiting[0][0] > _OLDEST_S:
            _, version, copy = self._waiting.popleft()
            shadow = self._shadows[version]
            shadow.budget.release(copy.size_bytes)
            shadow.dropped["load"] += 1

    def _start(self, version: int, copy: Copy) -> None:
        task = self._loop.create_task(self._send(version, copy))
        self._sending.add(task)
        # Not in the task: one that is cancelled before its first step would never come to it.
        task.add_done_callback(partial(self._finished, version, copy))

    def _finished(self, version: int, copy: Copy, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._shadows[version].budget.release(copy.size_bytes)

    async def _send(self, version: int, copy: Copy) -> None:
        shadow = self._shadows[version]
        try:
            reply = await self._deliver(version, copy)
            if copy.size_bytes + reply.size_bytes < _THREAD_FROM_BYTES:
                differing = _differing(copy, reply, self._tolerance)
            else:
                differing = await asyncio.to_thread(_differing, copy, reply, self._tolerance)
        except NoAnswer as failure:
            shadow.failed[failure.reason] += 1
        except RequestError:
            shadow.failed["unreadable"] += 1
        except Exception:
            shadow.failed["internal"] += 1
            logger.exception("A shadow's answer could not be compared.")
        else:
            shadow.compared += 1
            for name in copy.outputs:
                (shadow.disagreed if name in differing else shadow.agreed)[name] += 1

    async def _deliver(self, version: int, copy: Copy) -> Reply:
        links = self._links
        link = None if links is None else await links.find(version)
        if links is None or link is None:
            raise NoAnswer("not_deployed")
        try:
            return await copy.deliver(version, links, link)
        except NoAnswer as failure:
            if failure.reason in LOST:
                links.ask_again()
            raise

    async def close(self) -> None:
        """Ends what waits and what is on its way, and takes no more."""
        self.is_on = False
        self._active = []
        if self._look is not None:
            self._look.cancel()
            self._look = None
        while self._waiting:
            _, version, copy = self._waiting.popleft()
            self._shadows[version].budget.release(copy.size_bytes)
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    def counts(self) -> Iterator[tuple[int, ShadowState]]:
        """What became of the copies of this replica, by the version that got them."""
        yield from self._shadows.items()

    def document(self) -> dict[str, Any]:
        """What became of the copies of this replica since it started."""
        return {str(version): _counts(shadow) for version, shadow in self._shadows.items()}


def _counts(shadow: ShadowState) -> Mapping[str, Any]:
    names = sorted({*shadow.agreed, *shadow.disagreed})
    return {
        "compared": shadow.compared,
        "dropped": dict(shadow.dropped),
        "failed": dict(shadow.failed),
        "outputs": {
            name: {"agreed": shadow.agreed[name], "disagreed": shadow.disagreed[name]}
            for name in names
        },
    }


def _differing(copy: Copy, reply: Reply, tolerance: Tolerance) -> set[str]:
    """The outputs that differ.

    Raises:
        RequestError: The reply cannot be read.
    """
    actual = reply.decode()
    for name in copy.json_names & copy.outputs.keys() & actual.keys():
        actual[name] = _with_infinities(copy.outputs[name], actual[name])
    return {difference.output for difference in compare_outputs(copy.outputs, actual, tolerance)}


def _with_infinities(want: Array, got: Array) -> Array:
    """What a null of JSON may have been: it stands for infinities as well as for NaN.

    Where an infinity is expected, nothing more can be told of it.
    """
    # ml_dtypes register bfloat16 as kind "V" in numpy's eyes, so floats are told by exclusion.
    if want.dtype.kind in "biuOSU" or want.shape != got.shape or want.dtype != got.dtype:
        return got
    lost = np.isinf(want) & np.isnan(got)
    return np.where(lost, want, got) if lost.any() else got
