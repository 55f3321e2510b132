"""A replica's HTTP server on a loopback socket, with the fast lane or without; Ray is not started.

uvicorn is real, and so is Serve's handling of each request: the class that runs inside replicas,
without what it needs a cluster for.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import re
import socket
import warnings
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import uvloop

from tests.support.asyncs import until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from ray.serve._private.common import DeploymentID, RequestProtocol
    from ray.serve._private.config import DeploymentConfig
    from ray.serve._private.http_util import _apply_middlewares
    from ray.serve._private.replica import Replica, ReplicaMetricsManager
    from ray.serve._private.rolling_window import RollingWindowAccumulator, RollingWindowMax
    from ray.serve._private.utils import Semaphore

    from rayprism.serving import lane as lane_module
    from rayprism.serving.lane import Lane
    from rayprism.serving.lane_connection import LaneConnection

ROUTE = "/v2/models/tiny"
INFER = f"{ROUTE}/infer"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def on_both_loops(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on asyncio's loop and on uvloop's, for at most half a minute each."""

    @pytest.mark.parametrize("loop_name", list(LOOPS))
    @functools.wraps(function)
    def run(loop_name: str, *args: Any, **kwargs: Any) -> None:
        run_on(loop_name, function(*args, **kwargs))

    signature = inspect.signature(function)
    named = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[named, *signature.parameters.values()]
    )
    return run


def run_on(loop_name: str, work: Awaitable[None]) -> None:
    """Runs it on a loop of that kind. What nobody caught there makes it fail."""
    uncaught: list[Any] = []

    async def watched() -> None:
        handler = lambda _, context: uncaught.append(context)  # noqa: E731
        asyncio.get_running_loop().set_exception_handler(handler)
        async with asyncio.timeout(30):
            await work

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(watched())
    assert not uncaught, uncaught


# Ray's side


class CounterStandIn:
    """Stands for a counter or gauge of Ray's: remembers what it was told, by tags."""

    def __init__(self) -> None:
        self.counts: Counter[frozenset[tuple[str, str]]] = Counter()

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        self.counts[frozenset((tags or {}).items())] += int(value)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """A histogram's."""

    set = observe


class MetricsStandIn(ReplicaMetricsManager):  # type: ignore[misc]
    """Serve's own accounts of requests, over counters that need no cluster.

    It counts at once, which Serve does where its interval for export is 0.
    """

    _is_direct_ingress = True

    def __init__(self) -> None:
        self._num_ongoing_requests = 0
        self._cached_metrics_enabled = False
        self._num_ongoing_requests_gauge = CounterStandIn()
        self._request_counter, self._error_counter = CounterStandIn(), CounterStandIn()
        self._processing_latency_tracker = CounterStandIn()
        self._user_code_time_accumulator = RollingWindowAccumulator(600, 10)
        self._max_processing_latency_trackers = defaultdict(lambda: RollingWindowMax(600, 10))
        self.of_http = _IngressStandIn()
        self._ingress_metrics = {RequestProtocol.HTTP: self.of_http}
        self._ingress_ongoing_requests = {RequestProtocol.HTTP: 0}
        self.begun = self.ended = 0

    def _should_emit_request_ingress_metrics(self, protocol: RequestProtocol) -> bool:
        return True

    def _change_num_ongoing_requests(self, request_metadata: Any, delta: int) -> None:
        self.begun += delta > 0
        self.ended += delta < 0
        super()._change_num_ongoing_requests(request_metadata, delta)

    @property
    def ongoing(self) -> tuple[int, int]:
        """What autoscaling and draining go by, and what HTTP's gauge shows."""
        return self._num_ongoing_requests, self._ingress_ongoing_requests[RequestProtocol.HTTP]

    @property
    def counted(self) -> dict[str, Counter[frozenset[tuple[str, str]]]]:
        """All that was counted, by counter."""
        counters = {
            "requests": self._request_counter,
            "errors": self._error_counter,
            "http": self.of_http.request_counter,
            "http errors": self.of_http.request_error_counter,
            "deployment errors": self.of_http.deployment_request_error_counter,
        }
        return {name: counter.counts for name, counter in counters.items()}


class _IngressStandIn(lane_module.RequestIngressMetrics):  # type: ignore[misc]
    def __init__(self) -> None:
        self.request_counter, self.request_error_counter = CounterStandIn(), CounterStandIn()
        self.deployment_request_error_counter = CounterStandIn()
        self.processing_latency_tracker = CounterStandIn()
        self.num_ongoing_requests_gauge = CounterStandIn()


class ReplicaStandIn(Replica):  # type: ignore[misc]
    """Serve's own handling of requests that come to a replica by HTTP, without an actor around.

    Args:
        app: The application.
        max_ongoing_requests: Slots.
    """

    def __init__(self, app: Any, max_ongoing_requests: int = 64) -> None:
        self.app = app
        self.taken = 0
        self._event_loop = asyncio.get_running_loop()
        self._user_callable_initialized, self._user_callable_asgi_app = True, app
        self._route_prefix = ROUTE
        self._deployment_id = DeploymentID(name="model", app_name="tiny")
        self._deployment_config = DeploymentConfig(
            max_ongoing_requests=max_ongoing_requests,
            logging_config={"enable_access_log": False},
        )
        self._http_options = SimpleNamespace(request_timeout_s=None, root_path="")
        self._metrics_manager = MetricsStandIn()
        self._semaphore = Semaphore(lambda: self.max_ongoing_requests)
        self._access_log_context: dict[str, Any] = {}
        self._ingress, self._quiescing, self._num_queued_requests = True, False, 0
        self._user_callable_wrapper = SimpleNamespace(
            event_loop=self._event_loop,
            _run_user_code_in_separate_thread=False,
            get_user_method_info=lambda name: name,
            _call_http_entrypoint=self._call_app,
        )

    async def _call_app(self, name: str, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    async def _dataplane_health_check(self) -> tuple[bool, str]:
        return True, "success"

    async def _direct_ingress_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.taken += 1
        await super()._direct_ingress_asgi(scope, receive, send)

    @property
    def metrics(self) -> MetricsStandIn:
        return self._metrics_manager  # type: ignore[no-any-return]

    @property
    def slots_taken(self) -> int:
        return self._semaphore._value  # type: ignore[no-any-return]


# The server


@dataclass
class LaneServer:
    """A server, and what tests ask of it."""

    replica: ReplicaStandIn
    web: uvicorn.Server
    middleware: Any
    port: int
    clients: AsyncExitStack

    @property
    def taken_by_serve(self) -> int:
        """Requests that did not take the lane."""
        return self.replica.taken

    @property
    def has_lane(self) -> bool:
        return hasattr(self.middleware, "_lane")

    @property
    def lane(self) -> Lane:
        lane = self.middleware._lane
        assert isinstance(lane, Lane)
        return lane

    @property
    def connections(self) -> set[Any]:
        """Those that the server waits for when it ends."""
        return set(self.web.server_state.connections)

    @property
    def connection(self) -> LaneConnection:
        """The only one, which has been taken over."""
        (connection,) = self.connections
        assert isinstance(connection, LaneConnection)
        return connection

    def look_again(self) -> None:
        """What has changed in Serve's settings is noticed now, and not in a quarter of a second."""
        self.lane._look_at_s = 0.0

    async def client(self) -> Client:
        """A connection."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.push_async_callback(client.close)
        return client

    async def client_in_lane(self) -> Client:
        """A connection that has been taken over."""
        client = await self.client()
        await client.ask(post(b"first"))
        return client


@asynccontextmanager
async def lane_server(
    app: Any,
    *,
    lane: bool = True,
    keep_alive_s: float = 60,
    max_ongoing_requests: int = 64,
) -> AsyncIterator[LaneServer]:
    """Serves an application. At the end every account has to be settled."""
    lane_module.open_lane(app)
    replica = ReplicaStandIn(app, max_ongoing_requests)
    web_app = _apply_middlewares(
        replica._direct_ingress_asgi, lane_module.middlewares() if lane else []
    )
    # As Ray does it: without a level uvicorn wraps the application for its messages.
    log = logging.getLogger("uvicorn.error")
    level = log.level
    log.setLevel(logging.CRITICAL)
    web = uvicorn.Server(
        uvicorn.Config(
            lambda: web_app,
            factory=True,
            lifespan="off",
            access_log=False,
            log_level=None,
            log_config=None,
            timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
        )
    )
    web.config.load()
    web.lifespan = web.config.lifespan_class(web.config)
    # With the protocol said, asyncio switches Nagle's algorithm off for connections.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    try:
        await web.startup(sockets=[listening])
        await web.on_tick(0)
        async with AsyncExitStack() as clients:
            port = listening.getsockname()[1]
            served = LaneServer(replica, web, web_app, port, clients)
            yield served
        await until(lambda: not served.connections)
        metrics = replica.metrics
        await until(lambda: metrics.ongoing == (0, 0))
        assert replica.slots_taken == 0
        assert metrics.begun == metrics.ended
    finally:
        log.setLevel(level)
        lane_module._app = None
        for server in web.servers:
            server.close()
        listening.close()


# The client


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        status: The number.
        headers: As they came, but `date`; a generated request id is `generated`.
        body: Without framing.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def __getitem__(self, name: str) -> str:
        return dict(self.headers)[name]


class Client:
    """A connection on which nothing is done that a test does not say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Sends pieces, of which the server gets each by itself, if it is quick enough."""
        for piece in pieces:
            self.writer.write(piece)
            for _ in range(4 if len(pieces) > 1 else 0):
                await asyncio.sleep(0)
        await self.writer.drain()

    async def ask(self, *pieces: bytes, has_body: bool = True) -> Answer:
        """Sends a request and reads its answer."""
        await self.send(*pieces)
        return await self.answer(has_body=has_body)

    async def answer(self, *, has_body: bool = True) -> Answer:
        """The next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:])]
        status = int(lines[0].split()[1])
        body = b""
        if status >= 200 and has_body:
            if ("transfer-encoding", "chunked") in headers:
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
            else:
                body = await self.reader.readexactly(int(dict(headers)["content-length"]))
        return Answer(status, comparable(headers), body)

    async def rest(self) -> bytes:
        """What comes until the server closes the connection."""
        return await self.reader.read()

    async def close(self) -> None:
        self.writer.transport.abort()


def comparable(headers: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Headers without what differs from one answer to the next."""
    return tuple(
        (name, "generated" if name == "x-request-id" and _UUID.fullmatch(value) else value)
        for name, value in headers
        if name != "date"
    )


def post(body: bytes, *headers: str, path: str = INFER) -> bytes:
    """An inference request."""
    lines = [f"POST {path} HTTP/1.1", "host: test", *headers, f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: test", *headers, "", ""]).encode()


class ScriptedApp:
    """Stands for an application whose inference requests may take the lane: tests say what it does.

    Args:
        work: Gets the whole body, returns that of the answer.
        max_body_bytes: For the lane.
    """

    def __init__(
        self,
        work: Callable[[Any], Awaitable[bytes]] | None = None,
        max_body_bytes: int = 1 << 20,
    ) -> None:
        self.work = work or _echo
        self.max_body_bytes = max_body_bytes
        self.bodies: list[Any] = []
        self.scopes: list[Any] = []
        self.cancelled = 0

    def infer_paths(self, prefix: str) -> tuple[str, ...]:
        return (f"{prefix}/infer",)

    def infer_now(self, *request: Any) -> None:
        """It has to await: see `__call__`."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            part, more = message["body"], message["more_body"]
            body = body + part if body or more else part
        self.bodies.append(body if isinstance(body, memoryview) else bytes(body))
        try:
            answer = await self.work(body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        headers = [(b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


async def _echo(body: Any) -> bytes:
    return bytes(body)
