"""Runs a batch job to its end: plans, works in rounds, survives what dies, finishes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rayprism.core.shards import Shard
from rayprism.errors import RayprismError, SetupError
from rayprism.offline.commits import OutputFolder, Totals
from rayprism.offline.files import open_filesystem
from rayprism.offline.lease import Lease
from rayprism.offline.metrics import JobMetrics, exported
from rayprism.offline.plan import Plan, plan_job
from rayprism.offline.progress import Reporter, describe_s
from rayprism.offline.spec import JobSpec
from rayprism.offline.worker import Outcome

__all__ = [
    "JobFailed",
    "JobRun",
    "Summary",
    "describe",
    "describe_letter",
    "open_output",
    "run_job",
    "run_rounds",
]

_ROUNDS_WITHOUT_PROGRESS = 3
_PAUSES_S = (1.0, 5.0)
"""Between rounds that did nothing: a store that is away for a moment may come back."""
_MOST_REASONS = 5
_MIB = 1024**2

RunShards = Callable[[Plan, OutputFolder, Sequence[Shard]], Generator[Outcome, None, None]]


class JobFailed(SetupError):
    """A job ended before it was done. What is committed stays; the same command goes on."""

    code = "job_failed"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did.

    Args:
        totals: Of the whole output.
        seconds: That this run took, by the clock.
        rows: Rows of the input that this run did.
        peak_rss_bytes: Most memory of an actor after a shard; 0 where there was nothing to do.
    """

    totals: Totals
    seconds: float
    rows: int
    peak_rss_bytes: int


def open_output(plan: Plan) -> OutputFolder:
    """The folder that a job writes to."""
    output = plan.spec.output
    return OutputFolder(*open_filesystem(output.uri), compression=output.compression)


def run_job(
    spec: JobSpec,
    *,
    local: bool = False,
    restart: bool = False,
    say: Callable[[str], None] | None = None,
    source: str = "job",
) -> Summary:
    """Does what is missing of a job.

    Args:
        spec: The job.
        local: Whether on this machine alone, with a Ray of its own.
        restart: Whether to throw away what an earlier job wrote to the output.
        say: Tells the person; by default lines, and how far it is, on standard error.
        source: What the job was read from, for messages.

    Raises:
        ConfigInvalid, RepositoryError, SetupError: Something is wrong with the job, its input or
            its output; nothing was done.
        JobChanged, OutputBusy: The output is another job's, or another driver's.
        JobFailed: It ended before it was done.
    """
    began_s = time.monotonic()
    plan = plan_job(spec, source)
    output = open_output(plan)
    with output.lease() as lease:
        output.begin(plan.identity(), len(plan.shards), restart)
        damaged = output.verify()
        done = output.done()
        reporter = Reporter(plan.shards, done, output.totals())
        tell = say or reporter.say
        if damaged:
            tell(f"{len(damaged)} shards are done again: their files are damaged or gone")
        tell(_describe(plan, len(done)))
        before = reporter.rows
        if len(done) < len(plan.shards):
            work = JobRun(plan, output, lease, reporter, tell)
            work.check_dead_letters()
            _run_rounds(work, local=local)
        totals = output.finished()
        if totals is None:
            totals = output.finish({"rows_per_second": _rate(reporter, before)})
    return Summary(
        totals, time.monotonic() - began_s, reporter.rows - before, reporter.peak_rss_bytes
    )


def _rate(reporter: Reporter, before: int) -> float:
    elapsed_s = reporter.elapsed_s
    return round((reporter.rows - before) / elapsed_s, 1) if elapsed_s > 0 else 0.0


def _describe(plan: Plan, done: int) -> str:
    rows = "" if plan.rows is None else f", {plan.rows:,} rows"
    pool = plan.spec.pool
    actors = (
        f"{pool.max_actors}"
        if pool.min_actors == pool.max_actors
        else f"{pool.min_actors} to {pool.max_actors}"
    )
    gone_on = f"; {done:,} of them are done already" if done else ""
    return (
        f"model {plan.manifest.model} version {plan.manifest.version}, "
        f"{len(plan.listing.files):,} files{rows}, {len(plan.shards):,} shards{gone_on}\n"
        f"{actors} actors, mode {plan.way}, to {plan.spec.output.uri}"
    )


@dataclass(slots=True)
class JobRun:
    """One run: what is to be done, and what became of it."""

    plan: Plan
    output: OutputFolder
    lease: Lease
    reporter: Reporter
    say: Callable[[str], None]
    errors: Counter[str] = field(default_factory=Counter)
    """Why shards failed, in the newest round."""
    metrics: JobMetrics = field(init=False)

    def __post_init__(self) -> None:
        manifest = self.plan.manifest
        self.metrics = JobMetrics(
            batch_job=self.plan.spec.job_name,
            model=manifest.model,
            version=str(manifest.version),
        )

    def missing(self) -> list[Shard]:
        """What is not committed."""
        done = self.output.done()
        left = [shard for shard in self.plan.shards if shard.number not in done]
        self.metrics.begin_round([shard.number for shard in left])
        return left

    def check_dead_letters(self) -> None:
        """Raises JobFailed where there are more than the job allows."""
        most = self.plan.spec.limits.max_dead_letters
        count = self.reporter.dead_letters
        if count > most:
            some = self.output.letters(_MOST_REASONS)
            reasons = "".join(f"\n  {describe_letter(letter)}" for letter in some)
            raise JobFailed(
                f"{count:,} dead letters, limits.max_dead_letters allows {most:,}. Some of "
                f"them:{reasons}\nAll of them: {self.plan.spec.output.uri}/_dead_letters. What is "
                "done stays; with a higher limit the same command goes on"
            )

    def take(self, outcome: Outcome) -> None:
        """A shard was done, or failed."""
        self.lease.check()
        self.reporter.take(outcome)
        self.metrics.record(outcome)
        if outcome.error is not None:
            self.errors[outcome.error] += 1
        self.check_dead_letters()


def _run_rounds(work: JobRun, *, local: bool) -> None:
    # Only here: the import of Ray Data takes seconds, and a job that cannot be planned needs none.
    from rayprism.offline.ray_session import ray_session

    piped = work.plan.way == "pipeline"
    with ExitStack() as stack:
        stack.enter_context(
            ray_session(work.plan.spec, local=local, moves_rows=piped, say=work.say)
        )
        if not local:  # nobody asks a Ray that only this job has
            stack.enter_context(exported(work.metrics))
        run_rounds(work, _way(piped))


def _way(piped: bool) -> RunShards:
    if piped:
        from rayprism.offline.pipeline import run_pipeline

        return run_pipeline
    from rayprism.offline.stream import run_stream

    return run_stream


def run_rounds(work: JobRun, run: RunShards, pause: Callable[[float], None] = time.sleep) -> None:
    """Does what is missing, round by round, for as long as rounds get anything done.

    An actor that dies, a node that goes, a start that fails cost what was being done, and the next
    round has it again.

    Raises:
        JobFailed: Nothing was done in three rounds in a row, or there are too many dead letters.
    """
    idle = 0
    missing = work.missing()
    while missing:
        work.errors.clear()
        _run_round(work, run, missing)
        left = work.missing()
        idle = 0 if len(left) < len(missing) else idle + 1
        missing = left
        if not missing:
            return
        if idle == _ROUNDS_WITHOUT_PROGRESS:
            raise JobFailed(_stuck(work, missing))
        what = next(iter(work.errors), "their actors died")
        work.say(f"{len(missing):,} shards are to be done again: {what}")
        if idle:
            pause(_PAUSES_S[min(idle, len(_PAUSES_S)) - 1])


def _run_round(work: JobRun, run: RunShards, missing: Sequence[Shard]) -> None:
    # Where everything fails, as where the model cannot be loaded, not every shard has to.
    enough = max(8, 4 * work.plan.spec.pool.max_actors)
    succeeded = False
    outcomes = run(work.plan, work.output, missing)
    try:
        for outcome in outcomes:
            work.take(outcome)
            succeeded |= outcome.error is None
            if not succeeded and work.errors.total() >= enough:
                break
    except RayprismError:
        raise
    except Exception as error:
        # Of Ray, in any of its many classes: this round is over, and says so if it is the last.
        work.errors[f"{type(error).__name__}: {str(error).strip()[:2000]}"] += 1
    finally:
        outcomes.close()


def _stuck(work: JobRun, missing: Sequence[Shard]) -> str:
    files = list(dict.fromkeys(work.plan.listing.path(shard.file) for shard in missing))
    reasons = "".join(
        f"\n  {count} x {reason}" for reason, count in work.errors.most_common(_MOST_REASONS)
    )
    told = reasons or (
        "\n  their actors died, each time: too little memory, or a crash in the model's runtime"
    )
    more = f" and {len(files) - 3:,} more files" if len(files) > 3 else ""
    return (
        f"{len(missing):,} of {len(work.plan.shards):,} shards could not be done, in "
        f"{_ROUNDS_WITHOUT_PROGRESS} rounds (of {', '.join(files[:3])}{more}):{told}\n"
        "What is done stays; the same command goes on"
    )


def describe_letter(letter: Mapping[str, Any]) -> str:
    """A dead letter in a line."""
    place = next((f", {unit} {letter[unit]}" for unit in ("row", "byte") if unit in letter), "")
    return f"{letter['file']}{place}: {letter['reason']}"


def describe(summary: Summary) -> str:
    """A run in a few lines, for a person."""
    totals = summary.totals
    lines = [
        f"done: {totals.rows_in:,} rows in, {totals.rows_out:,} predicted, "
        f"{totals.dead_letters:,} dead letters, {totals.shards:,} shards"
    ]
    if summary.rows:
        lines.append(
            f"this run: {summary.rows:,} rows in {describe_s(summary.seconds)}, "
            f"{summary.rows / summary.seconds:,.0f} rows/s, start-up included; at most "
            f"{summary.peak_rss_bytes / _MIB:,.0f} MiB in an actor"
        )
    else:
        lines.append("nothing was left to do")
    return "\n".join(lines)
