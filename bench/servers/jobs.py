"""Batch jobs of rayprism under measurement: a command, from its start to its `_SUCCESS`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from bench.cluster import clean_environment
from bench.processes import end_marked
from bench.scenario import JobLoad, RayprismServer
from bench.servers.base import RunContext, RunningServer, Unavailable, model_of
from bench.servers.meter import Meter
from rayprism.offline.commits import SUCCESS_FILE

__all__ = ["JobFailed", "job_config", "run_job"]

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 3600.0
_LOG_CHARACTERS = 3000
_STEP_S = 0.5


class JobFailed(Exception):
    """A job ended with an error, or did not end; with what it printed last."""


def run_job(server: RunningServer, load: JobLoad, run: RunContext) -> dict[str, Any]:
    """Runs version 1 of a server's model over a Parquet file, with a Ray of its own.

    The server itself takes no part: it need not be started.

    Args:
        server: Of kind rayprism.
        load: How many rows, and what the job's config has beside input, output and model.
        run: Of the server.

    Returns:
        `seconds` from the command to `_SUCCESS`, `command_s` to the command's end, `rows`, `rate`
        in rows/s, and what a meter says of the whole command.

    Raises:
        Unavailable: The server is no rayprism, or its model has no batch jobs.
        JobFailed: The job did not finish.
    """
    if not isinstance(server.server, RayprismServer):
        raise Unavailable(f"{server.name} is no rayprism: there are batch jobs of nothing else")
    model = model_of(server.server)
    run.push(model, 1)
    try:
        source = model.job_input(load.rows, run.folder / "job-input")
    except NotImplementedError as error:
        raise Unavailable(str(error)) from None
    folder = run.folder / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    output = folder / "output"
    config = job_config(model.name, run.repository, source, output, load.config)
    config_file = folder / "job.yaml"
    config_file.write_text(yaml.safe_dump(config))
    try:
        found = _measure(f"{server.marker}/job", config_file, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**found, "rows": load.rows, "rate": load.rows / found["seconds"]}


def _measure(marker: str, config: Path, output: Path) -> dict[str, Any]:
    log = config.with_suffix(".log")
    command = [sys.executable, str(_ROOT / "batch" / "predict.py"), str(config), "--local"]
    meter = Meter(marker, rest="job", step_s=_STEP_S)
    with log.open("wb") as stream:
        began_ns, began_s = time.time_ns(), time.monotonic()
        meter.start()
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=clean_environment(marker),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            command_s = time.monotonic() - began_s
            used = meter.stop()
            # Where it was cut off: Ray's processes, too.
            process.kill()
            process.wait()
            end_marked(marker)
    success = output / SUCCESS_FILE
    if code != 0 or not success.exists():
        how = f"did not end within {_LIMIT_S:g} s" if code is None else f"ended with {code}"
        said = log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()
        raise JobFailed(f"{' '.join(command)}\n{how}, and printed last:\n{said}")
    return {
        **{key: value for key, value in used.items() if key != "seconds"},
        "seconds": (success.stat().st_mtime_ns - began_ns) / 1e9,
        "command_s": command_s,
    }


def job_config(
    model: str, repository: Path, source: Path, output: Path, beside: Mapping[str, Any]
) -> dict[str, Any]:
    """The job's config: what a load has beside comes into the sections that are there."""
    config: dict[str, Any] = {
        "model": model,
        "version": "1",
        "repository": str(repository.resolve()),
        "input": {"uri": str(source.resolve())},
        "output": {"uri": str(output.resolve())},
    }
    return _merged(config, beside)


def _merged(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(config))
    for key, value in beside.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = deepcopy(value)
    return merged
