"""What goes on beside a load: its processes are watched, and actions happen at their times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bench.scenario import Action

__all__ = ["Conductor"]


class _Meter(Protocol):
    def start(self, at_s: float | None = None) -> None: ...

    def stop(self) -> dict[str, Any]: ...


class Conductor:
    """Watches from the start of measuring to its end, and acts in between.

    An action that takes long holds up those after it, and not the load; one that fails is told in
    its event, and the load goes on.

    Args:
        meter: Of the server and the load generator; not yet started.
        act: Does an action, and says what it did.
        actions: With their times.
        seconds: How long is measured.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        meter: _Meter,
        act: Callable[[Action], str],
        actions: Sequence[Action],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._act = act
        self._actions = sorted(actions, key=lambda action: action.at_s)
        self._seconds = seconds
        self._clock = clock
        self._given_up = threading.Event()
        self._threads: list[threading.Thread] = []
        self._used: dict[str, Any] = {}
        self._events: list[dict[str, Any]] = []
        self._failure: BaseException | None = None

    def begin(self, at_s: float) -> None:
        """Says when measuring starts, by the monotonic clock; returns at once."""
        self._meter.start(at_s)
        self._threads = [
            threading.Thread(target=target, args=(at_s,), daemon=True)
            for target in (self._watch, self._do_all)
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Waits for the end of measuring, and of the action that is under way.

        Returns:
            What the meter gives, or nothing where measuring never started; and an event for each
            action: `at_s` when it began, `what`, `took_s`, `error` or None, `did`.
        """
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return self._used, self._events

    def give_up(self) -> None:
        """Ends without waiting for the end of measuring: the load failed."""
        self._given_up.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, at_s: float) -> None:
        try:
            self._wait_until(at_s + self._seconds)
            self._used = self._meter.stop()
        except BaseException as error:
            self._failure = error

    def _do_all(self, at_s: float) -> None:
        for action in self._actions:
            self._wait_until(at_s + action.at_s)
            if self._given_up.is_set():
                return
            began_s = self._clock()
            did, error = None, None
            try:
                did = self._act(action)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            self._events.append(
                {
                    "at_s": round(began_s - at_s, 3),
                    "what": _describe(action),
                    "took_s": round(self._clock() - began_s, 3),
                    "error": error,
                    "did": did,
                }
            )

    def _wait_until(self, at_s: float) -> None:
        self._given_up.wait(max(0.0, at_s - self._clock()))


def _describe(action: Action) -> str:
    return action.do if action.value is None else f"{action.do} {action.value}"
