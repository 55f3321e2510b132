"""Second table: sentence embeddings, where the model's own work is nearly everything."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from bench.batch.runs import ROOT, BatchBench, Way, measure_ways, version_digest
from bench.sentences import sentences

__all__ = ["run"]

COLUMN = "embedding"
MOST_DIFFERENCE = 1e-4
"""Of 1 and the cosine of a row: neighbours in its batch may change the last digits."""

_GROUP_ROWS = 500
_TUNING_ROWS = 1_000
_IN_ORDER = [(rows, 0) for rows in (1, 2, 4, 8, 16)]
_BY_LENGTH = [*((rows, 0) for rows in (4, 8, 16)), *((64, tokens) for tokens in (256, 512))]
"""Most rows, and most tokens (0: no bound), of a batch."""


def run(bench: BatchBench, rows: int) -> dict[str, Any]:
    """Seconds of two plain loops and of a job of rayprism, in turn.

    Raises:
        RunFailed: A command failed.
        OutputWrong: The outputs are not the same.
    """
    folder = _model_folder(bench)
    few, data = bench.folder / "few-sentences", bench.folder / "sentences"
    _make_data(few, min(rows, _TUNING_ROWS))
    tuning = {
        "in order": _tune(bench, folder, few, by_length=False),
        "by length": _tune(bench, folder, few, by_length=True),
    }
    _make_data(data, rows)
    best = {
        name: min(tried, key=lambda item: float(item["seconds"])) for name, tried in tuning.items()
    }
    config = bench.folder / "minilm.yaml"
    ways = [
        Way("by length", lambda out: _plain(bench, folder, data, out, best["by length"])),
        Way("rayprism", lambda out: _rayprism(bench, config, folder, data, out)),
        Way("in order", lambda out: _plain(bench, folder, data, out, best["in order"])),
    ]
    samples = measure_ways(bench, "sentences", ways, rows, COLUMN, _difference, MOST_DIFFERENCE)
    return {"rows": rows, "best": best, "tuning": tuning, "samples": samples}


def _model_folder(bench: BatchBench) -> Path:
    """The newest version; the example's own script pushes one where there is none."""
    model = bench.repository / "minilm"
    if not model.exists():
        script = ROOT / "examples" / "minilm" / "push.py"
        bench.run([sys.executable, str(script), f"--repository={bench.repository}"])
    return max(model.glob("[0-9]*"), key=lambda path: int(path.name))


def _make_data(folder: Path, rows: int) -> None:
    """Different sentences, in row groups small enough to be shared out."""
    folder.mkdir()
    table = pa.table({"row_id": np.arange(rows), "text": sentences(rows)})
    pq.write_table(table, folder / "sentences.parquet", row_group_size=_GROUP_ROWS)


def _plain(bench: BatchBench, model: Path, data: Path, out: Path, how: dict[str, Any]) -> list[str]:
    return [
        *(sys.executable, "-m", "bench.batch.plain", "minilm"),
        f"--model={model}",
        f"--version={model.name}",
        f"--digest={version_digest(model)}",
        f"--input={data}",
        f"--output={out}",
        f"--cores={bench.cores}",
        "--passthrough=row_id",
        f"--batch-rows={how['batch_rows']}",
        f"--batch-tokens={how['batch_tokens']}",
        *(["--by-length"] if how["by_length"] else []),
    ]


def _rayprism(bench: BatchBench, config: Path, model: Path, data: Path, out: Path) -> list[str]:
    job = {
        "model": "minilm",
        "version": model.name,
        "allow_code": True,
        "input": {"uri": str(data)},
        "output": {"uri": str(out), "passthrough": ["row_id"]},
        "pool": {"max_actors": bench.cores},
        # A few seconds of work each, so that the actors end at about the same time.
        "limits": {"shard_rows": _GROUP_ROWS},
    }
    config.write_text(yaml.safe_dump(job, sort_keys=False))
    return [sys.executable, "batch/predict.py", str(config), "--local"]


def _tune(bench: BatchBench, model: Path, data: Path, *, by_length: bool) -> list[dict[str, Any]]:
    """Seconds of the loop with each size of batches, the better of two interleaved runs."""
    tried: list[dict[str, Any]] = [
        {"batch_rows": rows, "batch_tokens": tokens, "by_length": by_length, "seconds": math.inf}
        for rows, tokens in (_BY_LENGTH if by_length else _IN_ORDER)
    ]
    out = bench.folder / "out"
    for how in tried * 2:
        seconds = bench.run(_plain(bench, model, data, out, how))["seconds"]
        shutil.rmtree(out)
        how["seconds"] = min(how["seconds"], seconds)
        tokens = f" and {how['batch_tokens']} tokens" if how["batch_tokens"] else ""
        order = ", sorted by length" if by_length else ""
        bench.say(f"plain loop, batches of {how['batch_rows']}{tokens}{order}: {seconds:.1f} s")
    return tried


def _difference(reference: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """1 less the smallest cosine of any row; both are of length 1."""
    return float(1.0 - np.einsum("rv,rv->r", reference, got, dtype=np.float64).min())
