"""The peers on Ray Serve: its documented pattern, and an application that does nothing."""

# No `from __future__ import annotations` here: FastAPI has to see the request's type, and Ray
# rebuilds the route's signature in the replica.
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from bench.tiny_model import INPUT, LANE_ANSWER, MODEL, OUTPUT, session_of

__all__ = ["documented", "noop", "noop_lane"]

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


class Tensor(BaseModel):
    """One tensor of an Open Inference Protocol request or answer."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class InferRequest(BaseModel):
    """The part of an Open Inference Protocol request that is used here."""

    inputs: list[Tensor]


api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Ingress:
    """HTTP in front of the model, as Ray Serve's FastAPI guide writes it."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @api.post("/infer")
    async def infer(self, request: InferRequest) -> dict[str, Any]:
        tensor = request.inputs[0]
        row = np.array(tensor.data, dtype=np.float32)
        score = await self._model.predict.remote(row)
        output = {"name": OUTPUT, "datatype": "FP32", "shape": [1, 1], "data": [score]}
        return {"model_name": MODEL, "model_version": "1", "outputs": [output]}


@serve.deployment
class Model:
    """The model behind it, as Ray Serve's guide to dynamic request batching writes it."""

    def __init__(self, model_file: str, batching: dict[str, Any]) -> None:
        self._session = session_of(model_file)
        if "max_batch_size" in batching:
            self.predict.set_max_batch_size(batching["max_batch_size"])
        if "batch_wait_timeout_s" in batching:
            self.predict.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])

    @serve.batch
    async def predict(self, rows: list[NDArray[np.float32]]) -> list[float]:
        scores = self._session.run([OUTPUT], {INPUT: np.stack(rows)})[0]
        return [float(score) for score in scores[:, 0]]


def documented(args: dict[str, Any]) -> Application:
    """FastAPI ingress deployment -> handle -> `@serve.batch` deployment.

    Args:
        args: `model_file`; optionally `options` for both deployments and `batching` for the
            decorator. Without these everything is Ray Serve's default.
    """
    options = args.get("options", {})
    model = Model.options(**options).bind(args["model_file"], args.get("batching", {}))
    return Ingress.options(**options).bind(model)


def noop(args: dict[str, Any]) -> Application:
    """An ASGI application that reads the body and answers a constant.

    Args:
        args: `answer`, the body to send; `options` of the deployment.
    """
    app = _constant(args["answer"].encode())

    @serve.deployment(name="noop", **args.get("options", {}))
    @serve.ingress(lambda: app)
    class Noop:
        pass

    return Noop.bind()


def noop_lane() -> list[Middleware]:
    """The same as a middleware around Ray's own handling of requests, which it leaves out.

    For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: what is left is uvicorn's work and the proxy's.
    """
    return [Middleware(_Lane)]


class _Lane:
    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._constant = _constant(os.environ[LANE_ANSWER].encode())

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        infer = scope["type"] == "http" and scope["path"].endswith("/infer")
        await (self._constant if infer else self._app)(scope, receive, send)


def _constant(answer: bytes) -> AsgiApp:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer)).encode()),
    ]

    async def app(scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app
