"""Runs commands of the batch benchmark, each a fresh process, and checks what they wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bench.batch.memory import MemoryWatch
from bench.cluster import clean_environment
from bench.processes import CpuMeter, end_marked
from rayprism.models.repository import Repository

__all__ = [
    "ROOT",
    "BatchBench",
    "OutputWrong",
    "RunFailed",
    "Way",
    "measure_ways",
    "predictions",
    "version_digest",
]

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 3600.0
_QUIET_S = 1.0
_LOG_CHARACTERS = 3000

Values = NDArray[np.float32]


class RunFailed(Exception):
    """A command ended with an error, or did not end."""


class OutputWrong(Exception):
    """A way did not write the right predictions: its speed would mean nothing."""


@dataclass(frozen=True)
class Way:
    """One way to do the same work.

    Args:
        name: In the results.
        command: For a folder that it writes to.
    """

    name: str
    command: Callable[[Path], list[str]]


@dataclass(frozen=True)
class BatchBench:
    """What the parts of one run share.

    Args:
        marker: Of its processes; see `bench.processes`.
        folder: For everything that is written; gone afterwards.
        repository: Where the models are.
        cores: That every way has.
        rounds: Of every comparison.
    """

    marker: str
    folder: Path
    repository: Path
    cores: int
    rounds: int
    started_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Prints progress, with the minutes since the start."""
        elapsed_s = int(time.monotonic() - self.started_s)
        print(f"[{elapsed_s // 60}:{elapsed_s % 60:02d}] {text}", flush=True)

    def run(
        self, command: Sequence[str], *, limit_s: float = _LIMIT_S, watch: bool = False
    ) -> dict[str, Any]:
        """Runs a command to its end.

        Args:
            command: Program and arguments.
            limit_s: When to give up.
            watch: Whether to sample its memory.

        Returns:
            `seconds` of wall clock, all of it, `cpu_s` that this machine was busy meanwhile,
            `other_cores` that something else kept busy before, and `memory` where watched.

        Raises:
            RunFailed: It ended with an error, or not at all; says what it printed last.
        """
        # What the last command left in the caches of the disk is not this one's to write.
        os.sync()
        other_cores = self._noise()
        log = self.folder / "command.log"
        meter = CpuMeter(self.marker)
        began_s = time.perf_counter()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            memory = MemoryWatch(process.pid) if watch else None
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                seconds = time.perf_counter() - began_s
                used = meter.stop()
                peaks = memory.stop() if memory is not None else None
                # Where it was cut off: Ray's processes, too.
                process.kill()
                process.wait()
                end_marked(self.marker)
        if code != 0:
            how = f"did not end within {limit_s:g} s" if code is None else f"ended with {code}"
            said = log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()
            raise RunFailed(f"{' '.join(command)}\n{how}, and printed last:\n{said}")
        found = {
            "seconds": seconds,
            "cpu_s": used.by_role["load"] + used.other_cores * seconds,
            "other_cores": other_cores,
        }
        return {**found, "memory": peaks.to_json()} if peaks is not None else found

    def _noise(self) -> float:
        meter = CpuMeter(self.marker)
        time.sleep(_QUIET_S)
        return meter.stop().other_cores

    def _environment(self) -> dict[str, str]:
        return {
            **clean_environment(self.marker),
            "RAYPRISM_REPOSITORY": str(self.repository),
            "TOKENIZERS_PARALLELISM": "false",
        }


def measure_ways(
    bench: BatchBench,
    what: str,
    ways: Sequence[Way],
    rows: int,
    column: str,
    difference: Callable[[Values, Values], float],
    most: float,
) -> list[dict[str, Any]]:
    """Runs all ways in turn, round after round; each round begins with another one.

    Every output is read, and compared with the first one's.

    Args:
        bench: Of the run.
        what: Is done, for people.
        ways: To do it.
        rows: That each has to predict.
        column: With the predictions.
        difference: Of two outputs.
        most: That it may be.

    Raises:
        RunFailed: A command failed.
        OutputWrong: Rows are missing or come twice, or the predictions differ.
    """
    samples: list[dict[str, Any]] = []
    reference: Values | None = None
    for number in range(bench.rounds):
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):
            output = bench.folder / "out"
            found = bench.run(way.command(output))
            got = predictions(output, rows, column)
            size_bytes = sum(file.stat().st_size for file in output.rglob("*.parquet"))
            shutil.rmtree(output)
            reference = got if reference is None else reference
            apart = difference(reference, got)
            if not apart <= most:
                raise OutputWrong(
                    f"{what}, {way.name}: predictions differ from {ways[0].name}'s by {apart:.3g}, "
                    f"allowed is {most:g}"
                )
            rate = rows / found["seconds"]
            samples.append(
                {
                    "way": way.name,
                    "round": number,
                    "rows": rows,
                    "rate": rate,
                    "difference": apart,
                    "output_bytes": size_bytes,
                    **found,
                }
            )
            bench.say(
                f"{what}, round {number + 1}/{bench.rounds}, {way.name}: {found['seconds']:.1f} s, "
                f"{rate:,.0f} rows/s{_warning(found)}"
            )
    return samples


def version_digest(folder: Path) -> str:
    """What a job writes beside each prediction.

    Args:
        folder: Of the version, in its repository.
    """
    version = Repository(folder.parents[1]).version(folder.parent.name, int(folder.name))
    return version.manifest.digest


def _warning(found: Mapping[str, Any]) -> str:
    busy = found["other_cores"]
    return f", {busy:.1f} cores busy with something else" if busy > 0.2 else ""


def predictions(folder: Path, rows: int, column: str) -> Values:
    """What was predicted, by `row_id`.

    Args:
        folder: With Parquet files. What begins with `_` is no part of the output.
        rows: That there have to be: 0 to rows - 1, each once.
        column: With the predictions: numbers, or lists of a fixed size.

    Returns:
        Shape: `[rows]`, or `[rows, size]`.

    Raises:
        OutputWrong: Rows are missing, come twice, or have no prediction.
    """
    found: Values | None = None
    times = np.zeros(rows, np.int64)
    for file in sorted(folder.rglob("*.parquet")):
        if any(part.startswith(("_", ".")) for part in file.relative_to(folder).parts):
            continue
        table = pq.read_table(file, columns=["row_id", column]).combine_chunks()
        places = table["row_id"].to_numpy()
        if len(places) and not 0 <= places.min() <= places.max() < rows:
            raise OutputWrong(f"{file.name}: row_id from {places.min()} to {places.max()}")
        if table[column].null_count:
            raise OutputWrong(f"{file.name}: {table[column].null_count} rows without {column}")
        values = _matrix(table[column])
        if found is None:
            found = np.empty((rows, *values.shape[1:]), np.float32)
        found[places] = values
        # Counted, and not only marked: the same row may come twice in one file.
        times += np.bincount(places, minlength=rows)
    if found is None or not (times == 1).all():
        missing, again = int((times == 0).sum()), int((times > 1).sum())
        raise OutputWrong(f"{missing:,} of {rows:,} rows are missing, {again:,} come again")
    return found


def _matrix(column: Any) -> Values:
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not hasattr(chunk, "flatten") or not hasattr(chunk.type, "value_type"):
        return np.asarray(chunk.to_numpy(zero_copy_only=False), np.float32)
    values = np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), np.float32)
    return values.reshape(len(chunk), -1)
