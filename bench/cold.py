"""Third table: how long a fresh replica takes until it is ready."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cluster import BenchCluster, clean_environment
from bench.figures import Target, Verdict
from bench.plan import Plan

__all__ = ["judge", "parse_load_steps", "run", "summarise"]

_FACTOR = 1.5
_LOADED = re.compile(r"is loaded on \S+ with \d+ threads: (?P<steps>[^\n]*?)\.(?:$|[\"\s])")
_STEP = re.compile(r"(?P<step>\w+) (?P<seconds>[0-9.]+) s")
_BARE = (
    "import sys, onnxruntime as ort\n"
    "options = ort.SessionOptions()\n"
    "options.intra_op_num_threads = options.inter_op_num_threads = 1\n"
    "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
)


def run(
    plan: Plan, cluster: BenchCluster, applications: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Starts replicas, one at a time, each as a new application.

    Args:
        plan: Of the run.
        cluster: Where.
        applications: rayprism's, by the model's name; each says where its files are.
    """
    samples = []
    for number in range(plan.repeats):
        empty = {
            "import_path": "bench.peers:noop",
            "args": {"answer": "{}"},
            "deployments": [{"name": "noop", "ray_actor_options": {"num_cpus": 0.1}}],
        }
        for name, application in {"empty": empty, **applications}.items():
            ready_s = _ready_s(cluster, f"cold-{name}-{number}", application)
            sample: dict[str, Any] = {"what": name, "round": number, "ready_s": ready_s}
            if name != "empty":
                sample["bare_s"] = _bare_s(plan, application["args"])
                sample["steps_s"] = parse_load_steps(_logs(cluster, f"cold-{name}-{number}"))
            samples.append(sample)
            plan.say(
                f"cold start {number + 1}/{plan.repeats}: {name} ready in {ready_s:.2f} s"
                + (f", bare process {sample['bare_s']:.2f} s" if "bare_s" in sample else "")
            )
    return samples


def _ready_s(cluster: BenchCluster, name: str, application: Mapping[str, Any]) -> float:
    started = time.perf_counter()
    cluster.deploy({**application, "name": name, "route_prefix": f"/{name}"})
    ready_s = time.perf_counter() - started
    cluster.remove([name])
    return ready_s


def _bare_s(plan: Plan, args: Mapping[str, Any]) -> float:
    folder = Path(args["repository"]) / args["model"] / str(args["version"])
    model_file = folder / json.loads((folder / "manifest.json").read_bytes())["file"]
    command = [sys.executable, "-c", _BARE, str(model_file)]
    started = time.perf_counter()
    subprocess.run(command, env=clean_environment(plan.marker), check=True)
    return time.perf_counter() - started


def _logs(cluster: BenchCluster, application: str) -> str:
    files = cluster.log_folder.glob(f"replica_{application}_*.log")
    return "\n".join(path.read_text(errors="replace") for path in files)


def parse_load_steps(log: str) -> dict[str, float]:
    """What a replica logged of its own loading: seconds by step; empty where it logged nothing."""
    match = _LOADED.search(log)
    if match is None:
        return {}
    return {item["step"]: float(item["seconds"]) for item in _STEP.finditer(match["steps"])}


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by model, and each model's ratio to its limit."""
    empty_s = _median([item["ready_s"] for item in samples if item["what"] == "empty"])
    rows = []
    for what in dict.fromkeys(item["what"] for item in samples if item["what"] != "empty"):
        mine = [item for item in samples if item["what"] == what]
        ready_s, bare_s = (_median([item[key] for item in mine]) for key in ("ready_s", "bare_s"))
        steps = {step for item in mine for step in item["steps_s"]}
        rows.append(
            {
                "model": what,
                "ready_s": ready_s,
                "actor_s": empty_s,
                "bare_s": bare_s,
                "steps_s": {
                    step: _median([item["steps_s"].get(step, 0.0) for item in mine])
                    for step in sorted(steps)
                },
                "ratio": (ready_s - empty_s) / bare_s,
            }
        )
    return rows


def _median(values: list[float]) -> float:
    return statistics.median(values)


def judge(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Ready within 1.5 times the bare process, on top of the actor's own start."""
    return [
        Target(
            f"cold start of {row['model']}: (ready - actor start) / bare process",
            _FACTOR,
            "at most",
        ).judge(row["ratio"])
        for row in rows
    ]
