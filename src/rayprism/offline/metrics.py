"""What a batch job tells of itself while it runs: the metrics `rayprism_job_*`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

from rayprism.offline.worker import Outcome
from rayprism.telemetry.recorder import Point, Recorder

__all__ = ["JobMetrics", "exported"]

_ACTIVE_S = 60.0

logger = logging.getLogger(__name__)


class JobMetrics:
    """Counts what this run does. One thread records, and another one may take.

    Args:
        batch_job: The job's name.
        model: The model's.
        version: The version's.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        batch_job: str,
        model: str,
        version: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._missing: set[int] | None = None
        self._active: dict[str, float] = {}
        self._peak_rss_bytes = 0
        self._recorder = recorder = Recorder(batch_job=batch_job, model=model, version=version)
        self._predicted, self._dead_letters = (
            recorder.count("rayprism_job_rows_total", outcome=outcome)
            for outcome in ("predicted", "dead_letter")
        )
        self._done, self._failed = (
            recorder.count("rayprism_job_shards_total", outcome=outcome)
            for outcome in ("done", "failed")
        )
        self._seconds = recorder.histogram("rayprism_job_shard_seconds")
        recorder.gauge("rayprism_job_shards_left", self._left)
        recorder.gauge("rayprism_job_actors", self._actors)
        recorder.gauge("rayprism_job_actor_memory_bytes", lambda: self._peak_rss_bytes or None)

    def begin_round(self, missing: Collection[int]) -> None:
        """These shards are not done.

        Others may be done without a word: an actor can die between its commit and its answer.
        """
        with self._lock:
            self._missing = set(missing)

    def record(self, outcome: Outcome) -> None:
        """A shard is done, or failed."""
        with self._lock:
            self._peak_rss_bytes = max(self._peak_rss_bytes, outcome.rss_bytes)
            if outcome.error is not None:
                self._failed.add()
                return
            self._active[outcome.worker] = self._clock()
            if self._missing is not None:
                if outcome.shard not in self._missing:
                    return  # done by two actors, committed by one
                self._missing.remove(outcome.shard)
            self._predicted.add(outcome.rows_in - outcome.dead_letters)
            self._dead_letters.add(outcome.dead_letters)
            self._done.add()
            self._seconds.observe(outcome.seconds)

    def take(self) -> list[Point]:
        """What changed since the last time, and every gauge. From any thread."""
        with self._lock:
            return self._recorder.take()

    def _left(self) -> float | None:
        return None if self._missing is None else len(self._missing)

    def _actors(self) -> float:
        since_s = self._clock() - _ACTIVE_S
        self._active = {name: at_s for name, at_s in self._active.items() if at_s >= since_s}
        return len(self._active)


@contextmanager
def exported(metrics: JobMetrics) -> Iterator[None]:
    """Sends metrics to the agent of this node while the block runs. Never fails a job."""
    with ExitStack() as stack:
        try:
            # Only here: these know Ray, and a job that cannot be planned needs neither.
            from rayprism.telemetry.export import export_in_thread
            from rayprism.telemetry.ray_agent import find_agent

            stack.enter_context(export_in_thread(metrics, find_agent))
        except Exception:
            logger.warning("The job runs without metrics.", exc_info=True)
        yield
