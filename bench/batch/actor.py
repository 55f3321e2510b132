"""How much memory one actor of a batch job needs, by the sizes of its shards and batches.

    python -m bench.batch.actor

Each cell is a process of its own that does shards of the flights model, one after the other, as an
actor does, without what Ray adds to its processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import table

__all__ = ["main", "measure_here", "render"]

_ROOT = Path(__file__).resolve().parents[2]
_OUTPUT = _ROOT / "bench/results/batch-actor.json"
_SHARD_ROWS = (65_536, 262_144, 1_048_576)
_BATCH_ROWS = (256, 4_096, 16_384)
_ROWS = 3 * _SHARD_ROWS[-1]
_SHARDS = 3
_MIB = 1024**2


def measure_here(folder: Path, shard_rows: int, batch_rows: int) -> dict[str, int]:
    """Does a few shards in this process, which has to be a fresh one.

    Returns:
        `loaded_bytes` with the model loaded, `peak_bytes` at most, `rows` done.
    """
    from rayprism.offline.job import open_output
    from rayprism.offline.plan import plan_job
    from rayprism.offline.spec import parse_spec
    from rayprism.offline.worker import ShardWorker

    spec = parse_spec(
        {
            "model": "flights",
            "version": "2",
            "repository": str(folder / "models"),
            "input": {"uri": str(folder / "data")},
            "output": {
                "uri": str(folder / f"out-{shard_rows}-{batch_rows}"),
                "passthrough": ["row_id", "carrier"],
            },
            "limits": {"shard_rows": shard_rows, "batch_rows": batch_rows},
        }
    )
    plan = plan_job(spec)
    output = open_output(plan)
    output.begin(plan.identity(), len(plan.shards))
    worker = ShardWorker(plan.spec, plan.listing, output)
    worker.load()
    loaded = _peak_bytes()
    outcomes = [worker.run(shard) for shard in plan.shards[:_SHARDS]]
    failed = [outcome.error for outcome in outcomes if outcome.error]
    assert not failed, failed
    rows = sum(outcome.rows_in for outcome in outcomes)
    return {"loaded_bytes": loaded, "peak_bytes": _peak_bytes(), "rows": rows}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    cells = {(cell["shard_rows"], cell["batch_rows"]): cell for cell in results["cells"]}
    rows = [
        [
            f"shards of {shard_rows:,} rows",
            *(f"{cells[shard_rows, batch]['peak_bytes'] / _MIB:,.0f} MiB" for batch in _BATCH_ROWS),
        ]
        for shard_rows in _SHARD_ROWS
    ]
    loaded = max(cell["loaded_bytes"] for cell in results["cells"]) / _MIB
    head = (
        f"{results['date'][:10]}, {results['machine']['cores']} cores "
        f"({results['machine']['cpu']}); flights version 2, peak memory of a process that does "
        f"{_SHARDS} shards; {loaded:,.0f} MiB of it are there once the model is loaded. "
        "`python -m bench.batch.actor`."
    )
    header = ["", *(f"batches of {rows:,}" for rows in _BATCH_ROWS)]
    return f"{head}\n\n{table(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "SHARD_ROWS", "BATCH_ROWS"))
    arguments = parser.parse_args()
    if arguments.one:
        folder, shard_rows, batch_rows = arguments.one
        print(json.dumps(measure_here(Path(folder), int(shard_rows), int(batch_rows))))
        return
    folder = Path(tempfile.mkdtemp(prefix="rayprism-actor-"))
    try:
        _python("examples/flights/train.py", "--repository", str(folder / "models"))
        _python(
            "examples/flights/batch_data.py",
            *("--rows", str(_ROWS), "--out", str(folder / "data"), "--files", "1"),
            *("--row-group-rows", "65536"),
        )
        cells = [
            {
                "shard_rows": shard_rows,
                "batch_rows": batch_rows,
                **json.loads(
                    _python(
                        *("-m", "bench.batch.actor", "--one", str(folder)),
                        *(str(shard_rows), str(batch_rows)),
                    )
                ),
            }
            for shard_rows in _SHARD_ROWS
            for batch_rows in _BATCH_ROWS
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {**machine.describe(), "command": "python -m bench.batch.actor", "cells": cells}
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(render(results))
    print(render(results))


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], check=True, cwd=_ROOT, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    main()
