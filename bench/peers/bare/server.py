"""uvicorn, FastAPI and ONNX Runtime in one process, as most people serve a model without a server.

As fast as that stack goes without giving up FastAPI: no pydantic on the way, orjson both ways,
uvloop and httptools. A small model runs on the event loop, as a thread would cost more than its
work. A large one runs in a thread, one request at a time, for the loop has to go on reading:
there is no batching in this stack, and each server here has one thread for its model.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request, Response

from bench.peers.served import Arguments, InvalidRequest, open_model

_IN_A_THREAD = ("minilm",)


def create(arguments: Arguments) -> FastAPI:
    """The application.

    Options: `in_a_thread`, whether the model runs beside the event loop and not on it.
    """
    options = arguments.options_over({"in_a_thread": arguments.model in _IN_A_THREAD})
    model = open_model(arguments)
    app = FastAPI()
    thread = ThreadPoolExecutor(1) if options["in_a_thread"] else None

    @app.post(arguments.path)
    async def infer(request: Request) -> Response:
        header_length = request.headers.get("inference-header-content-length")
        body = await request.body()
        try:
            tensors = model.decode(body, None if header_length is None else int(header_length))
        except InvalidRequest as error:
            return Response(str(error), status_code=400)
        if thread is None:
            (outputs,) = model.run([tensors])
        else:
            loop = asyncio.get_running_loop()
            (outputs,) = await loop.run_in_executor(thread, model.run, [tensors])
        return Response(model.encode(outputs), media_type="application/json")

    return app


def main() -> None:
    """Serves until it is ended."""
    arguments = Arguments.from_command()
    uvicorn.run(
        create(arguments),
        host="127.0.0.1",
        port=arguments.port,
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
