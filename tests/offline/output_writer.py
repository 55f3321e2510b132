"""A job that writes shards into a folder, as a process of its own that may be killed.

python output_writer.py FOLDER SHARDS
"""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs

from rayprism.offline.commits import OutputFolder, Totals

ROWS = 1_000
IDENTITY: dict[str, Any] = {
    "spec": {"model": "flights", "output": {"prefix": ""}},
    "listing": "sha256:1",
    "model": "flights",
    "version": 2,
    "digest": "sha256:2",
}


def rows_of(shard: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows of a shard, and those of them that are dead letters: every 100th of some shards."""
    first = shard * ROWS
    dead = [first + n for n in range(0, ROWS, 100)] if shard % 3 == 0 else []
    alive = [n for n in range(first, first + ROWS) if n not in dead]
    if shard % 7 == 6:
        dead, alive = list(range(first, first + ROWS)), []
    table = pa.table({"id": pa.array(alive, pa.int64()), "y": pa.array(alive, pa.float64())})
    letters = [{"file": "a", "row": row, "reason": "null", "code": "invalid"} for row in dead]
    return table, letters


def write_shard(output: OutputFolder, shard: int) -> None:
    table, letters = rows_of(shard)
    with output.writer(shard) as writer:
        for start in range(0, table.num_rows, 300):
            writer.write(table.slice(start, 300))
        writer.write(None, letters)
        writer.commit(ROWS, 0.5)


def run(output: OutputFolder, shards: int, restart: bool = False) -> Totals:
    """What a driver does."""
    with output.lease() as lease:
        output.begin(IDENTITY, shards, restart)
        for shard in sorted(set(range(shards)) - output.done()):
            lease.check()
            write_shard(output, shard)
        return output.finish()


if __name__ == "__main__":
    print("ready", flush=True)
    run(OutputFolder(pa_fs.LocalFileSystem(), sys.argv[1]), int(sys.argv[2]))
