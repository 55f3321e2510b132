"""Sends copies of requests to shadow versions, and counts how far their answers agree.

A copy is made after the real answer is on its way, and is sent when the replica has time for it.
What it gives is compared and thrown away: clients never see it, wait for it, or suffer from it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayprism.core.compare import Tolerance, compare_outputs
from rayprism.core.tensors import Tensors
from rayprism.core.traffic import ShadowBudget
from rayprism.errors import RequestError
from rayprism.serving.links import Link, Links
from rayprism.serving.settings import TrafficConfig
from rayprism.serving.traffic import NoAnswer

__all__ = ["Copy", "Shadows"]

_PAUSE_S = 0.002
"""Between two looks at whether there is time for copies."""
_LATE_LOOP_S = 0.002
"""An event loop that is later than this has enough to do."""
_OLDEST_S = 1.0
"""Copies that found no time for so long are dropped."""
_THREAD_FROM_BYTES = 256 * 1024

logger = logging.getLogger("ray.serve.rayprism")


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered, to be sent to a shadow as well.

    Args:
        size_bytes: Of its body and of the outputs.
        outputs: What the client got.
        deliver: Sends it to a version and gives its outputs; raises NoAnswer where there are none.
    """

    size_bytes: int
    outputs: Tensors
    deliver: Callable[[int, Links, Link], Awaitable[Tensors]]


@dataclass(slots=True)
class _Shadow:
    share: float = 0.0
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
        draw: Uniform from 0 up to, but not including, 1.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        version: int,
        tolerance: Tolerance,
        links: Links | None,
        is_busy: Callable[[], bool],
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._version = version
        self._tolerance = tolerance
        self._links = links
        self._is_busy = is_busy
        self._draw = draw
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._budget = ShadowBudget(1, 1)
        self._shadows: dict[int, _Shadow] = {}
        self._active: list[tuple[int, _Shadow]] = []
        self._waiting: deque[tuple[float, int, Copy]] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._look_s = 0.0
        self.is_on = False
        """Whether copies are wanted at all."""

    def reconfigure(self, config: TrafficConfig | None) -> None:
        """Takes new samples and bounds. Counts are kept."""
        config = config or TrafficConfig()
        self._budget.max_requests = config.max_shadow_requests
        self._budget.max_bytes = config.max_shadow_bytes
        self._active = []
        for shadow in config.shadow:
            if shadow.sample and shadow.version != self._version:
                entry = self._shadows.setdefault(shadow.version, _Shadow())
                entry.share = shadow.sample / 100
                self._active.append((shadow.version, entry))
        self.is_on = bool(self._active) and self._links is not None

    def offer(self, make: Callable[[], Copy]) -> None:
        """Draws, for a request that was answered, who gets a copy of it.

        Args:
            make: Makes the copy; called only where one is wanted.
        """
        copy: Copy | None = None
        for version, shadow in self._active:
            if self._draw() >= shadow.share:
                continue
            copy = copy or make()
            refused = self._budget.admit(copy.size_bytes)
            if refused:
                shadow.dropped[refused] += 1
                continue
            self._waiting.append((self._clock(), version, copy))
            if self._look is None:
                self._look_later()

    def _look_later(self) -> None:
        self._look_s = self._clock() + _PAUSE_S
        self._look = self._loop.call_later(_PAUSE_S, self._on_look)

    def _on_look(self) -> None:
        self._look = None
        now_s = self._clock()
        if now_s - self._look_s > _LATE_LOOP_S or self._is_busy():
            self._drop_old(now_s)
        else:
            _, version, copy = self._waiting.popleft()
            task = self._loop.create_task(self._send(version, copy))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        if self._waiting:
            self._look_later()

    def _drop_old(self, now_s: float) -> None:
        while self._waiting and now_s - self._waiting[0][0] > _OLDEST_S:
            _, version, copy = self._waiting.popleft()
            self._budget.release(copy.size_bytes)
            self._shadows[version].dropped["load"] += 1

    async def _send(self, version: int, copy: Copy) -> None:
        shadow = self._shadows[version]
        try:
            outputs = await self._deliver(version, copy)
            if sum(array.nbytes for array in copy.outputs.values()) < _THREAD_FROM_BYTES:
                differences = compare_outputs(copy.outputs, outputs, self._tolerance)
            else:
                differences = await asyncio.to_thread(
                    compare_outputs, copy.outputs, outputs, self._tolerance
                )
        except NoAnswer as failure:
            shadow.failed[failure.reason] += 1
        except RequestError:
            shadow.failed["unreadable"] += 1
        except Exception:
            shadow.failed["internal"] += 1
            logger.exception("A shadow's answer could not be compared.")
        else:
            shadow.compared += 1
            differing = {difference.output for difference in differences}
            for name in copy.outputs:
                (shadow.disagreed if name in differing else shadow.agreed)[name] += 1
        finally:
            self._budget.release(copy.size_bytes)

    async def _deliver(self, version: int, copy: Copy) -> Tensors:
        links = self._links
        link = None if links is None else await links.find(version)
        if links is None or link is None:
            raise NoAnswer("not_deployed")
        try:
            return await copy.deliver(version, links, link)
        except NoAnswer as failure:
            if failure.reason in ("gone", "unreachable", "wrong_version"):
                links.ask_again()
            raise

    async def close(self) -> None:
        """Ends what waits and what is on its way."""
        if self._look is not None:
            self._look.cancel()
        self._waiting.clear()
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    def document(self) -> dict[str, Any]:
        """What became of the copies of this replica since it started."""
        return {str(version): _counts(shadow) for version, shadow in self._shadows.items()}


def _counts(shadow: _Shadow) -> Mapping[str, Any]:
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
