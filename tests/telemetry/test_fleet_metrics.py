"""Metrics, rules, alerts and dashboards on a real fleet, with a real Prometheus.

The tests play one after the other: first the counts of known requests, then faults until each alert
has fired, then every query of every panel, and at the end the fleet goes.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.telemetry.catalogue import SECONDS
from rayprism.telemetry.dashboards import build_dashboards
from rayprism.telemetry.dashboards.queries import default_variables, panel_queries, substitute
from tests.support import scene
from tests.support.fleet import Fleet, model_application, running_fleet, wait_for
from tests.support.prometheus import Prometheus, running_prometheus
from tests.telemetry.collector import Collector, http_collector

pytestmark = [pytest.mark.cluster, pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCALE = 1 / 100
NO_GPU = "needs a GPU: Ray says nothing of them where there is none"
ABSENT = {
    "ray_node_gpus": NO_GPU,
    "ray_node_gram": NO_GPU,
    "ray_rayprism_gpu": NO_GPU,
}
"""Metrics that this fleet cannot have, and why; whatever asks for them may stay without data."""
ALERTS = {
    "RayprismApplicationNotRunning",
    "RayprismCandidateFailing",
    "RayprismCandidateSlow",
    "RayprismConfigRefused",
    "RayprismDeadLetters",
    "RayprismErrorBudgetBurnFast",
    "RayprismErrorBudgetBurnSlow",
    "RayprismJobShardsFailing",
    "RayprismLatencyOverTarget",
    "RayprismLoadFailing",
    "RayprismMetricsOverflow",
    "RayprismQueueOld",
    "RayprismReplicasNotReady",
    "RayprismShadowDisagrees",
}
"""All but RayprismTargetDown, which comes when the fleet goes."""
SLOWNESS = {"RayprismCandidateSlow", "RayprismQueueOld", "RayprismLatencyOverTarget"}

OVERFLOW = """
import sys

import ray

from rayprism.telemetry.export import send_once
from rayprism.telemetry.ray_agent import find_agent
from rayprism.telemetry.recorder import Recorder

ray.init(address=sys.argv[1], log_to_driver=False)
recorder = Recorder()
for number in range(2100):
    recorder.count("rayprism_batch_padding_total", model="other", version=str(number)).add()
assert send_once(recorder.take(), find_agent, within_s=20)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.push_models(tmp_path_factory.mktemp("seen-models"))


@pytest.fixture(scope="module")
def stage(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("seen")
    with ExitStack() as stack:
        collector = stack.enter_context(http_collector())
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RAYPRISM_METRICS_INTERVAL_S", "1")
            environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
            environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "500")
            fleet_stack = stack.enter_context(ExitStack())
            fleet = fleet_stack.enter_context(running_fleet(models, folder / "state", haproxy=True))
        fleet.deploy(scene.applications())
        prometheus = stack.enter_context(
            running_prometheus(
                folder / "prometheus",
                scale=SCALE,
                cluster="test",
                sd_urls=[f"{fleet.state.dashboard_address}/api/prometheus/sd"],
                haproxy_port=fleet.state.ports["haproxy_metrics"],
                scrape_interval_s=1,
                refresh_s=2,
            )
        )
        yield Stage(fleet, prometheus, collector, models, folder, fleet_stack.close)


@dataclass(slots=True)
class Stage:
    """The fleet, what watches it, and how to stop it."""

    fleet: Fleet
    prometheus: Prometheus
    collector: Collector
    models: Path
    folder: Path
    end: Callable[[], None]

    def client(self, make: Any, **options: Any) -> scene.Client:
        return scene.Client(self.fleet.url, f"127.0.0.1:{self.fleet.grpc_port}", make, **options)

    def post(self, document: Any, timeout_s: float = 30, **headers: str) -> httpx.Response:
        url = f"{self.fleet.url}/v2/models/shown/infer"
        return httpx.post(url, json=document, timeout=timeout_s, headers=headers)

    def rayprism(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("rayprism")), *arguments]
        command += ["--address", self.fleet.state.dashboard_address]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def logged(self, request_id: str) -> list[dict[str, Any]]:
        """Lines of the request logs of all replicas."""
        folder = Path(self.fleet.state.temp_dir) / "session_latest/logs/serve"
        return [
            json.loads(line)
            for file in folder.glob("rayprism_requests_*.jsonl")
            for line in file.read_text().splitlines()
            if request_id in line
        ]

    def predict(self, job: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "batch/predict.py"), str(job)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env=os.environ
            | {"RAY_ADDRESS": self.fleet.state.ray_address, "RAYPRISM_METRICS_INTERVAL_S": "1"},
        )


def counted(prometheus: Prometheus) -> Counter[tuple[str, str, str]]:
    """Requests of clients by protocol, version and reason, as Prometheus has them."""
    expr = 'sum by (protocol, version, reason) (ray_rayprism_requests_total{source="client"})'
    return Counter(
        {
            (labels["protocol"], labels["version"], labels["reason"]): int(value)
            for labels, value in prometheus.query(expr)
            if value and "protocol" in labels
        }
    )


def test_counts_are_those_of_the_clients(stage: Stage) -> None:
    prometheus = stage.prometheus
    wait_for(lambda: prometheus.query("ray_rayprism_replica_info"))
    before = counted(prometheus)
    with stage.client(lambda: scene.request(0, 0.1), connections=2, rpcs=1) as client:
        wait_for(lambda: client.answers.total() >= 200 and len(client.answers) == 4)
    expected: Counter[tuple[str, str, str]] = Counter()
    for (protocol, version, status), number in client.answers.items():
        assert status in (200, "OK"), client.answers
        expected[protocol, version, "ok"] += number
    for document, status, reason in (
        (scene.request(scene.FAIL), 500, "model_failed"),
        ({"inputs": []}, 400, "invalid_input"),
        (scene.request(0, 0.2, parameters={"timeout": 20_000}), 504, "deadline_exceeded"),
        (many_rows(33), 413, "too_large"),
    ):
        for _ in range(3):
            answer = stage.post(document)
            # By the stable version, also what the candidate got first.
            assert (answer.status_code, answer.headers["x-rayprism-version"]) == (status, "1")
        expected["http", "1", reason] += 3
    expected += overloaded(stage)
    try:
        wait_for(lambda: counted(prometheus) - before == expected, 30)
    except AssertionError:
        raise AssertionError(f"{counted(prometheus) - before}, not {expected}") from None
    # A candidate's failure is the candidate's, and the client's request one of the stable version.
    split = 'sum(ray_rayprism_requests_total{source="split", reason="model_failed", version="2"})'
    fallbacks = 'sum(ray_rayprism_fallbacks_total{version="2", reason="error"})'
    assert prometheus.value(split) == prometheus.value(fallbacks)
    check_quantiles(prometheus, client.seconds["1"], "1")
    rows = prometheus.value('sum(ray_rayprism_rows_total{version="1"})')
    batches = prometheus.value('sum(ray_rayprism_batch_rows_count{version="1"})')
    assert 0 < batches <= rows


def test_a_request_is_one_trace_through_two_versions(stage: Stage) -> None:
    trace_id, client_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    traceparent = f"00-{trace_id}-{client_span}-01"
    secret = 0.0625  # as a number that is nowhere else
    answer = stage.post(
        scene.request(0, secret),
        **{"traceparent": traceparent, "x-request-id": "traced-1", "x-rayprism-version": "2"},
    )
    assert answer.headers["x-rayprism-version"] == "2"

    def spans() -> list[Any]:
        return [s for s in list(stage.collector.spans) if s.trace_id.hex() == trace_id]

    wait_for(lambda: sum(span.name == "infer shown" for span in spans()) == 2)
    wait_for(lambda: any(span.name == "forward" for span in spans()))
    (forward,) = [span for span in spans() if span.name == "forward"]
    first, second = [span for span in spans() if span.name == "infer shown"]
    if first.parent_span_id != bytes.fromhex(client_span):
        first, second = second, first
    assert first.parent_span_id == bytes.fromhex(client_span)
    assert forward.parent_span_id == first.span_id
    assert second.parent_span_id == forward.span_id
    computed = {span.parent_span_id for span in spans() if span.name == "compute"}
    assert computed == {second.span_id}, "only one of them ran the model"
    (sent_on, answered) = sorted(
        wait_for(lambda: len(lines := stage.logged("traced-1")) == 2 and lines),
        key=lambda line: line["source"] != "client",
    )
    assert (sent_on["forwarded_to"], sent_on["version"], sent_on["source"]) == ("2", "2", "client")
    assert (answered["version"], answered["source"], answered["rows"]) == ("2", "split", 1)
    assert sent_on["trace_id"] == answered["trace_id"] == trace_id
    assert str(secret) not in json.dumps([sent_on, answered])


def many_rows(rows: int) -> dict[str, Any]:
    x = {"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": [0.0] * 3 * rows}
    return {"inputs": [x]}


def overloaded(stage: Stage) -> Counter[tuple[str, str, str]]:
    """More at once than the queue holds: some are refused, and told when to come back."""
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(stage.post(many_rows(8), 60)))
        for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected: Counter[tuple[str, str, str]] = Counter()
    for answer in answers:
        assert answer.status_code in (200, 503), answer.text
        reason = "ok" if answer.status_code == 200 else "overloaded"
        expected["http", answer.headers["x-rayprism-version"], reason] += 1
    assert len(answers) == 24
    return expected


def check_quantiles(prometheus: Prometheus, seconds: list[float], version: str) -> None:
    """p50 and p99 of the clients, and those of the buckets, are at most one bucket apart."""
    for percent in (50, 99):
        buckets = f'sum by (le) (ray_rayprism_request_seconds_bucket{{version="{version}"}})'
        told_s = prometheus.value(f"histogram_quantile({percent / 100}, {buckets})")
        seen_s = float(np.percentile(seconds, percent))
        apart = bisect_left(SECONDS, told_s) - bisect_left(SECONDS, seen_s)
        assert abs(apart) <= 1, (percent, told_s, seen_s)


def test_every_alert_fires(stage: Stage) -> None:
    fleet, prometheus = stage.fleet, stage.prometheus
    jobs = ThreadPoolExecutor(2)
    fleet.put(
        [
            *scene.applications(p99_target_s=0.05),
            # Does not reproduce its example, wants more than there is.
            beside(scene.BROKEN),
            big("hungry"),
        ]
    )
    done, failed = (jobs.submit(stage.predict, job) for job in write_jobs(stage))
    long = scene.write_job(stage.folder / "long", stage.models, rows=2048, batch_s=0.5)
    draw = random.Random(3)
    fired: set[str] = set()
    failing = [scene.request(scene.FAIL), scene.request(scene.FAIL_CANDIDATE)]
    failing += [scene.request(scene.DIFFER), scene.request(0, 0.1)]
    with stage.client(lambda: draw.choice(failing), connections=8, rpcs=1):
        refuse_config(stage)
        overflow(stage)
        wait_for_alerts(prometheus, fired, ALERTS - SLOWNESS)
    # Without failures: what a slow candidate fails is late at the stable version, too.
    slow = [scene.request(0, 0.1), scene.request(0, 0.1, 1)]
    with stage.client(lambda: draw.choice(slow), connections=24, rpcs=1):
        wait_for_alerts(prometheus, fired, ALERTS)
    assert done.result().returncode == 0, done.result().stderr
    assert failed.result().returncode == 1, failed.result().stderr
    # Something of everything goes on while the panels are asked.
    with stage.client(lambda: draw.choice(failing), connections=2, rpcs=1):
        going_on = jobs.submit(stage.predict, long)
        # Of this job: what an ended one said last is known for a while, and is that none are left.
        left = 'sum(ray_rayprism_job_shards_left{batch_job="nightly"})'
        wait_for(lambda: 0 < prometheus.value(left) < 8)
        top = jobs.submit(stage.rayprism, "top", "--once", "--json")
        check_every_query(prometheus)
        check_every_rule(prometheus)
        shown = json.loads(top.result())["versions"]
        roles = {row["version"]: row["role"] for row in shown if row["model"] == "shown"}
        assert {"1": "stable", "2": "version"}.items() <= roles.items()
        (stable,) = [row for row in shown if (row["model"], row["version"]) == ("shown", "1")]
        assert stable["requests_per_s"] > 0
        assert going_on.result().returncode == 0, going_on.result().stderr


def wait_for_alerts(prometheus: Prometheus, fired: set[str], wanted: set[str]) -> None:
    try:
        wait_for(lambda: fired >= wanted or fired.update(prometheus.firing()), 120)
    except AssertionError:
        raise AssertionError(f"not fired: {wanted - fired}") from None


def write_jobs(stage: Stage) -> list[Path]:
    bad = scene.write_job(stage.folder / "bad", stage.models, bad_rows=3)
    failing = scene.write_job(stage.folder / "failing", stage.models, name="failing")
    text = failing.read_text()
    assert "limits:\n" in text
    failing.write_text(text.replace("limits:\n", "limits:\n  max_memory_bytes: 67108864\n"))
    return [bad, failing]


def beside(version: int) -> dict[str, Any]:
    return model_application(
        "shown",
        version,
        name=f"shown-{version}",
        route=f"/v2/models/shown/versions/{version}",
        allow_code=True,
    )


def big(name: str) -> dict[str, Any]:
    application = model_application("worded", 1, name=name, route=f"/{name}", allow_code=True)
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 1000}
    return application


def refuse_config(stage: Stage) -> None:
    """A key that there is not, in the `user_config` of an application that runs."""
    wrong = scene.applications(p99_target_s=0.05)
    (worded,) = [application for application in wrong if application["name"] == "worded"]
    worded["deployments"][0]["user_config"] = {"max_queue_row": 5}
    stage.fleet.put([*wrong, beside(scene.BROKEN), big("hungry")])


def overflow(stage: Stage) -> None:
    """More label sets than the agent keeps of one metric."""
    done = subprocess.run(
        [sys.executable, "-c", OVERFLOW, stage.fleet.state.ray_address],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr


def check_every_query(prometheus: Prometheus) -> None:
    """Each gives data, with the labels that its legend names."""
    known = {"datasource": "test", "model": "shown", "batch_job": "nightly"}
    wrong = []
    for dashboard in build_dashboards().values():
        variables = {**default_variables(dashboard), **known}
        for query in panel_queries(dashboard):
            expr = substitute(query.expr, variables)
            found = prometheus.query(expr)
            if not found:
                if not any(name in expr for name in ABSENT):
                    wrong.append(f"{query.dashboard}, {query.panel}: no data: {expr}")
                continue
            for labels, _ in found:
                missing = [label for label in sorted(query.labels) if label not in labels]
                if missing:
                    wrong.append(f"{query.dashboard}, {query.panel}: no {missing} in {labels}")
                    break
    assert not wrong, "\n".join(wrong)


def check_every_rule(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    for rule in rules:
        if rule["type"] == "recording":
            values = [value for _, value in prometheus.query(rule["name"])]
            assert values, rule["name"]
            assert not all(map(math.isnan, values)), rule["name"]


def test_a_fleet_that_is_gone_is_missed(stage: Stage) -> None:
    stage.end()
    wait_for(lambda: "RayprismTargetDown" in stage.prometheus.firing())
