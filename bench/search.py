"""Which rates to try, to find the highest that a server holds: without sending anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

__all__ = ["RateSearch"]

_GROWTH = 2.0
_GROWTH_FROM_GUESS = 1.2


class RateSearch:
    """Grows from the lowest rate until one fails, then halves the gap in log space.

    A failure is believed when it comes twice: one hiccup of the machine is no limit of the server.

        search = RateSearch(10, 1000, 0.05)
        for rate in search:
            search.tell(held=try_it(rate))
        search.found

    Args:
        low: The lowest rate. Where it fails, nothing is found.
        high: No rate above it is tried.
        precision: The answer and the lowest rate that fails are this share apart, at most.
        guess: Where to begin instead, as what an earlier search found: from there, up or down in
            smaller steps that grow.

    Units: requests/s.
    """

    def __init__(
        self, low: float, high: float, precision: float, guess: float | None = None
    ) -> None:
        if not 0 < low <= high:
            raise ValueError(f"low is {low:g} and high {high:g}: 0 < low <= high is needed")
        if precision <= 0:
            raise ValueError(f"precision is {precision:g}: a share above 0 is needed, as 0.05")
        self._low = low
        self._high = high
        self._precision = precision
        self._growth = _GROWTH if guess is None else _GROWTH_FROM_GUESS
        self._start = low if guess is None else min(max(guess, low), high)
        self._held: float | None = None
        self._failed: float | None = None
        self._doubted: float | None = None
        self._current: float | None = None

    def __iter__(self) -> Iterator[float]:
        while (rate := self.next_rate()) is not None:
            yield rate

    @property
    def found(self) -> float | None:
        """The highest rate that held so far; None where none did."""
        return self._held

    @property
    def at_most(self) -> float | None:
        """The lowest rate that failed so far; None where none did: the limit was not reached."""
        return self._failed

    def next_rate(self) -> float | None:
        """The rate to try now, until `tell` is called; None when the search is over."""
        if self._current is None:
            self._current = self._doubted if self._doubted is not None else self._choose()
        return self._current

    def tell(self, *, held: bool, sure: bool = False) -> None:
        """How the rate that `next_rate` gave went.

        Args:
            held: Whether it was held.
            sure: That a failure was no hiccup: the rate is not tried again.

        Raises:
            ValueError: No rate was asked for.
        """
        rate, self._current = self._current, None
        if rate is None:
            raise ValueError("no rate was asked for: call next_rate first")
        if held:
            self._doubted, self._held = None, rate
        elif sure or self._doubted is not None:
            self._doubted, self._failed = None, rate
        else:
            self._doubted = rate

    def _choose(self) -> float | None:
        held, failed = self._held, self._failed
        if held is None and failed is None:
            return self._start
        if held is None or failed is None:
            return self._further(held, failed)
        if failed <= held * (1 + self._precision):
            return None
        return math.sqrt(held * failed)

    def _further(self, held: float | None, failed: float | None) -> float | None:
        """The next one in the direction in which all so far lie."""
        factor = max(self._growth, 1 + self._precision)
        self._growth = min(_GROWTH, self._growth**2)
        if held is not None:
            return min(held * factor, self._high) if held < self._high else None
        assert failed is not None  # one of them is given
        return max(failed / factor, self._low) if failed > self._low else None
