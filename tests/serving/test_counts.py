"""What requests over HTTP and gRPC leave in the metrics of all versions that they come to."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.telemetry.catalogue import STAGES
from rayprism.telemetry.outcomes import outcome_of
from rayprism.telemetry.records import BatchRecord
from tests.serving.seen import FAIL, FAIL_CANDIDATE, Gate, ask, asking, copies, push_seen, splits
from tests.support.asyncs import async_test, until
from tests.support.models import PROCESSOR, mlp_example, save_mlp
from tests.support.recorded import Recorded, keep_records
from tests.support.versions import Hanging, Member, Proxy, answer, fleet
from tests.support.ways import both_ways

__all__ = ["both_ways"]
pytestmark = pytest.mark.usefixtures("both_ways")

both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture(scope="module")
def versions(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> list[ModelVersion]:
    return push_seen(repository, tmp_path_factory.mktemp("seen"))


def counted(protocol: str, version: int, reason: str = "ok", source: str = "client") -> Any:
    """The labels of a request's count."""
    return (str(version), protocol, source, outcome_of(reason), reason)


def stage_counts(seen: Recorded, version: str) -> dict[str, float]:
    found = {name: seen.histogram(f"rayprism_{name}_seconds", version).number for name in STAGES}
    return {name: number for name, number in found.items() if number}


def hang(proxy: Proxy, protocol: str) -> Hanging:
    """Version 2 takes requests, and does not answer."""
    hanging = Hanging()
    proxy.stand_ins[2 if protocol == "http" else (2, "grpc")] = (
        hanging if protocol == "http" else hanging.infer
    )
    return hanging


HERE = {"decode": 1, "queue": 1, "compute": 1, "encode": 1}


# Who answers


@both
def test_a_request_is_counted_at_both_and_once_for_its_client(
    versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits()) as (stable, proxy):
            assert await ask(stable, protocol, rows=3) == (True, "2")
            here, there = Recorded(stable), Recorded(proxy.members[2])
            assert here.requests() == {counted(protocol, 2): 1}
            assert there.requests() == {counted(protocol, 2, source="split"): 1}
            # Rows and stages where they are made, the client's time where the client is.
            assert here.counts("rayprism_rows_total", "version") == {}
            assert there.counts("rayprism_rows_total", "version") == {("2",): 3}
            assert here.counts("rayprism_request_seconds_count", "version") == {("2",): 1}
            assert there.counts("rayprism_request_seconds_count", "version") == {}
            assert stage_counts(here, "2") == {"forward": 1}
            assert stage_counts(here, "1") == {}
            assert stage_counts(there, "2") == HERE
            forward = here.histogram("rayprism_forward_seconds", "2")
            whole = here.histogram("rayprism_request_seconds", "2")
            inside = sum(there.histogram(f"rayprism_{name}_seconds", "2").sum for name in HERE)
            assert inside < forward.sum < whole.sum

    run()


@both
def test_shares_are_counted_under_who_answered(versions: list[ModelVersion], protocol: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits(50)) as (stable, proxy):
            stable.draws(0.0, 0.25, 0.5, 0.75, 0.9)
            answered = [(await ask(stable, protocol))[1] for _ in range(5)]
            here, there = Recorded(stable), Recorded(proxy.members[2])
            assert here.requests() == {
                counted(protocol, int(version)): answered.count(version) for version in ("1", "2")
            }
            number = answered.count("2")
            assert there.requests() == {counted(protocol, 2, source="split"): number}
            assert await ask(proxy.members[2], protocol) == (True, "2")
            assert there.requests()[counted(protocol, 2)] == 1, "at its own address"

    run()


@async_test
async def test_a_models_seed_does_not_choose_who_answers(versions: list[ModelVersion]) -> None:
    """A model's code may seed the common generator at each request."""
    shadow = [{"version": 3, "sample": 50}]
    async with fleet(versions, v1=splits(50, shadow=shadow)) as (stable, proxy):
        for _ in range(60):
            random.seed(1)
            await ask(stable, "http")
        copied = stable.service.shadows._shadows[3]
        await until(lambda: copied.compared and not copied.budget.requests)
        here = Recorded(stable).requests()
        assert here.keys() == {counted("http", 1), counted("http", 2)}
        assert proxy.versions().count(3) < here[counted("http", 1)]


@both
def test_a_copy_is_counted_at_the_shadow_alone(versions: list[ModelVersion], protocol: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions, rpcs=True, v1=copies(2, 3)) as (stable, proxy):
            assert await ask(stable, protocol, rows=2) == (True, "1")
            await until(lambda: all(stable.shadow(version)["compared"] for version in (2, 3)))
            here = Recorded(stable)
            assert here.requests() == {counted(protocol, 1): 1}
            assert here.histogram("rayprism_request_seconds", "1").number == 1
            assert stage_counts(here, "1") == HERE
            for version in (2, 3):
                there = Recorded(proxy.members[version])
                assert there.requests() == {counted(protocol, version, source="shadow"): 1}
                assert there.counts("rayprism_request_seconds_count", "version") == {}
                assert there.counts("rayprism_rows_total", "version") == {(str(version),): 2}

    run()


@both
def test_what_a_candidate_fails_is_answered_and_counted_here(
    versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits()) as (stable, proxy):
            records = keep_records(stable)
            assert await ask(stable, protocol, FAIL_CANDIDATE) == (True, "1")
            here, there = Recorded(stable), Recorded(proxy.members[2])
            assert here.requests() == {counted(protocol, 1): 1}
            assert there.requests() == {counted(protocol, 2, "model_failed", "split"): 1}
            fallbacks = here.counts("rayprism_fallbacks_total", "version", "reason")
            assert fallbacks == {("2", "error"): 1}
            (record,) = records
            assert (record.forwarded_to, record.fallback, record.version) == ("2", "error", "")
            assert stage_counts(here, "1") == HERE
            assert stage_counts(here, "2") == {"forward": 1}
            decode = here.histogram("rayprism_decode_seconds", "1").sum
            assert decode == pytest.approx(record.decoded_s - record.forward_ended_s)
            sums = [here.histogram(f"rayprism_{name}_seconds", "1").sum for name in HERE]
            sums.append(here.histogram("rayprism_forward_seconds", "2").sum)
            gap_s = record.forward_began_s - record.began_s
            whole = here.histogram("rayprism_request_seconds", "1").sum
            assert whole == pytest.approx(sum(sums) + gap_s, abs=1e-9)

    run()


@both
def test_a_candidate_that_rests_gets_nothing_and_no_time(
    versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits()) as (stable, proxy):
            for _ in range(7):
                assert await ask(stable, protocol, FAIL_CANDIDATE) == (True, "1")
            here, there = Recorded(stable), Recorded(proxy.members[2])
            fallbacks = here.counts("rayprism_fallbacks_total", "version", "reason")
            assert fallbacks == {("2", "error"): 5, ("2", "resting"): 2}
            assert here.histogram("rayprism_forward_seconds", "2").number == 5
            assert here.requests() == {counted(protocol, 1): 7}
            assert there.requests() == {counted(protocol, 2, "model_failed", "split"): 5}

    run()


# A version that the client names


@both
@pytest.mark.parametrize(
    ("asked", "shape", "reason"),
    [
        (0.0, None, "ok"),
        (FAIL_CANDIDATE, None, "model_failed"),
        (0.0, (2, 2, 2), "invalid_input"),
    ],
)
def test_a_named_versions_word_is_counted_as_its_own(
    versions: list[ModelVersion], protocol: str, asked: float, shape: Any, reason: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True) as (stable, proxy):
            ok = reason == "ok"
            found = await ask(stable, protocol, asked, shape=shape, x_rayprism_version="2")
            assert found == (ok, "2")
            here, there = Recorded(stable), Recorded(proxy.members[2])
            assert here.requests() == {counted(protocol, 2, reason): 1}
            assert there.requests() == {counted(protocol, 2, reason, "split"): 1}
            assert stage_counts(here, "2") == {"forward": 1}

    run()


@both
def test_versions_that_clients_make_up_are_no_series(
    versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True) as (stable, _):
            here = Recorded(stable)
            here.requests()
            for made_up in ("7", "1000", "9999999999", "newest", "-1"):
                assert await ask(stable, protocol, x_rayprism_version=made_up) == (False, "1")
            assert here.requests() == {
                counted(protocol, 1, "not_found"): 3,
                counted(protocol, 1, "invalid_input"): 2,
            }
            assert {dict(labels).get("version") for _, labels in here._added} == {"1"}

    run()


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (503, {"retry_after": "3"}, "overloaded"),
        (503, {}, "not_ready"),
        (504, {}, "deadline_exceeded"),
        (413, {}, "too_large"),
        (404, {}, "not_found"),
        (501, {}, "unsupported"),
        (422, {}, "invalid_input"),
        (502, {}, "internal"),
    ],
)
def test_a_named_versions_status(
    versions: list[ModelVersion], status: int, headers: dict[str, str], reason: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2]) as (stable, proxy):
            own = {"x_rayprism_version": "2", "content_type": "application/json", **headers}
            proxy.stand_ins[2] = answer(status, b"{}", **own)
            assert await ask(stable, "http", x_rayprism_version="2") == (False, "2")
            assert Recorded(stable).requests() == {counted("http", 2, reason): 1}

    run()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("RESOURCE_EXHAUSTED", "overloaded"),
        ("UNAVAILABLE", "not_ready"),
        ("DEADLINE_EXCEEDED", "deadline_exceeded"),
        ("INVALID_ARGUMENT", "invalid_input"),
        ("NOT_FOUND", "not_found"),
        ("UNIMPLEMENTED", "unsupported"),
        ("UNKNOWN", "internal"),
    ],
)
def test_a_named_versions_code(versions: list[ModelVersion], code: str, reason: str) -> None:
    async def fails(request: Any, context: Any) -> Any:
        context.set_trailing_metadata([("x-rayprism-version", "2")])
        context.set_code(grpc.StatusCode[code])
        return request

    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True) as (stable, proxy):
            proxy.stand_ins[2, "grpc"] = fails
            assert await ask(stable, "grpc", x_rayprism_version="2") == (False, "2")
            assert Recorded(stable).requests() == {counted("grpc", 2, reason): 1}

    run()


# What is refused, fails, or is left


@both
@pytest.mark.parametrize(
    ("request_of", "reason", "stages"),
    [
        ({"asked": FAIL}, "model_failed", {"decode", "queue"}),
        ({"shape": (1, 2, 3)}, "invalid_input", set()),
        ({"rows": 9}, "too_large", {"decode"}),
        ({"x_rayprism_timeout_s": "soon"}, "invalid_input", set()),
    ],
)
def test_refusals_have_their_codes(
    versions: list[ModelVersion],
    protocol: str,
    request_of: dict[str, Any],
    reason: str,
    stages: set[str],
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True, v1={"max_queue_rows": 8}) as (stable, _):
            assert await ask(stable, protocol, **request_of) == (False, "1")
            seen = Recorded(stable)
            assert seen.requests() == {counted(protocol, 1, reason): 1}
            assert set(stage_counts(seen, "1")) == stages
            assert seen.counts("rayprism_rows_total", "version") == {}
            assert seen.counts("rayprism_request_seconds_count", "version") == {}

    run()


@both
def test_a_full_queue_and_a_deadline(versions: list[ModelVersion], protocol: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True, v1={"max_queue_rows": 2}) as (stable, _):
            gate, seen = Gate(stable), Recorded(stable)
            running = asking(stable, protocol)
            await until(lambda: gate.entered == 1)
            waiting = asking(stable, protocol, rows=2, x_rayprism_timeout_s="0.2")
            await until(lambda: stable.service.scheduler.queued_rows == 2)
            assert await ask(stable, protocol) == (False, "1")
            assert seen.requests() == {counted(protocol, 1, "overloaded"): 1}
            assert await waiting == (False, "1")
            assert seen.requests()[counted(protocol, 1, "deadline_exceeded")] == 1
            number, sum_s = seen.histogram("rayprism_queue_seconds", "1")
            assert number == 1
            assert 0.15 < sum_s < 10
            gate.open.set()
            assert await running == (True, "1")
            assert seen.requests() == {
                counted(protocol, 1): 1,
                counted(protocol, 1, "overloaded"): 1,
                counted(protocol, 1, "deadline_exceeded"): 1,
            }
            assert stage_counts(seen, "1") == {"decode": 3, "queue": 2, "compute": 1, "encode": 1}

    run()


@both
@pytest.mark.parametrize("where", ["waiting", "running"])
def test_a_client_that_leaves_while_it_is_answered(
    versions: list[ModelVersion], protocol: str, where: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True) as (stable, _):
            gate = Gate(stable)
            first = asking(stable, protocol)
            await until(lambda: gate.entered == 1)
            second = asking(stable, protocol)
            await until(lambda: stable.service.scheduler.queued_rows == 1)
            left, stays = (first, second) if where == "running" else (second, first)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            gate.open.set()
            assert await stays == (True, "1")
            seen = Recorded(stable)
            assert seen.requests() == {
                counted(protocol, 1): 1,
                counted(protocol, 1, "cancelled"): 1,
            }
            assert seen.histogram("rayprism_compute_seconds", "1").number == 1

    run()


@both
def test_a_client_that_leaves_while_its_request_is_elsewhere(
    versions: list[ModelVersion], protocol: str
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:2], rpcs=True, v1=splits()) as (stable, proxy):
            await ask(stable, protocol)  # where it is, is known now
            seen = Recorded(stable)
            hanging = hang(proxy, protocol)
            records = keep_records(stable)
            request = asking(stable, protocol)
            await until(lambda: hanging.entered == 1)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await until(lambda: len(records) == 1)
            assert seen.requests() == {
                counted(protocol, 2): 1,
                counted(protocol, 1, "cancelled"): 1,
            }
            assert seen.counts("rayprism_fallbacks_total", "version", "reason") == {}
            (record,) = records
            assert record.forward_ended_s >= record.forward_began_s > 0
            await until(lambda: hanging.left == 1)

    run()


@pytest.mark.parametrize("sent", [[], [{"type": "http.request", "body": b"{", "more_body": True}]])
def test_a_client_that_leaves_before_its_request_is_whole(
    versions: list[ModelVersion], sent: list[dict[str, Any]]
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1]) as (stable, _):
            messages = iter([*sent, {"type": "http.disconnect"}])
            said: list[Any] = []

            async def receive() -> Any:
                return next(messages)

            async def send(message: Any) -> None:
                said.append(message)

            path = "/v2/models/seen/infer"
            scope = {"type": "http", "method": "POST", "path": path, "headers": []}
            await stable.app(scope, receive, send)
            assert said == []
            seen = Recorded(stable)
            assert seen.requests() == {counted("http", 1, "cancelled"): 1}
            assert stage_counts(seen, "1") == {}

    run()


@both
def test_a_fault_of_our_own(
    versions: list[ModelVersion], protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True) as (stable, _):

            async def broken(*args: Any, **kwargs: Any) -> Any:
                raise KeyError("a mistake")

            def broken_at_once(*args: Any, **kwargs: Any) -> Any:
                raise KeyError("a mistake")

            monkeypatch.setattr(stable.service, "infer", broken)
            monkeypatch.setattr(stable.service, "submit", broken_at_once)
            assert await ask(stable, protocol) == (False, "1")
            assert Recorded(stable).requests() == {counted(protocol, 1, "internal"): 1}

    run()


# Batches


async def held(stable: Member, gate: Gate, protocol: str, *lengths: int) -> list[tuple[bool, str]]:
    """A batch of one, and behind it one of all the others."""
    first = asking(stable, protocol, length=lengths[0])
    await until(lambda: gate.entered == 1)
    others = [asking(stable, protocol, rows=2, length=length) for length in lengths[1:]]
    await until(lambda: stable.service.scheduler.queued_rows == 2 * len(others))
    gate.open.set()
    return [await one for one in (first, *others)]


@both
def test_batches_rows_and_padding(versions: list[ModelVersion], protocol: str) -> None:
    @async_test
    async def run() -> None:
        async with fleet(versions[:1], rpcs=True) as (stable, _):
            records, seen = keep_records(stable), Recorded(stable)
            assert await held(stable, Gate(stable), protocol, 3, 2, 5) == [(True, "1")] * 3
            assert seen.histogram("rayprism_batch_rows", "1") == (2, 1 + 4)
            # 1 x 3, and 4 rows as long as the longest, of which 2 x 3 values are padding.
            assert seen.counts("rayprism_batch_cost_total", "version") == {("1",): 3 + 4 * 5}
            assert seen.counts("rayprism_batch_padding_total", "version") == {("1",): 2 * 3}
            batches = [record.batch for record in records]
            assert all(batches)
            told = [(batch.number, batch.rows, batch.requests) for batch in batches if batch]
            assert told == [(1, 1, 1), (2, 4, 2), (2, 4, 2)]
            assert batches[1] is batches[2]
            for record, batch in zip(records, batches, strict=True):
                assert batch is not None
                assert record.started_s <= batch.began_s <= batch.joined_s <= batch.ran_s
                assert batch.ran_s <= batch.ended_s <= record.computed_s <= record.ended_s

    run()


@async_test
async def test_a_request_of_many_rows_is_in_its_last_batch(versions: list[ModelVersion]) -> None:
    async with fleet(versions[:1]) as (stable, _):
        records, seen = keep_records(stable), Recorded(stable)
        batches: list[BatchRecord] = []
        stable.service.telemetry.batch = lambda batch, *_: batches.append(batch)  # type: ignore[method-assign]
        assert await ask(stable, "http", rows=20) == (True, "1")
        assert [(batch.number, batch.rows) for batch in batches] == [(1, 8), (2, 8), (3, 4)]
        (record,) = records
        assert record.batch is batches[-1]
        assert record.started_s <= batches[0].began_s, "when its first rows began"
        assert stage_counts(seen, "1") == HERE
        assert seen.counts("rayprism_rows_total", "version") == {("1",): 20}


@both
def test_stages_of_a_real_request_add_up(
    repository: Repository, tmp_path: Path, protocol: str, both_ways: str
) -> None:
    save_mlp(tmp_path / "model.onnx", x="features", y="scores")
    (tmp_path / "processor.py").write_text(PROCESSOR)
    version = push_model(
        repository,
        f"worded-{protocol}-{both_ways}",
        tmp_path,
        example=mlp_example(),
        file="model.onnx",
        code="processor.py:Processor",
        inputs=[TensorSpec("x", Datatype.FP32, (-1, 4))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1, 3))],
        allow_code=True,
    ).version

    @async_test
    async def run() -> None:
        async with fleet([version], rpcs=True) as (stable, _):
            seen = Recorded(stable)
            for _ in range(5):
                assert await ask(stable, protocol, rows=3, length=4) == (True, "1")
            found = {
                name: seen.histogram(f"rayprism_{name}_seconds", "1")
                for name in ("decode", "prepare", "queue", "compute", "encode")
            }
            assert {stage.number for stage in found.values()} == {5}
            assert all(stage.sum > 0 for stage in found.values())
            whole = seen.histogram("rayprism_request_seconds", "1")
            total_s = sum(stage.sum for stage in found.values())
            assert whole == (5, pytest.approx(total_s, abs=1e-9))

    run()
