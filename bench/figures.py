"""The arithmetic of the tables: medians, ratios, and whether a target is met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "Target",
    "Verdict",
    "across_phases",
    "clean",
    "cpu_groups",
    "median_of",
    "paired_ratio",
    "per_request_us",
    "select",
    "spread",
]

Sample = Mapping[str, Any]
"""One round of one server: what `bench.load.drive` gives, with `server`, `phase` and `round`."""


@dataclass(frozen=True)
class Target:
    """What a figure has to reach.

    Args:
        name: What is compared, for people.
        bound: The limit itself.
        sense: Whether it is the least or the most that will do.
    """

    name: str
    bound: float
    sense: Literal["at least", "at most"]

    def judge(self, value: float | None, *, valid: bool = True) -> Verdict:
        """Whether a value meets it; None or an invalid value does not."""
        if value is None or not valid:
            return Verdict(self, value, False)
        met = value >= self.bound if self.sense == "at least" else value <= self.bound
        return Verdict(self, value, met)


@dataclass(frozen=True)
class Verdict:
    """A target, the value, and whether it is met."""

    target: Target
    value: float | None
    met: bool

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {
            "name": self.target.name,
            "bound": self.target.bound,
            "sense": self.target.sense,
            "value": self.value,
            "met": self.met,
        }


def select(samples: Sequence[Sample], **wanted: Any) -> list[Sample]:
    """The samples that have these values, in the order of their rounds."""
    found = [
        sample
        for sample in samples
        if all(sample.get(key) == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda sample: sample["round"])


def value_of(sample: Sample, path: str) -> float:
    """A figure of a sample by its path: `rate`, `latency_s.p50`."""
    value: Any = sample
    for part in path.split("."):
        value = value[part]
    return float(value)


def median_of(samples: Sequence[Sample], path: str = "rate") -> float | None:
    """Median over rounds; None where there are none."""
    if not samples:
        return None
    return statistics.median(value_of(sample, path) for sample in samples)


def spread(samples: Sequence[Sample], path: str = "rate") -> float | None:
    """Range over rounds as a share of the median: how far to trust the median."""
    middle = median_of(samples, path)
    if not middle:
        return None
    values = [value_of(sample, path) for sample in samples]
    return (max(values) - min(values)) / middle


def paired_ratio(
    above: Sequence[Sample], below: Sequence[Sample], path: str = "rate"
) -> float | None:
    """Median of the rounds' own ratios.

    The two sides of a round are measured within seconds of each other: what slows the machine for
    a while slows both, and leaves the ratio alone.

    Returns:
        None where no round has both.
    """
    divisors = {sample["round"]: value_of(sample, path) for sample in below}
    ratios = [
        value_of(sample, path) / divisors[sample["round"]]
        for sample in above
        if divisors.get(sample["round"])
    ]
    return statistics.median(ratios) if ratios else None


def across_phases(above: float | None, below: float | None) -> float | None:
    """Ratio of two servers that never ran side by side, through one that ran beside each.

    Args:
        above: The first server's ratio to the common one, in its phase.
        below: The second server's ratio to the common one, in its phase.
    """
    if above is None or not below:
        return None
    return above / below


def clean(samples: Sequence[Sample]) -> bool:
    """Whether there are samples, and none of them counted an error."""
    return bool(samples) and all(not any(sample["errors"].values()) for sample in samples)


def per_request_us(samples: Sequence[Sample]) -> dict[str, float]:
    """CPU time for each request by role, over all rounds. Units: microseconds."""
    requests = sum(sample["requests"] for sample in samples)
    seconds: dict[str, float] = {}
    for sample in samples:
        for role, value in sample["cpu_s"].items():
            seconds[role] = seconds.get(role, 0.0) + value
    return {role: value / requests * 1e6 for role, value in seconds.items() if value > 0}


def cpu_groups(by_role: Mapping[str, float], application: str | None) -> dict[str, float]:
    """Puts the roles of `bench.processes` together, as one server's figures.

    Args:
        by_role: Any amounts by role.
        application: The Serve application that was under load; None for the peer without Ray,
            which has no proxy either.

    Returns:
        `server`, `proxy`, `client`, and `rest`: what went on beside it.
    """
    groups = {"server": 0.0, "proxy": 0.0, "client": 0.0, "rest": 0.0}
    for role, amount in by_role.items():
        if role == "load":
            groups["client"] += amount
        elif role == "bare":
            groups["rest" if application else "server"] += amount
        elif role.startswith("replica:"):
            mine = role.split(":")[1] == application
            groups["server" if mine else "rest"] += amount
        elif role in ("haproxy", "proxy"):
            groups["proxy" if application else "rest"] += amount
        else:
            groups["rest"] += amount
    return groups
