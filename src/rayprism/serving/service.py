"""One loaded model version, as the HTTP and the gRPC side of a replica see it. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from rayprism.core.batching import BatchLimits
from rayprism.core.tensors import Tensors, check_inputs
from rayprism.errors import (
    ConfigInvalid,
    DeadlineExceeded,
    InvalidInput,
    ModelFailed,
    NotFound,
    RequestError,
    SetupError,
)
from rayprism.models.loader import LoadedModel
from rayprism.models.manifest import Manifest
from rayprism.protocol.messages import InferRequest
from rayprism.protocol.metadata import ServedModel
from rayprism.protocol.select import select_outputs
from rayprism.serving.links import Links
from rayprism.serving.scheduler import Execution, Job, OnDone, Scheduler
from rayprism.serving.service_gauges import ServiceGauges
from rayprism.serving.settings import UserConfig, parse_user_config
from rayprism.serving.shadows import Shadows
from rayprism.serving.statistics import Statistics
from rayprism.serving.telemetry import ReplicaTelemetry
from rayprism.serving.traffic import Traffic
from rayprism.telemetry.records import BatchRecord, RequestRecord

__all__ = ["ModelService", "batch_limits", "served_model"]

_HANG_S = 600.0
"""A batch that runs longer is taken for hung, unless the time-outs allow far more."""

_PLATFORMS = {
    "onnx": ("onnxruntime_onnx", "onnxruntime"),
    "torch": ("pytorch_libtorch", "pytorch"),
    "python": ("python", "python"),
}
"""Source: the platform and backend names of Triton's model configuration."""

logger = logging.getLogger("ray.serve.rayprism")


def batch_limits(manifest: Manifest, config: UserConfig) -> BatchLimits:
    """The bounds in force: the manifest's hints, overridden by the operator's `user_config`."""
    hints = manifest.batching
    max_rows = config.max_batch_rows or hints.max_rows
    max_delay_s = hints.max_delay_s if config.max_delay_s is None else config.max_delay_s
    return BatchLimits(
        max_rows=max_rows if hints.batched else 1,
        max_queue_rows=config.max_queue_rows,
        max_cost=(config.max_batch_cost or hints.max_cost) if hints.ragged else None,
        max_padding_share=hints.max_padding_share,
        max_delay_s=max_delay_s,
    )


class ModelService:
    """Answers requests with one loaded model version. Made and used on one event loop.

    Args:
        model: Loaded, warmed up, its golden example reproduced.
        config: The `user_config` to begin with.
        links: Where the model's other versions are; None where there are none to be found.
        telemetry: What is told of requests and batches; by default it is told nobody.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: UserConfig,
        links: Links | None = None,
        telemetry: ReplicaTelemetry | None = None,
    ) -> None:
        self.manifest = model.manifest
        self.model_name = self.manifest.model
        self.version = str(self.manifest.version)
        """As the protocol writes it."""
        self.config = config
        self.config_error: str | None = None
        """Why the newest `user_config` is not in force; None where it is."""
        self.statistics = Statistics()
        self.telemetry = telemetry or ReplicaTelemetry(self.model_name, self.version)
        self.is_stable: bool | None = None
        """Whether this is at the model's own address; None where that is not known."""
        self._model = model
        self._output_names = self.manifest.output_names
        self._batched = self.manifest.batching.batched
        self._loop = asyncio.get_running_loop()
        self._preparer = ThreadPoolExecutor(1, "prepare") if model.has_prepare else None
        self._preparing_since_s: float | None = None
        self._scheduler = Scheduler(
            model,
            batch_limits(self.manifest, config),
            ragged=self.manifest.batching.ragged,
            ragged_outputs=self.manifest.batching.ragged_outputs,
            batched=self._batched,
            execution=self._execution(config),
            statistics=self.statistics,
            on_batch=self._on_batch,
        )
        self._links = links
        self.traffic = Traffic(self.model_name, self.manifest.version, links)
        self.shadows = Shadows(
            self.manifest.version,
            self.manifest.golden.tolerance,
            links,
            is_busy=lambda: self._scheduler.is_behind,
        )
        self._reconfigure_traffic(config)
        self._gauges = ServiceGauges(self)

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self._model.device

    @property
    def scheduler(self) -> Scheduler:
        """The queue and the loop that feeds the model."""
        return self._scheduler

    def _execution(self, config: UserConfig) -> Execution:
        execution = config.execution or self.manifest.batching.execution
        if execution == "auto" and self.manifest.runs_code:
            # How long Python code takes, or waits, for other inputs no warm-up can show.
            return "thread"
        return execution

    def reconfigure(self, raw: Mapping[str, Any] | None) -> bool:
        """Takes a new `user_config`; a faulty one is refused, and the last good one kept.

        Returns:
            Whether the new one is in force; else `config_error` says why not.
        """
        try:
            config = parse_user_config(raw)
        except ConfigInvalid as error:
            self.config_error = str(error)
            self._gauges.config_refused()
            logger.error("The new user_config is refused, the last good one is kept. %s", error)
            return False
        self.config = config
        self.config_error = None
        self._scheduler.reconfigure(batch_limits(self.manifest, config), self._execution(config))
        self._reconfigure_traffic(config)
        return True

    def _reconfigure_traffic(self, config: UserConfig) -> None:
        self.traffic.reconfigure(config.traffic)
        self.shadows.reconfigure(config.traffic)
        self.telemetry.log_share = config.telemetry.log_percent / 100
        self.telemetry.trace_share = config.telemetry.trace_percent / 100

    def check_target(self, model: str | None, version: str | None) -> None:
        """Checks that a request means this model and version; None means whatever is here.

        Raises:
            NotFound: It means another.
        """
        if model is not None and model != self.manifest.model:
            raise NotFound(
                f"model {model!r} is not served here; here is {self.manifest.model!r} "
                f"version {self.version}"
            )
        if version and version != self.version:
            raise NotFound(
                f"version {version!r} of model {self.manifest.model!r} is not served here; "
                f"here is version {self.version}"
            )

    def now_s(self) -> float:
        """The time on the clock of arrivals."""
        return self._scheduler.now_s()

    async def infer(
        self,
        request: InferRequest,
        request_id: str,
        *,
        arrival_s: float | None = None,
        most_s: float | None = None,
        record: RequestRecord | None = None,
    ) -> Tensors:
        """Answers one decoded request.

        Args:
            request: What is asked.
            request_id: For the log.
            arrival_s: When it came, on the clock of `now_s`; by default now.
            most_s: Most seconds that it may take, whatever it says itself.
            record: Gets what it takes at each step.

        Returns:
            The outputs that it asked for, in its order; all of them where it asked for none.

        Raises:
            RequestError: See `Scheduler.infer`; and InvalidInput for what the model does not take.
        """
        scheduler = self._scheduler
        if arrival_s is None:
            arrival_s = scheduler.now_s()
        timeout_s, priority, names = self._terms(request, most_s)
        tensors = request.tensors
        rows = check_inputs(self.manifest.inputs, tensors, batched=self._batched)
        if record is not None:
            record.rows = rows
            record.decoded_s = scheduler.now_s()
        if self._preparer is not None:
            with scheduler.reserve(rows), self._counted(arrival_s):
                left_s = arrival_s + timeout_s - scheduler.now_s()
                tensors = await self._prepare(
                    self._preparer, tensors, timeout_s, left_s, request_id
                )
            if record is not None:
                record.prepared_s = scheduler.now_s()
        outputs = await scheduler.infer(
            tensors,
            rows,
            timeout_s=timeout_s,
            priority=priority,
            request_id=request_id,
            arrival_s=arrival_s,
            record=record,
        )
        return _selected(outputs, names)

    @property
    def is_direct(self) -> bool:
        """Whether requests may be submitted: nothing happens to them before the queue."""
        return self._preparer is None

    def submit(
        self,
        request: InferRequest,
        record: RequestRecord,
        done: OnDone,
        *,
        most_s: float | None = None,
    ) -> Job:
        """Lets a decoded request wait for its turn, where `is_direct`; does not wait itself.

        Args:
            request: What is asked.
            record: Says when it came; gets what it takes at each step.
            done: Called once, later, with the outputs that it asked for, or with the error; not
                for a request that is cancelled.
            most_s: As for `infer`.

        Raises:
            RequestError: What can be said at once; then `done` is not called.
        """
        scheduler = self._scheduler
        timeout_s, priority, names = self._terms(request, most_s)
        tensors = request.tensors
        record.rows = rows = check_inputs(self.manifest.inputs, tensors, batched=self._batched)
        record.decoded_s = scheduler.now_s()
        if names:
            done = partial(_tell_selected, done, names)
        return scheduler.submit(
            tensors,
            rows,
            timeout_s=timeout_s,
            priority=priority,
            request_id=record.request_id,
            arrival_s=record.began_s,
            record=record,
            done=done,
        )

    def cancel(self, job: Job) -> None:
        """Takes back a request that was submitted: its client has left."""
        self._scheduler.cancel(job)

    def _terms(
        self, request: InferRequest, most_s: float | None
    ) -> tuple[float, int, Sequence[str]]:
        """Time-out, priority and wanted outputs of a request; no outputs: all of them."""
        config = self.config
        timeout_s = request.timeout_s or config.default_timeout_s
        if most_s is not None and most_s < timeout_s:
            timeout_s = most_s
        priority = self._priority(request.priority, config)
        names = select_outputs(request, self._output_names) if request.outputs else ()
        return timeout_s, priority, names

    def _on_batch(
        self,
        record: BatchRecord,
        cost: int,
        padding: int,
        requests: Iterable[RequestRecord | None],
    ) -> None:
        traces = []
        if self.telemetry.tracer is not None:
            traces = [request.trace for request in requests if request and request.trace]
        self.telemetry.batch(record, cost, padding, traces)

    def _priority(self, asked: int, config: UserConfig) -> int:
        if asked == 0:
            return config.default_priority
        if asked > config.priority_levels:
            raise InvalidInput(
                f"priority {asked}: allowed are 1 (first) to {config.priority_levels}, "
                f"and 0 for the default, which is {config.default_priority}"
            )
        return asked

    @contextmanager
    def _counted(self, arrival_s: float) -> Iterator[None]:
        """Counts a request that ends here, before the scheduler sees it."""
        try:
            yield
        except (RequestError, asyncio.CancelledError) as error:
            code = error.code if isinstance(error, RequestError) else "cancelled"
            self.statistics.failed(code, self._scheduler.now_s() - arrival_s)
            raise

    async def _prepare(
        self,
        preparer: Executor,
        tensors: Tensors,
        timeout_s: float,
        left_s: float,
        request_id: str,
    ) -> Tensors:
        try:
            async with asyncio.timeout(left_s):
                outcome = await self._loop.run_in_executor(preparer, self._try_prepare, tensors)
        except TimeoutError:
            raise DeadlineExceeded(
                f"not served within the {timeout_s:.3g} s that the request allowed: "
                "it was still waiting for pre-processing"
            ) from None
        if isinstance(outcome, dict):
            return outcome
        if isinstance(outcome, RequestError) and not isinstance(outcome, ModelFailed):
            raise outcome
        logger.error("Pre-processing failed on request %s.", request_id, exc_info=outcome)
        raise ModelFailed(
            "pre-processing failed on this request; the log of the replica has the details "
            f"under request id {request_id}"
        )

    def _try_prepare(self, tensors: Tensors) -> Tensors | BaseException:
        # As a value: a future cannot carry every exception (StopIteration).
        self._preparing_since_s = self._scheduler.now_s()
        try:
            return self._model.prepare(tensors)
        except BaseException as error:
            return error
        finally:
            self._preparing_since_s = None

    def check_health(self) -> None:
        """Checks that the model still moves.

        Raises:
            SetupError: A batch, or the pre-processing of a request, has been running for so long
                that nobody waits for it any more.
        """
        limit_s = max(_HANG_S, 10 * self.config.default_timeout_s)
        running_s = self._scheduler.running_for_s
        if running_s > limit_s:
            raise SetupError(f"a batch has been running for {running_s:.0f} s: the model hangs")
        since_s = self._preparing_since_s
        if since_s is not None and self._scheduler.now_s() - since_s > limit_s:
            raise SetupError(
                f"pre-processing of one request has been running for more than {limit_s:.0f} s: "
                "it hangs, and the others wait for it"
            )

    async def close(self) -> None:
        """Refuses what waits, ends the running batch, and frees the model."""
        await self.shadows.close()
        if self._links is not None:
            await self._links.close()
        await self._scheduler.close()
        if self._preparer is not None:
            self._preparer.shutdown(wait=False)
        await asyncio.to_thread(self.telemetry.close)
        self._model.close()

    def served_model(self) -> ServedModel:
        """What the protocol's documents say of this version, with the bounds in force."""
        return served_model(self.manifest, self.config)


def _tell_selected(
    done: OnDone, names: Sequence[str], outputs: Tensors | None, error: RequestError | None
) -> None:
    done(None if outputs is None else _selected(outputs, names), error)


def _selected(outputs: Tensors, names: Sequence[str]) -> Tensors:
    return {name: outputs[name] for name in names} if names else outputs


def served_model(manifest: Manifest, config: UserConfig | None = None) -> ServedModel:
    """A manifest in the terms of the protocol's documents."""
    config = config or UserConfig()
    limits = batch_limits(manifest, config)
    platform, backend = _PLATFORMS[manifest.runtime]
    return ServedModel(
        name=manifest.model,
        version=str(manifest.version),
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        batched=manifest.batching.batched,
        max_rows=limits.max_rows,
        max_delay_s=limits.max_delay_s,
        platform=platform,
        backend=backend,
        default_timeout_s=config.default_timeout_s,
        priority_levels=config.priority_levels,
        default_priority=config.default_priority,
        description=str(manifest.metadata.get("description", "")),
        example=manifest.golden.input_arrays(),
    )
