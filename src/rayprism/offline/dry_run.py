"""Says what a job would do, and tries it on a few rows. Writes nothing, and needs no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from rayprism.models.manifest import Manifest
from rayprism.offline.commits import JobChanged
from rayprism.offline.images import input_columns
from rayprism.offline.job import describe_letter, open_output
from rayprism.offline.plan import Plan, plan_job, prepares
from rayprism.offline.progress import describe_s
from rayprism.offline.spec import JobSpec
from rayprism.offline.worker import ShardWorker

__all__ = ["dry_run"]

_TRIAL_S = 3.0
_MOST_SHOWN = 3
_START_UP_S = 10
"""Of Ray and its actors, on a machine of two cores."""


@dataclass(slots=True)
class _Trial:
    """What a few batches showed."""

    load_s: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    letters: int = 0
    reasons: tuple[str, ...] = ()
    table: pa.Table | None = None


def dry_run(spec: JobSpec, source: str = "job") -> str:
    """Plans a job, runs its first batches in this process, and estimates the rest.

    Args:
        spec: The job.
        source: What it was read from, for messages.

    Returns:
        Lines for a person.

    Raises:
        RayprismError: Whatever a run would raise before it works, and what the model raises.
    """
    plan = plan_job(spec, source)
    state = _output_state(plan)
    trial = _try(plan)
    return "\n".join([*_plan_lines(plan, state), *_trial_lines(trial), *_estimate(plan, trial)])


def _plan_lines(plan: Plan, state: str) -> Iterator[str]:
    manifest, spec = plan.manifest, plan.spec
    sizes = sum(facts.size_bytes for facts in plan.listing.files)
    rows = "rows unknown until they are read" if plan.rows is None else f"{plan.rows:,} rows"
    yield f"model    {manifest.model} version {manifest.version}, {manifest.digest}"
    yield (
        f"input    {len(plan.listing.files):,} {plan.listing.format} files, {sizes / 1e6:,.1f} MB, "
        f"{rows}, {len(plan.shards):,} shards"
    )
    if plan.listing.passed_over:
        yield f"           {plan.listing.passed_over:,} other files are passed over"
    mapped = input_columns(spec.input, manifest)
    for item in manifest.inputs:
        columns = mapped.get(item.name, (item.name,))
        shape = f"{item.datatype.value} {list(item.shape)}"
        yield f"           {item.name} {shape}  <-  {_columns(plan, columns)}"
    yield f"output   {spec.output.uri}: {state}"
    if plan.columns.passthrough:
        yield f"           copied: {', '.join(plan.columns.passthrough)}"
    yield f"actors   {_actors(plan)}"
    yield f"mode     {plan.way}: {_why(plan, manifest)}"


def _columns(plan: Plan, columns: tuple[str, ...]) -> str:
    told = [
        f"{name} ({plan.listing.schema.field(name).type})"
        for name in columns[:_MOST_SHOWN]
        if name in plan.listing.schema.names
    ]
    more = f", and {len(columns) - _MOST_SHOWN} more" if len(columns) > _MOST_SHOWN else ""
    return f"{', '.join(told) or ', '.join(columns[:_MOST_SHOWN])}{more}"


def _actors(plan: Plan) -> str:
    pool = plan.spec.pool
    gpus = f" and {pool.gpus:g} GPUs" if pool.gpus else ""
    return (
        f"{pool.first_actors} at the start, {pool.min_actors} to {pool.max_actors}, "
        f"{pool.cpus:g} CPUs{gpus} each"
    )


def _why(plan: Plan, manifest: Manifest) -> str:
    if plan.spec.mode != "auto":
        return "as the job says"
    if plan.way == "pipeline":
        return "the actors have GPUs, and CPUs have rows to prepare"
    if plan.spec.pool.gpus:
        return "nothing has to be prepared for the GPUs"
    what = "pre-processing runs in the actors too" if prepares(manifest) else "no pre-processing"
    return f"no GPUs; {what}, and no row moves between processes"


def _output_state(plan: Plan) -> str:
    output = open_output(plan)
    try:
        output.check(plan.identity(), len(plan.shards))
    except JobChanged as error:
        return f"would be refused: {error}"
    if output.finished() is not None:
        return "complete; a run would do nothing"
    done = len(output.done())
    if done:
        return f"{done:,} of {len(plan.shards):,} shards are done; a run would do the others"
    return "new"


def _try(plan: Plan) -> _Trial:
    """Runs batches for a few seconds."""
    trial = _Trial()
    worker = ShardWorker(
        plan.spec, plan.listing, open_output(plan), threads=max(1, int(plan.spec.pool.cpus))
    )
    try:
        began_s = time.perf_counter()
        worker.load()
        trial.load_s = time.perf_counter() - began_s
        until_s = time.perf_counter() + _TRIAL_S
        for shard in plan.shards:
            began_s = time.perf_counter()
            for table, letters in worker.predict(shard):
                now_s = time.perf_counter()
                trial.rows += (0 if table is None else table.num_rows) + len(letters)
                trial.seconds += now_s - began_s
                trial.letters += len(letters)
                trial.reasons = (*trial.reasons, *map(describe_letter, letters))[:_MOST_SHOWN]
                if trial.table is None and table is not None:
                    trial.table = table.slice(0, _MOST_SHOWN)
                began_s = now_s
                if now_s > until_s:
                    return trial
    finally:
        worker.close()
    return trial


def _trial_lines(trial: _Trial) -> Iterator[str]:
    yield (
        f"tried    loaded in {trial.load_s:.1f} s; {trial.rows:,} rows in {trial.seconds:.1f} s, "
        f"{trial.letters:,} dead letters"
    )
    for reason in trial.reasons:
        yield f"           {reason}"
    if trial.table is not None:
        yield "rows     as they would be written:"
        for row in trial.table.to_pylist():
            yield f"           {json.dumps(row, default=str):.300}"


def _estimate(plan: Plan, trial: _Trial) -> Iterator[str]:
    if not trial.rows or not trial.seconds:
        yield "estimate none: no row was predicted"
        return
    rate = trial.rows / trial.seconds
    actors = plan.spec.pool.max_actors
    told = f"estimate {rate:,.0f} rows/s in one actor of this machine"
    if plan.rows is not None:
        seconds = plan.rows / (rate * actors) + _START_UP_S
        told += f", so about {describe_s(seconds)} with {actors} actors, if each has its own cores"
    yield told
    share = trial.letters / trial.rows
    if plan.rows is not None and share * plan.rows > plan.spec.limits.max_dead_letters:
        yield (
            f"warning  at this rate there would be {share * plan.rows:,.0f} dead letters, and "
            f"limits.max_dead_letters is {plan.spec.limits.max_dead_letters:,}"
        )
