"""Which version answers a request, and when a candidate or a shadow is left alone.

Every key, and every draw, falls into one of 10,000 slots: a slot is a hundredth of a percent, so
weights are exact. A candidate takes as many slots as its weight says, always the same ones in the
same order; the rest is the stable version's. So raising a weight never takes a key from that
candidate, nor gives one back to the stable version; and where the candidates do not meet, which
takes weights that are large together, keys move from the stable version to that candidate only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

__all__ = ["SLOTS", "Breaker", "ShadowBudget", "Split", "sticky_slot"]

SLOTS = 10_000
"""Hundredths of a percent."""


def sticky_slot(model: str, key: bytes) -> int:
    """The slot of a key: the same in every replica and at any time.

    The model's name is part of it, or the same few users would meet the candidates of all models.
    """
    digest = hashlib.blake2b(key, digest_size=8, person=_person(model)).digest()
    # 2**64 is so much larger than the slots that the remainder is as good as uniform.
    return int.from_bytes(digest, "big") % SLOTS


def _person(model: str) -> bytes:
    return hashlib.blake2b(model.encode(), digest_size=16).digest()


class Split:
    """Slots shared out to the candidates of a model.

    Args:
        weights: Hundredths of a percent by version; at least 0 each, at most 10,000 together.

    Raises:
        ValueError: Weights that are not so.
    """

    def __init__(self, weights: Mapping[int, int]) -> None:
        if any(weight < 0 for weight in weights.values()) or sum(weights.values()) > SLOTS:
            raise ValueError(f"weights: 0 or more, together at most {SLOTS}: {dict(weights)}")
        self.weights = dict(weights)
        self._slots: list[int | None] = [None] * SLOTS
        for version in sorted(weights):
            self._take(version, weights[version])

    @property
    def stable_weight(self) -> int:
        """What is left for the stable version, in hundredths of a percent."""
        return SLOTS - sum(self.weights.values())

    def version_at(self, slot: int) -> int | None:
        """The candidate that has a slot; None for the stable version."""
        return self._slots[slot]

    def draw(self, uniform: float) -> int | None:
        """The candidate for a request without a key; None for the stable version.

        Args:
            uniform: From 0 up to, but not including, 1.
        """
        return self._slots[int(uniform * SLOTS)]

    def _take(self, version: int, weight: int) -> None:
        # Where a version begins depends on its number alone, so that the others may come and go.
        # Neighbours grow away from each other, from starts that are far from those of the pairs
        # before and after: any five versions in a row have room for 19 % each before two of them
        # meet. Where they do, the later one goes around the earlier.
        start, step = _start(version // 2), 1 if version % 2 == 0 else -1
        slot = start if step == 1 else start - 1
        while weight > 0:
            if self._slots[slot % SLOTS] is None:
                self._slots[slot % SLOTS] = version
                weight -= 1
            slot += step


_GOLDEN = 2654435769
"""2**32 over the golden ratio."""


def _start(number: int) -> int:
    """The number-th multiple of the golden ratio around the circle, as a slot.

    Source: Knuth, The Art of Computer Programming, vol. 3, 6.4 (Fibonacci hashing): each multiple
    falls into a largest gap that those before it left, and any few in a row lie far apart.
    """
    return (number * _GOLDEN % 2**32) * SLOTS >> 32


class Breaker:
    """Leaves a candidate alone that fails again and again, and tries it once in a while.

    Requests that a hanging candidate got would each lose the time that it was given. After
    `failures_to_open` failures in a row nothing is sent for `first_pause_s`, then one request as a
    test; each failed test doubles the pause.

    Args:
        failures_to_open: Failures in a row.
        first_pause_s: Seconds.
        longest_pause_s: Seconds.
    """

    def __init__(
        self,
        failures_to_open: int = 5,
        first_pause_s: float = 1.0,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._failures = 0
        self._pause_s = first_pause_s
        self._open_until_s: float | None = None
        self._testing = False

    @property
    def is_open(self) -> bool:
        """Whether the candidate is left alone, but for tests."""
        return self._open_until_s is not None

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent now; then `succeeded`, `failed` or `abandoned` follows."""
        if self._open_until_s is None:
            return True
        if self._testing or now_s < self._open_until_s:
            return False
        self._testing = True
        return True

    def succeeded(self) -> None:
        """The candidate answered."""
        self._failures = 0
        self._pause_s = self._first_pause_s
        self._open_until_s = None
        self._testing = False

    def failed(self, now_s: float) -> None:
        """The candidate did not answer as it should."""
        self._failures += 1
        if self._open_until_s is None:
            if self._failures >= self._failures_to_open:
                self._open_until_s = now_s + self._pause_s
        elif self._testing:
            self._testing = False
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
            self._open_until_s = now_s + self._pause_s

    def abandoned(self) -> None:
        """Nothing is known: the client left before the candidate answered."""
        self._testing = False


class ShadowBudget:
    """Bounds what is kept and sent for shadows.

    Args:
        max_requests: Copies that wait or are on their way.
        max_bytes: Of their bodies, together.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0

    def admit(self, size_bytes: int) -> str | None:
        """Takes a copy in; `release` has to follow.

        Returns:
            None where it was taken in; else which bound it would break: `requests` or `bytes`.
        """
        if self.requests >= self.max_requests:
            return "requests"
        if self.bytes + size_bytes > self.max_bytes:
            return "bytes"
        self.requests += 1
        self.bytes += size_bytes
        return None

    def release(self, size_bytes: int) -> None:
        """A copy that was taken in is done with."""
        self.requests -= 1
        self.bytes -= size_bytes
