"""What a service is asked for each time that metrics are sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayprism.models.repository import ModelVersion, Repository
from tests.serving.seen import FAIL_CANDIDATE, Gate, ask, asking, push_seen, splits
from tests.support.asyncs import async_test, until
from tests.support.recorded import Recorded
from tests.support.versions import Member, answer, fleet

WEIGHTS = ("rayprism_traffic_weight_ratio", "version")
FALLBACKS = ("rayprism_fallbacks_total", "version", "reason")
COPIES = ("rayprism_shadow_copies_total", "version", "outcome", "reason")
OUTPUTS = ("rayprism_shadow_outputs_total", "version", "output", "outcome")


@pytest.fixture(scope="module")
def versions(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    return push_seen(repository, tmp_path_factory.mktemp("gauged"), "gauged")


def weights(**by_version: float) -> dict[str, Any]:
    candidates = [{"version": int(v[1:]), "weight": weight} for v, weight in by_version.items()]
    return {"traffic": {"candidates": candidates}}


def gauge(member: Member, name: str) -> float | None:
    """Of this replica; None where there is none."""
    return Recorded(member).gauges(name, "model", "version", "replica").get(("gauged", "1", ""))


# Weights


@async_test
async def test_weights_are_shares_and_add_up(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        seen, service = Recorded(stable), stable.service
        service.is_stable = True
        assert seen.gauges(*WEIGHTS) == {("1",): 1.0}
        for config, expected in (
            (weights(v2=25), {"1": 0.75, "2": 0.25}),
            (weights(v2=33.33, v3=0.01), {"1": 0.6666, "2": 0.3333, "3": 0.0001}),
            (weights(v3=100), {"1": 0.0, "3": 1.0}),
            (weights(v2=0), {"1": 1.0}),
            # Between the two steps of a promotion.
            (weights(v1=40, v2=10), {"1": 0.9, "2": 0.1}),
            (None, {"1": 1.0}),
        ):
            assert service.reconfigure(config), service.config_error
            found = {version: value for (version,), value in seen.gauges(*WEIGHTS).items()}
            assert found == pytest.approx(expected)
            assert sum(found.values()) == pytest.approx(1.0)


@async_test
async def test_weights_of_a_faulty_config_are_not_shown(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1], v1=weights(v2=25)) as (stable, _):
        stable.service.is_stable = True
        assert not stable.service.reconfigure(weights(v2=25, v3=90))
        assert Recorded(stable).gauges(*WEIGHTS) == {("1",): 0.75, ("2",): 0.25}


@pytest.mark.parametrize("is_stable", [False, None])
def test_only_the_stable_application_tells_weights(
    versions: list[ModelVersion], is_stable: bool | None
) -> None:
    """A candidate that split traffic on would be a second opinion."""

    @async_test
    async def run() -> None:
        async with fleet(versions[:1], v1=weights(v2=25)) as (stable, _):
            seen = Recorded(stable)
            stable.service.is_stable = is_stable
            assert seen.gauges(*WEIGHTS) == {}
            stable.service.is_stable = True
            assert len(seen.gauges(*WEIGHTS)) == 2
            stable.service.is_stable = is_stable
            assert seen.gauges(*WEIGHTS) == {}

    run()


# Fallbacks and shadows


@async_test
async def test_fallbacks_are_totals(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:2], v1=splits()) as (stable, proxy):
        seen = Recorded(stable)
        assert seen.series(*FALLBACKS) == {}
        for number in (1, 2):
            assert await ask(stable, "http", FAIL_CANDIDATE) == (True, "1")
            assert seen.counts(*FALLBACKS) == {("2", "error"): number}
        assert await ask(stable, "http") == (True, "2")
        proxy.stand_ins[2] = answer(404)
        assert await ask(stable, "http") == (True, "1")
        expected = {("2", "error"): 2, ("2", "gone"): 1}
        assert seen.counts(*FALLBACKS) == expected
        assert seen.counts(*FALLBACKS) == expected, "nothing is counted twice"
        assert stable.service.reconfigure(None)
        assert seen.counts(*FALLBACKS) == expected, "nor lost with its candidate"
        assert stable.service.reconfigure(splits())
        assert await ask(stable, "http") == (True, "1")
        assert seen.counts(*FALLBACKS) == expected | {("2", "gone"): 2}


@async_test
async def test_copies_and_their_outputs_are_totals(versions: list[ModelVersion]) -> None:
    traffic = {"shadow": [{"version": 2, "sample": 100}], "max_shadow_requests": 1}
    async with fleet(versions[:2], v1={"traffic": traffic}) as (stable, proxy):
        seen = Recorded(stable)
        assert await ask(stable, "http") == (True, "1")
        await until(lambda: stable.shadow(2)["compared"] == 1)
        assert seen.counts(*COPIES) == {("2", "compared", "ok"): 1}
        assert seen.counts(*OUTPUTS) == {("2", "y", "agreed"): 1}
        assert await ask(stable, "http", FAIL_CANDIDATE) == (True, "1")
        await until(lambda: stable.shadow(2)["failed"])
        member, gate = proxy.members[2], Gate(proxy.members[2])
        assert await ask(stable, "http") == (True, "1")
        await until(lambda: gate.entered == 1)
        for _ in range(3):
            assert await ask(stable, "http") == (True, "1")
        gate.open.set()
        await until(lambda: stable.shadow(2)["compared"] == 2)
        run = member.service.scheduler._model.run

        def differs(batch: Any) -> Any:
            return {name: value + 1 for name, value in run(batch).items()}

        member.service.scheduler._model.run = differs  # type: ignore[method-assign]
        await until(lambda: stable.service.shadows._shadows[2].budget.requests == 0)
        assert await ask(stable, "http") == (True, "1")
        await until(lambda: stable.shadow(2)["compared"] == 3)
        for _ in range(2):
            assert seen.counts(*COPIES) == {
                ("2", "compared", "ok"): 3,
                ("2", "failed", "error"): 1,
                ("2", "dropped", "requests"): 3,
            }
            assert seen.counts(*OUTPUTS) == {("2", "y", "agreed"): 2, ("2", "y", "disagreed"): 1}


# user_config


@async_test
async def test_refused_configs_are_counted(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        seen, service = Recorded(stable), stable.service
        name = "rayprism_config_refusals_total"
        assert seen.series(name, "model", "version") == {("gauged", "1"): 0}, "from the start"
        configs: list[Any] = [{"max_queue_row": 5}, {"max_queue_rows": 5}, [], {"telemetry": 1}]
        for config in configs:
            service.reconfigure(config)
        assert seen.counts(name, "version") == {("1",): 3}


@async_test
async def test_targets_are_those_in_force(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        p99, ratio = "rayprism_target_p99_seconds", "rayprism_target_availability_ratio"
        assert (gauge(stable, p99), gauge(stable, ratio)) == (None, pytest.approx(0.999))
        targets = {"p99_target_s": 0.25, "availability_percent": 99}
        assert stable.service.reconfigure({"telemetry": targets})
        assert (gauge(stable, p99), gauge(stable, ratio)) == (0.25, pytest.approx(0.99))
        assert not stable.service.reconfigure({"telemetry": {"p99_target_s": 0}})
        assert gauge(stable, p99) == 0.25
        assert stable.service.reconfigure(None)
        assert (gauge(stable, p99), gauge(stable, ratio)) == (None, pytest.approx(0.999))


# The queue


@async_test
async def test_rows_that_wait_and_how_long(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        rows, age = "rayprism_queue_rows", "rayprism_queue_age_seconds"
        scheduler, gate = stable.service.scheduler, Gate(stable)
        assert (gauge(stable, rows), gauge(stable, age)) == (0, 0)
        running = asking(stable, "http", rows=4)
        await until(lambda: gate.entered == 1)
        assert (gauge(stable, rows), gauge(stable, age)) == (0, 0), "it does not wait"
        before_s = scheduler.now_s()
        first = asking(stable, "http", rows=2)
        await until(lambda: scheduler.queued_rows == 2)
        second = asking(stable, "grpc", rows=3)
        await until(lambda: scheduler.queued_rows == 5)
        arrived_s = scheduler._queue.oldest_s()
        assert arrived_s is not None
        assert before_s <= arrived_s
        real, now_s = scheduler._clock, arrived_s + 2.5
        scheduler._clock = lambda: now_s
        assert (gauge(stable, rows), gauge(stable, age)) == (5, 2.5)
        now_s = arrived_s - 1
        assert gauge(stable, age) == 0, "never negative"
        scheduler._clock = real
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert gauge(stable, rows) == 3
        later_s = scheduler._queue.oldest_s()
        assert later_s is not None
        assert later_s > arrived_s
        gate.open.set()
        assert [await running, await second] == [(True, "1")] * 2
        assert (gauge(stable, rows), gauge(stable, age)) == (0, 0)
