"""Where a replica's telemetry goes: what is configured, the role it finds out, its log file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayprism.errors import DigestMismatch, GoldenMismatch, RayprismError
from rayprism.models.gpu import GpuFacts
from rayprism.models.loader import load_model
from rayprism.models.repository import ModelVersion
from rayprism.serving.http import ModelApp
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig
from rayprism.telemetry.export import Exporter, send_once
from rayprism.telemetry.gpu import GpuReading
from tests.support.asyncs import async_test, until
from tests.support.models import mlp_example
from tests.support.recorded import Recorded
from tests.telemetry.agent import Agent, plain_channel, run_agent

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving import reporting as reporting_module
    from rayprism.serving.reporting import Reporting, report_failed_load

METRICS = "RAYPRISM_METRICS"
INTERVAL = "RAYPRISM_METRICS_INTERVAL_S"
OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"
INFO = ("rayprism_replica_info", "version", "replica", "application", "role", "runtime", "device")

Ask = Callable[[], Any]


@pytest.fixture(autouse=True)
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agent]:
    """The agent of this node, reached without Ray."""
    for name in [name for name in os.environ if name.startswith(("OTEL_", "RAYPRISM_"))]:
        monkeypatch.delenv(name)
    with run_agent() as agent:
        monkeypatch.setattr(reporting_module, "get_serve_logs_dir", lambda: str(tmp_path / "serve"))
        monkeypatch.setattr(reporting_module, "find_agent", agent.find)
        for name, real in (("Exporter", Exporter), ("send_once", send_once)):
            monkeypatch.setattr(reporting_module, name, partial(real, open_channel=plain_channel))
        yield agent


def said(route: Any, application: str = "app") -> dict[str, Any]:
    """The controller's answer."""
    return {"applications": {application: {"deployed_app_config": {"route_prefix": route}}}}


def make(ask: Ask = lambda: said("/v2/models/tiny"), version: int = 1) -> Reporting:
    return Reporting("tiny", version, "r1", "app", ask)


@asynccontextmanager
async def reporting(
    version: ModelVersion, ask: Ask = lambda: said("/v2/models/tiny")
) -> AsyncIterator[tuple[Reporting, ModelService, httpx.AsyncClient]]:
    """As a replica has it, from its start to its end."""
    model = await asyncio.to_thread(load_model, version)
    made = make(ask)
    service = ModelService(model, UserConfig(), telemetry=made.telemetry)
    made.start(model, service)
    transport = httpx.ASGITransport(app=ModelApp(service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield made, service, client
    await service.close()
    await made.close()


# The role


@pytest.mark.parametrize(
    ("route", "is_stable"),
    [
        ("/v2/models/tiny", True),
        ("/", True),
        ("/api/v2/models/tiny/", True),
        (None, True),
        ("/v2/models/tiny/versions/1", False),
        ("/v2/models/tiny/versions/1/", False),
        ("/api/v2/models/tiny/versions/1", False),
        ("/v2/models/tiny/versions/11", True),
    ],
)
def test_the_role_is_told_by_the_route(tiny: ModelVersion, route: Any, is_stable: bool) -> None:
    @async_test
    async def run() -> None:
        async with reporting(tiny, lambda: said(route)) as (made, service, _):
            seen = Recorded(service.telemetry.recorder)
            assert service.is_stable is None
            assert seen.gauges(*INFO) == {}, "not known yet"
            assert seen.gauges("rayprism_traffic_weight_ratio", "version") == {}
            made.look_up_role()
            assert service.is_stable is is_stable
            role = "stable" if is_stable else "version"
            assert seen.gauges(*INFO) == {("1", "r1", "app", role, "onnx", "cpu"): 1}
            weights = seen.gauges("rayprism_traffic_weight_ratio", "version")
            assert weights == ({("1",): 1.0} if is_stable else {})

    run()


def fail() -> Any:
    raise RuntimeError("the controller is gone")


@pytest.mark.parametrize(
    "ask",
    [
        fail,
        lambda: {},
        lambda: said("/v2/models/tiny/versions/1", "another"),
        lambda: {"applications": {"app": {"deployed_app_config": None}}},
        lambda: None,
    ],
)
def test_a_role_that_cannot_be_found_is_none(
    tiny: ModelVersion, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Ask] = [ask, lambda: said("/v2/models/tiny"), ask]

    @async_test
    async def run() -> None:
        async with reporting(tiny, lambda: answers.pop(0)()) as (made, service, client):
            made.look_up_role()
            assert service.is_stable is None
            assert Recorded(service.telemetry.recorder).gauges(*INFO) == {}
            assert (await client.post("/infer", json=mlp_example())).status_code == 200
            made.look_up_role()
            made.look_up_role()
            assert service.is_stable is True, "what was known stays"

    run()
    assert caplog.text.count("The route of app could not be found") == 2


@async_test
async def test_a_promotion_changes_the_role(tiny: ModelVersion) -> None:
    routes = ["/v2/models/tiny/versions/1", "/v2/models/tiny"]
    async with reporting(tiny, lambda: said(routes.pop(0))) as (made, service, _):
        seen = Recorded(service.telemetry.recorder)
        for role in ("version", "stable"):
            made.look_up_role()
            assert seen.gauges("rayprism_replica_info", "role") == {(role,): 1}


@async_test
async def test_a_role_is_not_looked_up_before_there_is_a_service() -> None:
    make(lambda: pytest.fail("for nobody")).look_up_role()


# Metrics


def test_what_is_counted_arrives(
    tiny: ModelVersion, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0.1")
    labels = {"model": "tiny", "version": "1"}
    requests = {"protocol": "http", "source": "client", "outcome": "ok", "reason": "ok"}

    def arrived() -> float | None:
        return agent.value("rayprism_requests_total", **labels, **requests)

    @async_test
    async def run() -> None:
        async with reporting(tiny) as (made, _, client):
            made.look_up_role()
            await client.post("/infer", json=mlp_example())
            await until(lambda: arrived() == 1)
            assert agent.value("rayprism_loads_total", **labels, outcome="ok") == 1
            assert agent.value("rayprism_load_seconds_total", **labels, step="golden")
            await client.post("/infer", json=mlp_example())
        assert arrived() == 2, "the last ones are sent at the end"

    run()
    roles = {"replica": "r1", "application": "app", "role": "stable"}
    info = {**labels, **roles, "runtime": "onnx", "device": "cpu"}
    assert agent.value("rayprism_replica_info", **info) == 1


# GPUs

GPU_USED = ("rayprism_gpu_memory_used_bytes", "version", "replica", "gpu")
GPU_LIMIT = ("rayprism_gpu_memory_limit_bytes", "version", "replica", "gpu")
GPU_BUSY = ("rayprism_gpu_utilization_ratio", "version", "replica", "gpu")


class StandInMeter:
    """Stand-in for what NVML says."""

    def __init__(self) -> None:
        self.reading = GpuReading()
        self.threads: list[str] = []

    def read(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.reading = GpuReading(700.0, 0.5)


@asynccontextmanager
async def on_gpu(version: ModelVersion, limit_bytes: int | None) -> AsyncIterator[Recorded]:
    """The telemetry of a replica whose model says that it runs on a GPU."""
    model = await asyncio.to_thread(load_model, version)
    model.gpu, model.gpu_limit_bytes = GpuFacts("H100", "GPU-1", 1000), limit_bytes
    made = make()
    service = ModelService(model, UserConfig(), telemetry=made.telemetry)
    made.start(model, service)
    yield Recorded(made.telemetry.recorder)
    await service.close()
    await made.close()


@pytest.mark.parametrize(("limit_bytes", "shown"), [(250, 250), (None, 1000)])
def test_a_replica_on_a_gpu_tells_what_it_has_of_it(
    tiny: ModelVersion,
    monkeypatch: pytest.MonkeyPatch,
    limit_bytes: int | None,
    shown: float,
) -> None:
    meter = StandInMeter()
    monkeypatch.setattr(reporting_module.GpuMeter, "open", lambda uuid: meter)
    monkeypatch.setattr(reporting_module, "_FLUSH_LOG_EVERY_S", 0.01)

    @async_test
    async def run() -> None:
        async with on_gpu(tiny, limit_bytes) as seen:
            await until(lambda: len(meter.threads) > 1)
            labels = ("1", "r1", "GPU-1")
            assert seen.gauges(*GPU_LIMIT) == {labels: shown}
            assert seen.gauges(*GPU_USED) == {labels: 700}
            assert seen.gauges(*GPU_BUSY) == {labels: 0.5}
        assert threading.current_thread().name not in meter.threads, "requests do not wait for it"

    run()


@async_test
async def test_without_nvml_the_limit_is_told_and_the_rest_is_not(
    tiny: ModelVersion,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reporting_module.GpuMeter, "open", lambda uuid: None)
        async with on_gpu(tiny, 250) as seen:
            assert seen.gauges(*GPU_LIMIT) == {("1", "r1", "GPU-1"): 250}
            assert seen.gauges(*GPU_USED) == seen.gauges(*GPU_BUSY) == {}


def test_metrics_may_be_turned_off(
    tiny: ModelVersion, agent: Agent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(METRICS, "0")
    monkeypatch.setattr(reporting_module, "Exporter", lambda *_, **__: pytest.fail("not wanted"))

    @async_test
    async def run() -> None:
        async with reporting(tiny) as (_, service, client):
            assert (await client.post("/infer", json=mlp_example())).status_code == 200
            assert (await client.post("/infer", json={})).status_code == 400
            assert Recorded(service.telemetry.recorder).requests() == {}
        report_failed_load("tiny", 1, RuntimeError("x"))

    run()
    assert agent.asked == 0
    assert len(log_lines(tmp_path)) == 1, "failures are logged all the same"


@pytest.mark.parametrize("value", ["1", "", "false"])
def test_only_0_turns_metrics_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(METRICS, value)

    @async_test
    async def run() -> None:
        assert make()._exporter is not None

    run()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 5.0),
        ("0.1", 0.1),
        ("1e1", 10.0),
        ("15", 15.0),
        ("15.01", None),
        ("0.09", None),
        ("0", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_the_interval(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str | None,
    seconds: float | None,
) -> None:
    if value is not None:
        monkeypatch.setenv(INTERVAL, value)
    asked: list[float] = []
    monkeypatch.setattr(reporting_module, "Exporter", lambda *_, every_s: asked.append(every_s))

    @async_test
    async def run() -> None:
        make()

    run()
    assert asked == [5.0 if seconds is None else seconds]
    assert (f"{INTERVAL} is {value!r}, allowed are 0.1 to 15 seconds" in caplog.text) == (
        seconds is None
    )


# Loads that failed


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DigestMismatch("model.onnx"), "digest_mismatch"),
        (GoldenMismatch("y"), "golden_mismatch"),
        (RayprismError("x"), RayprismError.code),
        (MemoryError("x"), "internal"),
    ],
)
def test_a_load_that_failed_is_counted(agent: Agent, error: Exception, code: str) -> None:
    report_failed_load("tiny", 7, error)
    name = "rayprism_loads_total"
    assert agent.value(name, model="tiny", version="7", outcome=code) == 1
    assert len(agent.values) == 1, "nothing else is known of it"


@pytest.mark.parametrize("broken", [lambda: None, fail])
def test_nobody_to_tell_of_a_load_that_failed(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, broken: Callable[[], Any]
) -> None:
    monkeypatch.setattr(reporting_module, "find_agent", broken)
    report_failed_load("tiny", 7, RuntimeError("x"))
    assert agent.asked == 0


# Traces


@pytest.mark.parametrize(
    "variables",
    [
        {OTLP: "nonsense"},
        {OTLP: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"},
        {OTLP: "http://127.0.0.1:1", "OTEL_BSP_MAX_QUEUE_SIZE": "many"},
        {OTLP: "http://127.0.0.1:1", "OTEL_BSP_SCHEDULE_DELAY": "0"},
        {
            OTLP: "http://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "soon",
        },
    ],
)
def test_a_faulty_tracer_costs_traces_and_nothing_else(
    tiny: ModelVersion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variables: dict[str, str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    @async_test
    async def run() -> None:
        async with reporting(tiny) as (made, _, client):
            assert made.telemetry.tracer is None
            parent = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
            got = await client.post("/infer", json=mlp_example(), headers=parent)
            assert got.status_code == 200

    run()
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert told.getMessage().startswith("There are no traces. ")
    assert told.name == "ray.serve.rayprism"


@async_test
async def test_traces_are_off_where_nothing_is_said() -> None:
    assert make().telemetry.tracer is None


def test_a_tracer_knows_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        reporting_module, "make_tracer", lambda environment, **names: asked.append(names)
    )

    @async_test
    async def run() -> None:
        make(version=3)

    run()
    assert asked == [{"model": "tiny", "version": "3", "replica": "r1", "application": "app"}]


# The request log


def log_path(folder: Path) -> Path:
    return folder / "serve/rayprism_requests_app_r1.jsonl"


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_path(folder).read_text().splitlines()]


def test_a_failure_is_written_without_its_payload(tiny: ModelVersion, tmp_path: Path) -> None:
    secret = "a-name-that-nobody-may-read"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [secret, 1, 2, 424242.5]}
    headers = {"authorization": f"Bearer {secret}", "x-request-id": "r-77"}

    @async_test
    async def run() -> None:
        async with reporting(tiny) as (_, _, client):
            got = await client.post("/infer", json={"inputs": [tensor]}, headers=headers)
            assert got.status_code == 400
            assert (await client.post("/infer", json=mlp_example())).status_code == 200

    run()
    (line,) = log_lines(tmp_path)
    time, total_s = line.pop("time"), line.pop("total_s")
    assert (time[-1], 0 < total_s < 10) == ("Z", True)
    assert line == {
        "request_id": "r-77",
        "model": "tiny",
        "version": "1",
        "replica": "r1",
        "application": "app",
        "protocol": "http",
        "source": "client",
        "outcome": "client_error",
        "reason": "invalid_input",
    }
    text = log_path(tmp_path).read_text()
    assert secret not in text
    assert "424242" not in text


def test_lines_are_written_while_it_runs_and_off_the_loop(
    tiny: ModelVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting_module, "_FLUSH_LOG_EVERY_S", 0.01)
    threads = set()

    def has_lines(number: int) -> bool:
        return log_path(tmp_path).exists() and len(log_lines(tmp_path)) == number

    @async_test
    async def run() -> None:
        async with reporting(tiny) as (made, service, client):
            log = made.telemetry.log
            assert log is not None
            flush = log.flush

            def watched() -> None:
                threads.add(threading.current_thread())
                flush()

            monkeypatch.setattr(log, "flush", watched)
            assert service.reconfigure({"telemetry": {"log_percent": 100}})
            for number in (1, 2):
                assert (await client.post("/infer", json=mlp_example())).status_code == 200
                await until(partial(has_lines, number))

    run()
    assert threads
    assert threading.main_thread() not in threads
    for line in log_lines(tmp_path):
        assert (line["outcome"], line["rows"]) == ("ok", 3)
        assert line["batch"]["rows"] == 3
