"""The yardstick of the sentence model: ONNX Runtime in a loop, with nothing around it.

Runs as a process of its own: `python -m bench.yardstick FOLDER MODEL_FILE --batch-size 8 ...`
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cluster import clean_environment
from bench.sentences import sentences

__all__ = ["SENTENCES", "batches_of", "embed", "measure"]

SENTENCES = 512
"""How many different ones there are; the loop and the clients go round them in the same order."""

_MAX_TOKENS = 256
"""Where the example's own processor cuts; no sentence here is so long."""

Feed = dict[str, NDArray[np.int64]]


def measure(
    folder: Path,
    model_file: str,
    *,
    marker: str,
    seconds: float,
    threads: int,
    batch_size: int,
    tokenise: bool = False,
    by_length: bool = False,
) -> dict[str, Any]:
    """Runs the loop in a process of its own.

    Args:
        folder: Of the model version.
        model_file: The ONNX file in it.
        marker: Of the run.
        seconds: How long.
        threads: Of the session.
        batch_size: Rows of each run.
        tokenise: Whether the loop makes the tokens itself, and does not find them ready.
        by_length: Whether sentences of like lengths share batches.

    Returns:
        `rate` (rows/s), `cpu_ms_per_row`, and how they were got.
    """
    command = [
        *(sys.executable, "-m", "bench.yardstick", str(folder), model_file),
        f"--seconds={seconds}",
        f"--threads={threads}",
        f"--batch-size={batch_size}",
        *(["--tokenise"] if tokenise else []),
        *(["--by-length"] if by_length else []),
    ]
    # The tokenizer has no more threads than in a replica.
    environment = {**clean_environment(marker), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return {"batch_size": batch_size, "by_length": by_length, **result}


def batches_of(order: Sequence[int], size: int) -> list[list[int]]:
    """Cuts an order into batches; what does not fill the last one is left out."""
    whole = len(order) - len(order) % size
    return [list(order[start : start + size]) for start in range(0, whole, size)]


def _feed(rows: Sequence[Sequence[int]], names: Sequence[str]) -> Feed:
    """Joins token ids, padded to the longest. Shapes: each `[rows, longest] int64`."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: feed[name] for name in names}


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    (path,) = folder.rglob("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)
    return tokenizer


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def embed(folder: Path, model_file: str, text: str) -> NDArray[np.float32]:
    """The embedding of one sentence, mean-pooled and of length 1. Shape: [384] float32."""
    session = _session(folder / model_file, 1)
    names = [item.name for item in session.get_inputs()]
    tokens = _tokenizer(folder).encode(text).ids
    (hidden,) = session.run(None, _feed([tokens], names))[:1]
    pooled: NDArray[np.float32] = hidden[0].mean(axis=0)
    return pooled / np.linalg.norm(pooled)


def _loop(given: argparse.Namespace) -> dict[str, float]:
    session = _session(given.folder / given.model_file, given.threads)
    names = [item.name for item in session.get_inputs()]
    tokenizer = _tokenizer(given.folder)
    texts = sentences(SENTENCES)
    tokens = [item.ids for item in tokenizer.encode_batch(texts)]
    order = list(range(SENTENCES))
    if given.by_length:
        order.sort(key=lambda index: len(tokens[index]))
    groups = batches_of(order, given.batch_size)
    if given.by_length:
        # Each stretch of the loop holds all lengths, or the rate would depend on where it ends.
        np.random.default_rng(3).shuffle(groups)
    ready = [_feed([tokens[index] for index in group], names) for group in groups]
    for feed in ready[:2]:
        session.run(None, feed)
    rows = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for number in itertools.cycle(range(len(groups))):
        feed = ready[number]
        if given.tokenise:
            encoded = tokenizer.encode_batch([texts[index] for index in groups[number]])
            feed = _feed([item.ids for item in encoded], names)
        session.run(None, feed)
        rows += given.batch_size
        elapsed = time.perf_counter() - started
        if elapsed >= given.seconds:
            cpu_s = time.process_time() - cpu_started
            return {"rate": rows / elapsed, "cpu_ms_per_row": cpu_s / rows * 1e3}
    raise AssertionError("the cycle does not end")


def main() -> None:
    """Prints the rate and the CPU time of a row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model_file")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--tokenise", action="store_true")
    parser.add_argument("--by-length", action="store_true")
    print(json.dumps(_loop(parser.parse_args())))


if __name__ == "__main__":
    main()
