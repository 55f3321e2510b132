"""Results of runs that never were, in the shape that `python -m bench run` writes."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

__all__ = ["SERVERS", "made_bound", "made_results", "made_sample"]

# name: kind, title, requests/s at best, latency in ms when idle, CPU us per request by role
SERVERS: dict[str, tuple[str, str, float, float, dict[str, float]]] = {
    "rayprism": (
        "rayprism",
        "rayprism",
        3100,
        0.62,
        {"replica": 255, "proxy": 88, "ray": 9, "load": 61},
    ),
    "bare": (
        "peer",
        "uvicorn + FastAPI + onnxruntime",
        2600,
        0.48,
        {"server": 372, "load": 63},
    ),
    "mosec": ("peer", "mosec", 5200, 0.39, {"server": 190, "load": 58}),
    "litserve": ("peer", "LitServe", 1350, 2.1, {"server": 820, "load": 66}),
    "bentoml": ("peer", "BentoML", 900, 2.9, {"server": 1290, "load": 70}),
    "mlserver": ("peer", "MLServer", 640, 3.4, {"server": 1710, "load": 72}),
    "documented": (
        "ray-serve",
        "Ray Serve as documented",
        48,
        19.0,
        {"replica": 14100, "proxy": 6100, "ray": 900, "load": 140},
    ),
    "adjusted": (
        "ray-serve",
        "Ray Serve, batching adjusted",
        310,
        5.2,
        {"replica": 2900, "proxy": 2300, "ray": 260, "load": 90},
    ),
    "tuned": (
        "ray-serve",
        "Ray Serve, tuned",
        880,
        2.4,
        {"replica": 1100, "proxy": 310, "ray": 40, "load": 75},
    ),
    "noop": (
        "ray-serve",
        "no-op ASGI application in Ray Serve",
        3400,
        0.55,
        {"replica": 215, "proxy": 86, "ray": 9, "load": 60},
    ),
}
_PERCENTILES = {
    "p25": 25,
    "p50": 50,
    "p75": 75,
    "p90": 90,
    "p95": 95,
    "p99": 99,
    "p999": 99.9,
    "p9999": 99.99,
}
_STAGES = {"decode": 0.03, "queue": 0.12, "preprocess": 0.02, "run": 0.09, "encode": 0.02}


def made_results(
    loads: dict[str, dict[str, Any]] | None = None,
    servers: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 8.0,
    seed: int = 1,
    faster: float = 1.0,
    faster_server: str = "rayprism",
    name: str = "overhead",
) -> dict[str, Any]:
    """A document.

    Args:
        loads: As in a scenario; by default three closed loops.
        servers: Of SERVERS.
        rounds: Of each.
        seconds: Of each sample.
        seed: Of the noise.
        faster: So many times its own rate `faster_server` has.
        faster_server: The one that another run found faster, or slower.
        name: Of the scenario.
    """
    loads = loads or {
        f"c{count}": {"loop": "closed", "connections": count} for count in (1, 16, 64)
    }
    servers = servers or list(SERVERS)
    described = {
        key: {"kind": SERVERS[key][0], "title": SERVERS[key][1], "model": "tiny"} for key in servers
    }
    samples = []
    for number in range(rounds):
        for load, spec in loads.items():
            for server in servers:
                if server not in spec.get("servers", servers):
                    continue
                speed = faster if server == faster_server else 1.0
                samples.append(made_sample(load, spec, server, number, seconds, seed, speed))
    return {
        "date": "2026-03-02T10:11:12+00:00",
        "commit": {"hash": "3f7b1c0d4e5f60718293a4b5c6d7e8f901234567", "changed_since": False},
        "machine": {
            "cpu": "A processor of the tests",
            "cores": 2,
            "memory_gib": 7.8,
            "system": "Linux-6.1-x86_64",
        },
        "versions": {"python": "3.11.9", "ray": "2.60.0", "onnxruntime": "1.23.0", "wrk": "4.2.0"},
        "command": f"python -m bench run bench/scenarios/{name}.yaml",
        "quick": False,
        "scenario": {
            "name": name,
            "title": "One row of 30 floats, tiny MLP",
            "about": "What stands between a client and a model of 20 us.",
            "servers": described,
            "loads": loads,
            "rounds": rounds,
            "seed": seed,
            "bounds": [],
        },
        "servers": {key: {"version": "1.2.3"} for key in servers},
        "unavailable": {},
        "samples": samples,
        "bounds": [],
        "warnings": [],
    }


def made_bound(**changed: Any) -> dict[str, Any]:
    """A bound as it was judged."""
    return {
        "title": "requests/s at 16 connections, of bare uvicorn's",
        "measure": "rate",
        "load": "c16",
        "server": "rayprism",
        "against": "bare",
        "against_load": None,
        "against_value": None,
        "at_least": 1.1,
        "at_most": None,
        "value": 1.19,
        "interval": [1.16, 1.22],
        "rounds": [1.16, 1.18, 1.19, 1.2, 1.22],
        "met": True,
        "why": None,
        **changed,
    }


def made_sample(
    load: str,
    spec: dict[str, Any],
    server: str,
    number: int,
    seconds: float = 8.0,
    seed: int = 1,
    faster: float = 1.0,
) -> dict[str, Any]:
    """One sample: noise of 2 %, latencies that grow with what is asked."""
    rng = np.random.default_rng([seed, number, zlib.crc32(f"{load}/{server}".encode())])
    _, _, best, idle_ms, cpu = SERVERS[server]
    best = best * faster * rng.normal(1, 0.02)
    head = {"server": server, "load": load, "round": number, "seed": seed * 1000 + number}
    if spec["loop"] == "start":
        parts = {"process": 1.2, "cluster": 4.1, "deploy": 1.4, "model": 0.3}
        parts = {key: value * rng.normal(1, 0.05) for key, value in parts.items()}
        return {**head, "ready_s": sum(parts.values()), "parts_s": parts}
    if spec["loop"] == "job":
        return {**head, "seconds": 1e6 / best / 30, "rows": 1_000_000, "rate": best * 30}
    if spec["loop"] == "closed":
        asked = min(
            best, spec.get("connections", 64) * 1e3 / idle_ms * rng.normal(0.9, 0.02) * faster
        )
        mean_ms = spec.get("connections", 64) / asked * 1e3
    else:
        rate = spec.get("rate") or 0.0
        offered = rate["share"] * best if isinstance(rate, dict) else rate
        offered = offered or best * 0.9
        asked = min(offered, best)
        mean_ms = idle_ms / max(1 - asked / best, 0.02)
    search = _search(spec, best, idle_ms, rng) if spec.get("search") else None
    wanted = max(int(asked * seconds), 8)
    latencies = rng.lognormal(math.log(mean_ms / 1e3), 0.35, wanted)
    latencies[rng.random(wanted) < 0.004] *= 6
    refused = max(offered - best, 0.0) if spec["loop"] == "open" else 0.0
    sample = {
        **head,
        "client": spec.get("client", "python"),
        "requests": wanted + int(refused * seconds),
        "ok": wanted,
        "duration_s": seconds,
        "rate": wanted / seconds,
        "goodput": float((latencies <= spec.get("target_s", math.inf)).sum() / seconds),
        "latency_s": _percentiles(latencies),
        "service_s": _percentiles(latencies),
        "histogram": _encoded(latencies),
        "refused": {
            "count": int(refused * seconds),
            "rate": refused,
            "with_retry_after": int(refused * seconds),
            "latency_s": _percentiles(latencies * 0.3) if refused else None,
        },
        "errors": {},
        "example_error": None,
        "series": _series(asked, refused, latencies, seconds, rng),
        "generator": {
            "limited": None,
            "late_s": {"p50": 1e-5, "p99": 2e-4, "max": 1e-3},
            "cpu_share": [0.31],
        },
        "cpu": {"step_s": 0.25, "cores": _cores(cpu, asked, seconds, rng)},
        "rss_mib": {"step_s": 0.25, **_memory(cpu, seconds, rng)},
        "cpu_us_per_request": {key: value * rng.normal(1, 0.02) for key, value in cpu.items()},
        "other_cores": float(abs(rng.normal(0.03, 0.02))),
        "replica": _replica(spec, rng) if server == "rayprism" else None,
        "events": [],
        "search": search,
    }
    if spec["loop"] == "open":
        sample["offered_rate"] = offered
    if spec.get("actions") and server == "rayprism":
        sample["events"] = [
            {"at_s": at["at_s"], "what": at["do"], "took_s": 1.3, "error": None}
            for at in spec["actions"]
        ]
    return sample


def _percentiles(latencies: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(latencies.mean()),
        "min": float(latencies.min()),
        **{key: float(np.percentile(latencies, at)) for key, at in _PERCENTILES.items()},
        "max": float(latencies.max()),
    }


def _encoded(latencies: np.ndarray) -> str:
    histogram = HdrHistogram(1, 120_000_000, 3)
    values, counts = np.unique((latencies * 1e6).astype(int), return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(max(value, 1), count)
    return str(histogram.encode().decode())


def _series(
    rate: float, refused: float, latencies: np.ndarray, seconds: float, rng: Any
) -> dict[str, Any]:
    steps = int(seconds / 0.5)
    parts = np.array_split(latencies, steps)
    return {
        "step_s": 0.5,
        "ok_rate": [float(value) for value in rate * rng.normal(1, 0.03, steps)],
        "failed_rate": [refused] * steps,
        "p50_s": [float(np.median(part)) if len(part) else None for part in parts],
        "p99_s": [float(np.percentile(part, 99)) if len(part) else None for part in parts],
    }


def _cores(cpu: dict[str, float], rate: float, seconds: float, rng: Any) -> dict[str, list[float]]:
    steps = int(seconds / 0.25)
    return {
        role: [float(max(value, 0)) for value in rate * us / 1e6 * rng.normal(1, 0.08, steps)]
        for role, us in cpu.items()
    }


def _memory(cpu: dict[str, float], seconds: float, rng: Any) -> dict[str, list[float]]:
    sizes = {"replica": 310.0, "server": 190.0, "proxy": 24.0, "ray": 720.0, "load": 66.0}
    steps = np.arange(int(seconds / 0.25))
    return {
        role: [float(value) for value in sizes[role] + steps * 0.2 + rng.normal(0, 0.5, len(steps))]
        for role in cpu
    }


def _replica(spec: dict[str, Any], rng: Any) -> dict[str, Any]:
    wide = min(spec.get("connections", 16), 32)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= wide]
    counts = {str(size): int(900 * size**0.5 * rng.normal(1, 0.05)) for size in sizes}
    stages = {
        stage: {"mean": ms / 750, "p50": ms / 1e3, "p99": ms / 1e3 * 5}
        for stage, ms in _STAGES.items()
    }
    return {
        "batch_rows": {**counts, "more": 7},
        "stages_s": stages,
        "batches": sum(counts.values()),
    }


def _search(spec: dict[str, Any], best: float, idle_ms: float, rng: Any) -> list[dict[str, Any]]:
    target = spec["search"]["at_most_s"]
    rate, low, high, steps = best / 16, None, None, []
    while len(steps) < 12 and not (low and high and high / low < 1.05):
        over = rate >= best
        p_s = idle_ms * 3e-3 / max(1 - rate / best, 0.01) * rng.normal(1, 0.05)
        held = not over and p_s <= target
        why = None if held else ("falls behind" if over else "p99 is over the target")
        steps.append({"rate": rate, "p_s": p_s, "held": held, "why": why})
        low, high = (rate, high) if held else (low, rate)
        rate = rate * 2 if high is None else math.sqrt((low or high / 4) * high)
    return steps
