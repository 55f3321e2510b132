"""Second table: a sentence model, whose own work is nearly everything there is to do."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.cluster import BenchCluster, clean_environment
from bench.figures import (
    Target,
    Verdict,
    clean,
    cpu_groups,
    median_of,
    paired_ratio,
    spread,
)
from bench.load import drive
from bench.plan import Plan, Server, wait_for_answer
from bench.sentences import sentences
from bench.yardstick import SENTENCES, embed, measure

__all__ = ["MODEL", "application", "judge", "push", "run", "summarise"]

MODEL = "minilm"
_CONNECTIONS = 32
_ROOT = Path(__file__).resolve().parent.parent
_PUSH = _ROOT / "examples" / "minilm" / "push.py"


def push(plan: Plan) -> Path:
    """Pushes the example's model as version 1, with the example's own script.

    Returns:
        The version's folder.
    """
    folder = plan.repository / MODEL / "1"
    if not folder.exists():
        command = [sys.executable, str(_PUSH), "--repository", str(plan.repository)]
        environment = clean_environment(plan.marker)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder


def application(plan: Plan, threads: int) -> dict[str, Any]:
    """The application for the sentence model, as an operator writes it."""
    return {
        "name": MODEL,
        "import_path": "rayprism.serving.app:build",
        "route_prefix": f"/v2/models/{MODEL}",
        "args": {
            "model": MODEL,
            "version": 1,
            "repository": str(plan.repository),
            "allow_code": True,
        },
        "deployments": [{"name": "model", "ray_actor_options": {"num_cpus": threads}}],
    }


def run(plan: Plan, cluster: BenchCluster, threads: int = 1) -> dict[str, Any]:
    """Rows/s through rayprism, and through ONNX Runtime alone, in turn."""
    folder = push(plan)
    model_file = json.loads((folder / "manifest.json").read_bytes())["file"]
    plan.say("deploying the sentence model with rayprism")
    cluster.deploy(application(plan, threads))
    server = Server("rayprism", cluster.url(f"/v2/models/{MODEL}/infer"))
    bodies = _bodies(cluster.url(f"/v2/models/{MODEL}"))
    _check(server, bodies[0], folder, model_file)

    def alone(size: int, seconds: float, **how: bool) -> dict[str, Any]:
        common: dict[str, Any] = {"marker": plan.marker, "threads": threads, **how}
        return measure(folder, model_file, seconds=seconds, batch_size=size, **common)

    tuning = []
    for by_length in (False, True):
        for size in plan.batch_sizes:
            found = alone(size, plan.seconds / 2, by_length=by_length)
            tuning.append(found)
            plan.say(
                f"onnxruntime alone, batches of {size}"
                f"{', sorted by length' if by_length else ''}: {found['rate']:.1f} rows/s"
            )
    best = max((item for item in tuning if not item["by_length"]), key=lambda item: item["rate"])
    drive(server.url, bodies, connections=_CONNECTIONS, seconds=2, marker=plan.marker)
    samples = []
    for number in range(plan.rounds):
        ours = drive(
            server.url,
            bodies,
            connections=_CONNECTIONS,
            # Rows leave in batches: over a short time, one more or less would show.
            seconds=plan.seconds * 2,
            marker=plan.marker,
        )
        cpu_s = cpu_groups(ours["cpu_s"], MODEL)["server"]
        ours["cpu_ms_per_row"] = cpu_s / ours["requests"] * 1e3
        samples.append({"server": "rayprism", "round": number, **ours})
        for name, tokenise in (("model only", False), ("with tokenisation", True)):
            found = alone(best["batch_size"], plan.seconds, tokenise=tokenise)
            samples.append({"server": name, "round": number, "errors": {}, **found})
        rates = ", ".join(f"{item['server']} {item['rate']:.1f}" for item in samples[-3:])
        plan.say(f"sentences, round {number + 1}/{plan.rounds}, rows/s: {rates}")
    statistics = _get(cluster.url(f"/v2/models/{MODEL}/stats"))
    cluster.remove([MODEL])
    return {
        "threads": threads,
        "connections": _CONNECTIONS,
        "sentences": SENTENCES,
        "tuning": tuning,
        "batch_size": best["batch_size"],
        "samples": samples,
        "statistics": statistics,
    }


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _bodies(url: str) -> list[bytes]:
    (tensor,) = _get(url)["inputs"]
    shape = [1] * len(tensor["shape"])
    return [
        json.dumps(
            {
                "inputs": [
                    {"name": tensor["name"], "datatype": "BYTES", "shape": shape, "data": [text]}
                ]
            },
            separators=(",", ":"),
        ).encode()
        for text in sentences(SENTENCES)
    ]


def _check(server: Server, body: bytes, folder: Path, model_file: str) -> None:
    right = embed(folder, model_file, sentences(SENTENCES)[0])

    def check(answer: Mapping[str, Any]) -> bool:
        (output,) = answer["outputs"]
        got = np.asarray(output["data"], np.float32)
        # Quantised as a whole, so that a batch mate changes the last digits.
        return got.shape == right.shape and float(got @ right) > 0.99

    wait_for_answer(server, body, check)


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and ratios."""
    samples = result["samples"]
    by_server = {
        name: [item for item in samples if item["server"] == name]
        for name in ("rayprism", "model only", "with tokenisation")
    }
    ours = by_server["rayprism"]
    sorted_best = [item for item in result["tuning"] if item["by_length"]]
    return {
        "rows": {
            name: {
                "rate": median_of(items),
                "rate_spread": spread(items),
                "cpu_ms_per_row": median_of(items, "cpu_ms_per_row"),
            }
            for name, items in by_server.items()
        },
        "p50_s": median_of(ours, "latency_s.p50"),
        "p99_s": median_of(ours, "latency_s.p99"),
        "clean": clean(ours),
        "ratios": {
            name: paired_ratio(ours, by_server[name])
            for name in ("model only", "with tokenisation")
        },
        "batch_size": result["batch_size"],
        "by_length": max(sorted_best, key=lambda item: item["rate"]) if sorted_best else None,
    }


def judge(summary: Mapping[str, Any]) -> list[Verdict]:
    """The target of this table."""
    target = Target("MiniLM, 32 connections, rows/s: rayprism / onnxruntime alone", 0.9, "at least")
    return [target.judge(summary["ratios"]["model only"], valid=summary["clean"])]
