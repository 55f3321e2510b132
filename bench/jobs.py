"""A batch job as a load: a job of the server's model, as its command line runs it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from bench.batch_runs import ROOT, BatchBench, OutputWrong, RunFailed
from bench.models import MODELS
from bench.scenario import JobLoad

__all__ = ["JobWrong", "count_rows", "job_config", "run_job"]

_SCRIPT = ROOT / "batch" / "predict.py"
_SUCCESS = "_SUCCESS"

Command = Callable[[Sequence[str]], Mapping[str, Any]]
"""Runs it to its end; gives its `seconds`."""


class JobWrong(Exception):
    """A job failed, or did not write every row: its speed would mean nothing."""


def run_job(
    load: JobLoad,
    model: str,
    *,
    marker: str,
    folder: Path,
    command: Command | None = None,
) -> dict[str, Any]:
    """Runs a job once, on a Ray of its own, from its command to its `_SUCCESS`.

    Args:
        load: How many rows, and what its config says.
        model: Of `bench.models`; version 1 is pushed where it is not there.
        marker: Of its processes.
        folder: Where the input, the repository and the output are; the first two stay.
        command: Runs a command; for tests.

    Returns:
        `seconds`, `rows`, `rate` (rows/s), `cpu_s` where it is known.

    Raises:
        JobWrong: It failed, or the output does not have every row.
    """
    bench = BatchBench(marker, folder, folder / "repository", cores=1, rounds=1)
    source = MODELS[model].job_input(load.rows, folder)
    MODELS[model].push(bench.repository, 1)
    output = folder / "job-output"
    config = folder / "job.yaml"
    config.write_text(yaml.safe_dump(job_config(load, model, bench.repository, source, output)))
    line = [sys.executable, str(_SCRIPT), str(config), "--local"]
    try:
        found = (command or bench.run)(line)
        if not (output / _SUCCESS).exists():
            raise JobWrong(f"the job of {model} ended without writing {_SUCCESS}")
        rows = count_rows(output)
    except (RunFailed, OutputWrong) as error:
        raise JobWrong(f"the job of {model}: {error}") from None
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if rows != load.rows:
        raise JobWrong(f"the job of {model} wrote {rows:,} of {load.rows:,} rows")
    seconds = found["seconds"]
    return {
        "seconds": seconds,
        "rows": load.rows,
        "rate": load.rows / seconds,
        "cpu_s": found.get("cpu_s"),
        "other_cores": found.get("other_cores"),
    }


def job_config(
    load: JobLoad, model: str, repository: Path, source: Path, output: Path
) -> dict[str, Any]:
    """What `batch/predict.py` is given."""
    given = dict(load.config)
    return {
        **given,
        **MODELS[model].application_args(),
        "model": model,
        "version": "1",
        "repository": str(repository.resolve()),
        "input": {**given.get("input", {}), "uri": str(source)},
        "output": {**given.get("output", {}), "uri": str(output)},
    }


def count_rows(folder: Path) -> int:
    """Rows in the Parquet files of an output; what begins with `_` is no part of it."""
    return sum(
        pq.ParquetFile(file).metadata.num_rows
        for file in folder.rglob("*.parquet")
        if not any(part.startswith(("_", ".")) for part in file.relative_to(folder).parts)
    )
