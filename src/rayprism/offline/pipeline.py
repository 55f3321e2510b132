"""Shards through three stages of Ray Data: tasks prepare, actors predict, tasks write.

CPUs tokenize and decode ahead while a GPU predicts. A row of the data set is a whole shard, so that
one task commits it as a whole, as in `stream`; Ray Data would cut blocks of plain rows by their
size, and nobody would know which of them make a shard.
"""

from __future__ import annotations

import functools
import pickle
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pyarrow as pa

from rayprism.core.shards import Shard
from rayprism.models.loader import Preprocessing, load_model, load_preprocessing
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder
from rayprism.offline.parts import Part, ShardParts, map_columns, predicted
from rayprism.offline.plan import Plan
from rayprism.offline.predictor import Predictor
from rayprism.offline.spec import JobSpec
from rayprism.offline.stream import (
    actor_device,
    actor_options,
    actor_threads,
    outcome_table,
    outcomes_of,
    shard_numbers,
)
from rayprism.offline.worker import (
    EXPECTED,
    Outcome,
    begin_attempt,
    check_memory,
    failed,
    new_worker_name,
    write_parts,
)

__all__ = ["run_pipeline"]


@dataclass(frozen=True, slots=True)
class _Stages:
    """What every stage needs to know."""

    spec: JobSpec
    listing: Any
    output: OutputFolder
    shards: dict[int, Shard]
    token: str


@dataclass(slots=True)
class _Load:
    """A shard between two stages: its parts, or why there are none; and what became of it."""

    shard: int
    parts: list[Part]
    seconds: float = 0.0
    rss_bytes: int = 0
    error: str | None = None
    worker: str = ""
    done: Outcome | None = None


def run_pipeline(
    plan: Plan, output: OutputFolder, shards: Sequence[Shard]
) -> Generator[Outcome, None, None]:
    """Does shards, in any order.

    Args:
        plan: Of the job.
        output: Begun.
        shards: Those to do.

    Yields:
        What became of each.

    Raises:
        ray.exceptions.RayError: Ray itself failed, as when its node is gone.
    """
    spec = plan.spec
    stages = _Stages(
        spec,
        plan.listing,
        output,
        {shard.number: shard for shard in shards},
        secrets.token_hex(4),
    )
    tasks: dict[str, Any] = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "num_cpus": 1,
        # Ray Data does tasks within the actors where the options of both are the same.
        "max_calls": 10_000,
    }
    outcomes = (
        shard_numbers(shards)
        .map_batches(functools.partial(_prepare, stages), **tasks)
        .map_batches(
            _Actor,
            fn_constructor_args=(stages,),
            batch_size=None,
            batch_format="pyarrow",
            **actor_options(spec),
        )
        .map_batches(functools.partial(_write, stages), **tasks)
    )
    yield from outcomes_of(outcomes)


def _prepare(stages: _Stages, numbers: pa.Table) -> pa.Table:
    """First stage: reads shards, and does the pre-processing. In: column `shard`."""
    spec = stages.spec

    def prepare(load: _Load) -> None:
        shard = stages.shards[load.shard]
        begin_attempt(stages.output, shard, f"{stages.token}-prepare")
        model = _preprocessing(spec.repository_path(), spec.model, spec.version, spec.allow_code)
        predictor = Predictor(model, spec.limits.batch_rows)
        columns = map_columns(spec, stages.listing, model.manifest)
        parts = ShardParts(spec, stages.listing, columns, predictor.limits.max_rows)
        for part in parts.read(shard):
            if model.has_prepare:
                part.take(predictor.prepare(part.tensors, int(part.ok.sum())))
            load.parts.append(part)

    loads = [_Load(number, []) for number in numbers["shard"].to_pylist()]
    return _packed([_timed(stages, load, prepare) for load in loads])


class _Actor:
    """Second stage: holds the model.

    Nothing in its constructor can fail: what is wrong with the model is told shard by shard.
    """

    def __init__(self, stages: _Stages) -> None:
        self._stages = stages
        self._predictor: Predictor | None = None
        self._process = psutil.Process()
        self._name = new_worker_name()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predicts shards."""
        return _packed([_timed(self._stages, load, self._predict) for load in _unpacked(table)])

    def _predict(self, load: _Load) -> None:
        stages, spec = self._stages, self._stages.spec
        begin_attempt(stages.output, stages.shards[load.shard], f"{stages.token}-predict")
        if self._predictor is None:
            version = Repository(spec.repository_path()).version(spec.model, spec.version)
            device, gpu = actor_device(spec)
            model = load_model(
                version,
                allow_code=spec.allow_code,
                threads=actor_threads(spec),
                device=device,
                gpu=gpu,
                options=spec.options,
            )
            self._predictor = Predictor(model, spec.limits.batch_rows)
        load.parts = list(predicted(self._predictor, load.parts, prepared=True))
        load.rss_bytes, load.worker = self._process.memory_info().rss, self._name
        check_memory(self._process, spec.limits.max_memory_bytes)


def _write(stages: _Stages, table: pa.Table) -> pa.Table:
    """Third stage: writes and commits shards. Out: the fields of `Outcome`."""
    spec = stages.spec

    def commit(load: _Load) -> None:
        shard = stages.shards[load.shard]
        version = Repository(spec.repository_path()).version(spec.model, spec.version)
        columns = map_columns(spec, stages.listing, version.manifest)
        how = ShardParts(spec, stages.listing, columns, 1)
        load.done = write_parts(stages.output, shard, how, load.parts, lambda: load.seconds)

    outcomes = []
    for load in _unpacked(table):
        _timed(stages, load, commit)
        done = load.done or Outcome(load.shard, error=load.error)
        told = replace(done, seconds=load.seconds, rss_bytes=load.rss_bytes, worker=load.worker)
        outcomes.append(told)
    return outcome_table(outcomes)


def _timed(stages: _Stages, load: _Load, do: Callable[[_Load], None]) -> _Load:
    """Does a stage's work on a shard that is well so far."""
    if load.error is not None:
        return load
    began_s = time.monotonic()
    try:
        do(load)
    except EXPECTED as error:
        load.parts = []
        load.error = failed(stages.shards[load.shard], error).error
    load.seconds += time.monotonic() - began_s
    return load


@functools.lru_cache(maxsize=4)
def _preprocessing(repository: Any, model: str, version: int, allow_code: bool) -> Preprocessing:
    """Once in a process, which does many tasks."""
    return load_preprocessing(Repository(repository).version(model, version), allow_code=allow_code)


def _packed(loads: Sequence[_Load]) -> pa.Table:
    # By pickle, as Ray itself passes values between processes of one job.
    data = [pickle.dumps(load, protocol=pickle.HIGHEST_PROTOCOL) for load in loads]
    return pa.table({"load": pa.array(data, pa.large_binary())})


def _unpacked(table: pa.Table) -> list[_Load]:
    return [pickle.loads(value.as_buffer()) for value in table["load"]]
