"""Measures what the batching of the pushed version rests on, without a fleet.

    python examples/minilm/measure.py --repository models

Prints the time of one run by rows and length, then how fast 200 waiting texts of mixed lengths are
served under different bounds, by the queue that replicas use. Only lengths matter to the time, so
the tokens are drawn by lot.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from push import BATCHING, MAX_TOKENS, MODEL

from rayprism.core.batching import BatchLimits, BatchQueue, Pending
from rayprism.core.tensors import Tensors
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.repository import Repository

TEXTS = 200
MEDIAN_LENGTH = 30
SEED = 6
LARGEST_RUN = 4_096
BOUNDS = [(cost, share) for cost in (256, 512, 2_048) for share in (1.0, 0.3, 0.1, 0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repository", type=Path, default=Path(os.environ.get("RAYPRISM_REPOSITORY", "models"))
    )
    arguments = parser.parse_args()
    repository = Repository(arguments.repository)
    version = repository.version(MODEL, repository.versions(MODEL)[-1])
    model = load_model(version, allow_code=True)
    random = np.random.default_rng(SEED)
    print_runs(model, random)
    lengths = np.clip(random.lognormal(np.log(MEDIAN_LENGTH), 0.6, TEXTS), 4, MAX_TOKENS)
    print_bounds(model, random, lengths.astype(int).tolist())


def print_runs(model: LoadedModel, random: np.random.Generator) -> None:
    """Milliseconds of a run, and per token, for rows x length."""
    all_rows = (1, 4, 16, 64)
    print(
        "ms of a run (ms a token)\n" + f"{'length':>8}" + "".join(f"{n:>11} rows" for n in all_rows)
    )
    for length in (8, 32, 128, MAX_TOKENS):
        cells = []
        for rows in all_rows:
            if rows * length > LARGEST_RUN:
                continue
            took_ms = min(time_run(model, tokens(random, rows, length)) for _ in range(5)) * 1e3
            cells.append(f"{took_ms:>8.1f} ({took_ms / rows / length:.2f})")
        print(f"{length:>8}" + " ".join(cells))


def print_bounds(model: LoadedModel, random: np.random.Generator, lengths: list[int]) -> None:
    """Rows a second and the longest batch, for bounds of cost and padding."""
    print(f"\n{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, all waiting")
    print(
        f"{'max_cost':>10}{'max_padding_share':>20}{'batches':>10}{'texts/s':>10}{'longest ms':>12}"
    )
    for cost, share in BOUNDS:
        queue = BatchQueue(BatchLimits(BATCHING.max_rows, len(lengths), cost, share))
        for length in lengths:
            queue.push(Pending(None, 1, 0.0, float("inf"), length=length))
        times = []
        while batch := queue.decide(0.0, free=True).batch:
            longest = max(pending.length for pending in batch)
            times.append(time_run(model, tokens(random, len(batch), longest)))
        print(
            f"{cost:>10}{share:>20}{len(times):>10}{len(lengths) / sum(times):>10.0f}"
            f"{max(times) * 1e3:>12.0f}"
        )


def tokens(random: np.random.Generator, rows: int, length: int) -> Tensors:
    """Inputs of the network, without padding."""
    ids = random.integers(1_000, 30_000, (rows, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def time_run(model: LoadedModel, batch: Tensors) -> float:
    """Seconds of computing that one run takes.

    The model runs on the thread that calls it, so the CPU time of that thread is all of it, and
    does not change with what else the machine does.
    """
    began = time.thread_time()
    model.run(batch)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
