"""The service that `server.py` starts; its settings are told there."""

from __future__ import annotations

from functools import cache
from typing import Any

import bentoml
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.served import (
    Arguments,
    InvalidRequest,
    Served,
    Tensors,
    best_batch,
    open_model,
)

__all__ = ["Peer"]

_ARGUMENTS = Arguments.from_environment()
_OPTIONS = _ARGUMENTS.options_over(
    {"max_batch_size": best_batch(_ARGUMENTS.model), "max_latency_ms": 60_000}
)


@cache
def _model() -> Served:
    return open_model(_ARGUMENTS)


class _Body(bentoml.IODescriptor):
    """A request of the protocol, read without pydantic: a list of one, which may be joined."""

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Any:
        length = request.headers.get("inference-header-content-length")
        body = await request.body()
        try:
            return [_model().decode(body, None if length is None else int(length))]
        except InvalidRequest as error:
            raise bentoml.exceptions.InvalidArgument(str(error)) from None


_Body.__root_input__ = True


class _Answer(bentoml.IODescriptor):
    """An answer of the protocol."""

    @classmethod
    async def to_http_response(cls, obj: list[Tensors], serde: Any) -> Response:
        return Response(_model().encode(obj[0]), media_type="application/json")


@bentoml.service(
    workers=1,
    threads=1,
    logging={"access": {"enabled": False}},
    traffic={"timeout": 60},
)
class Peer:
    """The model, in batches."""

    def __init__(self) -> None:
        self._model = _model()

    @bentoml.api(
        batchable=_OPTIONS["max_batch_size"] > 1,
        route=_ARGUMENTS.path,
        # It takes no 1, even where it is not used.
        max_batch_size=max(2, _OPTIONS["max_batch_size"]),
        max_latency_ms=_OPTIONS["max_latency_ms"],
        input_spec=_Body,
        output_spec=_Answer,
    )
    def infer(self, requests: list[Tensors]) -> list[Tensors]:
        """Of a batch."""
        return self._model.run(requests)
