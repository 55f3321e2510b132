"""What a recorder has handed over, and a stand-in for the request log, for tests of serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayprism.telemetry.recorder import Point, Recorder
from rayprism.telemetry.records import RequestRecord
from tests.support.versions import Member

__all__ = ["KeptRecords", "Observed", "Recorded", "keep_records"]

Values = tuple[str, ...]
_REQUEST = ("version", "protocol", "source", "outcome", "reason")


class Observed(NamedTuple):
    """One histogram."""

    number: float
    sum: float


class Recorded:
    """All that a recorder has handed over so far, added up as Ray's agent does it.

    Args:
        source: The recorder, or the member of a fleet whose it is.
    """

    def __init__(self, source: Recorder | Member) -> None:
        if isinstance(source, Member):
            source = source.service.telemetry.recorder
        self._recorder = source
        self._added: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def requests(self) -> dict[Values, float]:
        """Counts by version, protocol, source, outcome and reason."""
        return self.counts("rayprism_requests_total", *_REQUEST)

    def counts(self, name: str, *labels: str) -> dict[Values, float]:
        """By the values of labels. Series that are 0 are left out."""
        return {key: value for key, value in self.series(name, *labels).items() if value}

    def series(self, name: str, *labels: str) -> dict[Values, float]:
        """Of a counter, by the values of labels."""
        self._take()
        found = {}
        for (known, pairs), value in self._added.items():
            if known == name:
                key = tuple(dict(pairs)[label] for label in labels)
                assert key not in found, "these labels do not tell the series apart"
                found[key] = value
        return found

    def histogram(self, name: str, version: str) -> Observed:
        """Of one version; nothing where there is none."""
        number = self.counts(f"{name}_count", "version").get((version,), 0.0)
        return Observed(number, self.counts(f"{name}_sum", "version").get((version,), 0.0))

    def gauges(self, name: str, *labels: str) -> dict[Values, float]:
        """As they are now, by the values of labels."""
        return {
            tuple(dict(point.labels)[label] for label in labels): point.value
            for point in self._take()
            if point.name == name
        }

    def _take(self) -> Sequence[Point]:
        points = self._recorder.take()
        for point in points:
            if point.kind != "gauge":
                key = point.name, frozenset(point.labels)
                self._added[key] = self._added.get(key, 0.0) + point.value
        return points


class KeptRecords:
    """Stands for the request log: keeps the records."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def offer(self, record: RequestRecord, outcome: str, share: float) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def keep_records(member: Member) -> list[RequestRecord]:
    """The records of a member's requests from now on, each when it has ended."""
    kept = KeptRecords()
    telemetry = member.service.telemetry
    telemetry.log, telemetry.log_share = kept, 1.0  # type: ignore[assignment]
    return kept.records
