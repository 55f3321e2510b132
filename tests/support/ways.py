"""Both ways of an inference request into an application: Serve's, and that of the fast lane."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from rayprism.serving.http import ModelApp

__all__ = ["LaneModelApp", "both_ways"]


@pytest.fixture(params=["task", "lane"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with members of `fleet` that are asked as by Serve, and as by the lane."""
    if request.param == "lane":
        monkeypatch.setattr("tests.support.versions.ModelApp", LaneModelApp)
    return str(request.param)


class LaneModelApp(ModelApp):
    """Answers as on a connection of the fast lane: without a task where that can be."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body", False):
            messages.append(await receive())

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        if messages[-1]["type"] != "http.request":
            await super().__call__(scope, replay, send)  # the lane never sees half a request
            return
        body = b"".join(message.get("body", b"") for message in messages)
        cancel = None
        if scope["path"] in self.infer_paths(scope.get("root_path", "")):
            replied = asyncio.get_running_loop().create_future()
            headers = list(scope["headers"])
            request_id = dict(headers).get(b"x-request-id", b"of-the-lane")
            cancel = self.infer_now(
                scope["path"],
                headers,
                body,
                request_id.decode("latin-1"),
                lambda *answer: replied.set_result(answer),
            )
        if cancel is None:
            await super().__call__(scope, replay, send)
            return
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({replied, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            cancel()
            raise
        finally:
            leaving.cancel()
        if not replied.done():
            cancel()
            return
        status, said, answer = replied.result()
        said.append((b"x-request-id", request_id))
        await send({"type": "http.response.start", "status": status, "headers": said})
        await send({"type": "http.response.body", "body": answer})


async def _left(receive: Any) -> None:
    """Ends when the client leaves; never where the test has nothing more to say of it."""
    with contextlib.suppress(IndexError):
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await asyncio.Event().wait()
