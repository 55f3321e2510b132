"""A deployment with nothing in it: what starting any replica takes.

In a module of its own, since what a replica imports is part of its start.
"""

from __future__ import annotations

from ray import serve

__all__ = ["app"]


@serve.deployment
class Empty:
    """Answers an empty string."""

    async def __call__(self) -> str:
        return ""


app = Empty.bind()
