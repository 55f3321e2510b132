"""Async tests without a plugin."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any


def async_test(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on a loop of its own, for at most half a minute."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(function(*args, **kwargs), 30))  # type: ignore[arg-type]

    return run


async def until(condition: Callable[[], Any], timeout_s: float = 10) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
