"""Third table: how long a fresh replica takes until it is ready."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import tiny_model
from bench.cluster import BenchCluster, clean_environment
from bench.figures import Target, Verdict
from bench.plan import Plan

__all__ = ["judge", "push", "run", "summarise", "tiny_application"]

_FACTOR = 1.5
_BARE = (
    "import sys, onnxruntime as ort\n"
    "options = ort.SessionOptions()\n"
    "options.intra_op_num_threads = options.inter_op_num_threads = 1\n"
    "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
)
_LOADER = (
    "import json, sys, time\n"
    "started = time.perf_counter()\n"
    "from rayprism.models.loader import load_model\n"
    "from rayprism.models.repository import Repository\n"
    "imported_s = time.perf_counter() - started\n"
    "version = Repository(sys.argv[1]).version(sys.argv[2], int(sys.argv[3]))\n"
    "loaded = load_model(version, allow_code=True)\n"
    "print(json.dumps({'imports': imported_s, **loaded.load_s}))\n"
)
_NAMED = ("repository", "model", "version")
_EMPTY = {
    "import_path": "bench.empty:app",
    "deployments": [{"name": "Empty", "ray_actor_options": {"num_cpus": 0.1}}],
}


def push(plan: Plan) -> None:
    """Pushes the tiny model into the run's repository."""
    model_file = plan.folder / "tiny.onnx"
    tiny_model.write_onnx(model_file)
    tiny_model.push(model_file, plan.repository)


def tiny_application(plan: Plan) -> dict[str, Any]:
    """The application for the tiny model, as an operator writes it."""
    return {
        "name": tiny_model.MODEL,
        "import_path": "rayprism.serving.app:build",
        "route_prefix": f"/v2/models/{tiny_model.MODEL}",
        "args": {"model": tiny_model.MODEL, "version": 1, "repository": str(plan.repository)},
        "deployments": [{"name": "model", "ray_actor_options": {"num_cpus": 0.5}}],
    }


def run(
    plan: Plan, cluster: BenchCluster, applications: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Starts replicas, one at a time, each as a new application.

    Args:
        plan: Of the run.
        cluster: Where.
        applications: rayprism's, by the model's name; each says where its files are.
    """
    everything = {"empty": _EMPTY, **applications}
    names = list(everything)
    # The first application of a cluster also waits for Serve itself.
    _ready_s(cluster, "cold-first", _EMPTY)
    samples = []
    for number in range(plan.repeats):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            ready_s = _ready_s(cluster, f"cold-{name}-{number}", everything[name])
            sample: dict[str, Any] = {"what": name, "round": number, "ready_s": ready_s}
            if name != "empty":
                sample |= _processes(plan, everything[name]["args"])
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
    cluster.remove([name], wait=True)
    return ready_s


def _processes(plan: Plan, args: Mapping[str, Any]) -> dict[str, Any]:
    """The bare process, and one that loads the version as a replica does.

    The second is there to explain: a replica's own log is buffered under load settings.
    """
    folder = Path(args["repository"]) / args["model"] / str(args["version"])
    model_file = folder / json.loads((folder / "manifest.json").read_bytes())["file"]
    environment = clean_environment(plan.marker)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _BARE, str(model_file)], env=environment, check=True)
    bare_s = time.perf_counter() - started
    command = [sys.executable, "-c", _LOADER, *(str(args[key]) for key in _NAMED)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return {"bare_s": bare_s, "steps_s": json.loads(done.stdout)}


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by model; the ratio to its limit is the median of the rounds' own."""
    empty_s = {item["round"]: item["ready_s"] for item in samples if item["what"] == "empty"}
    rows = []
    for what in dict.fromkeys(item["what"] for item in samples if item["what"] != "empty"):
        mine = [item for item in samples if item["what"] == what]
        steps = dict.fromkeys(step for item in mine for step in item["steps_s"])
        ratios = [
            (item["ready_s"] - empty_s[item["round"]]) / item["bare_s"]
            for item in mine
            if item["round"] in empty_s
        ]
        rows.append(
            {
                "model": what,
                "ready_s": statistics.median(item["ready_s"] for item in mine),
                "actor_s": statistics.median(empty_s.values()),
                "bare_s": statistics.median(item["bare_s"] for item in mine),
                "steps_s": {
                    step: statistics.median(item["steps_s"].get(step, 0.0) for item in mine)
                    for step in steps
                },
                "ratio": statistics.median(ratios),
            }
        )
    return rows


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
