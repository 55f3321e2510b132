"""Sends the share of a candidate on to it, and answers here whenever it does not answer.

The stable version is the way back for every request: nothing that a candidate does, or fails to
do, reaches a client. Which candidate gets a request is decided in `rayprism.core.traffic`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rayprism.core.traffic import SLOTS, Breaker, Split, sticky_slot
from rayprism.errors import DeadlineExceeded, InvalidInput, NotFound, NotReady
from rayprism.serving.links import Link, Links
from rayprism.serving.settings import TrafficConfig
from rayprism.telemetry.records import RequestRecord, Source

__all__ = [
    "FORWARDED_HEADER",
    "LOST",
    "SHADOW_MARK",
    "TIMEOUT_HEADER",
    "VERSION_HEADER",
    "Deliver",
    "NoAnswer",
    "Target",
    "Traffic",
    "parse_timeout",
    "source_of",
]

VERSION_HEADER = "x-rayprism-version"
"""On a request: the version that is wanted. On an answer: the version that gave it."""

TIMEOUT_HEADER = "x-rayprism-timeout-s"
"""On a request: seconds that it may take, as the parameter `timeout`; the smaller one counts."""

FORWARDED_HEADER = "x-rayprism-forwarded"
"""On a request that one version sent on to another: it is answered there, whatever happens.

Its value is the version that sent it, with `;shadow` behind it where it is a copy.
"""

SHADOW_MARK = ";shadow"

_LONGEST_TIMEOUT_S = 86_400.0
_PATIENT_S = 1.0
"""A client that leaves after waiting longer than this for a candidate counts against it."""
LOST = frozenset({"gone", "unreachable", "wrong_version"})
"""Reasons for which a version may be elsewhere by now."""
_FAULTLESS = frozenset({"refused", "busy", "not_deployed"})
"""Reasons that say nothing of the candidate's health, or for which nothing was sent to it."""

_T = TypeVar("_T")
Deliver = Callable[[float, Links, Link], Awaitable[_T]]
"""Sends a request within so many seconds, and raises NoAnswer where it gets no answer."""

logger = logging.getLogger("ray.serve.rayprism")


class NoAnswer(Exception):
    """A candidate gave no answer that a client may have.

    Args:
        reason: `not_deployed`, `unreachable`, `busy` (too many requests are on their way to it),
            `late`, `gone` (nothing answers at its address), `not_ready`, `overloaded`, `error`
            (any other 5xx), `refused` (any 4xx, or a request that cannot be sent on),
            `wrong_version`, `resting` (it failed again and again and is left alone for a while),
            or `internal` (a fault of rayprism's own; the log has it).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes that is not answered here.

    Args:
        version: Which version answers it.
        named: Whether the client named it. Then no other version answers instead.
    """

    version: int
    named: bool


@dataclass(slots=True)
class _Candidate:
    breaker: Breaker = field(default_factory=Breaker)
    answered: int = 0
    left: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


def parse_timeout(value: str | None) -> float | None:
    """Reads `x-rayprism-timeout-s`.

    Raises:
        InvalidInput: Not a number of seconds over 0.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _LONGEST_TIMEOUT_S:
        raise InvalidInput(
            f"header {TIMEOUT_HEADER} is {value[:40]!r}, allowed are seconds over 0 and up to "
            f"{_LONGEST_TIMEOUT_S:g}"
        )
    return seconds


def source_of(forwarded: str | None) -> Source:
    """Who asks, by the value of `x-rayprism-forwarded`; None where a request has none."""
    if forwarded is None:
        return "client"
    return "shadow" if forwarded.endswith(SHADOW_MARK) else "split"


class Traffic:
    """Who answers the requests that come to one replica of the stable version.

    Args:
        model: The model's name.
        version: What is answered here.
        links: Where the other versions are; None where there are none to be found.
        draw: Uniform from 0 up to, but not including, 1; by default of a generator of its own,
            since models seed the common one.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        version: int,
        links: Links | None,
        draw: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.version = version
        self.links = links
        self._draw = draw or random.Random().random
        self._clock = clock
        self._config = TrafficConfig()
        self._split: Split | None = None
        self.slots: dict[int, int] = {version: SLOTS}
        """Of all that come to this address, in hundredths of a percent, by version."""
        self._candidates: dict[int, _Candidate] = {}
        self.sticky_header: str | None = None
        """In lower case, as gRPC's metadata has it."""
        self._sticky_header_bytes: bytes | None = None

    @property
    def is_split(self) -> bool:
        """Whether any request may go elsewhere without asking for it."""
        return self._split is not None

    def reconfigure(self, config: TrafficConfig | None) -> None:
        """Takes new weights, between two requests. Counts are kept."""
        self._config = config = config or TrafficConfig()
        weights = {
            candidate.version: candidate.slots
            for candidate in config.candidates
            # Between the two steps of a promotion the candidate is what answers here.
            if candidate.slots and candidate.version != self.version
        }
        self._split = Split(weights) if weights else None
        self.slots = {**weights, self.version: SLOTS - sum(weights.values())}
        self.sticky_header = config.sticky.header.lower() if config.sticky else None
        self._sticky_header_bytes = self.sticky_header.encode() if self.sticky_header else None
        for version in weights:
            self._candidates.setdefault(version, _Candidate())
        if self.links is not None and (weights or config.shadow):
            self.links.expect_changes()

    def target(self, wanted: str | None, key: bytes | None) -> Target | None:
        """Where a request goes; None where it is answered here.

        Args:
            wanted: The version that the client named; None where it named none.
            key: Its sticky key; None, or an empty one, where it has none.

        Raises:
            InvalidInput: The version is not one.
        """
        if wanted:
            if not (wanted.isascii() and wanted.isdigit() and len(wanted) <= 10):
                raise InvalidInput(
                    f"{VERSION_HEADER}, or model_version over gRPC, is {wanted[:40]!r}, allowed "
                    'is a version\'s number, as in "3"'
                )
            version = int(wanted)
            return None if version == self.version else Target(version, named=True)
        split = self._split
        if split is None:
            return None
        chosen = split.version_at(sticky_slot(self.model, key)) if key else split.draw(self._draw())
        return None if chosen is None else Target(chosen, named=False)

    def sticky_key(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        """The value of a request's sticky header; None where it has none, or none is set."""
        name = self._sticky_header_bytes
        return None if name is None else headers.get(name)

    def budget_s(self, target: Target, allowed_s: float) -> float:
        """How long a version may take to answer in the place of this one.

        Args:
            target: The version.
            allowed_s: What the request allows in all.
        """
        # The version that gets it allows no more, whatever the request itself says.
        allowed_s = min(allowed_s, _LONGEST_TIMEOUT_S)
        if target.named:
            return allowed_s
        configured_s = self._config.candidate_timeout_s
        # The other half is for the stable version, should the candidate be late.
        return min(allowed_s / 2, configured_s) if configured_s else allowed_s / 2

    async def send(
        self,
        target: Target,
        budget_s: float,
        deliver: Deliver[_T],
        record: RequestRecord | None = None,
    ) -> _T | None:
        """Sends a request to the version that it belongs to.

        Args:
            target: The version.
            budget_s: How long it may take, with finding out where that is.
            deliver: Sends it.
            record: Gets where it was sent and what became of it.

        Returns:
            The answer; None where it is to be answered here.

        Raises:
            NotFound, NotReady, DeadlineExceeded: The client named a version that does not answer.
        """
        if record is None:
            return await self._send(target, budget_s, deliver, None)
        record.forwarded_to = str(target.version)
        record.forward_began_s = self._clock()
        try:
            answer = await self._send(target, budget_s, deliver, record)
        finally:
            record.forward_ended_s = self._clock()
        if answer is not None:
            record.version = record.forwarded_to
        return answer

    async def _send(
        self, target: Target, budget_s: float, deliver: Deliver[_T], record: RequestRecord | None
    ) -> _T | None:
        if target.named:
            try:
                return await self._deliver(target.version, budget_s, deliver)
            except NoAnswer as failure:
                raise self._explain(target.version, failure.reason) from None
        candidate = self._candidates[target.version]
        breaker = candidate.breaker
        is_test = breaker.is_open
        began_s = self._clock()
        if not breaker.allows(began_s):
            candidate.fallbacks["resting"] += 1
            if record is not None:
                record.fallback = "resting"
            return None
        try:
            answer = await self._deliver(target.version, budget_s, deliver)
        except NoAnswer as failure:
            reason = failure.reason
        except asyncio.CancelledError:
            candidate.left += 1
            # Where nobody waits until a candidate that hangs is late, nothing else would tell.
            waited_s = self._clock() - began_s
            self._settle(breaker, is_test, failed=waited_s > _PATIENT_S)
            raise
        except Exception:
            reason = "internal"
            logger.exception("A request could not be sent to version %d.", target.version)
        else:
            breaker.succeeded()
            candidate.answered += 1
            return answer
        candidate.fallbacks[reason] += 1
        if record is not None:
            record.fallback = reason
        self._settle(breaker, is_test, failed=reason not in _FAULTLESS)
        return None

    def _settle(self, breaker: Breaker, is_test: bool, *, failed: bool) -> None:
        if breaker.is_open and not is_test:
            return  # Sent before the breaker opened: it says nothing of the test.
        if failed:
            breaker.failed(self._clock())
        else:
            breaker.abandoned()

    async def _deliver(self, version: int, budget_s: float, deliver: Deliver[_T]) -> _T:
        links = self.links
        if links is None:
            raise NoAnswer("not_deployed")
        # Without awaiting where it is known, which is nearly always.
        link = links.known(version)
        if link is None:
            began_s = self._clock()
            link = await links.find(version, budget_s)
            budget_s -= self._clock() - began_s
            if link is None:
                raise NoAnswer("not_deployed")
            if budget_s <= 0:
                raise NoAnswer("late")
        try:
            return await deliver(budget_s, links, link)
        except NoAnswer as failure:
            if failure.reason in LOST:
                links.ask_again()
            raise

    def _explain(self, version: int, reason: str) -> NotFound | NotReady | DeadlineExceeded:
        name = f"version {str(version)!r} of model {self.model!r}"
        if reason in ("not_deployed", "gone", "wrong_version"):
            return NotFound(
                f"{name} is not served here; here is version {self.version}. "
                "What is: /v2/repository/index"
            )
        if reason == "late":
            return DeadlineExceeded(f"{name} did not answer within the time that was allowed")
        return NotReady(f"{name} does not answer ({reason})")

    def fallbacks(self) -> Iterator[tuple[int, Mapping[str, int]]]:
        """Of each candidate, how often the stable version answered instead, by reason."""
        for version, candidate in self._candidates.items():
            yield version, candidate.fallbacks

    def document(self) -> dict[str, Any]:
        """Weights, and what became of the requests of this replica since it started."""
        config = self._config
        weights = {str(candidate.version): candidate.weight for candidate in config.candidates}
        others = sum(c.weight for c in config.candidates if c.version != self.version)
        weights[str(self.version)] = round(100 - others, 2)
        return {
            "model_name": self.model,
            "model_version": str(self.version),
            "weights": weights,
            "sticky": {"header": config.sticky.header} if config.sticky else None,
            "shadow": {str(shadow.version): shadow.sample for shadow in config.shadow},
            "candidates": {
                str(version): {
                    "answered": candidate.answered,
                    "left": candidate.left,
                    "fallbacks": dict(candidate.fallbacks),
                    "resting": candidate.breaker.is_open,
                }
                for version, candidate in self._candidates.items()
            },
        }
