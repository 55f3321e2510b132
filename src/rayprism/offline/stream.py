"""Shards through Ray Data, each whole within one actor: no row moves between processes.

A row of the data set is the number of a shard. What an actor gives back is what became of it; the
predictions are in the output folder by then.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data

from rayprism.core.shards import Shard
from rayprism.models.gpu import Device, Gpu, choose_device
from rayprism.offline.commits import OutputFolder
from rayprism.offline.files import Listing
from rayprism.offline.plan import Plan
from rayprism.offline.spec import JobSpec
from rayprism.offline.worker import Outcome, ShardWorker

__all__ = [
    "actor_device",
    "actor_options",
    "actor_threads",
    "outcome_table",
    "outcomes_of",
    "run_stream",
    "shard_numbers",
]


class _Actor:
    """Holds the model.

    Nothing in its constructor can fail: what is wrong with the model is told shard by shard.
    """

    def __init__(
        self,
        spec: JobSpec,
        listing: Listing,
        output: OutputFolder,
        shards: Sequence[Shard],
        threads: int,
        attempts: str,
    ) -> None:
        self._worker = ShardWorker(
            spec,
            listing,
            output,
            threads=threads,
            attempts=attempts,
            place=lambda: actor_device(spec),
        )
        self._shards = {shard.number: shard for shard in shards}

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """What became of shards. In: column `shard`. Out: the fields of `Outcome`."""
        shards = [self._shards[number] for number in numbers["shard"].to_pylist()]
        return outcome_table([self._worker.run(shard) for shard in shards])


def run_stream(
    plan: Plan, output: OutputFolder, shards: Sequence[Shard]
) -> Generator[Outcome, None, None]:
    """Does shards, in any order.

    Args:
        plan: Of the job.
        output: Begun.
        shards: Those to do.

    Yields:
        What became of each, but of those whose actor died again and again.

    Raises:
        ray.exceptions.RayError: Ray itself failed, as when its node is gone.
    """
    spec = plan.spec
    outcomes = shard_numbers(shards).map_batches(
        _Actor,
        fn_constructor_args=(
            spec,
            plan.listing,
            output,
            tuple(shards),
            actor_threads(spec),
            secrets.token_hex(4),
        ),
        batch_size=None,
        batch_format="pyarrow",
        **actor_options(spec),
    )
    yield from outcomes_of(outcomes)


def shard_numbers(shards: Sequence[Shard]) -> ray.data.Dataset:
    """A data set of one block for each shard, so that each is a task of its own."""
    numbers = [{"shard": shard.number} for shard in shards]
    return ray.data.from_items(numbers, override_num_blocks=len(numbers))


def actor_threads(spec: JobSpec) -> int:
    """Threads of one run of the model."""
    return max(1, int(spec.pool.cpus))


def actor_device(spec: JobSpec) -> tuple[Device, Gpu]:
    """The GPU that Ray gave this actor, or a part of one; else the CPU.

    Raises:
        LoadFailed: The job asks for a GPU, and the actor has none.
    """
    assigned = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return choose_device(spec.device, assigned, spec.pool.gpus)


def actor_options(spec: JobSpec) -> dict[str, Any]:
    """What `map_batches` is told of the actors of a job.

    Ray Data starts an actor that died again, and gives it its shards again, without end: they are
    counted in `begin_attempt`.
    """
    pool = spec.pool
    options: dict[str, Any] = {
        "compute": ray.data.ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            initial_size=pool.first_actors,
            # The next shard is there when one ends, and one death costs two shards at most.
            max_tasks_in_flight_per_actor=2,
        ),
        "num_cpus": pool.cpus,
    }
    if pool.gpus:
        options["num_gpus"] = pool.gpus
    if spec.limits.max_memory_bytes is not None:
        options["memory"] = spec.limits.max_memory_bytes
    return options


def outcome_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """Outcomes as rows."""
    return pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], _OUTCOMES)


def outcomes_of(dataset: ray.data.Dataset) -> Iterator[Outcome]:
    """The outcomes that a data set gives, as they come."""
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in batches:
        for row in batch.to_pylist():
            yield Outcome(**row)


_OUTCOMES = pa.schema(
    [
        ("shard", pa.int64()),
        ("rows_in", pa.int64()),
        ("dead_letters", pa.int64()),
        ("seconds", pa.float64()),
        ("rss_bytes", pa.int64()),
        ("error", pa.string()),
        ("worker", pa.string()),
    ]
)
