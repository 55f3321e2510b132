"""MLServer: FastAPI and adaptive batching in one process, the model in a worker process.

Of its guides to adaptive batching and parallel inference: `max_batch_size` and `max_batch_time`
are found by load tests, and the worker keeps the model off the event loop. `debug`, its default,
would log every request.
"""

from __future__ import annotations

import asyncio
import tempfile

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput
from mlserver.utils import install_uvloop_event_loop

from bench.peers.served import Arguments, open_model

_BATCH_TIME_S = {"minilm": 0.01}


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


def _array(tensor: RequestInput) -> np.ndarray:
    ...
