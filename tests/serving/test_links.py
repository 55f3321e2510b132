"""Where other versions are: what the controller says, how often it is asked, what is let go."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

import grpc
import grpc.aio
import pytest

from rayprism.serving import grpc_channel
from rayprism.serving.forward import HttpForwarder
from rayprism.serving.grpc_channel import GrpcForwarder
from rayprism.serving.links import Addresses, Link, Links, parse_addresses
from tests.support.asyncs import async_test, until
from tests.support.versions import NODE, application

HERE = {NODE: {"node_ip": "10.0.0.1", "status": "HEALTHY"}}


def details(
    *versions: int, proxies: dict[str, Any] | None = None, grpc_port: int | None = None, **http: Any
) -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000} | http,
        "grpc_options": {
            "port": grpc_port,
            "grpc_servicer_functions": [] if grpc_port is None else ["add"],
        },
        "proxies": HERE if proxies is None else proxies,
        "applications": {
            f"m-{version}": application("m", version, f"/v2/models/m/versions/{version}")
            for version in versions
        },
    }


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Controller:
    """Answers what it is told to, when it is told to."""

    def __init__(self, *versions: int) -> None:
        self.answer: Any = details(*versions)
        self.asked = 0
        self.open = threading.Event()
        self.open.set()

    def __call__(self) -> Any:
        self.asked += 1
        answer = self.answer  # what it knew when it was asked
        assert self.open.wait(20)
        if isinstance(answer, Exception):
            raise answer
        return answer


def links_to(controller: Callable[[], Any]) -> tuple[Links, Clock]:
    clock = Clock()
    return Links("m", controller, NODE, clock=clock), clock


async def asked(links: Links) -> None:
    """Until the controller's answer is there."""
    await until(lambda: links._asking is None)


# What the controller says


def test_versions_are_reached_through_the_proxy_of_the_same_node() -> None:
    found = parse_addresses(details(2, 3, grpc_port=9000), "m", NODE)
    assert found == Addresses(
        host="127.0.0.1",
        http_port=8000,
        grpc_port=9000,
        links={
            2: Link("m-2", b"/v2/models/m/versions/2"),
            3: Link("m-3", b"/v2/models/m/versions/3"),
        },
    )


def test_a_version_s_own_route_goes_before_that_of_the_stable_application() -> None:
    said = details(2)
    for name, route in (("a", "/v2/models/m"), ("z", "/v2/models/m")):
        said["applications"] = {
            name: application("m", 2, route),
            **said["applications"],
            f"{name}{name}": application("m", 2, route),
        }
    assert parse_addresses(said, "m", NODE).links == {2: Link("m-2", b"/v2/models/m/versions/2")}


def test_what_is_no_version_of_the_model_is_passed_over() -> None:
    said = details(2)
    said["applications"] |= {
        "other": application("other", 3, "/v2/models/other"),
        "no-route": application("m", 4, None),
        "someone's": {"deployed_app_config": {"import_path": "their:app"}, "route_prefix": "/x"},
        "faulty": application("m", 5, "/y", deployed_app_config={"args": {"model": 3}}),
        "starting": {"deployed_app_config": None, "route_prefix": None},
    }
    assert list(parse_addresses(said, "m", NODE).links) == [2]


def test_a_root_path_is_part_of_every_route() -> None:
    found = parse_addresses(details(2, root_path="/ml/"), "m", NODE)
    assert found.links[2].route == b"/ml/v2/models/m/versions/2"


def test_an_empty_answer_is_no_fault() -> None:
    assert parse_addresses({}, "m", NODE) == Addresses()
    said: dict[str, Any] = {
        "http_options": None,
        "grpc_options": None,
        "proxies": None,
        "applications": {},
    }
    assert parse_addresses(said, "m", NODE) == Addresses()
    said = {"grpc_options": {"grpc_servicer_functions": ["add"]}}
    assert parse_addresses(said, "m", NODE).grpc_port == 9000


class Status(Enum):
    HEALTHY = "HEALTHY"


AWAY = {
    "b": {"node_ip": "10.0.0.3", "status": "HEALTHY"},
    "a": {"node_ip": "10.0.0.2", "status": "STARTING"},
}


@pytest.mark.parametrize(
    ("bound", "proxies", "host"),
    [
        ("127.0.0.1", HERE, "127.0.0.1"),
        ("0.0.0.0", HERE, "127.0.0.1"),
        ("::", HERE, "127.0.0.1"),
        ("10.0.0.1", HERE, "10.0.0.1"),
        ("::1", HERE, "::1"),
        ("0.0.0.0", AWAY, "10.0.0.3"),
        ("10.0.0.9", AWAY, "10.0.0.3"),
        ("127.0.0.1", AWAY, None),  # the loopback of another node
        ("localhost", AWAY, None),
        ("0.0.0.0", {}, None),
        ("0.0.0.0", {"b": {"node_ip": "10.0.0.3", "status": Status.HEALTHY}}, "10.0.0.3"),
    ],
)
def test_the_proxy_that_is_taken(bound: str, proxies: dict[str, Any], host: str | None) -> None:
    assert parse_addresses(details(proxies=proxies, host=bound), "m", NODE).host == host


def test_tls_of_serve_s_own_cannot_be_spoken() -> None:
    assert parse_addresses(details(ssl_certfile="/cert.pem"), "m", NODE).host is None


def test_nodes_without_a_proxy_share_out_those_of_others() -> None:
    proxies = {
        str(number): {"node_ip": f"10.0.0.{number}", "status": "HEALTHY"} for number in range(4)
    }
    turned = dict(reversed(proxies.items()))

    def host(node: int, proxies: dict[str, Any]) -> str | None:
        said = details(proxies=proxies, host="0.0.0.0")
        return parse_addresses(said, "m", f"node-{node}").host

    chosen = [host(node, proxies) for node in range(40)]
    assert set(chosen) == {f"10.0.0.{number}" for number in range(4)}
    assert chosen == [host(node, turned) for node in range(40)], "in whatever order they come"


# Asking


@async_test
async def test_the_first_request_waits_for_the_answer_and_later_ones_do_not() -> None:
    controller = Controller(2)
    links, clock = links_to(controller)
    assert links.known(2) is None
    found = await asyncio.gather(*(links.find(2) for _ in range(20)))
    assert {link.application for link in found if link} == {"m-2"}
    assert len(found) == 20
    assert controller.asked == 1
    controller.open.clear()
    clock.now_s += 100
    assert await links.find(3) is None, "asks, and does not wait"
    assert (await links.find(2)) == links.known(2)
    controller.answer = details(2, 3)
    controller.open.set()
    await asked(links)
    clock.now_s += 100
    await links.find(3)
    await asked(links)
    assert links.known(3)
    await links.close()


@async_test
async def test_patience_is_bounded() -> None:
    controller = Controller(2)
    controller.open.clear()
    links, _ = links_to(controller)
    began_s = asyncio.get_running_loop().time()
    assert await links.find(2, patience_s=0.02) is None
    assert asyncio.get_running_loop().time() - began_s < 1
    controller.open.set()
    await asked(links)
    assert links.known(2)
    await links.close()


@async_test
async def test_what_is_not_there_is_asked_for_less_and_less_often() -> None:
    """All replicas ask the one controller of the cluster."""
    controller = Controller(2)
    links, clock = links_to(controller)
    times = []
    for _ in range(200):
        before = controller.asked
        await links.find(9)
        await asked(links)
        if controller.asked > before:
            times.append(clock.now_s)
        clock.now_s += 0.25
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[:3] == [1, 2, 4]
    assert set(gaps[3:]) == {5}
    controller.answer = details(2, 3)
    clock.now_s += 5
    await links.find(9)
    await asked(links)
    clock.now_s += 1
    links.ask_again()
    assert links._asking is not None, "something was new: soon again"
    await links.close()


@async_test
async def test_a_change_is_asked_for_at_once() -> None:
    controller = Controller(2)
    links, clock = links_to(controller)
    for _ in range(5):
        await links.find(9)
        await asked(links)
        clock.now_s += 6
    before = controller.asked
    clock.now_s -= 6
    assert await links.find(3) is None
    assert controller.asked == before
    controller.answer = details(2, 3)
    links.expect_changes()
    assert await links.find(3), "and is waited for"
    await links.close()


@async_test
async def test_an_answer_from_before_a_change_is_not_enough() -> None:
    controller = Controller(2)
    controller.open.clear()
    links, _ = links_to(controller)
    links.expect_changes()
    await until(lambda: controller.asked == 1)
    controller.answer = details(2, 3)
    links.expect_changes()
    controller.open.set()
    assert await links.find(3), "asked twice, without another second between"
    assert controller.asked == 2
    await links.close()


def test_what_was_known_stays_while_the_controller_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @async_test
    async def run() -> None:
        controller = Controller(2)
        links, clock = links_to(controller)
        await links.find(2)
        await asked(links)
        for answer in (RuntimeError("away"), {"applications": 3}, details(2, grpc_port="x")):  # type: ignore[arg-type]
            controller.answer = answer
            clock.now_s += 60
            links.ask_again()
            await asked(links)
            assert links.known(2)
            assert links.http is not None
        controller.answer = details(3)
        clock.now_s += 60
        links.ask_again()
        await asked(links)
        assert (links.known(2), links.known(3) is not None) == (None, True)
        await links.close()

    run()
    assert "away" in caplog.text


def test_no_proxy_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    @async_test
    async def run() -> None:
        controller = Controller()
        controller.answer = details(2, proxies=AWAY, grpc_port=9000)
        links, clock = links_to(controller)
        for _ in range(3):
            links.ask_again()
            await asked(links)
            clock.now_s += 60
            assert (links.http, links.grpc) == (None, None)
        assert len(caplog.records) == 1
        for answer in (details(2), controller.answer):
            controller.answer = answer
            clock.now_s += 60
            links.ask_again()
            await asked(links)
        assert len(caplog.records) == 2, "it was there between"
        await links.close()

    with caplog.at_level(logging.ERROR):
        run()
    assert "http_options.host" in caplog.records[0].getMessage()


# Connections


@async_test
async def test_connections_are_kept_until_the_proxy_moves() -> None:
    controller = Controller()
    controller.answer = details(2, grpc_port=9000)
    links, clock = links_to(controller)
    assert (links.http, links.grpc) == (None, None), "nothing is known yet"
    await links.find(2)
    await asked(links)
    http, channel = links.http, links.grpc
    assert isinstance(http, HttpForwarder)
    assert isinstance(channel, GrpcForwarder)
    for said, same_http, same_channel in (
        (details(2, 3, grpc_port=9000), True, True),
        (details(2, grpc_port=9000, port=8001), False, True),
        (details(2, grpc_port=9001, port=8001), True, False),
        (details(2, grpc_port=9001, port=8001, proxies=AWAY, host="0.0.0.0"), False, False),
    ):
        controller.answer = said
        clock.now_s += 60
        links.ask_again()
        await asked(links)
        assert (links.http is http, links.grpc is channel) == (same_http, same_channel)
        http, channel = links.http, links.grpc
    await links.close()


@async_test
async def test_nothing_is_left_after_closing() -> None:
    before = asyncio.all_tasks()
    controller = Controller()
    controller.answer = details(2, grpc_port=9000)
    links, clock = links_to(controller)
    await links.find(2)
    channel = links.grpc
    assert channel is not None
    controller.open.clear()
    clock.now_s += 60
    links.ask_again()
    await asyncio.sleep(0)
    await links.close()
    await links.close()
    assert (links.http, links.grpc) == (None, None)
    with pytest.raises(Exception, match="closed"):
        await channel.infer(b"", (), 1)
    clock.now_s += 60
    links.expect_changes()
    assert await links.find(9) is None
    assert links._asking is None, "a request that ends late starts nothing"
    controller.open.set()
    assert asyncio.all_tasks() == before


class Rpcs:
    """A gRPC server whose answers are held."""

    def __init__(self) -> None:
        self.entered = 0
        self.open = asyncio.Event()
        self.server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(self._answer)

        class Handler(grpc.GenericRpcHandler):
            def service(self, handler_call_details: Any) -> Any:
                return handler

        self.server.add_generic_rpc_handlers((Handler(),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def _answer(self, request: bytes, context: Any) -> bytes:
        self.entered += 1
        await self.open.wait()
        return request


@async_test
async def test_a_channel_that_is_retired_ends_with_its_last_request() -> None:
    rpcs = Rpcs()
    await rpcs.server.start()
    channel = GrpcForwarder("127.0.0.1", rpcs.port, max_requests=2)
    sent = [asyncio.create_task(channel.infer(b"x", (), 20)) for _ in range(2)]
    await until(lambda: rpcs.entered == 2)
    assert channel.is_busy
    channel.retire()
    channel.retire()
    await asyncio.sleep(0)
    assert channel._closing is None
    rpcs.open.set()
    assert [answer for answer, _ in await asyncio.gather(*sent)] == [b"x", b"x"]
    assert not channel.is_busy
    assert channel._closing is not None
    await channel._closing
    with pytest.raises(Exception, match="closed"):
        await channel.infer(b"x", (), 1)
    await rpcs.server.stop(None)


def test_an_ipv6_address_and_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = grpc.aio.insecure_channel

    def channel(address: str, options: Any) -> Any:
        seen.append((address, dict(options)))
        return real(address, options=options)

    monkeypatch.setattr(grpc_channel.grpc.aio, "insecure_channel", channel)

    @async_test
    async def run() -> None:
        await GrpcForwarder("::1", 9000).close()

    run()
    ((address, options),) = seen
    assert address == "[::1]:9000"
    assert options["grpc.enable_http_proxy"] == 0
    assert options["grpc.max_reconnect_backoff_ms"] <= 2000
