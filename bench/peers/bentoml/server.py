"""BentoML: a supervisor, and a worker with HTTP, adaptive batching and the model in a thread.

Of its guides to adaptive batching and to workers: `batchable`, with `max_batch_size`; one worker,
as the model is to be there once; no log line a request. `max_latency_ms` stays at its own 60 s: it
refuses with 503 what it expects to take longer, and its expectation starts wrong. Its batches are
lists of JSON values in one request; so that it takes the protocol's bodies, the input and the
output of the API are read and written by descriptors of our own, in `service.py`, which also saves
it pydantic. A mounted ASGI application would come to the same batches only through a request to
itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.peers.served import Arguments


def main() -> None:
    """Becomes the supervisor.

    Options: `max_batch_size`, of requests; `max_latency_ms`, beyond which it refuses.
    """
    arguments = Arguments.from_command()
    arguments.export()
    os.environ |= {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(Path(sys.prefix) / "home"),
    }
    command = [
        *(sys.executable, "-m", "bentoml", "serve", "service:Peer"),
        f"--working-dir={Path(__file__).resolve().parent}",
        "--host=127.0.0.1",
        f"--port={arguments.port}",
    ]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
