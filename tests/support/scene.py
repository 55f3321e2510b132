"""A fleet with everything in it that can be seen: a canary, a shadow, errors, rejections, a job.

The tests of metrics and alerts play in it, and so do the pictures of the docs.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tritonclient.grpc as triton_grpc
import yaml
from tritonclient.utils import InferenceServerException

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.fleet import FRONT_DOOR, model_application
from tests.support.models import PROCESSOR, mlp_example, save_mlp

__all__ = [
    "BROKEN",
    "CANDIDATE",
    "FAIL",
    "FAIL_CANDIDATE",
    "SHADOW",
    "STABLE",
    "Client",
    "applications",
    "push_models",
    "request",
    "write_job",
]

STABLE, CANDIDATE, SHADOW, BROKEN = 1, 2, 3, 4
FAIL, FAIL_CANDIDATE, DIFFER = 1.0, 2.0, 3.0
"""What a row asks for: an error of all versions, of the candidate; another answer of the shadow."""

_RPC_TIMEOUT_S = 15.0

SHOWN = """
import time

class Shown:
    def __init__(self, folder, options):
        self.version = options["version"]

    def predict(self, inputs):
        rows = inputs["x"]
        asked, seconds = rows[:, 0], float(rows[:, 1].max())
        if (asked == 1).any() or (self.version == 2 and (asked == 2).any()):
            raise RuntimeError("as it was asked to")
        if self.version == 2:
            seconds += float(rows[:, 2].max())
        time.sleep(seconds)
        y = rows.sum(1, keepdims=True)
        return {"y": y + (asked[:, None] == 3) * (self.version == 3)}
"""


def push_models(folder: Path) -> Path:
    """`shown` 1 to 4, of which 4 does not reproduce its example.

    Rows of `shown` are `x [-1, 3]`: what is asked for, seconds, more seconds of the candidate.

    Returns:
        The repository.
    """
    repository = Repository(folder / "models")
    code = folder / "shown"
    code.mkdir(parents=True)
    (code / "model.py").write_text(SHOWN)
    for version in (STABLE, CANDIDATE, SHADOW):
        push_model(
            repository,
            "shown",
            code,
            example={"x": np.zeros((1, 3), np.float32).tolist()},
            code="model.py:Shown",
            inputs=[TensorSpec("x", Datatype.FP32, (-1, 3))],
            outputs=[TensorSpec("y", Datatype.FP32, (-1, 1))],
            options={"version": version},
            batching=Batching(max_rows=4),
            allow_code=True,
        )
    broken = folder / f"models/shown/{BROKEN}"
    shutil.copytree(folder / f"models/shown/{SHADOW}", broken)
    manifest = broken / "manifest.json"
    document = json.loads(manifest.read_text())
    document["version"] = BROKEN
    document["golden"]["outputs"][0]["data"][0] += 1
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(document))
    worded = folder / "worded"
    worded.mkdir()
    save_mlp(worded / "model.onnx", x="features", y="scores")
    (worded / "processor.py").write_text(PROCESSOR)
    push_model(
        repository,
        "worded",
        worded,
        example=mlp_example(),
        file="model.onnx",
        code="processor.py:Processor",
        inputs=[TensorSpec("x", Datatype.FP32, (-1, 4))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1, 3))],
        allow_code=True,
    )
    return folder / "models"


def applications(
    *, weight: float = 25, p99_target_s: float = 5.0, **more: dict[str, Any]
) -> list[dict[str, Any]]:
    """The front door, `shown` with a candidate and a shadow, and `worded`.

    Args:
        weight: Of the candidate, in percent.
        p99_target_s: Of the stable version.
        more: More of the stable version's `user_config`.
    """
    config = {
        "max_queue_rows": 32,
        "default_timeout_s": 20,
        "telemetry": {"p99_target_s": p99_target_s, "log_percent": 100},
        "traffic": {
            "candidates": [{"version": str(CANDIDATE), "weight": weight}],
            "shadow": [{"version": str(SHADOW), "sample": 100}],
        },
        **more,
    }
    return [
        FRONT_DOOR,
        model_application("shown", STABLE, user_config=config, allow_code=True),
        model_application("worded", 1, allow_code=True),
        *(
            model_application(
                "shown",
                version,
                name=f"shown-{version}",
                route=f"/v2/models/shown/versions/{version}",
                user_config={"max_queue_rows": 32, "telemetry": {"log_percent": 100}},
                allow_code=True,
            )
            for version in (CANDIDATE, SHADOW)
        ),
    ]


def request(asked: float = 0, seconds: float = 0, more: float = 0, **extra: Any) -> dict[str, Any]:
    """A request of one row, in JSON."""
    row = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [asked, seconds, more]}
    return {"inputs": [row], **extra}


class Client:
    """Asks `shown`, again and again, over a few connections, and counts what it gets.

    Args:
        url: Of the HTTP front.
        grpc: Of the gRPC front.
        make: The next request; see `request`.
        connections: HTTP connections that send the next request when the answer is there.
        rpcs: The same over gRPC.
        pause_s: Between an answer and the next request.
    """

    def __init__(
        self,
        url: str,
        grpc: str,
        make: Callable[[], dict[str, Any]],
        *,
        connections: int = 1,
        rpcs: int = 0,
        pause_s: float = 0.0,
    ) -> None:
        self._url = f"{url}/v2/models/shown/infer"
        self._grpc = grpc
        self._make = make
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answers: Counter[tuple[str, str, int | str]] = Counter()
        """Answers by protocol, version, and HTTP status or gRPC code."""
        self.seconds: dict[str, list[float]] = {}
        """Latencies of successful HTTP requests by version."""
        self._threads = [
            *(threading.Thread(target=self._http) for _ in range(connections)),
            *(threading.Thread(target=self._rpc) for _ in range(rpcs)),
        ]

    def __enter__(self) -> Self:
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

    def _http(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                began_s = time.perf_counter()
                answer = client.post(self._url, json=self._make())
                took_s = time.perf_counter() - began_s
                version = answer.headers.get("x-rayprism-version", "")
                with self._lock:
                    self.answers["http", version, answer.status_code] += 1
                    if answer.status_code == 200:
                        self.seconds.setdefault(version, []).append(took_s)
                self._stop.wait(self._pause_s)

    def _rpc(self) -> None:
        with triton_grpc.InferenceServerClient(self._grpc) as client:
            while not self._stop.is_set():
                data = self._make()["inputs"][0]["data"]
                x = triton_grpc.InferInput("x", [1, 3], "FP32")
                x.set_data_from_numpy(np.array([data], np.float32))
                try:
                    answer = client.infer(
                        "shown",
                        [x],
                        headers={"application": "shown"},
                        client_timeout=_RPC_TIMEOUT_S,
                    )
                    found = (answer.get_response().model_version, "OK")
                except InferenceServerException as error:
                    found = ("", str(error.status()))
                with self._lock:
                    self.answers["grpc", *found] += 1
                self._stop.wait(self._pause_s)


def write_job(
    folder: Path,
    repository: Path,
    *,
    name: str = "nightly",
    rows: int = 4000,
    bad_rows: int = 0,
    batch_s: float = 0.0,
) -> Path:
    """A batch job over rows that `shown` 1 predicts; bad ones have a text that is no number.

    Args:
        folder: For its file, its input and its output.
        repository: Of the model.
        name: Of the job.
        rows: In 8 shards.
        bad_rows: Of them.
        batch_s: How long a batch of 64 rows takes.

    Returns:
        Its file.
    """
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {
        "b": np.full(rows, batch_s, np.float32),
        "c": np.zeros(rows, np.float32),
    }
    columns["a"] = ["many" if row < bad_rows else "0" for row in range(rows)]
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=rows // 8)
    document = {
        "name": name,
        "model": "shown",
        "version": str(STABLE),
        "repository": str(repository),
        "allow_code": True,
        "input": {"uri": str(folder / "rows.parquet"), "columns": {"x": list("abc")}},
        "output": {"uri": str(folder / "out")},
        "pool": {"max_actors": 1, "cpus": 0.5},
        "limits": {"shard_rows": rows // 8, "batch_rows": 64, "max_dead_letters": rows},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
