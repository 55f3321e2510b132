"""How fast batch jobs are, and how much memory they take: `python -m bench.batch`.

The flights model over millions of rows and MiniLM over thousands of sentences: a job of rayprism,
as a user starts it, beside plain loops over the same files and the obvious pipeline of Ray Data.
Then the peak memory of jobs of few rows and of many. See `bench.batch.plain` and
`bench.batch.obvious` for what it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import machine
from bench.batch import flights, minilm
from bench.batch.report import (
    judge,
    render,
    summarise_memory,
    summarise_minilm,
    summarise_ways,
)
from bench.batch.runs import ROOT, BatchBench, OutputWrong, RunFailed
from bench.figures import median_of
from bench.processes import end_marked, new_marker
from rayprism.errors import RayprismError

__all__ = ["main"]

_PARTS = ("flights", "minilm", "rss")
_FULL_ROWS = 10_000_000
_FULL_SENTENCES = 20_000
_OUTPUT = ROOT / "bench" / "results"
_TRIAL_OUTPUT = ROOT / ".bench"
"""For runs that are not of full size: README.md shows what is in `_OUTPUT`."""
_BYTES_A_ROW = 100
"""Of input, output and what Ray may spill, with room to spare; measured were about 16."""
_BYTES_AT_LEAST = 2 * 2**30


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 where every target is met, 1 where one is missed, 2 where the run failed, 130 after
        Ctrl-C.
    """
    given = _parse(arguments)
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
        _check_space(given)
    except (OSError, RunFailed) as error:
        print(f"cannot begin: {error}", file=sys.stderr)
        return 2
    # An ended terminal or container must not leave clusters behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cores = sorted(os.sched_getaffinity(0))[: given.cores]
    # Inherited by all that is started: no way has more than the others.
    os.sched_setaffinity(0, cores)
    marker = new_marker()
    try:
        with tempfile.TemporaryDirectory(prefix="rayprism-bench-", dir=given.folder) as name:
            folder = Path(name).resolve()
            bench = BatchBench(
                marker=marker,
                folder=folder,
                repository=(given.repository or folder / "models").resolve(),
                cores=len(cores),
                rounds=given.rounds,
            )
            results = _run(bench, given)
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    except (OutputWrong, RunFailed, RayprismError) as error:
        print(f"the run failed: {error}", file=sys.stderr)
        return 2
    finally:
        end_marked(marker)
    met = True
    given.output.mkdir(parents=True, exist_ok=True)
    for part in given.only:
        found = _part(results, part)
        text = render(found)
        path = given.output / f"batch-{part}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
        print(f"\n{text}\nwritten to {path} and {path.with_suffix('.md').name}")
        met &= all(verdict["met"] for verdict in found["verdicts"])
    return 0 if met else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", type=_names, default=_PARTS, help=f"of {','.join(_PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of every comparison")
    parser.add_argument("--rows", type=int, default=_FULL_ROWS, help="flights")
    parser.add_argument("--sentences", type=int, default=_FULL_SENTENCES)
    parser.add_argument(
        "--memory-rows",
        type=_numbers,
        default=(2_000_000, 20_000_000),
        help="flights of the jobs whose memory is compared",
    )
    parser.add_argument("--cores", type=int, default=2, help="that every way has")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where a folder for data and outputs is made, which is removed at the end",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        help="of models, used as it is and added to; default: made anew, which takes a minute",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder; default: bench/results, or .bench where less than the full size is measured",
    )
    given = parser.parse_args(arguments)
    given.command = shlex.join(["python", "-m", "bench.batch", *(arguments or sys.argv[1:])])
    if given.output is None:
        whole = given.rows >= _FULL_ROWS and given.sentences >= _FULL_SENTENCES
        given.output = _OUTPUT if whole else _TRIAL_OUTPUT
    return given


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item.replace("_", "")) for item in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(_PARTS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)}: allowed are {', '.join(_PARTS)}")
    return names


def _check_space(given: argparse.Namespace) -> None:
    rows = max(
        given.rows if "flights" in given.only else 0,
        max(given.memory_rows) if "rss" in given.only else 0,
    )
    need = rows * _BYTES_A_ROW + _BYTES_AT_LEAST
    free = shutil.disk_usage(given.folder).free
    if free < need:
        raise RunFailed(
            f"{given.folder} has {free / 2**30:.1f} GiB free, needed are {need / 2**30:.1f}. Mend: "
            "--folder on another disk, or fewer --rows"
        )


def _run(bench: BatchBench, given: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        **machine.describe(),
        "command": given.command,
        "plan": {
            "rounds": bench.rounds,
            "cores": bench.cores,
            "rows": given.rows,
            "sentences": given.sentences,
            "memory_rows": given.memory_rows,
            "only": given.only,
        },
    }
    results["versions"]["pyarrow"] = metadata.version("pyarrow")
    if "flights" in given.only:
        found = flights.run(bench, given.rows)
        results["flights"] = {**found, "summary": summarise_ways(found["samples"])}
    if "minilm" in given.only:
        found = minilm.run(bench, given.sentences)
        results["minilm"] = {**found, "summary": summarise_minilm(found["samples"])}
    if "rss" in given.only:
        found = flights.run_memory(bench, given.memory_rows)
        results["rss"] = {**found, "summary": summarise_memory(found["samples"])}
    return results


def _part(results: dict[str, Any], part: str) -> dict[str, Any]:
    """What was found of one part, as if it had been measured alone."""
    found = {name: value for name, value in results.items() if name not in _PARTS}
    found[part] = results[part]
    found["other_cores"] = median_of(results[part]["samples"], "other_cores")
    found["verdicts"] = [verdict.to_json() for verdict in judge(found)]
    return found


if __name__ == "__main__":
    sys.exit(main())
