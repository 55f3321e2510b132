"""Rounds, dead letters and refusals of a job, with a real worker and without Ray."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprism.core.shards import Shard
from rayprism.errors import ConfigInvalid, RepositoryError
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import JobChanged, OutputFolder
from rayprism.offline.dry_run import dry_run
from rayprism.offline.job import JobFailed, JobRun, RunShards, open_output, run_rounds
from rayprism.offline.plan import Plan, plan_job, with_absolute_uris
from rayprism.offline.progress import Reporter
from rayprism.offline.spec import JobSpec, parse_spec
from rayprism.offline.worker import Outcome, ShardWorker
from tests.support.models import mlp_example, save_mlp

ROWS, SHARDS = 1000, 10


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1: input `x` FP32 [-1, 4], output `y` FP32 [-1, 3]."""
    folder = tmp_path_factory.mktemp("job-models")
    path = save_mlp(folder / "tiny.onnx")
    push_model(Repository(folder / "models"), "tiny", path, example=mlp_example())
    return folder / "models"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    data = np.random.default_rng(3).standard_normal((ROWS, 4)).astype(np.float32)
    columns: dict[str, Any] = {name: data[:, index] for index, name in enumerate("abcd")}
    table = pa.table({"id": pa.array(range(ROWS)), **columns})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=ROWS // SHARDS)
    return tmp_path / "in.parquet"


@pytest.fixture
def job(repository: Path, source: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(**more: Any) -> JobSpec:
        document = {
            "model": "tiny",
            "version": "1",
            "repository": str(repository),
            "input": {"uri": str(source), "columns": {"x": list("abcd")}},
            "output": {"uri": str(tmp_path / "out"), "passthrough": ["id"]},
            "limits": {"shard_rows": ROWS // SHARDS},
        }
        return parse_spec(document | more)

    return make


class Desk:
    """One run of a job, up to where Ray would come in."""

    def __init__(self, spec: JobSpec) -> None:
        self.plan = plan_job(spec)
        self.output = open_output(self.plan)
        self.told: list[str] = []
        self.pauses: list[float] = []

    def run(self, run: RunShards) -> None:
        with self.output.lease() as lease:
            self.output.begin(self.plan.identity(), len(self.plan.shards))
            reporter = Reporter(
                self.plan.shards, self.output.done(), self.output.totals(), io.StringIO()
            )
            work = JobRun(self.plan, self.output, lease, reporter, self.told.append)
            run_rounds(work, run, self.pauses.append)


def in_this_process(
    plan: Plan, output: OutputFolder, shards: Sequence[Shard]
) -> Generator[Outcome, None, None]:
    worker = ShardWorker(plan.spec, plan.listing, output)
    try:
        for shard in shards:
            yield worker.run(shard)
    finally:
        worker.close()


def ids(spec: JobSpec) -> list[int]:
    parts = sorted(Path(spec.output.uri).glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part)["id"].to_pylist()]


def test_a_round_does_everything(job: Callable[..., JobSpec]) -> None:
    desk = Desk(job())
    desk.run(in_this_process)
    assert ids(desk.plan.spec) == list(range(ROWS))
    assert desk.told == []
    assert desk.output.finish().rows_out == ROWS


def test_what_a_round_leaves_out_is_done_in_the_next(job: Callable[..., JobSpec]) -> None:
    asked: list[list[int]] = []

    def dies_on_the_way(
        plan: Plan, output: OutputFolder, shards: Sequence[Shard]
    ) -> Generator[Outcome, None, None]:
        asked.append([shard.number for shard in shards])
        yield from in_this_process(plan, output, shards[:4])
        raise ConnectionError("the node is gone")

    desk = Desk(job())
    desk.run(dies_on_the_way)
    assert ids(desk.plan.spec) == list(range(ROWS))
    assert asked == [list(range(10)), list(range(4, 10)), [8, 9]]
    assert "ConnectionError: the node is gone" in desk.told[0]
    assert desk.pauses == [], "it got on in each round"


def test_three_rounds_without_progress_end_it(job: Callable[..., JobSpec]) -> None:
    rounds = 0

    def fails(
        plan: Plan, output: OutputFolder, shards: Sequence[Shard]
    ) -> Generator[Outcome, None, None]:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            yield from in_this_process(plan, output, shards[:3])
        for shard in shards[3:] if rounds == 1 else shards:
            yield Outcome(shard.number, error="LoadFailed: no such library")

    desk = Desk(job())
    with pytest.raises(JobFailed, match="7 of 10 shards could not be done") as failed:
        desk.run(fails)
    assert "7 x LoadFailed: no such library" in str(failed.value)
    assert "in.parquet" in str(failed.value)
    assert rounds == 4
    assert len(desk.pauses) == 2, "a store that is away may come back"
    assert desk.output.done() == {0, 1, 2}, "what is done stays"


def test_where_everything_fails_not_every_shard_has_to(job: Callable[..., JobSpec]) -> None:
    tried: list[int] = []

    def fails(
        plan: Plan, output: OutputFolder, shards: Sequence[Shard]
    ) -> Generator[Outcome, None, None]:
        for shard in shards:
            tried.append(shard.number)
            yield Outcome(shard.number, error="LoadFailed: no such library")

    desk = Desk(job(pool={"min_actors": 1, "max_actors": 1}))
    with pytest.raises(JobFailed, match="no such library"):
        desk.run(fails)
    assert tried == [*range(8)] * 3


def test_a_round_that_is_left_is_closed(job: Callable[..., JobSpec]) -> None:
    closed = False

    def endless(
        plan: Plan, output: OutputFolder, shards: Sequence[Shard]
    ) -> Generator[Outcome, None, None]:
        nonlocal closed
        try:
            while True:
                yield Outcome(0, rows_in=1, dead_letters=1)
        finally:
            closed = True

    with pytest.raises(JobFailed, match="max_dead_letters"):
        Desk(job(limits={"max_dead_letters": 5})).run(endless)
    assert closed, "or its actors would work on"


def test_too_many_dead_letters_end_it_and_are_shown(
    job: Callable[..., JobSpec], source: Path
) -> None:
    table = pq.read_table(source)
    broken = [
        "x" if row % 100 == 0 else str(value) for row, value in enumerate(table["a"].to_pylist())
    ]
    csv = source.with_suffix(".csv")
    rows = zip(broken, *(table[name].to_pylist() for name in "bcd"), range(ROWS), strict=True)
    csv.write_text("a,b,c,d,id\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    spec = job(
        input={"uri": str(csv), "columns": {"x": list("abcd")}},
        limits={"max_dead_letters": 3, "shard_bytes": 4096},
    )
    desk = Desk(spec)
    with pytest.raises(JobFailed) as failed:
        desk.run(in_this_process)
    assert "limits.max_dead_letters allows 3" in str(failed.value)
    assert "in.csv, byte 11: column 'a'" in str(failed.value)
    assert "'x'" in str(failed.value)
    # With a higher limit the same job goes on where it was.
    before = desk.output.done()
    assert before
    again = Desk(
        job(input=spec.input.model_dump(), limits={"max_dead_letters": 10, "shard_bytes": 4096})
    )
    again.run(in_this_process)
    totals = again.output.finish()
    assert (totals.rows_in, totals.rows_out, totals.dead_letters) == (ROWS, ROWS - 10, 10)


def test_another_job_is_refused_and_shown(job: Callable[..., JobSpec], source: Path) -> None:
    Desk(job()).run(in_this_process)
    with pytest.raises(JobChanged, match=r"limits\.shard_rows: was 100, is 200"):
        Desk(job(limits={"shard_rows": 200})).run(in_this_process)
    table = pq.read_table(source)
    pq.write_table(table.slice(1), source, row_group_size=100)
    with pytest.raises(JobChanged, match=r"input: was \"sha256:"):
        Desk(job()).run(in_this_process)


def test_how_fast_it_goes_may_change(job: Callable[..., JobSpec]) -> None:
    Desk(job()).run(in_this_process)
    limits = {"shard_rows": ROWS // SHARDS, "batch_rows": 7, "max_dead_letters": 0}
    desk = Desk(job(pool={"max_actors": 5}, mode="pipeline", limits=limits))
    desk.run(in_this_process)
    assert desk.output.finish().rows_out == ROWS


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": "7"}, RepositoryError, "no version 7"),
        ({"model": "tinny"}, RepositoryError, "tiny"),
        ({"input": {"uri": "/nowhere/*.parquet"}}, Exception, "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    job: Callable[..., JobSpec], tmp_path: Path, change: dict[str, Any], error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        plan_job(job(**change))
    assert not (tmp_path / "out").exists()


def test_relative_paths_start_at_the_data_folder(job: Callable[..., JobSpec]) -> None:
    spec = job(input={"uri": "in/*.parquet"}, output={"uri": "out"})
    found = with_absolute_uris(spec, {"RAYPRISM_DATA": "/data", "RAY_JOB_ID": "1"}, "job.yaml")
    assert (found.input.uri, found.output.uri) == (("/data/in/*.parquet",), "/data/out")
    with pytest.raises(ConfigInvalid) as refused:
        with_absolute_uris(spec, {"RAY_JOB_ID": "1"}, "job.yaml")
    assert [fault.path for fault in refused.value.faults] == ["input.uri", "output.uri"]
    assert "RAYPRISM_DATA" in str(refused.value)
    remote = job(input={"uri": "s3://bucket/in"}, output={"uri": "/out"})
    same = with_absolute_uris(remote, {"RAY_JOB_ID": "1"}, "job.yaml")
    assert same.input.uri == ("s3://bucket/in",)


def test_a_dry_run_tells_and_writes_nothing(job: Callable[..., JobSpec], tmp_path: Path) -> None:
    told = dry_run(job())
    assert not (tmp_path / "out").exists()
    for words in (
        "model    tiny version 1, sha256:",
        "1 parquet files",
        "1,000 rows, 10 shards",
        "x FP32 [-1, 4]  <-  a (float), b (float), c (float), and 1 more",
        "/out: new",
        "stream: no GPUs",
        "1,000 rows in",
        '"id": 0',
        "rows/s in one actor",
    ):
        assert words in told, told
    desk = Desk(job())
    desk.run(in_this_process)
    assert "10 of 10 shards are done" in dry_run(job())
    desk.output.finish()
    assert "complete; a run would do nothing" in dry_run(job())
    assert "limits.shard_rows: was 100, is 50" in dry_run(job(limits={"shard_rows": 50}))


def test_progress_tells_rows_speed_time_left_and_dead_letters(job: Callable[..., JobSpec]) -> None:
    plan = plan_job(job())
    now_s = 100.0
    stream = io.StringIO()
    output = open_output(plan)
    reporter = Reporter(plan.shards, set(), output.totals(), stream, lambda: now_s)
    now_s = 105.0
    reporter.take(Outcome(0, rows_in=100, dead_letters=2, rss_bytes=5))
    assert stream.getvalue() == "", "not more often than every ten seconds"
    now_s = 110.0
    reporter.take(Outcome(1, rows_in=100))
    assert stream.getvalue() == (
        "[0:10]  200 of 1,000 rows  20.0%  20 rows/s  0:40 left  2 dead letters\n"
    )
    assert reporter.peak_rss_bytes == 5
