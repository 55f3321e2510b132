"""The peer without Ray: uvicorn, FastAPI and ONNX Runtime in one process.

Written as fast as that stack goes without giving up FastAPI: no pydantic on the way, orjson both
ways, and the model runs on the event loop, since handing 20 microseconds of work to a thread would
cost more than the work.
"""

from __future__ import annotations

import argparse

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from bench.tiny_model import FEATURES, INPUT, MODEL, OUTPUT, infer_path, session_of

__all__ = ["create"]


def create(model_file: str) -> FastAPI:
    """The application.

    Args:
        model_file: The tiny ONNX model.
    """
    app = FastAPI()
    session = session_of(model_file)

    @app.post(infer_path(MODEL))
    async def infer(request: Request) -> Response:
        body = orjson.loads(await request.body())
        rows = np.array(body["inputs"][0]["data"], dtype=np.float32).reshape(-1, FEATURES)
        scores = session.run([OUTPUT], {INPUT: rows})[0]
        answer = {
            "model_name": MODEL,
            "model_version": "1",
            "outputs": [
                {
                    "name": OUTPUT,
                    "datatype": "FP32",
                    "shape": scores.shape,
                    "data": scores.ravel().tolist(),
                }
            ],
        }
        return Response(orjson.dumps(answer), media_type="application/json")

    return app


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-file", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(
        create(given.model_file),
        host="127.0.0.1",
        port=given.port,
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
