"""Stand-in for Ray's metrics agent: a real server that adds up what it gets, as the agent does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

Series = tuple[str, frozenset[tuple[str, str]]]


class Agent(MetricsServiceServicer):
    """What it has got. Where it `refuses`, it takes nothing; until it may `go_on`, it is silent."""

    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        self.values: dict[Series, float] = {}
        self.refuses = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.came = threading.Condition()
        self.asked = 0
        self.metadata: list[dict[str, str]] = []
        self.address = ""

    def find(self) -> str:
        return self.address

    def Export(  # noqa: N802
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        with self.came:
            self.asked += 1
            self.metadata.append(dict(context.invocation_metadata()))
            self.came.notify_all()
        self.go_on.wait(10)
        if self.refuses:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        with self.came:
            self.requests.append(request)
            for metric in self.metrics(request):
                self._add(metric)
            self.came.notify_all()
        return ExportMetricsServiceResponse()

    def _add(self, metric: Metric) -> None:
        is_gauge = metric.WhichOneof("data") == "gauge"
        for point in (metric.gauge if is_gauge else metric.sum).data_points:
            labels = frozenset((tag.key, tag.value.string_value) for tag in point.attributes)
            before = 0.0 if is_gauge else self.values.get((metric.name, labels), 0.0)
            self.values[metric.name, labels] = before + point.as_double

    @staticmethod
    def metrics(request: ExportMetricsServiceRequest) -> list[Metric]:
        return [
            metric
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

    def value(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))

    def wait_for(self, asked: int = 0, taken: int = 0) -> None:
        with self.came:
            assert self.came.wait_for(
                lambda: self.asked >= asked and len(self.requests) >= taken, timeout=20
            )


@contextmanager
def run_agent(port: int = 0) -> Iterator[Agent]:
    agent = Agent()
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    add_MetricsServiceServicer_to_server(agent, server)
    agent.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield agent
    finally:
        agent.go_on.set()
        server.stop(None).wait(10)


def plain_channel(address: str) -> grpc.Channel:
    """Without Ray."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(address, options=options)
