"""What a job tells of itself: counted once, from 0, sent to an agent, and never in its way."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprism.core.shards import Shard
from rayprism.errors import ConfigInvalid
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder
from rayprism.offline.job import JobFailed, run_job
from rayprism.offline.metrics import JobMetrics
from rayprism.offline.plan import Plan
from rayprism.offline.spec import JobSpec, name_of_folder, parse_spec
from rayprism.offline.worker import Outcome, ShardWorker
from rayprism.telemetry import ray_agent
from tests.support.models import mlp_example, save_mlp
from tests.telemetry.agent import Agent, plain_channel, run_agent

SHARDS, ROWS = 5, 50
WHOSE = {"batch_job": "night", "model": "tiny", "version": "1"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Sums:
    """An agent in miniature."""

    def __init__(self, metrics: JobMetrics) -> None:
        self._metrics = metrics
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def take(self) -> None:
        for point in self._metrics.take():
            key = point.name, frozenset(point.labels)
            before = 0.0 if point.kind == "gauge" else self.values.get(key, 0.0)
            self.values[key] = before + point.value

    def __call__(self, name: str, **labels: str) -> float | None:
        self.take()
        return self.values.get((f"rayprism_job_{name}", frozenset({**WHOSE, **labels}.items())))


def job_metrics(clock: Clock | None = None) -> JobMetrics:
    return JobMetrics(batch_job="night", model="tiny", version="1", clock=clock or Clock())


def test_every_series_begins_at_zero() -> None:
    points = job_metrics().take()
    assert {point.value for point in points} == {0.0}
    assert {point.name for point in points} == {
        "rayprism_job_rows_total",
        "rayprism_job_shards_total",
        "rayprism_job_shard_seconds_bucket",
        "rayprism_job_shard_seconds_count",
        "rayprism_job_shard_seconds_sum",
        "rayprism_job_actors",
    }
    assert all(dict(point.labels).items() >= WHOSE.items() for point in points)


def test_shards_are_counted_with_rows_seconds_and_memory() -> None:
    metrics = job_metrics()
    value = Sums(metrics)
    metrics.begin_round([3, 4, 5])
    metrics.record(Outcome(3, 100, 2, 4.0, 7_000, None, "a"))
    metrics.record(Outcome(4, 50, 0, 1.5, 5_000, None, "b"))
    metrics.record(Outcome(5, seconds=9.0, rss_bytes=9_000, error="MemoryError: 1"))
    assert value("rows_total", outcome="predicted") == 148
    assert value("rows_total", outcome="dead_letter") == 2
    assert value("shards_total", outcome="done") == 2
    assert value("shards_total", outcome="failed") == 1
    assert value("shards_left") == 1
    assert value("shard_seconds_sum") == 5.5
    assert value("shard_seconds_count") == 2
    assert value("shard_seconds_bucket", le="3.0") == 1
    assert value("actors") == 2
    assert value("actor_memory_bytes") == 9_000


def test_a_shard_that_two_actors_did_counts_once() -> None:
    metrics = job_metrics()
    value = Sums(metrics)
    metrics.begin_round([1, 2])
    for worker in "ab":
        metrics.record(Outcome(1, 10, worker=worker))
    assert value("rows_total", outcome="predicted") == 10
    assert value("shards_total", outcome="done") == 1
    assert value("shards_left") == 1


def test_shards_that_were_done_without_a_word_are_not_left() -> None:
    metrics = job_metrics()
    value = Sums(metrics)
    metrics.begin_round(range(10))
    metrics.begin_round([8, 9])
    assert value("shards_left") == 2


def test_actors_are_those_of_the_last_minute() -> None:
    clock = Clock()
    metrics = job_metrics(clock)
    value = Sums(metrics)
    metrics.begin_round(range(10))
    metrics.record(Outcome(0, worker="a"))
    clock.now_s = 50
    metrics.record(Outcome(1, worker="b"))
    metrics.record(Outcome(2, worker="b"))
    assert value("actors") == 2
    clock.now_s = 61
    assert value("actors") == 1
    clock.now_s = 111
    assert value("actors") == 0


# The name


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("out/flights", "flights"),
        ("/data/out/flights/", "flights"),
        ("s3://bucket/out/night?endpoint_override=host:1/x", "night"),
        ("s3://bucket", "bucket"),
        ("/out/täglich 7", "t_glich_7"),
        ("/out/" + "x" * 80, "x" * 64),
        ("/", "job"),
        (".", "job"),
        ("..", "job"),
    ],
)
def test_a_job_is_named_after_its_output(uri: str, name: str) -> None:
    assert name_of_folder(uri) == name


def document(**more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "version": "1",
        "repository": "/models",
        "input": {"uri": "/in"},
        "output": {"uri": "/out/night"},
        **more,
    }


def test_a_job_may_have_a_name() -> None:
    assert parse_spec(document()).job_name == "night"
    assert parse_spec(document(name="day-2")).job_name == "day-2"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, 'a"b', "é"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigInvalid, match="at most 64") as refused:
        parse_spec(document(name=name))
    assert [fault.path for fault in refused.value.faults] == ["name"]


def test_a_name_may_change_when_a_job_goes_on() -> None:
    before, after = parse_spec(document()), parse_spec(document(name="other"))
    assert before.identity(prepares=False) == after.identity(prepares=False)


# A whole run


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    path = save_mlp(tmp_path / "tiny.onnx")
    push_model(Repository(tmp_path / "models"), "tiny", path, example=mlp_example())
    data = np.random.default_rng(3).standard_normal((ROWS, 4)).astype(np.float32)
    table = pa.table({name: data[:, index] for index, name in enumerate("abcd")})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=ROWS // SHARDS)
    return parse_spec(
        {
            "model": "tiny",
            "version": "1",
            "repository": str(tmp_path / "models"),
            "input": {"uri": str(tmp_path / "in.parquet"), "columns": {"x": list("abcd")}},
            "output": {"uri": str(tmp_path / "night")},
            "limits": {"shard_rows": ROWS // SHARDS},
        }
    )


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """An agent, in place of Ray's, and a job's work in this process."""

    @contextmanager
    def session(*_: Any, **__: Any) -> Iterator[None]:
        yield

    def run(plan: Plan, output: OutputFolder, shards: Sequence[Shard]) -> Iterator[Outcome]:
        worker = ShardWorker(plan.spec, plan.listing, output)
        yield from (worker.run(shard) for shard in shards)
        worker.close()

    # In place of the modules: the import of Ray Data takes seconds.
    stand_ins = {"ray_session": {"ray_session": session}, "stream": {"run_stream": run}}
    for module, names in stand_ins.items():
        monkeypatch.setitem(
            sys.modules,
            f"rayprism.offline.{module}",
            SimpleNamespace(**names),  # type: ignore[arg-type]
        )
    with run_agent() as agent:
        monkeypatch.setattr(ray_agent, "find_agent", agent.find)
        monkeypatch.setattr(ray_agent, "open_channel", plain_channel)
        yield agent


def test_a_run_is_sent_to_the_agent(job: JobSpec, agent: Agent) -> None:
    run_job(job, say=lambda _: None)
    rows = "rayprism_job_rows_total"
    assert agent.value(rows, **WHOSE, outcome="predicted") == ROWS
    assert agent.value(rows, **WHOSE, outcome="dead_letter") == 0
    assert agent.value("rayprism_job_shards_total", **WHOSE, outcome="done") == SHARDS
    assert agent.value("rayprism_job_shards_total", **WHOSE, outcome="failed") == 0
    assert agent.value("rayprism_job_shards_left", **WHOSE) == 0
    assert agent.value("rayprism_job_actors", **WHOSE) == 1
    assert (agent.value("rayprism_job_actor_memory_bytes", **WHOSE) or 0) > 1_000_000


def test_a_run_that_goes_on_counts_what_it_does(job: JobSpec, agent: Agent) -> None:
    run_job(job, say=lambda _: None)
    for entry in ("00000001", "00000002"):
        (Path(job.output.uri) / "_shards" / f"{entry}.json").unlink()
    (Path(job.output.uri) / "_SUCCESS").unlink()
    agent.values.clear()
    run_job(job, say=lambda _: None)
    assert agent.value("rayprism_job_shards_total", **WHOSE, outcome="done") == 2
    assert agent.value("rayprism_job_rows_total", **WHOSE, outcome="predicted") == 20


def test_a_local_run_sends_nothing(job: JobSpec, agent: Agent) -> None:
    run_job(job, local=True, say=lambda _: None)
    assert agent.asked == 0


def test_a_run_that_fails_tells_its_failures(
    job: JobSpec, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*work: Any) -> Iterator[Outcome]:
        yield from (Outcome(shard.number, error="OSError: gone") for shard in work[2])

    monkeypatch.setattr(sys.modules["rayprism.offline.stream"], "run_stream", fails)
    monkeypatch.setattr("rayprism.offline.job._PAUSES_S", (0.0,))
    with pytest.raises(JobFailed):
        run_job(job, say=lambda _: None)
    assert agent.value("rayprism_job_shards_total", **WHOSE, outcome="failed") == 3 * SHARDS
    assert agent.value("rayprism_job_shards_left", **WHOSE) == SHARDS


def _raises(*_: Any) -> Any:
    raise ConnectionError("no such cluster")


def test_an_agent_that_refuses_does_not_fail_a_job(job: JobSpec, agent: Agent) -> None:
    agent.refuses = True
    assert run_job(job, say=lambda _: None).rows == ROWS


def test_an_agent_that_is_not_found_does_not_fail_a_job(
    job: JobSpec, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_agent, "find_agent", _raises)
    assert run_job(job, say=lambda _: None).rows == ROWS


def test_metrics_that_cannot_begin_do_not_fail_a_job(
    job: JobSpec,
    agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("rayprism.telemetry.export.export_in_thread", _raises)
    assert run_job(job, say=lambda _: None).rows == ROWS
    assert "without metrics" in caplog.text
