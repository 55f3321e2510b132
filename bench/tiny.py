"""First table: what a server costs around a model that costs nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import tiny_model
from bench.cluster import BenchCluster, clean_environment, free_ports
from bench.figures import (
    Target,
    Verdict,
    across_phases,
    clean,
    cpu_groups,
    median_of,
    paired_ratio,
    per_request_us,
    select,
    spread,
)
from bench.plan import Plan, Server, measure_rounds, wait_for_answer
from bench.processes import end_marked
from bench.tiny_model import (
    LANE_ANSWER,
    MODEL,
    OUTPUT,
    expected,
    infer_body,
    infer_path,
    write_onnx,
)

__all__ = ["application", "bare_server", "judge", "push", "run_default", "run_haproxy", "summarise"]

_HAPROXY, _DEFAULT = "haproxy", "default"
_TUNED = {
    "options": {"max_ongoing_requests": 1000},
    "batching": {"max_batch_size": 64, "batch_wait_timeout_s": 0.0},
}
"""What Ray Serve's guides say to adjust first, where its defaults queue the load."""

_APPLICATIONS = {
    "rayprism": MODEL,
    "noop": "noop",
    "noop-unlogged": "noop-unlogged",
    "noop-lane": "noop-lane",
    "documented": "documented",
    "documented-tuned": "documented-tuned",
}

_DEFAULT_ROUNDS = 3
"""Of the slow peers: their ratios are of another order than the differences between rounds."""


def push(plan: Plan) -> None:
    """Pushes the model into the run's repository."""
    tiny_model.push(_model_file(plan), plan.repository)


def _model_file(plan: Plan) -> Path:
    return plan.folder / "tiny.onnx"


def application(plan: Plan) -> dict[str, Any]:
    """The application for the tiny model, as an operator writes it."""
    return {
        "name": MODEL,
        "import_path": "rayprism.serving.app:build",
        "route_prefix": f"/v2/models/{MODEL}",
        "args": {"model": MODEL, "version": 1, "repository": str(plan.repository)},
        "deployments": [{"name": "model", "ray_actor_options": {"num_cpus": 0.5}}],
    }


@contextmanager
def bare_server(plan: Plan) -> Iterator[Server]:
    """The peer without Ray."""
    (port,) = free_ports(1)
    marker = f"{plan.marker}/bare"
    model_file = _model_file(plan)
    write_onnx(model_file)
    command = [sys.executable, "-m", "bench.bare", f"--model-file={model_file}", f"--port={port}"]
    process = subprocess.Popen(command, env=clean_environment(marker), start_new_session=True)
    try:
        yield Server("bare", f"http://127.0.0.1:{port}{infer_path(MODEL)}")
    finally:
        process.terminate()
        process.wait(timeout=10)
        end_marked(marker)


def run_haproxy(plan: Plan, cluster: BenchCluster, bare: Server) -> list[dict[str, Any]]:
    """rayprism, an application that does nothing, and the peer without Ray, in turn."""
    push(plan)
    plan.say("deploying the tiny model with rayprism")
    cluster.deploy(application(plan))
    rayprism = Server("rayprism", cluster.url(infer_path(MODEL)))
    answer = _wait(plan, rayprism)
    noop = {
        "name": "noop",
        "import_path": "bench.peers.ray_serve:noop",
        "route_prefix": "/noop",
        # The same limits as rayprism's deployment has.
        "args": {"answer": answer.decode(), "options": {"max_ongoing_requests": 8192}},
        "deployments": [{"name": "noop", "ray_actor_options": {"num_cpus": 0.5}}],
    }
    lane = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "bench.peers.ray_serve:noop_lane",
        LANE_ANSWER: answer.decode(),
    }
    cluster.deploy(
        noop,
        {
            **noop,
            "name": "noop-lane",
            "route_prefix": "/noop-lane",
            "runtime_env": {"env_vars": lane},
        },
        {
            **noop,
            "name": "noop-unlogged",
            "route_prefix": "/noop-unlogged",
            # As rayprism's applications are by default.
            "logging_config": {"enable_access_log": False},
        },
    )
    servers = (
        rayprism,
        Server("noop", cluster.url("/noop/infer")),
        Server("noop-unlogged", cluster.url("/noop-unlogged/infer")),
        Server("noop-lane", cluster.url("/noop-lane/infer")),
        bare,
    )
    for server in servers:
        _wait(plan, server)
    samples = measure_rounds(plan, _HAPROXY, servers, [infer_body()], plan.connections, plan.rounds)
    cluster.remove(["noop", "noop-unlogged", "noop-lane", MODEL])
    return samples


def run_default(plan: Plan, cluster: BenchCluster, bare: Server) -> list[dict[str, Any]]:
    """Ray Serve's documented pattern under its default settings, and the peer without Ray."""
    model_file = str(_model_file(plan))
    plan.say("deploying Ray Serve's documented pattern")
    servers = []
    for name, args in (("documented", {}), ("documented-tuned", _TUNED)):
        cluster.deploy(
            {
                "name": name,
                "import_path": "bench.peers.ray_serve:documented",
                "route_prefix": f"/{name}",
                "args": {"model_file": model_file, **args},
            }
        )
        servers.append(Server(name, cluster.url(f"/{name}/infer")))
    servers.append(bare)
    for server in servers:
        _wait(plan, server)
    rounds = min(plan.rounds, _DEFAULT_ROUNDS)
    return measure_rounds(plan, _DEFAULT, servers, [infer_body()], plan.connections, rounds)


def _wait(plan: Plan, server: Server) -> bytes:
    right = expected(_model_file(plan))

    def check(answer: Mapping[str, Any]) -> bool:
        (output,) = answer["outputs"]
        named = output["name"] == OUTPUT and output["shape"] == [1, 1]
        return named and math.isclose(output["data"][0], right, rel_tol=1e-5)

    return wait_for_answer(server, infer_body(), check)


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of connections: medians of every server, and rayprism's ratios."""
    rows = []
    for connections in sorted({sample["connections"] for sample in samples}):
        chosen = select(samples, connections=connections)
        ours = select(chosen, server="rayprism")
        beside = select(chosen, server="bare", phase=_HAPROXY)
        to_bare = paired_ratio(ours, beside)
        row: dict[str, Any] = {"connections": connections, "servers": {}, "ratios": {}}
        for phase, server in dict.fromkeys((item["phase"], item["server"]) for item in chosen):
            mine = select(chosen, phase=phase, server=server)
            key = f"{server}@{phase}" if server == "bare" else server
            row["servers"][key] = {
                "rate": median_of(mine),
                "rate_spread": spread(mine),
                "p50_s": median_of(mine, "latency_s.p50"),
                "p99_s": median_of(mine, "latency_s.p99"),
                "cpu_us_per_request": cpu_groups(per_request_us(mine), _APPLICATIONS.get(server)),
                "clean": clean(mine),
            }
        noop = select(chosen, server="noop")
        row["ratios"]["bare"] = {"rate": to_bare}
        row["ratios"]["noop"] = {
            "rate": paired_ratio(ours, noop),
            "p50": paired_ratio(ours, noop, "latency_s.p50"),
        }
        for name in ("noop-unlogged", "noop-lane"):
            other = select(chosen, server=name)
            row["ratios"][name] = {"rate": paired_ratio(ours, other)}
        for server in ("documented", "documented-tuned"):
            peer = select(chosen, server=server)
            if not peer:
                continue
            other = select(chosen, server="bare", phase=_DEFAULT)
            ours_rate, peer_rate = median_of(ours), median_of(peer)
            row["ratios"][server] = {
                "raw": ours_rate / peer_rate if ours_rate and peer_rate else None,
                "rate": across_phases(to_bare, paired_ratio(peer, other)),
            }
        rows.append(row)
    return rows


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The targets of this table that the run could judge."""
    by_connections = {row["connections"]: row for row in rows}
    verdicts = []
    sixteen, one = by_connections.get(16), by_connections.get(1)
    if sixteen and "rayprism" in sixteen["servers"]:
        ours = sixteen["servers"]["rayprism"]["clean"]
        if ratio := sixteen["ratios"].get("documented"):
            # The lower of both: neither the quieter phase nor the yardstick may help.
            value = min(filter(None, ratio.values()), default=None)
            target = Target("16 connections, requests/s: rayprism / documented", 25.0, "at least")
            verdicts.append(target.judge(value, valid=ours))
        target = Target("16 connections, requests/s: rayprism / no-op", 0.85, "at least")
        verdicts.append(target.judge(sixteen["ratios"]["noop"]["rate"], valid=ours))
    if one and "rayprism" in one["servers"]:
        target = Target("1 connection, p50: rayprism / no-op", 1.5, "at most")
        valid = one["servers"]["rayprism"]["clean"]
        verdicts.append(target.judge(one["ratios"]["noop"]["p50"], valid=valid))
    return verdicts
