"""What became of each request: written by workers, read by whoever sums up."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BROKEN",
    "CONNECT",
    "GRPC",
    "NOT_SENT",
    "OK",
    "REASONS",
    "STATUS",
    "TIMEOUT",
    "Recorder",
    "Records",
]

REASONS = ("ok", "status", "connect", "broken", "timeout", "not_sent")
"""`status`: answered, but not rightly. `connect`: no connection. `broken`: it was closed before the
whole answer was there. `timeout`: sent, but not answered in time. `not_sent`: in all the time there
was no free connection."""
OK, STATUS, CONNECT, BROKEN, TIMEOUT, NOT_SENT = range(len(REASONS))

GRPC = 1000
"""A status of gRPC is recorded as its code and this."""

_SAMPLES_OF_A_KIND = 3
_SAMPLE_CHARACTERS = 400
_COLUMNS = 8


class Recorder:
    """Takes down requests of one worker, as cheaply as can be.

    Times are those of `time.monotonic`.
    """

    def __init__(self) -> None:
        self._rows = array("d")
        self._samples: dict[tuple[int, int], list[str]] = {}

    def add(
        self,
        intended: float,
        late_s: float,
        sent: float,
        done: float,
        status: int,
        reason: int,
        retry_after: bool,
        waited: bool,
    ) -> None:
        """A request that has come to its end.

        Args:
            intended: When it was meant to leave.
            late_s: How long after that the worker turned to it.
            sent: When it left; NaN where it never did.
            done: When its answer, or its failure, was there.
            status: Of HTTP, or of gRPC and GRPC; 0 where there is none.
            reason: Index in REASONS.
            retry_after: Whether the answer says when to come again.
            waited: Whether all connections that are allowed were in use.
        """
        self._rows.extend((intended, late_s, sent, done, status, reason, retry_after, waited))

    def sample(self, status: int, reason: int, text: str) -> None:
        """What a failure said; the first few of each kind are kept."""
        kept = self._samples.setdefault((status, reason), [])
        if len(kept) < _SAMPLES_OF_A_KIND:
            kept.append(text[:_SAMPLE_CHARACTERS])

    def finish(self, loop: Literal["closed", "open"], start: float, cpu_share: float) -> Records:
        """All of it, with times relative to `start`."""
        rows = np.array(self._rows, np.float64).reshape(-1, _COLUMNS)
        return Records(
            loop=loop,
            intended_s=rows[:, 0] - start,
            late_s=rows[:, 1],
            sent_s=rows[:, 2] - start,
            done_s=rows[:, 3] - start,
            status=rows[:, 4].astype(np.int16),
            reason=rows[:, 5].astype(np.int8),
            retry_after=rows[:, 6].astype(bool),
            waited=rows[:, 7].astype(bool),
            cpu_share=(cpu_share,),
            samples=tuple(
                (status, reason, text)
                for (status, reason), texts in self._samples.items()
                for text in texts
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Records:
    """Requests of one load, in no order.

    Args:
        loop: Of the load.
        intended_s: When each was meant to leave; in a closed loop, when it did. Negative for those
            of the warm-up that were answered after it: they count in throughput, and nowhere else.
        late_s: How long after that the generator turned to it; 0 in a closed loop.
        sent_s: When it left; NaN where it never did.
        done_s: When its answer, or its failure, was there.
        status: Of HTTP, or of gRPC and GRPC; 0 where there is none.
        reason: Index in REASONS.
        retry_after: Whether the answer says when to come again.
        waited: Whether all connections that are allowed were in use when its time came.
        cpu_share: Of each worker while it was measured: cores.
        samples: (status, reason, what it said) of some failures.

    Shapes:
        All arrays are [requests]; times are float64, from the start of measuring.
    """

    loop: Literal["closed", "open"]
    intended_s: NDArray[np.float64]
    late_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    done_s: NDArray[np.float64]
    status: NDArray[np.int16]
    reason: NDArray[np.int8]
    retry_after: NDArray[np.bool_]
    waited: NDArray[np.bool_]
    cpu_share: tuple[float, ...]
    samples: tuple[tuple[int, int, str], ...]

    def save(self, path: Path) -> None:
        """Writes them as .npz, which holds no pickles."""
        np.savez(
            path,
            loop=np.array(self.loop),
            cpu_share=np.array(self.cpu_share),
            sample_kinds=np.array([sample[:2] for sample in self.samples], np.int16).reshape(-1, 2),
            sample_texts=np.array([sample[2] for sample in self.samples], np.str_),
            **{name: getattr(self, name) for name in _ARRAYS},
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            kinds, texts = file["sample_kinds"].tolist(), file["sample_texts"].tolist()
            return cls(
                loop=str(file["loop"]),  # type: ignore[arg-type]
                cpu_share=tuple(file["cpu_share"].tolist()),
                samples=tuple(
                    (status, reason, text)
                    for (status, reason), text in zip(kinds, texts, strict=True)
                ),
                **{name: file[name] for name in _ARRAYS},
            )

    @classmethod
    def merge(cls, parts: Sequence[Records]) -> Self:
        """Those of several workers of one load."""
        return cls(
            loop=parts[0].loop,
            cpu_share=tuple(share for part in parts for share in part.cpu_share),
            samples=tuple(sample for part in parts for sample in part.samples),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS},
        )

    def within(self, seconds: float) -> Records:
        """Those that were meant to leave, or that came to their end, from 0 to `seconds`."""
        return self._where(
            ((self.intended_s >= 0) & (self.intended_s < seconds))
            | ((self.done_s >= 0) & (self.done_s < seconds))
        )

    def measured(self) -> Records:
        """Without those of the warm-up."""
        return self._where(self.intended_s >= 0)

    def _where(self, chosen: NDArray[np.bool_]) -> Records:
        return Records(
            loop=self.loop,
            cpu_share=self.cpu_share,
            samples=self.samples,
            **{name: getattr(self, name)[chosen] for name in _ARRAYS},
        )


_ARRAYS = (
    "intended_s",
    "late_s",
    "sent_s",
    "done_s",
    "status",
    "reason",
    "retry_after",
    "waited",
)
