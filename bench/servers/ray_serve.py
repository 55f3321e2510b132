"""Ray Serve without rayprism: its own patterns, and applications that do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import orjson

from bench.cluster import BenchCluster
from bench.scenario import RayServeServer
from bench.servers.base import Probe, RunContext, Unavailable, infer_path
from bench.servers.on_ray import RayServer
from bench.tiny_model import LANE_ANSWER
from rayprism.core.tensors import datatype_of

__all__ = ["RayServe", "answer_to"]

_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_LANE = "bench.peers.ray_serve:noop_lane"
_MODELS = {"documented": ("tiny", "minilm"), "adjusted": ("tiny", "minilm")}
"""What these are written for; the others serve every model that peers have."""
_ADJUSTED = {
    "options": {"max_ongoing_requests": 1000},
    "batching": {"max_batch_size": 64, "batch_wait_timeout_s": 0.0},
}
"""What Ray Serve's guides say to adjust first, where its defaults queue the load."""
_LIMITS = {"max_ongoing_requests": 8192}
"""As rayprism's deployment has."""
_IN_A_THREAD = ("minilm", "ragged")
_TINY = "tiny"


class RayServe(RayServer):
    """One pattern in a cluster of its own.

    `documented` and `adjusted` have Ray's default environment. `tuned`, `noop` and `noop-lane` have
    what `rayprism up` sets: HAProxy in front, Ray's options for throughput, and nothing of
    rayprism's inside the replicas.
    """

    server: RayServeServer

    def __init__(self, name: str, server: RayServeServer, run: RunContext) -> None:
        super().__init__(name, server, run)
        fitting = _MODELS.get(server.pattern)
        if fitting is not None and self.model.name not in fitting:
            raise Unavailable(
                f"the pattern {server.pattern} is written for {' and '.join(fitting)}, "
                f"not for {self.model.name}"
            )

    def prepare(self) -> None:
        """Writes the model's files."""
        self.run.files(self.model)

    def make_cluster(self) -> BenchCluster:
        """With Ray's defaults, or with what `rayprism up` sets."""
        ours = self.server.pattern in ("tuned", "noop", "noop-lane")
        environment = dict(self.server.environment)
        if ours:
            lane = self.server.pattern == "noop-lane"
            environment.setdefault(_MIDDLEWARES, _LANE if lane else "")
            environment.setdefault(LANE_ANSWER, self._answer)
        return BenchCluster(self.marker, rayprism=ours, environment=environment)

    def applications(self) -> Sequence[Mapping[str, Any]]:
        """One application, at the model's own address."""
        pattern, model = self.server.pattern, self.model.name
        application = {"name": model, "route_prefix": f"/v2/models/{model}"}
        if pattern in ("noop", "noop-lane"):
            return [
                {
                    **application,
                    "import_path": "bench.peers.ray_serve:noop",
                    "args": {"answer": self._answer, "options": _LIMITS},
                    "deployments": [{"name": "noop", "ray_actor_options": {"num_cpus": 0.5}}],
                    # As rayprism's applications are by default.
                    "logging_config": {"enable_access_log": False},
                }
            ]
        files = self.run.files(self.model)
        tokenizer = files["tokenizer"]
        args = {
            "model": model,
            "model_file": str(files["model_file"].resolve()),
            "tokenizer": None if tokenizer is None else str(tokenizer.resolve()),
        }
        if pattern == "tuned":
            beside = {"in_a_thread": model in _IN_A_THREAD, "options": _LIMITS}
            return [
                {
                    **application,
                    "import_path": "bench.peers.ray_serve:tuned",
                    "args": {**args, **beside},
                    "logging_config": {"enable_access_log": False},
                }
            ]
        written = "documented" if model == _TINY else "documented_text"
        adjusted = _ADJUSTED if pattern == "adjusted" else {}
        return [
            {
                **application,
                "import_path": f"bench.peers.ray_serve:{written}",
                "args": {**args, **adjusted},
            }
        ]

    def locate(self, cluster: BenchCluster) -> None:
        """The same paths as rayprism's; there is no metadata at its own."""
        self.url = cluster.url(infer_path(self.model.name))
        self.metadata_url = cluster.url(f"/v2/models/{self.model.name}")

    def reset(self) -> None:
        """There are no actions that change it."""

    def facts(self) -> dict[str, Any]:
        """As of any server on Ray, with the pattern."""
        return {**super().facts(), "pattern": self.server.pattern}

    @cached_property
    def _answer(self) -> str:
        return answer_to(self.probe).decode()


def answer_to(probe: Probe) -> bytes:
    """The right answer to a probe, in JSON: what an application sends that does nothing."""
    outputs = [
        {
            "name": name,
            "datatype": datatype_of(values).value,
            "shape": values.shape,
            "data": values.ravel(),
        }
        for name, values in probe.model.expected(probe.tensors).items()
    ]
    document = {"model_name": probe.model.name, "model_version": "1", "outputs": outputs}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
