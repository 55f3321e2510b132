"""Does one shard after the other: read, map, predict, write, commit.

Knows no Ray: actors, a run on a laptop and tests all use it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pyarrow as pa

from rayprism.core.shards import Shard
from rayprism.errors import RayprismError, SetupError
from rayprism.models.gpu import Device, Gpu
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder
from rayprism.offline.files import Listing
from rayprism.offline.parts import Part, ShardParts, map_columns, predicted
from rayprism.offline.predictor import Predictor
from rayprism.offline.spec import JobSpec

__all__ = [
    "EXPECTED",
    "Outcome",
    "ShardWorker",
    "begin_attempt",
    "check_memory",
    "failed",
    "new_worker_name",
    "write_parts",
]

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a shard.

    Args:
        shard: Its number.
        rows_in: Rows of the input; 0 where it failed.
        dead_letters: Rows that could not be predicted.
        seconds: That it took.
        rss_bytes: Memory of the process afterwards.
        error: Why it is not done; None where it is.
        worker: Tells the actors of a run apart: who predicted it.
    """

    shard: int
    rows_in: int = 0
    dead_letters: int = 0
    seconds: float = 0.0
    rss_bytes: int = 0
    error: str | None = None
    worker: str = ""


class ShardWorker:
    """Predicts shards, with a model that is loaded when the first one comes.

    Args:
        spec: The job.
        listing: Its input.
        output: Where it writes, begun by the driver.
        threads: Of one run of the model.
        attempts: Names this round, in which a shard that ends its process is begun three times at
            most. By default shards are not counted.
        place: Says where the model runs, when it is loaded. By default as the job says, with the
            first GPU that is visible.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        spec: JobSpec,
        listing: Listing,
        output: OutputFolder,
        *,
        threads: int = 1,
        attempts: str | None = None,
        place: Callable[[], tuple[Device, Gpu]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._listing = listing
        self._output = output
        self._threads = threads
        self._attempts = attempts
        self._place = place or (lambda: (spec.device, Gpu()))
        self._clock = clock
        self._loaded: tuple[ShardParts, Predictor, LoadedModel] | None = None
        self._process = psutil.Process()
        self._name = new_worker_name()

    def run(self, shard: Shard) -> Outcome:
        """Does a shard, or says why it could not be done: one shard's failure is its own."""
        began_s = self._clock()
        try:
            if self._attempts is not None:
                begin_attempt(self._output, shard, self._attempts)
            parts, predictor = self._load()
            done = write_parts(
                self._output,
                shard,
                parts,
                self._bounded(predicted(predictor, parts.read(shard))),
                lambda: self._clock() - began_s,
            )
        except EXPECTED as error:
            return failed(shard, error, self._clock() - began_s)
        rss = self._process.memory_info().rss
        seconds = self._clock() - began_s
        return replace(done, seconds=seconds, rss_bytes=rss, worker=self._name)

    def load(self) -> None:
        """Loads the model, which the first shard does otherwise.

        Raises:
            RayprismError: It cannot be loaded, or is not for this input.
        """
        self._load()

    def predict(self, shard: Shard) -> Iterator[tuple[pa.Table | None, list[dict[str, Any]]]]:
        """Reads and predicts a shard, and writes nothing.

        Yields:
            Of some rows at a time: those of the output, None where there are none; and the dead
            letters. Each row is in one of them.

        Raises:
            RayprismError: The shard cannot be done.
        """
        parts, predictor = self._load()
        for part in predicted(predictor, parts.read(shard)):
            yield parts.finish(shard, part)

    def _bounded(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            check_memory(self._process, self._spec.limits.max_memory_bytes)
            yield part

    def close(self) -> None:
        """Lets go of the model."""
        if self._loaded is not None:
            self._loaded[2].close()
            self._loaded = None

    def _load(self) -> tuple[ShardParts, Predictor]:
        if self._loaded is None:
            spec = self._spec
            version = Repository(spec.repository_path()).version(spec.model, spec.version)
            columns = map_columns(spec, self._listing, version.manifest)
            device, gpu = self._place()
            model = load_model(
                version,
                allow_code=spec.allow_code,
                threads=self._threads,
                device=device,
                gpu=gpu,
                options=spec.options,
            )
            predictor = Predictor(model, spec.limits.batch_rows)
            parts = ShardParts(
                spec, self._listing, columns, predictor.limits.max_rows, self._threads
            )
            self._loaded = (parts, predictor, model)
        return self._loaded[0], self._loaded[1]


def write_parts(
    output: OutputFolder,
    shard: Shard,
    how: ShardParts,
    parts: Iterable[Part],
    seconds: Callable[[], float],
) -> Outcome:
    """Writes and commits a shard.

    Args:
        output: Where to.
        shard: Which.
        how: Makes rows of parts.
        parts: Predicted.
        seconds: That the shard has taken so far.

    Raises:
        RayprismError: It cannot be written.
    """
    rows_in = dead_letters = 0
    with output.writer(shard.number, how.folder(shard)) as writer:
        for part in parts:
            table, letters = how.finish(shard, part)
            writer.write(table, letters)
            rows_in += len(letters) + (0 if table is None else table.num_rows)
            dead_letters += len(letters)
        writer.commit(rows_in, seconds())
    return Outcome(shard.number, rows_in, dead_letters)


EXPECTED = (RayprismError, OSError, pa.ArrowException, MemoryError)
"""What ends a shard, and not the process that works on it."""


_ATTEMPTS = 3


def new_worker_name() -> str:
    """A name for `Outcome.worker` that no other actor has."""
    return secrets.token_hex(8)


def begin_attempt(output: OutputFolder, shard: Shard, token: str) -> None:
    """Notes that a shard is begun, and refuses one that has ended its process again and again.

    Args:
        output: Of the job.
        shard: Which.
        token: Of the round, and of what is begun.

    Raises:
        SetupError: It was begun three times in this round.
    """
    if not output.attempt(shard.number, token, _ATTEMPTS):
        raise SetupError(
            f"the process that worked on this shard died {_ATTEMPTS} times: too little memory, or "
            "a crash in the model's runtime"
        )


def failed(shard: Shard, error: BaseException, seconds: float = 0.0) -> Outcome:
    """The outcome of a shard that could not be done."""
    rss = psutil.Process().memory_info().rss
    told = f"{type(error).__name__}: {error}"
    return Outcome(shard.number, seconds=seconds, rss_bytes=rss, error=told)


def check_memory(process: psutil.Process, most_bytes: int | None) -> None:
    """Ends what has grown over its bound.

    Raises:
        SetupError: The process has more memory than is allowed.
    """
    rss = process.memory_info().rss
    if most_bytes is not None and rss > most_bytes:
        raise SetupError(
            f"an actor has {rss / _MIB:,.0f} MiB of memory, limits.max_memory_bytes allows "
            f"{most_bytes / _MIB:,.0f} MiB. Lower limits.batch_rows, or shard_rows where the mode "
            "is pipeline; or allow more"
        )
