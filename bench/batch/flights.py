"""First table: the flights model over many rows, three ways; and memory over more of them."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.batch.runs import ROOT, BatchBench, RunFailed, Way, measure_ways, version_digest

__all__ = ["model_folder", "run", "run_memory"]

PASSTHROUGH = ("row_id", "year", "month", "day", "carrier", "flight", "origin")
"""What the shipped job copies, and `row_id` to compare the outputs by."""
COLUMN = "delayed_probability"
MOST_DIFFERENCE = 1e-6
"""One model, and no rule of rows that share a batch: only the last digit may differ."""

_CONFIG = ROOT / "batch" / "configs" / "flights.yaml"
_VERSION = "2"
_TUNING_ROWS = 1_000_000
_TUNING_LIMIT_S = 300.0
_BATCH_ROWS = (1_024, 4_096, 16_384, 65_536)


def run(bench: BatchBench, rows: int) -> dict[str, Any]:
    """Seconds of a plain loop, of a job of rayprism and of obvious Ray Data, in turn.

    Raises:
        RunFailed: A command failed.
        OutputWrong: The outputs are not the same.
    """
    folder = model_folder(bench)
    tuning_data = _make_data(bench, min(rows, _TUNING_ROWS))
    plain = _tune_plain(bench, folder, tuning_data)
    obvious = _tune_obvious(bench, folder, tuning_data)
    shutil.rmtree(tuning_data)
    data = _make_data(bench, rows)
    ways = [
        Way("plain", lambda out: _plain(bench, folder, data, out, plain["batch_rows"])),
        Way("rayprism", lambda out: _rayprism(bench, data, out)),
        Way("obvious", lambda out: _obvious(bench, folder, data, out, obvious["setting"])),
    ]
    samples = measure_ways(bench, "flights", ways, rows, COLUMN, _difference, MOST_DIFFERENCE)
    input_bytes = sum(file.stat().st_size for file in data.iterdir())
    shutil.rmtree(data)
    return {
        "rows": rows,
        "input_bytes": input_bytes,
        "batch_rows": plain["batch_rows"],
        "obvious": obvious["setting"],
        "tuning": {"plain": plain["tried"], "obvious": obvious["tried"]},
        "samples": samples,
    }


def run_memory(bench: BatchBench, all_rows: Sequence[int]) -> dict[str, Any]:
    """Peak memory of jobs of rayprism that differ in nothing but their rows.

    Raises:
        RunFailed: A command failed.
    """
    model_folder(bench)
    samples = []
    for rows in all_rows:
        data = _make_data(bench, rows)
        for number in range(bench.rounds):
            output = bench.folder / "out"
            found = bench.run(_rayprism(bench, data, output), watch=True)
            shutil.rmtree(output)
            memory = found.pop("memory")
            if memory["actor_bytes"] is None:
                raise RunFailed(f"no actor was seen in {memory['samples']} samples of its memory")
            samples.append({"round": number, "rows": rows, **found, **memory})
            bench.say(
                f"memory, {rows:,} rows, round {number + 1}/{bench.rounds}: largest actor "
                f"{memory['actor_bytes'] / 2**20:.0f} MiB, driver "
                f"{memory['driver_bytes'] / 2**20:.0f} MiB, all "
                f"{memory['all_bytes'] / 2**20:.0f} MiB; {found['seconds']:.1f} s"
            )
        shutil.rmtree(data)
    return {"rows": list(all_rows), "samples": samples}


def model_folder(bench: BatchBench) -> Path:
    """The model's folder; the example's own script trains it where it is not there."""
    folder = bench.repository / "flights" / _VERSION
    if not folder.exists():
        bench.say("training the flights model")
        script = ROOT / "examples" / "flights" / "train.py"
        # Not over the request that is checked in.
        rows = f"--rows={bench.folder / 'rows.json'}"
        bench.run([sys.executable, str(script), f"--repository={bench.repository}", rows])
    return folder


def _make_data(bench: BatchBench, rows: int) -> Path:
    """So many flights as Parquet, with the example's own script."""
    target = bench.folder / f"flights-{rows}"
    bench.say(f"writing {rows:,} flights")
    script = ROOT / "examples" / "flights" / "batch_data.py"
    bench.run([sys.executable, str(script), f"--rows={rows}", f"--out={target}"])
    return target


def _plain(bench: BatchBench, model: Path, data: Path, out: Path, batch_rows: int) -> list[str]:
    return [
        *(sys.executable, "-m", "bench.batch.plain", "flights"),
        f"--model={model}",
        f"--version={_VERSION}",
        f"--digest={version_digest(model)}",
        f"--input={data}",
        f"--output={out}",
        f"--cores={bench.cores}",
        f"--passthrough={','.join(PASSTHROUGH)}",
        f"--batch-rows={batch_rows}",
    ]


def _rayprism(bench: BatchBench, data: Path, out: Path) -> list[str]:
    """The job that ships, as a user starts it on other data."""
    changes = {
        "input.uri": f"{data}/*.parquet",
        "output.uri": str(out),
        "output.passthrough": f"[{', '.join(PASSTHROUGH)}]",
        "pool.max_actors": str(bench.cores),
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "batch/predict.py", str(_CONFIG), "--local", *sets]


def _obvious(
    bench: BatchBench, model: Path, data: Path, out: Path, setting: dict[str, Any]
) -> list[str]:
    return [
        *(sys.executable, "-m", "bench.batch.obvious"),
        f"--model={model}",
        f"--input={data}",
        f"--output={out}",
        f"--passthrough={','.join(PASSTHROUGH)}",
        f"--actors={bench.cores}",
        f"--actor-cpus={setting['actor_cpus']}",
        f"--ray-cpus={setting['ray_cpus']}",
        f"--batch-format={setting['batch_format']}",
    ]


def _tune_plain(bench: BatchBench, model: Path, data: Path) -> dict[str, Any]:
    """The best size of batches."""
    tried = []
    for batch_rows in _BATCH_ROWS:
        out = bench.folder / "out"
        # Of two, as the first one after a change may have found cold files.
        seconds = []
        for _ in range(2):
            seconds.append(bench.run(_plain(bench, model, data, out, batch_rows))["seconds"])
            shutil.rmtree(out)
        tried.append({"batch_rows": batch_rows, "seconds": min(seconds)})
        bench.say(f"plain loop, batches of {batch_rows:,}: {min(seconds):.2f} s")
    best = min(tried, key=lambda item: item["seconds"])
    return {"batch_rows": best["batch_rows"], "tried": tried}


def _tune_obvious(bench: BatchBench, model: Path, data: Path) -> dict[str, Any]:
    """The best format of batches and share of the cores.

    With a CPU for each actor, as is the default, nothing would be left to read and write with, and
    the pipeline would stand still. So actors take half a CPU each; or Ray is told of twice the
    CPUs.
    """
    tried: list[dict[str, Any]] = []
    shares = [(0.5, bench.cores), (1.0, 2 * bench.cores)]
    for batch_format, (actor_cpus, ray_cpus) in itertools.product(("numpy", "pyarrow"), shares):
        setting = {"batch_format": batch_format, "actor_cpus": actor_cpus, "ray_cpus": ray_cpus}
        out = bench.folder / "out"
        command = _obvious(bench, model, data, out, setting)
        try:
            seconds = bench.run(command, limit_s=_TUNING_LIMIT_S)["seconds"]
        except RunFailed as error:
            bench.say(f"obvious Ray Data, {setting}: left out, {error}")
            continue
        finally:
            shutil.rmtree(out, ignore_errors=True)
        tried.append({"setting": setting, "seconds": seconds})
        bench.say(f"obvious Ray Data, {setting}: {seconds:.1f} s")
    if not tried:
        raise RunFailed("obvious Ray Data failed with every setting")
    best = min(tried, key=lambda item: item["seconds"])
    return {"setting": best["setting"], "tried": tried}


def _difference(reference: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """The largest of any row."""
    return float(np.abs(reference - got).max())
