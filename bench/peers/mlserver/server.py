"""MLServer: FastAPI in one process, and the model there, too, or in a worker process.

Its guides to adaptive batching and to parallel inference leave the values to load tests. Of CPU
time, a request of the tiny model took about 860 us with a worker process, its default, and batches
of up to 32; 690 us with batches alone; 580 us with neither. So neither is on for small models; the
sentence model has a worker, which keeps it off the event loop. `debug`, a default, would log every
request.
"""

from __future__ import annotations

import asyncio
import tempfile

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput
from mlserver.utils import install_uvloop_event_loop
from numpy.typing import NDArray

from bench.peers.served import Arguments, open_model

_BATCH_TIME_S = {"minilm": 0.01}
_WITH_WORKER = ("minilm",)
_GRACE_S = 3


class Model(MLModel):
    """Runs what MLServer has read and joined."""

    async def load(self) -> bool:
        """In the worker process."""
        self._model = open_model(Arguments.from_environment())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Of a batch: its rows stand in one request."""
        tensors = {tensor.name: _array(tensor) for tensor in payload.inputs}
        (outputs,) = self._model.run([self._model.prepare(tensors)])
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[
                ResponseOutput(
                    name=name,
                    shape=list(values.shape),
                    datatype="FP32",
                    data=values.ravel().tolist(),
                )
                for name, values in outputs.items()
            ],
        )


def _array(tensor: RequestInput) -> NDArray[np.generic]:
    if tensor.datatype == "BYTES":
        return np.array(StringCodec.decode_input(tensor), object)
    return NumpyCodec.decode_input(tensor)


async def _serve(arguments: Arguments, folder: str) -> None:
    options = arguments.options_over(
        {
            "max_batch_size": 1,
            "max_batch_time_s": _BATCH_TIME_S.get(arguments.model, 0.001),
            "parallel_workers": int(arguments.model in _WITH_WORKER),
        }
    )
    if arguments.model == "ragged" and options["max_batch_size"] > 1:
        # It would, and answer wrongly.
        raise SystemExit("MLServer cannot join requests of different shapes")
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=arguments.port,
        # Any: nobody asks there.
        grpc_port=0,
        metrics_port=0,
        metrics_dir=folder,
        environments_dir=folder,
        parallel_workers=options["parallel_workers"],
        load_models_at_startup=False,
    )
    # Requests that its worker has when it is stopped are never answered, and it waits for them.
    settings._custom_rest_server_settings = {"timeout_graceful_shutdown": _GRACE_S}
    model = ModelSettings(
        name=arguments.model,
        implementation=Model,
        max_batch_size=options["max_batch_size"],
        max_batch_time=options["max_batch_time_s"],
        parameters=ModelParameters(version="1"),
    )
    await MLServer(settings).start([model])


def main() -> None:
    """Serves until it is ended.

    Options: `max_batch_size`, of requests, more than 1 to have adaptive batching;
    `max_batch_time_s`, for a batch to fill; `parallel_workers`, processes with the model, 0 to have
    it in the server's own.
    """
    arguments = Arguments.from_command()
    arguments.export()
    install_uvloop_event_loop()
    with tempfile.TemporaryDirectory(prefix="bench-mlserver-") as folder:
        asyncio.run(_serve(arguments, folder))


if __name__ == "__main__":
    main()
