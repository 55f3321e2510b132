"""Who answers a request, and what becomes of one that a candidate does not answer."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rayprism.core.traffic import SLOTS, sticky_slot
from rayprism.errors import DeadlineExceeded, InvalidInput, NotFound, NotReady
from rayprism.serving.links import Link, Links
from rayprism.serving.settings import TrafficConfig, parse_user_config
from rayprism.serving.traffic import NoAnswer, Target, Traffic, parse_timeout
from tests.support.asyncs import async_test, until
from tests.support.versions import NODE, application


class Clock:
    """Stands still until it is told to move."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def config(**traffic: Any) -> TrafficConfig:
    parsed = parse_user_config({"traffic": traffic}).traffic
    assert parsed is not None
    return parsed


def weights(**by_version: float) -> TrafficConfig:
    return config(
        candidates=[{"version": name[1:], "weight": weight} for name, weight in by_version.items()]
    )


def details(*versions: int) -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "proxies": {NODE: {"node_ip": "127.0.0.1", "status": "HEALTHY"}},
        "applications": {
            f"m-{version}": application("m", version, f"/v2/models/m/versions/{version}")
            for version in versions
        },
    }


def traffic_of(
    settings: TrafficConfig | None,
    *,
    draws: Callable[[], float] = lambda: 0.0,
    clock: Callable[[], float] | None = None,
    links: Links | None = None,
) -> Traffic:
    traffic = Traffic("m", 1, links, draws, clock or Clock())
    traffic.reconfigure(settings)
    return traffic


async def splitting(*versions: int, weight: float = 100) -> tuple[Traffic, Clock]:
    """Version 1, whose requests all go to version 2; these versions are deployed."""
    clock = Clock()
    links = Links("m", lambda: details(*versions), NODE, clock=clock)
    traffic = traffic_of(weights(v2=weight), clock=clock, links=links)
    await links.find(2)
    return traffic, clock


def fails(reason: str) -> Callable[..., Awaitable[Any]]:
    async def deliver(budget_s: float, links: Links, link: Link) -> Any:
        raise NoAnswer(reason)

    return deliver


async def answers(budget_s: float, links: Links, link: Link) -> Any:
    return link.application


TO_2 = Target(2, named=False)


# Where requests go


def test_without_a_config_everything_is_answered_here() -> None:
    traffic = traffic_of(None)
    assert not traffic.is_split
    assert traffic.target(None, None) is None
    assert traffic.target(None, b"ann") is None


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.99999])
@pytest.mark.parametrize("key", [None, b"ann", b"bob"])
def test_weights_0_and_100_are_exact(uniform: float, key: bytes | None) -> None:
    none = traffic_of(weights(v2=0), draws=lambda: uniform)
    assert none.target(None, key) is None
    assert not none.is_split
    every = traffic_of(weights(v2=100), draws=lambda: uniform)
    assert every.target(None, key) == TO_2


def test_draws_give_each_candidate_exactly_its_share() -> None:
    uniforms = iter([(slot + 0.5) / SLOTS for slot in range(SLOTS)])
    traffic = traffic_of(weights(v2=30, v3=0.25), draws=lambda: next(uniforms))
    targets = Counter(traffic.target(None, None) for _ in range(SLOTS))
    assert targets == {None: 6975, TO_2: 3000, Target(3, named=False): 25}


def test_a_key_always_goes_to_the_same_version() -> None:
    settings = config(candidates=[{"version": 2, "weight": 40}], sticky={"header": "X-User-Id"})
    draws = iter(())  # a key is never drawn
    one = traffic_of(settings, draws=lambda: next(draws))
    other = traffic_of(settings, draws=lambda: next(draws))
    assert one.sticky_header == "x-user-id"
    assert one.sticky_key({b"x-user-id": b"u1", b"other": b"2"}) == b"u1"
    keys = [f"user-{number}".encode() for number in range(500)]
    chosen = [one.target(None, key) for key in keys]
    assert chosen == [other.target(None, key) for key in keys], "in every replica"
    assert chosen == [one.target(None, key) for key in keys]
    assert 150 < chosen.count(TO_2) < 250
    split = one._split
    assert split is not None
    assert [split.version_at(sticky_slot("m", key)) == 2 for key in keys] == [
        target is not None for target in chosen
    ]


def test_an_empty_key_is_none() -> None:
    uniforms = iter([0.0, 0.5])
    traffic = traffic_of(weights(v2=50), draws=lambda: next(uniforms))
    assert {traffic.target(None, b""), traffic.target(None, b"")} == {None, TO_2}


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        ("1", None),  # here, though all go to 2
        ("01", None),
        ("2", Target(2, named=True)),
        ("3", Target(3, named=True)),  # weight 0
        ("9", Target(9, named=True)),  # not in the file
        ("", TO_2),
    ],
)
def test_a_version_may_be_asked_for(wanted: str, target: Target | None) -> None:
    assert traffic_of(weights(v2=100, v3=0)).target(wanted, b"ann") == target


@pytest.mark.parametrize(
    "wanted", ["two", "-1", "1.0", " 1", "+1", "1" * 11, "²", "\x00", "latest"]
)
def test_what_is_no_version_is_said_so(wanted: str) -> None:
    with pytest.raises(InvalidInput, match=r"x-rayprism-version.*model_version.*a version's num"):
        traffic_of(None).target(wanted, None)


def test_the_own_version_is_no_candidate() -> None:
    """Between the two steps of a promotion the candidate is what answers here."""
    traffic = traffic_of(weights(v1=60, v2=0))
    assert not traffic.is_split
    assert traffic.document()["weights"] == {"1": 100, "2": 0}
    traffic.reconfigure(weights(v1=60, v2=40))
    uniforms = iter([(slot + 0.5) / SLOTS for slot in range(SLOTS)])
    traffic._draw = lambda: next(uniforms)
    targets = Counter(traffic.target(None, None) for _ in range(SLOTS))
    assert targets == {None: 6000, TO_2: 4000}
    assert traffic.document()["weights"] == {"1": 60, "2": 40}


@async_test
async def test_a_new_config_is_in_force_at_once_and_keeps_the_counts() -> None:
    traffic, _ = await splitting(2)
    await traffic.send(TO_2, 1, answers)
    await traffic.send(TO_2, 1, fails("late"))
    traffic.reconfigure(None)
    assert not traffic.is_split
    assert traffic.target(None, None) is None
    assert traffic.sticky_header is None
    assert await traffic.send(TO_2, 1, answers) == "m-2", "what was drawn before is still sent"
    traffic.reconfigure(weights(v2=100))
    assert traffic.target(None, None) == TO_2
    assert traffic.document()["candidates"]["2"] == {
        "answered": 2,
        "left": 0,
        "fallbacks": {"late": 1},
        "resting": False,
    }


# Time


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, None), ("1.5", 1.5), ("86400", 86400.0), ("1e-3", 0.001)]
)
def test_timeouts_in_headers(value: str | None, seconds: float | None) -> None:
    assert parse_timeout(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "86401", "1 s", "1,2"])
def test_timeouts_in_headers_that_are_none(value: str) -> None:
    with pytest.raises(InvalidInput, match="x-rayprism-timeout-s"):
        parse_timeout(value)


@pytest.mark.parametrize(
    ("configured_s", "allowed_s", "named", "budget_s"),
    [
        (None, 10, False, 5),
        (2, 10, False, 2),
        (8, 10, False, 5),  # never more than half: the rest is the stable version's
        (None, 10, True, 10),  # nobody answers instead
        (2, 10, True, 10),
        (None, 1e12, False, 43_200),
        (None, 1e12, True, 86_400),  # or the other version would refuse its own header
    ],
)
def test_what_another_version_may_take(
    configured_s: float | None, allowed_s: float, named: bool, budget_s: float
) -> None:
    traffic = traffic_of(config(candidate_timeout_s=configured_s and float(configured_s)))
    assert traffic.budget_s(Target(2, named), allowed_s) == budget_s


@async_test
async def test_finding_out_where_a_version_is_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that is slow must not take the time that is the stable version's."""
    clock, links = Clock(), Links("m", lambda: details(2), NODE)
    waited: list[float] = []
    found: list[Link | None] = [Link("m-2", b"/m"), Link("m-2", b"/m"), None]

    async def find(version: int, patience_s: float) -> Link | None:
        waited.append(patience_s)
        clock.now_s += 3
        return found.pop(0)

    monkeypatch.setattr(links, "find", find)
    traffic = Traffic("m", 1, links, clock=clock)
    traffic.reconfigure(weights(v2=100))
    left_s: list[float] = []

    async def deliver(budget_s: float, links: Links, link: Link) -> str:
        left_s.append(budget_s)
        return "answer"

    assert await traffic.send(TO_2, 5, deliver) == "answer"
    assert await traffic.send(TO_2, 2, deliver) is None
    assert await traffic.send(TO_2, 2, deliver) is None
    assert (waited, left_s) == ([5, 2, 2], [2])
    assert traffic.document()["candidates"]["2"]["fallbacks"] == {"late": 1, "not_deployed": 1}
    await links.close()


@async_test
async def test_a_controller_that_hangs_costs_no_more_than_the_candidate_s_time() -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fetch() -> dict[str, Any]:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(20)
        return details(2)

    links = Links("m", fetch, NODE)
    traffic = traffic_of(weights(v2=100), links=links)
    began_s = loop.time()
    assert await traffic.send(TO_2, 0.05, answers) is None
    assert loop.time() - began_s < 1
    assert traffic.document()["candidates"]["2"]["fallbacks"] == {"not_deployed": 1}
    release.set()
    await until(lambda: links.known(2))
    assert await traffic.send(TO_2, 0.05, answers) == "m-2"
    await links.close()


# No answer

REASONS = [
    "unreachable",
    "busy",
    "late",
    "gone",
    "not_ready",
    "overloaded",
    "error",
    "refused",
    "wrong_version",
]


@pytest.mark.parametrize("reason", REASONS)
def test_whatever_fails_is_answered_here_and_counted(reason: str) -> None:
    @async_test
    async def run() -> None:
        traffic, _ = await splitting(2)
        for _ in range(3):
            assert await traffic.send(TO_2, 1, fails(reason)) is None
        found = traffic.document()["candidates"]["2"]
        assert (found["answered"], found["fallbacks"]) == (0, {reason: 3})

    run()


@async_test
async def test_what_is_not_deployed_is_answered_here() -> None:
    traffic, _ = await splitting(3)
    assert await traffic.send(TO_2, 1, answers) is None
    nowhere = traffic_of(weights(v2=100), links=None)
    assert await nowhere.send(TO_2, 1, answers) is None
    for document in (traffic.document(), nowhere.document()):
        assert document["candidates"]["2"]["fallbacks"] == {"not_deployed": 1}


def test_a_fault_of_our_own_reaches_no_client(caplog: pytest.LogCaptureFixture) -> None:
    @async_test
    async def run() -> None:
        traffic, _ = await splitting(2)

        async def broken(*_: Any) -> Any:
            raise KeyError("secret")

        assert await traffic.send(TO_2, 1, broken) is None
        assert traffic.document()["candidates"]["2"]["fallbacks"] == {"internal": 1}
        with pytest.raises(KeyError):
            await traffic.send(Target(2, named=True), 1, broken)

    with caplog.at_level(logging.ERROR):
        run()
    assert "version 2" in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("not_deployed", NotFound),
        ("gone", NotFound),
        ("wrong_version", NotFound),
        ("late", DeadlineExceeded),
        ("unreachable", NotReady),
        ("busy", NotReady),
        ("not_ready", NotReady),
        ("error", NotReady),
    ],
)
def test_a_version_that_was_named_has_no_stand_in(reason: str, error: type[Exception]) -> None:
    @async_test
    async def run() -> None:
        traffic, _ = await splitting(2)
        with pytest.raises(error, match="version '2' of model 'm'"):
            await traffic.send(Target(2, named=True), 1, fails(reason))
        found = traffic.document()["candidates"]["2"]
        assert (found["answered"], found["fallbacks"]) == (0, {}), "it is no part of the split"

    run()


@async_test
async def test_named_versions_are_found_without_being_in_the_file() -> None:
    links = Links("m", lambda: details(2, 7), NODE)
    traffic = traffic_of(None, links=links)
    assert await traffic.send(Target(7, named=True), 1, answers) == "m-7"
    with pytest.raises(NotFound, match="here is version 1"):
        await traffic.send(Target(8, named=True), 1, answers)
    assert traffic.document()["candidates"] == {}
    await links.close()


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("named", [True, False])
def test_what_was_lost_is_looked_for_again(reason: str, named: bool) -> None:
    @async_test
    async def run() -> None:
        asked = 0

        def fetch() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            return details(2)

        clock = Clock()
        links = Links("m", fetch, NODE, clock=clock)
        traffic = traffic_of(weights(v2=100), clock=clock, links=links)
        await links.find(2)
        await until(lambda: links._asking is None)
        before = asked
        clock.now_s += 60
        try:
            await traffic.send(Target(2, named), 1, fails(reason))
        except (NotFound, NotReady, DeadlineExceeded):
            assert named
        lost = reason in ("gone", "unreachable", "wrong_version")
        assert (links._asking is not None) == lost
        await until(lambda: links._asking is None)
        assert asked - before == lost
        await links.close()

    run()


# The breaker


async def fail(traffic: Traffic, count: int, reason: str = "late") -> None:
    for _ in range(count):
        assert await traffic.send(TO_2, 1, fails(reason)) is None


def resting(traffic: Traffic) -> tuple[bool, int]:
    """Whether the candidate is left alone now, and how many requests it was spared."""
    found = traffic.document()["candidates"]["2"]
    return found["resting"], found["fallbacks"].get("resting", 0)


@async_test
async def test_a_candidate_that_keeps_failing_is_left_alone_and_tried_again() -> None:
    traffic, clock = await splitting(2)
    await fail(traffic, 4)
    assert await traffic.send(TO_2, 1, answers), "an answer between starts the count again"
    await fail(traffic, 4)
    assert resting(traffic) == (False, 0)
    await fail(traffic, 1)
    assert resting(traffic) == (True, 0)
    sent = 0

    async def counts(*_: Any) -> Any:
        nonlocal sent
        sent += 1
        raise NoAnswer("late")

    assert await traffic.send(TO_2, 1, counts) is None
    assert (sent, resting(traffic)) == (0, (True, 1))
    clock.now_s += 1.01
    for _ in range(3):
        assert await traffic.send(TO_2, 1, counts) is None
    assert (sent, resting(traffic)) == (1, (True, 3)), "one test"
    clock.now_s += 1.01
    assert await traffic.send(TO_2, 1, counts) is None
    assert sent == 1, "its failure doubled the pause"
    clock.now_s += 1
    assert await traffic.send(TO_2, 1, answers) == "m-2"
    assert resting(traffic) == (False, 4)
    await fail(traffic, 4)
    assert await traffic.send(TO_2, 1, answers) == "m-2"


@pytest.mark.parametrize("reason", ["refused", "busy"])
def test_what_says_nothing_of_its_health_opens_nothing(reason: str) -> None:
    @async_test
    async def run() -> None:
        traffic, clock = await splitting(2)
        await fail(traffic, 20, reason)
        assert resting(traffic) == (False, 0)
        await fail(traffic, 5)
        clock.now_s += 1.01
        await fail(traffic, 1, reason)  # as the test: the next one is the test instead
        assert await traffic.send(TO_2, 1, answers) == "m-2"

    run()


@async_test
async def test_not_deployed_is_tried_every_time() -> None:
    """It costs nothing, and the candidate gets its share as soon as it is there."""
    traffic, _ = await splitting()
    await fail(traffic, 20, "never sent")
    assert traffic.document()["candidates"]["2"]["fallbacks"] == {"not_deployed": 20}


class Held:
    """A request that waits for its outcome."""

    def __init__(self, traffic: Traffic, *, named: bool = False) -> None:
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.started = False
        self.task = asyncio.create_task(traffic.send(Target(2, named), 1, self._deliver))

    async def _deliver(self, *_: Any) -> Any:
        self.started = True
        return await self.outcome

    async def end(self, reason: str | None) -> Any:
        if reason is None:
            self.outcome.set_result("m-2")
        else:
            self.outcome.set_exception(NoAnswer(reason))
        return await self.task

    async def leave(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


@pytest.mark.parametrize("reason", ["late", "refused", None])
def test_requests_from_before_say_nothing_of_the_test(reason: str | None) -> None:
    @async_test
    async def run() -> None:
        traffic, clock = await splitting(2)
        older = [Held(traffic) for _ in range(3)]
        await until(lambda: all(held.started for held in older))
        await fail(traffic, 5)
        clock.now_s += 1.01
        test = Held(traffic)
        await until(lambda: test.started)
        await older[0].end(reason)
        await older[1].leave()
        assert resting(traffic)[0] == (reason is not None), "but an answer is an answer"
        if reason is not None:
            assert await traffic.send(TO_2, 1, answers) is None, "one test at a time"
        assert await test.end(None) == "m-2"
        assert not resting(traffic)[0], "its outcome counts, and the pause was not made longer"
        await older[2].end("late")
        assert not resting(traffic)[0]

    run()


@async_test
async def test_a_test_whose_client_leaves_makes_room_for_the_next() -> None:
    traffic, clock = await splitting(2)
    await fail(traffic, 5)
    clock.now_s += 1.01
    test = Held(traffic)
    await until(lambda: test.started)
    await test.leave()
    assert resting(traffic) == (True, 0)
    assert await traffic.send(TO_2, 1, answers) == "m-2"


@pytest.mark.parametrize(("waited_s", "opens"), [(0.2, False), (1.5, True)])
def test_clients_that_wait_for_a_candidate_and_leave(waited_s: float, opens: bool) -> None:
    """A candidate that hangs longer than clients wait is never late: they are gone before."""

    @async_test
    async def run() -> None:
        traffic, clock = await splitting(2)
        held = [Held(traffic) for _ in range(5)]
        await until(lambda: all(one.started for one in held))
        clock.now_s += waited_s
        for one in held:
            await one.leave()
        found = traffic.document()["candidates"]["2"]
        assert (found["left"], found["fallbacks"]) == (5, {})
        assert found["resting"] == opens

    run()


@async_test
async def test_named_requests_neither_open_nor_ask_the_breaker() -> None:
    traffic, _ = await splitting(2)
    for _ in range(9):
        with pytest.raises(DeadlineExceeded):
            await traffic.send(Target(2, named=True), 1, fails("late"))
    assert resting(traffic) == (False, 0)
    await fail(traffic, 5)
    assert await traffic.send(Target(2, named=True), 1, answers) == "m-2"
    assert resting(traffic) == (True, 0)


def test_what_is_in_force_can_be_read() -> None:
    traffic = traffic_of(
        config(
            candidates=[{"version": 2, "weight": 4.35}, {"version": 3, "weight": 0}],
            sticky={"header": "X-User"},
            shadow=[{"version": 4, "sample": 10}],
        )
    )
    assert traffic.document() == {
        "model_name": "m",
        "model_version": "1",
        "weights": {"2": 4.35, "3": 0, "1": 95.65},
        "sticky": {"header": "X-User"},
        "shadow": {"4": 10},
        "candidates": {"2": {"answered": 0, "left": 0, "fallbacks": {}, "resting": False}},
    }
