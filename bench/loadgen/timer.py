"""A timer that is as exact as the system's, on an event loop whose own has whole milliseconds."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

__all__ = ["Timer"]

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Timer:
    """Calls back once for each time it is set, and never before it.

    Where the system has no timerfd, it is the event loop's timer, up to 1 ms late.

    Args:
        loop: Of the callback.
        callback: Called at the time, or at once where it is over.

    Source: timerfd_create(2). Python has it from 3.13 on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._file = -1
        if sys.platform == "linux":
            self._system = ctypes.CDLL(None, use_errno=True)
            self._file = self._system.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file >= 0:
            loop.add_reader(self._file, self._on_file)

    def set(self, due: float) -> None:
        """Calls at this time of `time.monotonic`, and not at one that was set before."""
        if self._file < 0:
            self.cancel()
            self._handle = self._loop.call_later(
                max(0.0, due - time.monotonic()), self._on_handle, due
            )
            return
        # 0 would switch it off.
        nanoseconds = max(1, int(due * 1e9))
        spec = _Spec(0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        if self._system.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def cancel(self) -> None:
        """Calls no more, until it is set again."""
        if self._handle is not None:
            self._handle.cancel()
        if self._file >= 0:
            self._system.timerfd_settime(self._file, 0, ctypes.byref(_Spec()), None)

    def close(self) -> None:
        """Is of no more use."""
        self.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _on_handle(self, due: float) -> None:
        # uvloop's timers may come early, by less than the millisecond that its clock has.
        if time.monotonic() < due:
            self.set(due)
        else:
            self._callback()

    def _on_file(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            return
        self._callback()
