"""The fast lane: inference requests past Ray's handling of each request, on Ray's own accounts.

Most of a replica's time for a small request is Serve's, around the call of the application
(`ray.serve._private.replica.Replica._direct_ingress_asgi`, Ray 2.60). Serve has a hook,
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=rayprism.serving.lane:middlewares`: what it returns wraps
the application inside each replica. The middleware here lets the first inference request of a
connection pass, and takes the connection over once it is answered: see `lane_connection`. What the
lane leaves out, it does itself here: ongoing requests (for autoscaling, draining and
`max_ongoing_requests`), request ids, Serve's counters. Whatever is not plain goes back to Serve.

Without the variable, or where another Ray has other insides, the same application answers the same,
only slower.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from ray.serve._private.common import RequestMetadata, RequestProtocol
from ray.serve._private.request_ingress_metrics import RequestIngressMetrics
from ray.serve._private.tracing_utils import is_tracing_enabled
from starlette.middleware import Middleware

from rayprism.serving.asgi import Message, Receive, Scope, Send
from rayprism.serving.lane_connection import Body, Headers, Reply, take_over

__all__ = ["Lane", "LaneApp", "RayAccounts", "middlewares", "open_lane"]

_LOOK_S = 0.25
"""So often the lane looks whether Serve's settings still allow it."""
_LAST_48_BITS = (1 << 48) - 1
_FLUSH_S = 0.5
"""So long requests are counted here before Serve's counters get them."""

logger = logging.getLogger("ray.serve.rayprism")
_app: LaneApp | None = None


class LaneApp(Protocol):
    """An application whose inference requests may take the lane."""

    @property
    def max_body_bytes(self) -> int:
        """Longer bodies are refused."""

    def infer_paths(self, prefix: str) -> tuple[str, ...]:
        """The paths of inference requests, where the application is mounted at a prefix."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""

    def infer_now(
        self, path: str, headers: Headers, body: Body, request_id: str, reply: Reply
    ) -> Callable[[], None] | None:
        """Answers a plain one without a task: see `ModelApp.infer_now`."""


def open_lane(app: LaneApp) -> None:
    """Says whose requests may take the lane: a process holds one replica."""
    global _app
    _app = app


def middlewares() -> list[Middleware]:
    """What Serve wraps around the application of each replica, and around its Python proxies."""
    return [Middleware(_Switch)]


class _Switch:
    """Takes connections over that carry inference requests."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lane: Lane | None = None
        self._replica = _replica_behind(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lane = self._lane or self._open()
        if lane is None or scope["type"] != "http" or not lane.leads_to(scope["path"]):
            await self._app(scope, receive, send)
            return

        async def send_and_switch(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # At once: nothing of a next request can have been read.
                take_over(send, lane)

        await self._app(scope, receive, send_and_switch)

    def _open(self) -> Lane | None:
        if self._replica is None or _app is None:
            return None
        try:
            self._lane = Lane(_app, RayAccounts(self._replica))
        except (AttributeError, TypeError):
            logger.warning("This Ray has no fast lane for requests.", exc_info=True)
            self._replica = None
        return self._lane


def _replica_behind(app: Any) -> Any:
    """Serve's replica, of which a method is the application; None in a proxy."""
    # Serve puts its own middleware, for request ids, around the method.
    replica = getattr(getattr(app, "_app", None), "__self__", None)
    return replica if hasattr(replica, "_direct_ingress_asgi") else None


class Lane:
    """Where inference requests go, and what is noted of them.

    Args:
        app: Answers them.
        accounts: Serve's.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        app: LaneApp,
        accounts: RayAccounts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.infer_now = app.infer_now
        self.accounts = accounts
        self._clock = clock
        self._look_at_s = 0.0
        begin = uuid.uuid4()
        self._id_begin = str(begin)[:24].encode()
        self._id_ends = itertools.count(begin.node)
        self._is_open = False
        self.prefix = ""
        self.paths: dict[bytes, str] = {}

    def leads_to(self, path: str) -> bool:
        """Whether requests for a path take the lane just now."""
        return self.is_open and path.encode("latin-1", "replace") in self.paths

    @property
    def max_body_bytes(self) -> int:
        """What the application takes."""
        return self.app.max_body_bytes

    @property
    def is_open(self) -> bool:
        """Whether Serve is set to nothing that the lane leaves out."""
        now_s = self._clock()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + _LOOK_S
            self._look()
        return self._is_open

    def _look(self) -> None:
        self._is_open = self.accounts.is_plain
        prefix = self.accounts.prefix
        if prefix != self.prefix or not self.paths:
            self.prefix = prefix
            self.paths = {path.encode(): path for path in self.app.infer_paths(prefix)}

    def new_request_id(self) -> bytes:
        """An id of the form of Serve's own: a UUID, of which the end is counted on."""
        return b"%b%012x" % (self._id_begin, next(self._id_ends) & _LAST_48_BITS)


class RayAccounts:
    """What Serve knows of a replica's requests, for those that it does not see.

    Everything here that begins with an underscore is Serve's own affair: read in the source of Ray
    2.60, and looked for when the lane is opened.

    Args:
        replica: `ray.serve._private.replica.Replica`.

    Raises:
        AttributeError: It is another than expected.
        TypeError: Likewise.
    """

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self._metrics = metrics = replica._metrics_manager
        self._semaphore = replica._semaphore
        self._deployment = replica._deployment_id
        self._request = RequestMetadata(
            request_id="",
            internal_request_id="",
            _request_protocol=RequestProtocol.HTTP,
            is_direct_ingress=True,
        )
        self._begun, self._ended = (
            metrics.inc_num_ongoing_requests,
            metrics.dec_num_ongoing_requests,
        )
        self._done: dict[int, int] = {}
        self._busy_s = 0.0
        self._longest_s = 0.0
        self._loop = asyncio.get_running_loop()
        # Whatever is missing shows now, and not in the middle of a request.
        for owner, names in (
            (self._semaphore, ("locked", "release", "_value")),
            (replica, ("_route_prefix",)),
            (metrics, ("_user_code_time_accumulator", "_max_processing_latency_trackers")),
            (metrics, ("_should_emit_request_ingress_metrics", "_ingress_metrics")),
            (metrics, ("_request_counter", "_error_counter")),
        ):
            for name in names:
                getattr(owner, name)
        _ = self.is_plain

    @property
    def prefix(self) -> str:
        """Where the application is mounted."""
        prefix: str = self._replica._route_prefix or ""
        return "" if prefix == "/" else prefix

    @property
    def is_plain(self) -> bool:
        """Whether Serve is set to nothing that only its own handling of a request does."""
        replica = self._replica
        logging_config = replica._deployment_config.logging_config or {}
        return (
            not logging_config.get("enable_access_log", True)
            and replica._http_options.request_timeout_s is None
            and not replica._http_options.root_path
            and not is_tracing_enabled()
            # There the application has an event loop of its own.
            and not replica._user_callable_wrapper._run_user_code_in_separate_thread
        )

    def begin(self) -> bool:
        """Takes a slot of `max_ongoing_requests`; False where none is free."""
        semaphore = self._semaphore
        if semaphore.locked():
            return False
        # All that its `acquire` does where it need not wait, without the coroutine.
        semaphore._value += 1
        self._begun(self._request)
        return True

    def end(self, status: int, took_s: float) -> None:
        """Gives the slot back, and counts the request.

        Args:
            status: Of the answer; 499 where the client left.
            took_s: How long it took.
        """
        self._ended(self._request)
        self._semaphore.release()
        done = self._done
        if not done:
            self._loop.call_later(_FLUSH_S, self._flush)
        done[status] = done.get(status, 0) + 1
        self._busy_s += took_s
        if took_s > self._longest_s:
            self._longest_s = took_s

    def _flush(self) -> None:
        """Adds what has been counted to Serve's counters.

        Serve's two histograms of latency are left out: each takes 8 us for each request, and
        rayprism has its own, which are finer.
        """
        done, self._done = self._done, {}
        metrics, route = self._metrics, self.prefix or "/"
        metrics._user_code_time_accumulator.add(self._busy_s * 1e3)
        metrics._max_processing_latency_trackers[route].add(self._longest_s * 1e3)
        self._busy_s = self._longest_s = 0.0
        for status, count in done.items():
            self._count(route, status, count)

    def _count(self, route: str, status: int, count: int) -> None:
        metrics, left = self._metrics, status == 499
        if left:
            metrics._error_counter.inc(
                count, tags={"route": route, "exception_type": "CancelledError"}
            )
        else:
            metrics._request_counter.inc(count, tags={"route": route})
        if not metrics._should_emit_request_ingress_metrics(RequestProtocol.HTTP):
            return
        tags = {
            "route": route,
            "method": "POST",
            "application": self._deployment.app_name,
            "status_code": str(status),
        }
        of_http = metrics._ingress_metrics[RequestProtocol.HTTP]
        of_http.request_counter.inc(count, tags=RequestIngressMetrics.request_tags(**tags))
        if status >= 400:
            of_http.request_error_counter.inc(
                count, tags=RequestIngressMetrics.request_error_tags(**tags)
            )
            of_http.deployment_request_error_counter.inc(
                count,
                tags=RequestIngressMetrics.deployment_error_tags(
                    **tags, deployment=self._deployment.name
                ),
            )
