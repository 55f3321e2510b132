"""What the load generator is told to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bench.scenario import Arrivals

if TYPE_CHECKING:
    from bench.models.bodies import Body

__all__ = ["LoadFailed", "Plan"]


class LoadFailed(Exception):
    """The load generator gave no figures."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One load.

    Args:
        url: Where to POST: http://host:port/path. Of gRPC host:port; what is called is `ModelInfer`
            of the Open Inference Protocol.
        bodies: Sent in turn.
        body_kind: How `bodies` are encoded, which says how they are sent.
        headers: Beside those of the bodies; of gRPC metadata.
        loop: `closed`: each connection sends its next request when it has its answer. `open`:
            requests leave at times that are drawn before, whatever the server does.
        connections: Closed loop: how many ask at once. Open loop: the most that are opened.
        seconds: How long is measured.
        warm_up_s: Before it, at the same load.
        rate: Open loop: requests/s in the mean.
        arrivals: Open loop: which process.
        seed: Of the arrivals.
        processes: Workers; connections and requests are dealt to them in turn.
        timeout_s: From when a request is meant to leave to the end of its answer.
        client: `wrk` can do closed loops of JSON only.

    Raises:
        ValueError: What cannot be driven.
    """

    url: str
    bodies: Sequence[Body]
    body_kind: Literal["json", "binary", "grpc"] = "json"
    headers: Mapping[str, str] = field(default_factory=dict)
    loop: Literal["closed", "open"] = "closed"
    connections: int = 64
    seconds: float = 5.0
    warm_up_s: float = 1.0
    rate: float | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    seed: int = 1
    processes: int = 1
    timeout_s: float = 30.0
    client: Literal["python", "wrk"] = "python"

    def __post_init__(self) -> None:
        faults = []
        if not self.bodies:
            faults.append("no bodies")
        if self.connections < self.processes:
            faults.append(f"{self.connections} connections for {self.processes} processes")
        if (self.loop == "open") != (self.rate is not None):
            faults.append("an open loop needs a rate, and a closed loop has none")
        if self.client == "wrk" and (self.loop != "closed" or self.body_kind != "json"):
            faults.append("wrk is for a closed loop of JSON bodies")
        if faults:
            raise ValueError("; ".join(faults))
