"""LitServe: FastAPI in one process, the model in another, queues between them.

Of its guide to batching: `max_batch_size`, and a `batch_timeout` that is short beside a run of the
model; with 0 its worker would spin on the queue. Bodies travel as the bytes they came as, and
answers as ready responses: what its defaults do instead, JSON of the standard library on one side
and `jsonable_encoder` on the other, is slower. `fast_queue` is left alone: 0.2.19 does not heed it,
and its ZeroMQ transport delivers no answers (github.com/Lightning-AI/LitServe/issues/751).
"""

# No `from __future__ import annotations` here: LitServe gives the types of `decode_request` and
# `encode_response` to FastAPI.
import os
import signal
from typing import Annotated

import litserve as ls
from fastapi import Depends, Request, Response

from bench.peers.served import Arguments, Served, Tensors, best_batch, open_model

_TIMEOUT_S = {"minilm": 0.01}


async def _body(request: Request) -> bytes:
    return await request.body()


class Model(ls.LitAPI):
    """Decodes, runs and encodes a batch in the worker process."""

    def __init__(self, arguments: Arguments, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(
            max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path=arguments.path
        )
        self._arguments = arguments
        self._model: Served

    def setup(self, device: str) -> None:
        """In the worker process."""
        self._model = open_model(self._arguments)

    def decode_request(self, request: Annotated[bytes, Depends(_body)]) -> Tensors:
        """Of each request of a batch."""
        return self._model.decode(request)

    def batch(self, inputs: list[Tensors]) -> list[Tensors]:
        """They are joined where they are run."""
        return inputs

    def predict(self, x: list[Tensors] | Tensors) -> list[Tensors] | Tensors:
        """Of a batch; with `max_batch_size` 1, of one request."""
        return self._model.run(x) if isinstance(x, list) else self._model.run([x])[0]

    def unbatch(self, output: list[Tensors]) -> list[Tensors]:
        """They are split already."""
        return output

    def encode_response(self, output: Tensors) -> Response:
        """Of each request of a batch."""
        return Response(self._model.encode(output), media_type="application/json")


def main() -> None:
    """Serves until it is ended.

    Options: `max_batch_size`, of requests; `batch_timeout_s`, for a batch to fill; `api_servers`,
    processes of FastAPI.
    """
    arguments = Arguments.from_command()
    options = arguments.options_over(
        {
            "max_batch_size": best_batch(arguments.model),
            "batch_timeout_s": _TIMEOUT_S.get(arguments.model, 0.001),
            "api_servers": 1,
        }
    )
    server = ls.LitServer(
        Model(arguments, options["max_batch_size"], options["batch_timeout_s"]),
        accelerator="cpu",
    )
    main_process = os.getpid()

    def end(number: int, frame: object) -> None:
        # SIGTERM alone would leave its processes behind; on SIGINT it ends them.
        raise KeyboardInterrupt if os.getpid() == main_process else SystemExit

    signal.signal(signal.SIGTERM, end)
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=options["api_servers"],
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
