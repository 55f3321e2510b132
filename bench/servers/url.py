"""A server that runs already, whoever started it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from bench.models import MODELS
from bench.scenario import UrlServer
from bench.servers.base import (
    NeverRight,
    NotOurs,
    Probe,
    RunContext,
    Unavailable,
    ask,
    infer_path,
)
from bench.servers.meter import Meter

__all__ = ["AtUrl"]

_FIRST_ANSWER_S = 10.0


class AtUrl(NotOurs):
    """Asked, and never touched.

    Its model may be any. Where it is none of `bench.models`, nobody knows a right answer, and it
    counts as ready once it tells its model's inputs.
    """

    def __init__(self, name: str, server: UrlServer, run: RunContext) -> None:
        self.name = name
        self.server = server
        self.marker = f"{run.marker}/{name}"
        base = server.url.rstrip("/")
        self.url = base + infer_path(server.model)
        self.metadata_url = f"{base}/v2/models/{server.model}"
        self.grpc_address = server.grpc_url
        # rayprism's gRPC asks for it, and others do not mind.
        self.headers: Mapping[str, str] = {"application": server.model}
        self._server_url = f"{base}/v2"
        model = MODELS.get(server.model)
        self._probe = None if model is None else Probe(model)

    def start(self) -> dict[str, float]:
        """Asks until the first right answer.

        Returns:
            `ready_s`.

        Raises:
            Unavailable: There is none.
        """
        began_s = time.monotonic()
        try:
            if self._probe is not None:
                self._probe.wait(self.url, _FIRST_ANSWER_S)
            else:
                self._metadata()
        except NeverRight as error:
            raise Unavailable(str(error)) from None
        return {"ready_s": time.monotonic() - began_s}

    def restart_model(self) -> float:
        """It is not ours to restart.

        Raises:
            Unavailable: Always.
        """
        raise Unavailable(f"{self.name} runs already: how it starts cannot be measured")

    def pause(self) -> None:
        """It is not ours to stop."""

    def resume(self) -> None:
        """It was not stopped."""

    def meter(self) -> Meter:
        """A meter of the load generator alone."""
        return Meter(None)

    def facts(self) -> dict[str, Any]:
        """What it says of itself, where it does."""
        facts: dict[str, Any] = {"model": self.server.model, "url": self.server.url}
        try:
            facts["says"] = json.loads(ask(self._server_url)[1])
        except (OSError, ValueError):
            facts["says"] = None
        return facts

    def stop(self) -> None:
        """It is not ours to end."""

    def _metadata(self) -> None:
        try:
            document = json.loads(ask(self.metadata_url)[1])
            if document["inputs"]:
                return
            fault = "no inputs in it"
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
        raise NeverRight(f"{self.metadata_url} tells no inputs: {fault}")
