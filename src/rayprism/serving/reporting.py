"""Where the telemetry of a replica goes: the node's agent, a log file, a trace collector."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ray.serve._private.logging_utils import get_serve_logs_dir

from rayprism.errors import RayprismError
from rayprism.models.loader import LoadedModel
from rayprism.serving.service import ModelService
from rayprism.serving.telemetry import ReplicaTelemetry
from rayprism.telemetry.export import Exporter, send_once
from rayprism.telemetry.gpu import GpuMeter
from rayprism.telemetry.ray_agent import find_agent
from rayprism.telemetry.recorder import Recorder
from rayprism.telemetry.request_log import RequestLog
from rayprism.telemetry.tracing import Tracer, make_tracer

__all__ = ["Reporting", "report_failed_load"]

METRICS_VARIABLE = "RAYPRISM_METRICS"
"""`0` turns metrics off."""

INTERVAL_VARIABLE = "RAYPRISM_METRICS_INTERVAL_S"
"""Seconds between two times that metrics are sent; 5 by default."""

_FLUSH_LOG_EVERY_S = 1.0
_SECONDS_TO_ASK_AGAIN = 30
_SECONDS_TO_READ_GPU = 5
logger = logging.getLogger("ray.serve.rayprism")


class Reporting:
    """The telemetry of one replica, and the timers that send it. Belongs to its event loop.

    Args:
        model: The model's name.
        version: Of the replica.
        replica: Serve's id of it.
        application: Serve's name of its application.
        ask: Asks Serve's controller; may block, and is called in a thread.
    """

    def __init__(
        self,
        model: str,
        version: int,
        replica: str,
        application: str,
        ask: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._application = application
        self._own_route = f"/versions/{version}"
        self._ask = ask
        is_on = _is_on()
        file = Path(get_serve_logs_dir()) / f"rayprism_requests_{application}_{replica}.jsonl"
        name = str(version)
        self.telemetry = ReplicaTelemetry(
            model,
            name,
            replica,
            is_on=is_on,
            log=RequestLog(
                file, model=model, version=name, replica=replica, application=application
            ),
            tracer=_make_tracer(model, name, replica, application),
        )
        self._exporter: Exporter | None = None
        if is_on:
            self._exporter = Exporter(self.telemetry.recorder, find_agent, every_s=_interval_s())
        self._service: ModelService | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._gpu: GpuMeter | None = None

    def start(self, model: LoadedModel, service: ModelService) -> None:
        """Begins, once the model is loaded.

        Args:
            model: How it was loaded, and where it runs.
            service: Answers with it.
        """
        self._service = service
        telemetry = self.telemetry
        telemetry.loaded(model.load_s)
        for role in ("stable", "version"):
            telemetry.recorder.gauge(
                "rayprism_replica_info",
                self._is(role),
                application=self._application,
                role=role,
                runtime=service.manifest.runtime,
                device=model.device,
            )
        self._measure_gpu(model)
        self._flushing = asyncio.get_running_loop().create_task(self._flush_log())
        if self._exporter is not None:
            self._exporter.start()

    def look_up_role(self) -> None:
        """Finds out whether the application has the model's own address. Blocks.

        It is asked again where a `user_config` has changed, as at each step of a promotion.
        """
        service = self._service
        if service is None:
            return
        try:
            config = self._ask()["applications"][self._application]["deployed_app_config"]
            route = str(config.get("route_prefix") or "")
        except Exception as error:
            logger.warning("The route of %s could not be found: %s", self._application, error)
            return
        service.is_stable = not route.rstrip("/").endswith(self._own_route)

    async def close(self) -> None:
        """Sends what is left."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self._exporter is not None:
            await self._exporter.close()

    def _is(self, role: str) -> Callable[[], float | None]:
        def read() -> float | None:
            is_stable = None if self._service is None else self._service.is_stable
            return None if is_stable is None or is_stable != (role == "stable") else 1.0

        return read

    def _measure_gpu(self, model: LoadedModel) -> None:
        gpu = model.gpu
        if gpu is None:
            return
        recorder = self.telemetry.recorder
        limit = model.gpu_limit_bytes or gpu.total_bytes
        recorder.gauge("rayprism_gpu_memory_limit_bytes", lambda: limit, gpu=gpu.uuid)
        meter = self._gpu = GpuMeter.open(gpu.uuid)
        if meter is None:
            logger.warning(
                "There are no metrics of what the model uses of the GPU: nvidia-ml-py or NVML is "
                "missing (pip install 'rayprism[gpu]')."
            )
            return
        for name, read in (
            ("rayprism_gpu_memory_used_bytes", lambda: meter.reading.used_bytes),
            ("rayprism_gpu_utilization_ratio", lambda: meter.reading.utilization),
        ):
            recorder.gauge(name, read, gpu=gpu.uuid)

    async def _flush_log(self) -> None:
        for number in count(1):
            await asyncio.sleep(_FLUSH_LOG_EVERY_S)
            # The controller was away when it was asked.
            unknown = self._service is not None and self._service.is_stable is None
            if unknown and number % _SECONDS_TO_ASK_AGAIN == 0:
                await asyncio.to_thread(self.look_up_role)
            if self._gpu is not None and number % _SECONDS_TO_READ_GPU == 1:
                await asyncio.to_thread(self._gpu.read)
            if self.telemetry.log is not None:
                await asyncio.to_thread(self.telemetry.log.flush)


def report_failed_load(model: str, version: int, error: Exception) -> None:
    """Counts a model that could not be loaded, before its replica ends. Blocks for 2 s at most."""
    if not _is_on():
        return
    recorder = Recorder(model=model, version=str(version))
    code = error.code if isinstance(error, RayprismError) else "internal"
    recorder.count("rayprism_loads_total", outcome=code).add()
    send_once(recorder.take(), find_agent)


def _make_tracer(model: str, version: str, replica: str, application: str) -> Tracer | None:
    try:
        return make_tracer(
            os.environ, model=model, version=version, replica=replica, application=application
        )
    except RayprismError as error:
        # A model that answers without traces is better than none.
        logger.error("There are no traces. %s", error)
        return None


def _is_on() -> bool:
    return os.environ.get(METRICS_VARIABLE, "1") != "0"


def _interval_s() -> float:
    text = os.environ.get(INTERVAL_VARIABLE, "5")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds <= 15.0:
        logger.warning(
            "%s is %r, allowed are 0.1 to 15 seconds; taken is 5.", INTERVAL_VARIABLE, text
        )
        return 5.0
    return seconds
