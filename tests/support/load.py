"""Real load for tests: closed and open loop, HTTP and gRPC; every answer is checked."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from rayprism.core.tensors import Array

__all__ = ["Load"]

_TIMEOUT_S = 30.0


class Load:
    """Clients that ask for one row again and again, from `with` to its end.

    Args:
        url: Of the HTTP front.
        grpc: Of the gRPC front.
        model: Asked for, without a version; also the application that gRPC clients name.
        reference: What a version answers to rows `[n, 4]`; other answers count as failures.
        connections: Of HTTP clients that send the next request when the answer is there.
        rate: Requests a second that are sent whether or not answers come, at random times.
    """

    def __init__(
        self,
        url: str,
        grpc: str,
        model: str,
        reference: Callable[[str, Array], Array],
        *,
        connections: int = 3,
        rate: float = 40.0,
    ) -> None:
        self._path = f"{url}/v2/models/{model}/infer"
        self._grpc = grpc
        self._model = model
        self._reference = reference
        self._connections = connections
        self._rate = rate
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.versions: Counter[str] = Counter()
        """Answers, by the version that gave them."""
        self.by_client: Counter[str] = Counter()
        """Answers, by kind of client."""
        self.failures: Counter[str] = Counter()
        self.slowest_s = 0.0
        """How long the slowest request took that was answered as it should be."""

    @property
    def answered(self) -> int:
        """Requests that were answered as they should be."""
        return self.versions.total()

    def __enter__(self) -> Self:
        loops: list[Callable[[], None]] = [self._closed_http] * self._connections
        loops += [self._closed_grpc, self._open_http]
        self._threads = [threading.Thread(target=loop) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, requests: int, version: str | None = None, timeout_s: float = 60) -> None:
        """Waits until so many more were answered, by a version or by any."""
        count = self.versions.total if version is None else lambda: self.versions[version]
        wanted = count() + requests
        deadline = time.monotonic() + timeout_s
        while count() < wanted:
            assert time.monotonic() < deadline, (version, self.versions, self.failures)
            time.sleep(0.05)

    def _count(self, client: str, version: str, rows: Array, answer: Array, seconds: float) -> None:
        right = np.allclose(answer, self._reference(version, rows), rtol=1e-3, atol=1e-4)
        with self._lock:
            if right:
                self.slowest_s = max(self.slowest_s, seconds)
                self.versions[version] += 1
                self.by_client[client] += 1
            else:
                self.failures[f"{client}: wrong answer of version {version}"] += 1

    def _fail(self, client: str, what: object) -> None:
        with self._lock:
            self.failures[f"{client}: {what}"] += 1

    def _take_http(self, client: str, rows: Array, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            self._fail(client, f"{answer.status_code} {answer.text[:200]}")
            return
        document = answer.json()
        version = document["model_version"]
        if answer.headers.get("x-rayprism-version") != version:
            self._fail(client, f"header {answer.headers.get('x-rayprism-version')}, {version}")
            return
        values = np.reshape(document["outputs"][0]["data"], (-1, 3))
        self._count(client, version, rows, values, answer.elapsed.total_seconds())

    def _closed_http(self) -> None:
        generator = np.random.default_rng(threading.get_ident())
        with httpx.Client(timeout=_TIMEOUT_S) as client:
            while not self._stop.is_set():
                rows = generator.standard_normal((1, 4)).astype(np.float32)
                try:
                    self._take_http("closed", rows, client.post(self._path, json=_document(rows)))
                except httpx.HTTPError as error:
                    self._fail("closed", repr(error))

    def _closed_grpc(self) -> None:
        generator = np.random.default_rng(threading.get_ident())
        client = triton_grpc.InferenceServerClient(self._grpc)
        try:
            while not self._stop.is_set():
                rows = generator.standard_normal((1, 4)).astype(np.float32)
                sent = triton_grpc.InferInput("x", [1, 4], "FP32")
                sent.set_data_from_numpy(rows)
                began_s = time.monotonic()
                try:
                    result = client.infer(
                        self._model,
                        [sent],
                        headers={"application": self._model},
                        client_timeout=_TIMEOUT_S,
                    )
                except InferenceServerException as error:
                    self._fail("grpc", error)
                else:
                    version = result.get_response().model_version
                    seconds = time.monotonic() - began_s
                    self._count("grpc", version, rows, result.as_numpy("y"), seconds)
        finally:
            client.close()

    def _open_http(self) -> None:
        asyncio.run(self._send_open())

    async def _send_open(self) -> None:
        draw = random.Random(7)
        generator = np.random.default_rng(7)
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        sent: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits) as client:
            due_s = time.monotonic()
            while not self._stop.is_set():
                due_s += draw.expovariate(self._rate)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                rows = generator.standard_normal((1, 4)).astype(np.float32)
                task = asyncio.create_task(self._send_one(client, rows))
                sent.add(task)
                task.add_done_callback(sent.discard)
            await asyncio.gather(*sent)

    async def _send_one(self, client: httpx.AsyncClient, rows: Array) -> None:
        try:
            self._take_http("open", rows, await client.post(self._path, json=_document(rows)))
        except httpx.HTTPError as error:
            self._fail("open", repr(error))


def _document(rows: Array) -> dict[str, Any]:
    return {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": list(rows.shape),
                "data": rows.ravel().tolist(),
            }
        ]
    }
