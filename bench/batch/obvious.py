"""The obvious way with Ray Data: `read_parquet -> map_batches(class) -> write_parquet`.

As Ray's documentation shows batch inference, with what anyone would add after a first try: a
session of one thread, only the columns that are needed, no progress bars and no dashboard. Spared
are the columns that say which model it was, and every check. Runs as a process of its own:
`python -m bench.batch.obvious ...`, with a Ray of its own on this machine.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

__all__ = ["main"]

_INPUTS = ("month", "hour", "minute", "distance", "carrier", "origin", "dest")


class Predictor:
    """Holds the model; called with batches.

    Args:
        path: Of the ONNX file.
        passthrough: Columns that are copied.
    """

    def __init__(self, path: str, passthrough: list[str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._output = self._session.get_outputs()[0].name
        self._passthrough = passthrough

    def __call__(self, batch: Any) -> Any:
        """Predicts a batch: columns as NumPy arrays, or a `pyarrow.Table`."""
        if isinstance(batch, pa.Table):
            (probability,) = self._session.run(
                [self._output], {name: batch[name].to_numpy() for name in _INPUTS}
            )
            kept = batch.select(self._passthrough)
            return kept.append_column(self._output, pa.array(probability))
        feed = {name: batch[name] for name in _INPUTS}
        (probability,) = self._session.run([self._output], feed)
        kept = {name: batch[name] for name in self._passthrough}
        return {**kept, self._output: probability}


def main() -> None:
    """Predicts everything that is in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the version")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--passthrough", required=True, help="columns that are copied: a,b")
    parser.add_argument("--actors", type=int, required=True)
    parser.add_argument("--actor-cpus", type=float, required=True)
    parser.add_argument("--ray-cpus", type=int, required=True, help="what Ray thinks there are")
    parser.add_argument("--batch-format", choices=("numpy", "pyarrow"), required=True)
    parser.add_argument("--batch-size", type=int, default=4096)
    given = parser.parse_args()
    passthrough = given.passthrough.split(",")
    ray.init(
        address="local",
        num_cpus=given.ray_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        columns = list(dict.fromkeys((*passthrough, *_INPUTS)))
        ray.data.read_parquet(str(given.input), columns=columns).map_batches(
            Predictor,
            fn_constructor_args=(str(given.model / "model.onnx"), passthrough),
            batch_format=given.batch_format,
            batch_size=given.batch_size,
            compute=ray.data.ActorPoolStrategy(size=given.actors),
            num_cpus=given.actor_cpus,
        ).write_parquet(str(given.output), compression="zstd")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
