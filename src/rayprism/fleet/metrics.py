"""Reads the metrics of a cluster's nodes where Prometheus would, without Prometheus."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from rayprism.errors import ClusterError
from rayprism.fleet.rest import DEFAULT_ADDRESS, token_header
from rayprism.telemetry.catalogue import LABELS

__all__ = ["Labels", "MetricsReader", "NodeSample", "Sample", "parse_metrics", "parse_targets"]

Labels = tuple[tuple[str, str], ...]
"""Names and values, ordered by name."""
Series = Mapping[str, Mapping[Labels, float]]
"""Values by name, then by labels."""

_KEPT_LABELS = frozenset(LABELS) | {"deployment", "le"}
"""Others are Ray's and OpenTelemetry's, and say nothing that the scrape's address does not."""
_MAX_BODY_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_MAX_THREADS = 32
_FAILURES = (OSError, http.client.HTTPException, ValueError)


@dataclass(frozen=True, slots=True)
class NodeSample:
    """What one address said.

    Args:
        at_s: When, in seconds of the reader's clock.
        series: Of those that were asked for; empty where it has none of them.
    """

    at_s: float
    series: Series


@dataclass(frozen=True, slots=True)
class Sample:
    """What a cluster said at one time.

    Args:
        at_s: When it was asked, in seconds of the reader's clock.
        nodes: By `host:port`. A node has several ports; one of them has its series.
        silent: Who did not answer, and why.
    """

    at_s: float
    nodes: Mapping[str, NodeSample]
    silent: Mapping[str, str]


class MetricsReader:
    """Asks the dashboard who is there, and then all of them at once.

    Args:
        names: Of the series that are wanted; a node has a hundred times as many.
        address: Of the dashboard.
        timeout_s: For each answer, from first to last byte.
    """

    def __init__(
        self, names: Collection[str], address: str = DEFAULT_ADDRESS, timeout_s: float = 3.0
    ) -> None:
        self.address = address.rstrip("/")
        self._names = frozenset(name.encode() for name in names)
        self._timeout_s = timeout_s
        self._targets: list[str] | None = None
        # Proxies of the environment are for the internet, not for a cluster's own nodes.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(self) -> Sample:
        """Asks everyone.

        Once the dashboard has answered, it may fail like any node: those that it named are asked
        again.

        Raises:
            ClusterError: The dashboard does not answer the first time, or not as Ray's does.
        """
        at_s = time.monotonic()
        silent: dict[str, str] = {}
        url = f"{self.address}/api/prometheus/sd"
        try:
            self._targets = parse_targets(self._get(url, token_header()))
        except _FAILURES as error:
            reason = _explain(error)
            if self._targets is None:
                raise ClusterError(
                    f"no Ray dashboard at {self.address} ({reason}). Is the cluster up "
                    "(`rayprism up`), and is this its dashboard's address?"
                ) from None
            silent[self.address] = reason
        nodes: dict[str, NodeSample] = {}
        if self._targets:
            with ThreadPoolExecutor(min(len(self._targets), _MAX_THREADS)) as pool:
                answers = list(pool.map(self._read_target, self._targets))
            for target, answer in zip(self._targets, answers, strict=True):
                if isinstance(answer, NodeSample):
                    nodes[target] = answer
                else:
                    silent[target] = answer
        return Sample(at_s, nodes, silent)

    def _read_target(self, target: str) -> NodeSample | str:
        try:
            body = self._get(f"http://{target}/metrics", {})
            at_s = time.monotonic()
            return NodeSample(at_s, parse_metrics(body, self._names))
        except _FAILURES as error:
            return _explain(error)

    def _get(self, url: str, headers: Mapping[str, str]) -> bytes:
        request = urllib.request.Request(url, headers=dict(headers))
        deadline_s = time.monotonic() + self._timeout_s
        body = bytearray()
        with self._opener.open(request, timeout=self._timeout_s) as response:
            # The socket's own time-out begins again with every byte.
            while chunk := response.read1(_CHUNK_BYTES):
                body += chunk
                if time.monotonic() > deadline_s:
                    raise TimeoutError("timed out")
                if len(body) > _MAX_BODY_BYTES:
                    raise OSError(f"its answer is over {_MAX_BODY_BYTES} bytes")
            if response.length:
                # Counters that are missing would look as if they had begun again.
                raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)


def _explain(error: Exception) -> str:
    """What happened, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        with error:
            token = " and asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            return f"it answered {error.code}{token if error.code in (401, 403) else ''}"
    if isinstance(error, ValueError):
        return f"it answered something else: {error}"
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return "timed out"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def parse_targets(body: bytes) -> list[str]:
    """The addresses in what the dashboard says to Prometheus' HTTP service discovery.

    Returns:
        `host:port` each, in order, none twice.

    Raises:
        ValueError: It is not such a list.

    Source: Prometheus, "HTTP SD".
    """
    groups = json.loads(body)
    if not isinstance(groups, list):
        raise ValueError("not a list")
    targets: dict[str, None] = {}
    for group in groups:
        found = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(found, list) or not all(isinstance(target, str) for target in found):
            raise ValueError("no targets in it")
        targets |= dict.fromkeys(found)
    return list(targets)


def parse_metrics(body: bytes, names: Collection[bytes]) -> Series:
    """Reads some of the series of a scrape.

    Lines are chosen before they are parsed: of a node's 0.8 MB hardly a hundredth is wanted, and
    choosing takes 2 ms, parsing everything 300.

    Args:
        body: In Prometheus' text format.
        names: Of the series, in full: with `_bucket`, `_sum` or `_count`.

    Raises:
        ValueError: A line that is wanted is not in that format.
    """
    found: dict[str, dict[Labels, float]] = {}
    for line in body.split(b"\n"):
        if line.partition(b"{")[0].partition(b" ")[0] not in names:
            continue
        end = line.rfind(b"}") + 1 or line.find(b" ")
        name, labels = _parse_series(line[:end])
        value, *_ = line[end:].split() or [b""]
        number = float(value)
        if number == number:  # not NaN, which says that there is none
            found.setdefault(name, {})[labels] = number
    return found


@lru_cache(maxsize=50_000)
def _parse_series(text: bytes) -> tuple[str, Labels]:
    """Name and labels: what takes long, and is the same in every scrape."""
    from prometheus_client.parser import text_string_to_metric_families

    # One line at a time, without the comments: of a counter whose name lacks `_total`, the parser
    # would make another name.
    (family,) = text_string_to_metric_families(f"{text.decode(errors='replace')} 0\n")
    (sample,) = family.samples
    kept = (label for label in sample.labels.items() if label[0] in _KEPT_LABELS)
    return sample.name, tuple(sorted(kept))
