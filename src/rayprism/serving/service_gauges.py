"""The metrics that are kept elsewhere in a replica: read now and then, not at each request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rayprism.core.traffic import SLOTS

if TYPE_CHECKING:
    from rayprism.serving.service import ModelService

__all__ = ["ServiceGauges"]


class ServiceGauges:
    """Puts queue, memory, weights, fallbacks, shadows of one service into its recorder.

    Args:
        service: Whose.
    """

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._recorder = recorder = service.telemetry.recorder
        self._weights: set[str] = set()
        recorder.before_each(self._read)
        scheduler = service.scheduler
        recorder.gauge("rayprism_queue_rows", lambda: scheduler.queued_rows)
        recorder.gauge("rayprism_queue_age_seconds", scheduler.queue_age_s)
        recorder.gauge("rayprism_batch_limit_ratio", lambda: scheduler.limit_share)
        recorder.gauge("rayprism_target_p99_seconds", lambda: service.config.telemetry.p99_target_s)
        recorder.gauge(
            "rayprism_target_availability_ratio",
            lambda: service.config.telemetry.availability_percent / 100,
        )
        self._refusals = recorder.count("rayprism_config_refusals_total")

    def config_refused(self) -> None:
        """A `user_config` was faulty."""
        self._refusals.add()

    def _read(self) -> None:
        self._total("rayprism_out_of_memory_batches_total", self._service.scheduler.out_of_memory)
        self._read_weights()
        self._read_fallbacks()
        self._read_shadows()

    def _read_weights(self) -> None:
        for version in self._service.traffic.slots:
            name = str(version)
            if name not in self._weights:
                self._weights.add(name)
                self._recorder.gauge(
                    "rayprism_traffic_weight_ratio", self._weight_of(version), version=name
                )

    def _weight_of(self, version: int) -> Callable[[], float | None]:
        def read() -> float | None:
            service = self._service
            slots = service.traffic.slots.get(version)
            return slots / SLOTS if slots is not None and service.is_stable else None

        return read

    def _read_fallbacks(self) -> None:
        for version, fallbacks in self._service.traffic.fallbacks():
            for reason, number in fallbacks.items():
                self._total("rayprism_fallbacks_total", number, version=str(version), reason=reason)

    def _read_shadows(self) -> None:
        for version, shadow in self._service.shadows.counts():
            name = str(version)
            copies = {
                "compared": {"ok": shadow.compared},
                "dropped": shadow.dropped,
                "failed": shadow.failed,
            }
            for outcome, reasons in copies.items():
                for reason, number in reasons.items():
                    labels = {"version": name, "outcome": outcome, "reason": reason}
                    self._total("rayprism_shadow_copies_total", number, **labels)
            for outcome, outputs in {
                "agreed": shadow.agreed,
                "disagreed": shadow.disagreed,
            }.items():
                for output, number in outputs.items():
                    labels = {"version": name, "output": output, "outcome": outcome}
                    self._total("rayprism_shadow_outputs_total", number, **labels)

    def _total(self, name: str, number: int, **labels: str) -> None:
        """Takes over a count that is kept elsewhere."""
        self._recorder.count(name, **labels).value = number
