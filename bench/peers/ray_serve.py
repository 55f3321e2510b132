"""The peers on Ray Serve: its documented pattern, and an application that does nothing."""

# No `from __future__ import annotations` here: FastAPI has to see the request's type, and Ray
# rebuilds the route's signature in the replica.
import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from bench.peers.served import Arguments, InvalidRequest, Served, Tensors, open_model
from bench.tiny_model import INPUT, LANE_ANSWER, MODEL, OUTPUT, session_of

__all__ = ["documented", "documented_text", "noop", "noop_lane", "tuned"]

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


# Before the deployments: Ray writes them down, with what they refer to, as it meets them.
def _open(args: dict[str, Any]) -> Served:
    tokenizer = args.get("tokenizer")
    return open_model(
        Arguments(
            model=args["model"],
            model_file=Path(args["model_file"]),
            port=0,
            tokenizer=None if tokenizer is None else Path(tokenizer),
        )
    )


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


class TextTensor(BaseModel):
    """One tensor of texts."""

    name: str
    shape: list[int]
    datatype: str
    data: list[str]


class TextRequest(BaseModel):
    """The part of an Open Inference Protocol request that is used here."""

    inputs: list[TextTensor]


text_api = FastAPI()


@serve.deployment
@serve.ingress(text_api)
class TextIngress:
    """HTTP in front of a model of texts, written as `Ingress`."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @text_api.post("/infer")
    async def infer(self, request: TextRequest) -> dict[str, Any]:
        embedding = await self._model.predict.remote(request.inputs[0].data[0])
        output = {
            "name": "embedding",
            "datatype": "FP32",
            "shape": [1, len(embedding)],
            "data": embedding,
        }
        return {"model_version": "1", "outputs": [output]}


@serve.deployment
class TextModel:
    """The model behind it, written as `Model`."""

    def __init__(self, args: dict[str, Any], batching: dict[str, Any]) -> None:
        self._served = _open(args)
        if "max_batch_size" in batching:
            self.predict.set_max_batch_size(batching["max_batch_size"])
        if "batch_wait_timeout_s" in batching:
            self.predict.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])

    @serve.batch
    async def predict(self, texts: list[str]) -> list[list[float]]:
        feed = self._served.prepare({"text": np.array(texts, object)})
        (outputs,) = self._served.run([feed])
        rows: list[list[float]] = outputs["embedding"].tolist()
        return rows


def documented_text(args: dict[str, Any]) -> Application:
    """`documented` for a model that takes one text a request.

    Args:
        args: `model`, `model_file` and `tokenizer`; `options` and `batching` as there.
    """
    options = args.get("options", {})
    model = TextModel.options(**options).bind(args, args.get("batching", {}))
    return TextIngress.options(**options).bind(model)


tuned_api = FastAPI()


@serve.deployment
@serve.ingress(tuned_api)
class Tuned:
    """Ray Serve as somebody writes it who knows where its time goes.

    One deployment: a handle would cost more than the model. FastAPI only routes; the body is read
    and the answer written without pydantic. Batches begin at once, and what comes while one runs is
    in the next. A model of some milliseconds runs in a thread, so that its replica goes on reading.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        self._served = _open(args)
        self._in_a_thread: bool = args["in_a_thread"]

    @tuned_api.post("/infer")
    async def infer(self, request: Request) -> Response:
        header_length = request.headers.get("inference-header-content-length")
        body = await request.body()
        try:
            length = None if header_length is None else int(header_length)
            tensors = self._served.decode(body, length)
        except InvalidRequest as error:
            return Response(str(error), status_code=400)
        outputs = await self.predict(tensors)
        return Response(self._served.encode(outputs), media_type="application/json")

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def predict(self, requests: list[Tensors]) -> list[Tensors]:
        if self._in_a_thread:
            return await asyncio.to_thread(self._served.run, requests)
        return self._served.run(requests)


def tuned(args: dict[str, Any]) -> Application:
    """FastAPI ingress and `@serve.batch` in one deployment.

    Args:
        args: `model`, `model_file` and `tokenizer`; `in_a_thread`, whether the model runs beside
            the event loop; `options` of the deployment.
    """
    return Tuned.options(**args.get("options", {})).bind(args)


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
