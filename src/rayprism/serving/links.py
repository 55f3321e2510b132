"""Where the other versions of a model are reached, as Serve's controller last said."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayprism.serving.fleet_view import parse_details
from rayprism.serving.forward import HttpForwarder
from rayprism.serving.grpc_channel import GrpcForwarder

__all__ = ["Addresses", "Link", "Links", "parse_addresses"]

_PATIENCE_S = 2.0
"""At most, how long a request waits for the first answer of the controller; later ones do not."""

logger = logging.getLogger("ray.serve.rayprism")


@dataclass(frozen=True, slots=True)
class Link:
    """One version, as a client would reach it.

    Args:
        application: What gRPC clients name in their metadata.
        route: What its HTTP paths begin with.
    """

    application: str
    route: bytes


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a replica needs to reach the other versions of its model.

    Args:
        host: Of the nearest proxy; None where none can be reached from this node.
        http_port: Its port for HTTP.
        grpc_port: Its port for gRPC; None where it has none.
        links: By version.
    """

    host: str | None = None
    http_port: int = 8000
    grpc_port: int | None = None
    links: Mapping[int, Link] = field(default_factory=dict)


def parse_addresses(details: Mapping[str, Any], model: str, node_id: str) -> Addresses:
    """Reads what the controller says of itself.

    Args:
        details: Its answer.
        model: Whose versions are wanted.
        node_id: Where this replica runs: a proxy of the same node is the nearest.
    """
    http = details.get("http_options") or {}
    grpc = details.get("grpc_options") or {}
    root = (http.get("root_path") or "").rstrip("/")
    links: dict[int, Link] = {}
    for app in parse_details(details):
        version = app.args.version
        if app.args.model != model or app.route_prefix is None:
            continue
        # The version's own route, where the same version is served at several.
        if version not in links or app.route_prefix.endswith(f"/versions/{version}"):
            route = f"{root}{app.route_prefix.rstrip('/')}".encode()
            links[version] = Link(app.application, route)
    return Addresses(
        host=_proxy_host(details, http.get("host") or "127.0.0.1", node_id),
        http_port=int(http.get("port") or 8000),
        grpc_port=int(grpc.get("port") or 9000) if grpc.get("grpc_servicer_functions") else None,
        links=links,
    )


def _proxy_host(details: Mapping[str, Any], bound: str, node_id: str) -> str | None:
    if (details.get("http_options") or {}).get("ssl_certfile"):
        return None
    proxies = details.get("proxies") or {}
    everywhere = bound in ("0.0.0.0", "::")
    if node_id in proxies:
        return "127.0.0.1" if everywhere else bound
    if not everywhere and _is_loopback(bound):
        return None  # of another node
    healthy = sorted(
        str(proxy["node_ip"])
        for proxy in proxies.values()
        if str(_plain(proxy["status"])) == "HEALTHY"
    )
    # Each node takes one of its own, and the same one as long as they are the same.
    return healthy[zlib.crc32(node_id.encode()) % len(healthy)] if healthy else None


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Links:
    """Finds the other versions of a model, and holds the connections to them.

    Args:
        model: Whose versions.
        fetch: Asks the controller; may block, and is called in a thread.
        node_id: Where this replica runs.
        max_age_s: What is not known, or was lost, is asked for again after this time.
        longest_age_s: Each time that nothing new is learnt doubles it, up to this.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        fetch: Callable[[], Mapping[str, Any]],
        node_id: str = "",
        max_age_s: float = 1.0,
        longest_age_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._fetch = fetch
        self._node_id = node_id
        self._max_age_s = max_age_s
        self._longest_age_s = longest_age_s
        self._age_s = max_age_s
        self._clock = clock
        self._addresses = Addresses()
        self._fresh = False
        self._changed = False
        self._cut_off = False
        self._closed = False
        self._asked_s: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self._http: HttpForwarder | None = None
        self._grpc: GrpcForwarder | None = None

    @property
    def http(self) -> HttpForwarder | None:
        """To the proxy; None where none can be reached."""
        return self._http

    @property
    def grpc(self) -> GrpcForwarder | None:
        """To the proxy; None where none can be reached."""
        addresses = self._addresses
        if addresses.host is None or addresses.grpc_port is None or self._closed:
            return None
        if self._grpc is None:
            self._grpc = GrpcForwarder(addresses.host, addresses.grpc_port)
        return self._grpc

    def known(self, version: int) -> Link | None:
        """Where a version is, as far as is known."""
        return self._addresses.links.get(version)

    async def find(self, version: int, patience_s: float = _PATIENCE_S) -> Link | None:
        """Where a version is; waits only for what the controller has not been asked for yet.

        Args:
            version: Which.
            patience_s: How long it waits at most; never longer than two seconds.
        """
        link = self.known(version)
        if link is not None:
            return link
        self.ask_again()
        if not self._fresh and self._asking is not None:
            await asyncio.wait([self._asking], timeout=min(patience_s, _PATIENCE_S))
        return self.known(version)

    def expect_changes(self) -> None:
        """The fleet has changed: requests to versions that are not known wait for the answer."""
        self._fresh = False
        self._age_s = self._max_age_s
        self._asked_s = None
        # An answer that is on its way may be from before the change.
        self._changed = True
        self.ask_again()

    def ask_again(self) -> None:
        """What is known may be wrong: asks in the background, at most once in a while."""
        if self._asking is not None or self._closed:
            return
        if self._asked_s is not None and self._clock() - self._asked_s < self._age_s:
            return
        self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        try:
            await self._ask_once()
            while self._changed:
                await self._ask_once()
        finally:
            self._fresh = True
            self._asked_s = self._clock()
            self._asking = None

    async def _ask_once(self) -> None:
        self._changed = False
        learnt = False
        try:
            details = await asyncio.to_thread(self._fetch)
            learnt = self._take(parse_addresses(details, self._model, self._node_id))
        except Exception as error:
            # What was known stays: the data path does not need the controller.
            logger.warning("Serve's controller does not say where other versions are: %s", error)
        # All replicas ask the one controller of the cluster.
        self._age_s = self._max_age_s if learnt else min(2 * self._age_s, self._longest_age_s)

    def _take(self, addresses: Addresses) -> bool:
        """Takes what is known now; returns whether anything is new."""
        before = self._addresses
        if addresses.host is None and not self._cut_off:
            logger.error(
                "No proxy can be reached from this node, so no traffic can be split: Serve's "
                "http_options.host is for one node only, or it uses TLS of its own."
            )
        self._cut_off = addresses.host is None
        if (addresses.host, addresses.http_port) != (before.host, before.http_port):
            http = None
            if addresses.host is not None:
                http = HttpForwarder(addresses.host, addresses.http_port)
            self._close_http()
            self._http = http
        grpc_moved = (addresses.host, addresses.grpc_port) != (before.host, before.grpc_port)
        if grpc_moved and self._grpc is not None:
            self._grpc.retire()
            self._grpc = None
        self._addresses = addresses
        return addresses != before

    def _close_http(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    async def close(self) -> None:
        """Gives the connections back; nothing is found any more."""
        self._closed = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        self._close_http()
        if self._grpc is not None:
            await self._grpc.close()
            self._grpc = None
