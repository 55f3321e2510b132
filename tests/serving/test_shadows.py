"""Copies for shadows: when they are sent, when they are not, and how their answers are compared."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Tensors
from rayprism.errors import InvalidInput
from rayprism.serving.links import Link, Links
from rayprism.serving.settings import TrafficConfig, parse_user_config
from rayprism.serving.shadows import Copy, Reply, Shadows, keep_copy
from rayprism.serving.traffic import NoAnswer
from tests.support.asyncs import async_test, until
from tests.support.versions import NODE, application

LINK = Link("m-2", b"/m")
ONE: Tensors = {"y": np.array([1.0, 2.0], np.float32)}


class Lane:
    """Shadows whose time, draws and load are a test's."""

    def __init__(
        self, tolerance: Tolerance | None = None, links: Links | None = None, **traffic: Any
    ) -> None:
        self.now_s = 0.0
        self.busy = False
        self.uniform = 0.0
        if links is None:
            links = Links("m", details, NODE)
            links._addresses = type(links._addresses)(links=dict.fromkeys((2, 3), LINK))
        self.links = links
        self.shadows = Shadows(
            1,
            tolerance or Tolerance(),
            links,
            is_busy=lambda: self.busy,
            draw=lambda: self.uniform,
            clock=lambda: self.now_s,
        )
        self.shadows.reconfigure(config(**traffic))

    def offer(self, *sent: Sent) -> None:
        for one in sent:
            self.shadows.offer(one.make)

    def found(self, version: int = 2) -> dict[str, Any]:
        found: dict[str, Any] = self.shadows.document()[str(version)]
        return found

    def held(self, version: int = 2) -> tuple[int, int]:
        """Copies, and their bytes."""
        budget = self.shadows._shadows[version].budget
        return budget.requests, budget.bytes

    async def idle(self) -> None:
        await until(lambda: not self.shadows._waiting and not self.shadows._sending)


def details() -> dict[str, Any]:
    return {
        "proxies": {NODE: {"node_ip": "127.0.0.1", "status": "HEALTHY"}},
        "applications": {"m-2": application("m", 2, "/v2/models/m/versions/2")},
    }


def config(*, sample: float = 100, **traffic: Any) -> TrafficConfig:
    traffic.setdefault("shadow", [{"version": 2, "sample": sample}])
    parsed = parse_user_config({"traffic": traffic}).traffic
    assert parsed is not None
    return parsed


class Sent:
    """One copy: who got it, and what it is answered."""

    def __init__(
        self, outputs: Any = ONE, reply: Any = ONE, *, size: int = 100, json: Any = ()
    ) -> None:
        self.outputs, self.reply, self.size = outputs, reply, size
        self.json = frozenset(json)
        self.made = 0
        self.delivered: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    def make(self) -> Copy:
        self.made += 1
        return Copy(self.size, self.outputs, self._deliver, self.json)

    async def _deliver(self, version: int, links: Links, link: Link) -> Reply:
        self.delivered.append(version)
        await self.open.wait()
        if isinstance(self.reply, NoAnswer):
            raise self.reply
        return Reply(self.size, self._decode)

    def _decode(self) -> Tensors:
        if isinstance(self.reply, Exception):
            raise self.reply
        return dict(self.reply)


def hanging(**fields: Any) -> Sent:
    sent = Sent(**fields)
    sent.open.clear()
    return sent


def floats(*values: float, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.array(values, dtype)


# Whether, and when


@async_test
async def test_a_copy_goes_out_after_the_request_and_is_compared() -> None:
    lane, sent = Lane(), Sent()
    lane.offer(sent)
    await asyncio.sleep(0)
    assert (sent.made, sent.delivered) == (1, []), "not in the request's own turn of the loop"
    await lane.idle()
    assert sent.delivered == [2]
    assert lane.found() == {
        "compared": 1,
        "dropped": {},
        "failed": {},
        "outputs": {"y": {"agreed": 1, "disagreed": 0}},
    }
    assert lane.held() == (0, 0)


@pytest.mark.parametrize(
    ("sample", "uniform", "copied"),
    [(100, 0.99999, True), (10, 0.09999, True), (10, 0.1, False), (0.01, 0.0002, False)],
)
def test_as_many_are_copied_as_were_asked_for(sample: float, uniform: float, copied: bool) -> None:
    @async_test
    async def run() -> None:
        lane, sent = Lane(sample=sample), Sent()
        lane.uniform = uniform
        lane.offer(sent)
        await lane.idle()
        assert (sent.made, sent.delivered) == ((1, [2]) if copied else (0, []))

    run()


@pytest.mark.parametrize(
    "traffic",
    [
        {"shadow": []},
        {"shadow": [{"version": 2, "sample": 0}]},
        {"shadow": [{"version": 1, "sample": 100}]},  # what answers here
    ],
)
def test_who_wants_no_copies_gets_none(traffic: dict[str, Any]) -> None:
    @async_test
    async def run() -> None:
        lane, sent = Lane(**traffic), Sent()
        assert not lane.shadows.is_on
        lane.offer(sent)
        assert (sent.made, lane.shadows.document()) == (0, {})
        lane.shadows.reconfigure(None)
        assert not lane.shadows.is_on

    run()


@async_test
async def test_each_shadow_gets_its_own() -> None:
    lane = Lane(shadow=[{"version": 2, "sample": 100}, {"version": 3, "sample": 20}])
    both, first = Sent(), Sent()
    lane.offer(both)
    lane.uniform = 0.5
    lane.offer(first)
    await lane.idle()
    assert (sorted(both.delivered), first.delivered) == ([2, 3], [2])
    assert both.made == 1, "one copy for both"
    assert (lane.found(2)["compared"], lane.found(3)["compared"]) == (2, 1)


@async_test
async def test_under_load_copies_wait_and_then_are_dropped() -> None:
    lane, sent = Lane(), [Sent() for _ in range(3)]
    lane.busy = True
    lane.offer(*sent)
    await asyncio.sleep(0.02)
    lane.now_s += 0.9
    await asyncio.sleep(0.02)
    assert lane.held()[0] == 3, "there may be time yet"
    lane.now_s += 0.2
    await until(lambda: not lane.shadows._waiting)
    assert lane.found()["dropped"] == {"load": 3}
    assert lane.held() == (0, 0)
    assert [one.delivered for one in sent] == [[], [], []]
    assert lane.shadows._look is None, "nobody looks where there is nothing"
    lane.busy = False
    lane.offer(Sent())
    await lane.idle()
    assert lane.found()["compared"] == 1


@async_test
async def test_a_loop_that_is_late_has_no_time() -> None:
    lane = Lane()
    late = [0.0]

    def clock() -> float:
        late[0] += 0.01  # more than the pause and what it may be late, at every look
        return late[0]

    lane.shadows._clock = clock
    sent = Sent()
    lane.offer(sent)
    await until(lambda: lane.found()["dropped"])
    assert (lane.found()["dropped"], sent.delivered) == ({"load": 1}, [])


@async_test
async def test_an_idle_replica_sends_more_at_a_time_but_not_all() -> None:
    lane = Lane()
    held = [hanging() for _ in range(20)]
    lane.offer(*held)
    seen: list[int] = []
    while len(lane.shadows._sending) < 20:
        count = len(lane.shadows._sending)
        if count and count not in seen:
            seen.append(count)
        await asyncio.sleep(0)
    for one in held:
        one.open.set()
    await lane.idle()
    assert lane.found()["compared"] == 20
    steps = [later - earlier for earlier, later in zip([0, *seen], seen, strict=False)]
    assert steps[0] == 1, "it begins with one"
    assert max(steps) == 4


# Bounds


@async_test
async def test_no_more_requests_are_held_than_allowed() -> None:
    lane = Lane(max_shadow_requests=2)
    held = [hanging() for _ in range(2)]
    lane.offer(*held)
    await until(lambda: len(lane.shadows._sending) == 2)
    refused = Sent()
    lane.offer(refused, refused)
    assert (refused.made, refused.delivered) == (0, []), "not even made"
    assert lane.found()["dropped"] == {"requests": 2}
    for one in held:
        one.open.set()
    await lane.idle()
    lane.offer(refused)
    await lane.idle()
    assert (refused.delivered, lane.found()["compared"]) == ([2], 3)


@async_test
async def test_no_more_bytes_are_held_than_allowed() -> None:
    lane = Lane(max_shadow_bytes=1024)
    held = hanging(size=1000)
    lane.offer(held, Sent(size=25), Sent(size=24), Sent(size=2000))
    assert lane.held() == (2, 1024)
    assert lane.found()["dropped"] == {"bytes": 2}
    held.open.set()
    await lane.idle()
    assert lane.held() == (0, 0)
    assert lane.found()["compared"] == 2


@async_test
async def test_a_shadow_that_hangs_takes_nothing_from_another() -> None:
    lane = Lane(
        shadow=[{"version": 2, "sample": 100}, {"version": 3, "sample": 100}],
        max_shadow_requests=8,
        max_shadow_bytes=8000,
    )
    stuck = asyncio.Event()

    class Partly(Sent):
        async def _deliver(self, version: int, links: Links, link: Link) -> Reply:
            if version == 2:
                await stuck.wait()
            return Reply(1, self._decode)

    for number in range(30):
        lane.offer(Partly())
        await until(lambda n=number: lane.found(3)["compared"] == n + 1)  # type: ignore[misc]
    assert lane.held(2)[0] == 4, "half of them"
    assert lane.found(2)["dropped"] == {"requests": 26}
    assert lane.found(3)["dropped"] == {}
    stuck.set()
    await lane.idle()
    assert (lane.held(2), lane.held(3)) == ((0, 0), (0, 0))


def test_a_copy_holds_no_more_than_it_says() -> None:
    async def deliver(*_: Any) -> Any:
        raise AssertionError

    batch = np.zeros((1000, 8), np.float32)
    strings = np.array(["x" * 1000, b"y" * 500], object)
    copy = keep_copy(
        10, {"row": batch[3:4], "all": batch, "most": batch[1:], "s": strings}, deliver
    )
    assert copy.outputs["row"].base is None, "not the whole batch"
    assert np.shares_memory(copy.outputs["all"], batch), "not copied for nothing"
    assert np.shares_memory(copy.outputs["most"], batch)
    assert copy.size_bytes >= 10 + 32 + 32000 + 31968 + 1500


# Their answers

LONG = floats(*np.linspace(0, 1, 100))


@pytest.mark.parametrize(
    ("tolerance", "want", "got", "agrees"),
    [
        (Tolerance("close", absolute=0.1, relative=0), floats(1, 2), floats(1.05, 2), True),
        (Tolerance("close", absolute=0.1, relative=0), floats(1, 2), floats(1.2, 2), False),
        (Tolerance("close", absolute=0, relative=0.1), floats(100), floats(109), True),
        (Tolerance("exact"), floats(1, 2), floats(1, 2), True),
        (Tolerance("exact"), floats(1, 2), floats(1, 2.0001), False),
        (Tolerance("top1"), floats(1, 9, 3), floats(4, 5, 0), True),
        (Tolerance("top1"), floats(1, 9, 3), floats(4, 3, 0), False),
        (Tolerance("cosine", cosine=0.99), floats(1, 0), floats(5, 0.01), True),
        (Tolerance("cosine", cosine=0.99), floats(1, 0), floats(1, 1), False),
        (Tolerance(), np.array(["a"], object), np.array(["a"], object), True),
        (Tolerance(), np.array(["a"], object), np.array(["b"], object), False),
        (Tolerance(), np.array([3]), np.array([3]), True),
        (Tolerance(), np.array([3]), np.array([4]), False),
        (Tolerance(), floats(1), floats(1, 1), False),
        (Tolerance(), floats(1), floats(1, dtype=np.float64), False),
    ],
    ids=str,
)
def test_outputs_agree_by_the_rule_of_the_manifest(
    tolerance: Tolerance, want: Any, got: Any, agrees: bool
) -> None:
    @async_test
    async def run() -> None:
        lane = Lane(tolerance)
        lane.offer(Sent({"y": want}, {"y": got}))
        await lane.idle()
        assert lane.found()["outputs"] == {"y": {"agreed": agrees, "disagreed": not agrees}}
        assert (lane.found()["compared"], lane.found()["failed"]) == (1, {})

    run()


@async_test
async def test_outputs_are_counted_one_by_one() -> None:
    lane = Lane()
    want = {"a": floats(1), "b": floats(2), "c": floats(3)}
    lane.offer(Sent(want, {"a": floats(1), "b": floats(9), "extra": floats(0)}))
    lane.offer(Sent(want, want))
    await lane.idle()
    assert lane.found()["outputs"] == {
        "a": {"agreed": 2, "disagreed": 0},
        "b": {"agreed": 1, "disagreed": 1},
        "c": {"agreed": 1, "disagreed": 1},  # was missing
    }


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("rule", ["close", "exact", "top1"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "bfloat16"])
@pytest.mark.parametrize(
    ("want", "got", "json", "agrees"),
    [
        # Nulls of JSON, which are read as NaN, may have been infinities.
        ([1, INF, 0], [1, NAN, 0], True, True),
        ([-INF, 3, 0], [NAN, 3, 0], True, True),
        ([NAN, 3, 0], [NAN, 3, 0], True, True),
        ([1, 2, 0], [NAN, 2, 0], True, False),
        ([1, INF, 0], [1, 7, 8], True, False),
        # Binary tensors carry both.
        ([0, INF, NAN], [0, INF, NAN], False, True),
        ([INF, 3, 0], [0, NAN, 0], False, False),
    ],
)
def test_infinities_that_json_cannot_carry(
    rule: Any, dtype: Any, want: list[float], got: list[float], json: bool, agrees: bool
) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16

    @async_test
    async def run() -> None:
        lane = Lane(Tolerance(rule))
        outputs = {"y": np.array(want, dtype), "n": np.array([1])}
        reply = {"y": np.array(got, dtype), "n": np.array([1])}
        lane.offer(Sent(outputs, reply, json=["y", "n", "gone"] if json else []))
        await lane.idle()
        found = lane.found()["outputs"]
        assert found["y"] == {"agreed": agrees, "disagreed": not agrees}
        assert found["n"] == {"agreed": 1, "disagreed": 0}

    run()


@async_test
async def test_outputs_of_another_kind_are_no_fault_of_the_comparison() -> None:
    lane = Lane()
    for got in (floats(NAN, NAN), np.array(["x"], object), np.array([3])):
        lane.offer(Sent({"y": floats(INF)}, {"y": got}, json=["y"]))
    await lane.idle()
    assert (lane.found()["compared"], lane.found()["failed"]) == (3, {})
    assert lane.found()["outputs"]["y"] == {"agreed": 0, "disagreed": 3}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (NoAnswer("late"), "late"),
        (NoAnswer("error"), "error"),
        (NoAnswer("refused"), "refused"),
        (InvalidInput("outputs is missing"), "unreadable"),
        (KeyError("secret"), "internal"),
    ],
)
def test_what_is_no_answer_is_counted(
    reply: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        lane = Lane()
        lane.offer(Sent(reply=reply), Sent(reply=reply))
        await lane.idle()
        assert (lane.found()["failed"], lane.found()["compared"]) == ({reason: 2}, 0)
        assert lane.found()["outputs"] == {}
        assert lane.held() == (0, 0)

    with caplog.at_level(logging.ERROR):
        run()
    assert ("secret" in caplog.text) == (reason == "internal")


@async_test
async def test_a_shadow_that_is_not_deployed_and_then_is() -> None:
    known: list[dict[str, Any]] = [{}, details()]
    now_s = 0.0
    links = Links("m", lambda: known[0], NODE, clock=lambda: now_s)
    lane = Lane(links=links)
    sent = Sent()
    lane.offer(sent)
    await lane.idle()
    assert lane.found()["failed"] == {"not_deployed": 1}
    known.pop(0)
    now_s += 60
    links.ask_again()
    await until(lambda: links.known(2))
    lane.offer(sent)
    await lane.idle()
    assert (sent.delivered, lane.found()["compared"]) == ([2], 1)
    await links.close()


def test_large_answers_are_read_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[Callable[..., Any]] = []
    real = asyncio.to_thread

    async def to_thread(function: Callable[..., Any], *args: Any) -> Any:
        threads.append(function)
        return await real(function, *args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)

    @async_test
    async def run() -> None:
        lane = Lane()
        lane.offer(Sent(size=1000))
        await lane.idle()
        assert not threads
        lane.offer(Sent(size=200 * 1024), Sent(size=200 * 1024, reply=InvalidInput("what")))
        await lane.idle()
        assert len(threads) == 2
        assert (lane.found()["compared"], lane.found()["failed"]) == (2, {"unreadable": 1})

    run()


# What must not happen to the request itself


def test_a_copy_that_cannot_be_made_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    @async_test
    async def run() -> None:
        lane = Lane(shadow=[{"version": 2, "sample": 100}, {"version": 3, "sample": 100}])

        def make() -> Copy:
            raise MemoryError("secret")

        lane.shadows.offer(make)
        assert lane.found(2)["dropped"] == {"internal": 1}
        assert (lane.held(2), lane.held(3)) == ((0, 0), (0, 0))

    run()
    assert "secret" in caplog.text


@async_test
async def test_copies_belong_to_no_request() -> None:
    """Or the context of the first request would be held, and would be in the logs, for ever."""
    request = contextvars.ContextVar("request", default="none")
    lane = Lane()
    seen: list[str] = []

    class Spy(Sent):
        async def _deliver(self, version: int, links: Links, link: Link) -> Reply:
            seen.append(request.get())
            return await super()._deliver(version, links, link)

    request.set("r-1")
    lane.offer(Spy(), Spy())
    await lane.idle()
    assert seen == ["none", "none"]


# Changes, and the end


@async_test
async def test_switching_off_drops_nothing_that_is_in_flight() -> None:
    lane = Lane()
    sent = [hanging() for _ in range(6)]
    lane.offer(*sent)
    await until(lambda: lane.shadows._sending)
    assert lane.shadows._waiting
    lane.shadows.reconfigure(None)
    assert not lane.shadows.is_on
    lane.offer(Sent())
    for one in sent:
        one.open.set()
    await lane.idle()
    assert (lane.found()["compared"], lane.found()["dropped"]) == (6, {})
    assert lane.held() == (0, 0)
    lane.shadows.reconfigure(config(sample=100))
    lane.offer(Sent())
    await lane.idle()
    assert lane.found()["compared"] == 7, "counts are kept"


@async_test
async def test_new_bounds_leave_alone_what_is_held() -> None:
    lane = Lane()
    sent = [hanging() for _ in range(6)]
    lane.offer(*sent)
    lane.shadows.reconfigure(config(max_shadow_requests=2, max_shadow_bytes=1024))
    lane.offer(Sent())
    assert lane.found()["dropped"] == {"requests": 1}
    for one in sent:
        one.open.set()
    await lane.idle()
    assert lane.found()["compared"] == 6
    lane.offer(Sent())
    await lane.idle()
    assert lane.found()["compared"] == 7


@async_test
async def test_closing_leaves_nothing() -> None:
    before = asyncio.all_tasks()
    lane = Lane()
    sent = [hanging() for _ in range(6)]
    lane.offer(*sent)
    await until(lambda: lane.shadows._sending)
    lane.shadows._start(2, sent[0].make())  # has not run a step yet
    lane.shadows._shadows[2].budget.admit(100)
    await lane.shadows.close()
    assert lane.held() == (0, 0)
    assert (lane.shadows._look, len(lane.shadows._waiting)) == (None, 0)
    assert asyncio.all_tasks() == before
    late = Sent()
    lane.offer(late)
    assert (lane.shadows.is_on, late.made, lane.shadows._look) == (False, 0, None)
    await lane.shadows.close()
