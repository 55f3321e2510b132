"""mosec: an HTTP front of Rust, and a worker process that gets batches over a socket.

Of its README's configuration and performance tuning: `max_batch_size` and `max_wait_time` are
found for the model, and the wait is less than a batch takes to run; `serialize` and `deserialize`
are replaced where JSON of the standard library is slow. 1 ms is the shortest wait it takes, and
for a small model already longer than a batch. Capacity (1,024 requests, then 429) and time-out
(3 s, then 408) are its own.

It fails every request of a batch in which one cannot be read.
"""

from __future__ import annotations

import os
import sys

from mosec import Server, Worker
from mosec.errors import DecodingError

from bench.peers.served import Arguments, InvalidRequest, Tensors, best_batch, open_model

_WAIT_MS = {"minilm": 10}


class Model(Worker):
    """Decodes, runs and encodes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self._model = open_model(Arguments.from_environment())

    def deserialize(self, data: bytes) -> Tensors:
        """Of each request of a batch."""
        try:
            return self._model.decode(bytes(data))
        except InvalidRequest as error:
            raise DecodingError(str(error)) from None

    def forward(self, data: list[Tensors] | Tensors) -> list[Tensors] | Tensors:
        """Of a batch; with `max_batch_size` 1, of one request."""
        return self._model.run(data) if isinstance(data, list) else self._model.run([data])[0]

    def serialize(self, data: Tensors) -> bytes:
        """Of each request of a batch."""
        return self._model.encode(data)


def main() -> None:
    """Serves until it is ended.

    Options: `max_batch_size`, of requests; `max_wait_ms`, for a batch to fill; `capacity`, requests
    that are held; `timeout_ms`, of a request.
    """
    arguments = Arguments.from_command()
    options = arguments.options_over(
        {
            "max_batch_size": best_batch(arguments.model),
            "max_wait_ms": _WAIT_MS.get(arguments.model, 1),
            "capacity": 1024,
            "timeout_ms": 3000,
        }
    )
    arguments.export()
    # It reads the command line, too, and would take our options for its own.
    del sys.argv[1:]
    os.environ |= {
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": str(arguments.port),
        "MOSEC_CAPACITY": str(options["capacity"]),
        "MOSEC_TIMEOUT": str(options["timeout_ms"]),
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = Server()
    server.append_worker(
        Model,
        max_batch_size=options["max_batch_size"],
        max_wait_time=options["max_wait_ms"],
        route=arguments.path,
    )
    server.run()


if __name__ == "__main__":
    main()
