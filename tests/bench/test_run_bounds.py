"""Whether bounds are met, by samples whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from bench.bounds import best_peer, is_peer, judge
from bench.scenario import Scenario

SERVERS: dict[str, Any] = {
    "ours": {"kind": "rayprism", "model": "tiny"},
    "noop": {"kind": "ray-serve", "model": "tiny", "pattern": "noop"},
    "documented": {"kind": "ray-serve", "model": "tiny", "pattern": "documented"},
    "fast": {"kind": "peer", "model": "tiny", "peer": "mosec"},
    "slow": {"kind": "peer", "model": "tiny", "peer": "bare"},
}


def scenario(**bound: Any) -> Scenario:
    bounds = [{"title": "b", "load": "l", "server": "ours", **bound}] if bound else []
    return Scenario.model_validate(
        {
            "title": "t",
            "servers": SERVERS,
            "loads": {"l": {"loop": "closed"}, "m": {"loop": "closed"}},
            "bounds": bounds,
        }
    )


def sample(server: str, number: int, rate: float | None, load: str = "l", **more: Any) -> Any:
    return {"server": server, "load": load, "round": number, "rate": rate, "errors": {}, **more}


def rounds(server: str, *rates: float | None, load: str = "l") -> list[Any]:
    return [sample(server, number, rate, load) for number, rate in enumerate(rates)]


def judged(samples: list[Any], **bound: Any) -> dict[str, Any]:
    (found,) = judge(scenario(**bound), samples)
    return found


@pytest.mark.parametrize(
    ("bound", "met"),
    [
        ({"at_least": 20}, True),
        ({"at_least": 20.1}, False),
        ({"at_most": 20}, True),
        ({"at_most": 19.9}, False),
    ],
)
def test_what_counts_is_the_median_of_the_rounds(bound: dict[str, float], met: bool) -> None:
    found = judged(rounds("ours", 10, 90, 20), **bound)
    assert found["value"] == 20
    assert found["met"] is met
    assert found["rounds"] == [10, 90, 20]
    assert found["interval"][0] >= 10
    assert found["interval"][1] <= 90
    assert found["title"] == "b"
    assert found["why"] is None


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine was five times slower in the second round.
    samples = rounds("ours", 100, 20, 102) + rounds("fast", 50, 10, 51)
    found = judged(samples, against="fast", at_least=2)
    assert found["rounds"] == pytest.approx([2, 2, 2])
    assert found["met"]
    assert found["against_server"] == "fast"


def test_rounds_with_one_side_are_left_out() -> None:
    samples = rounds("ours", 100, 900) + rounds("fast", 50)
    assert judged(samples, against="fast", at_least=1)["rounds"] == [2.0]


def test_a_ratio_to_another_load() -> None:
    samples = rounds("ours", 90) + rounds("ours", 100, load="m")
    assert judged(samples, against_load="m", at_least=0.9)["value"] == pytest.approx(0.9)


def test_a_ratio_to_another_figure() -> None:
    refused = {"count": 8, "with_retry_after": 6}
    bound = {
        "measure": "refused.with_retry_after",
        "against_measure": "refused.count",
        "at_least": 1,
    }
    found = judged([sample("ours", 0, 1, refused=refused)], **bound)
    assert found["value"] == 0.75
    assert not found["met"]


def test_a_ratio_to_a_number() -> None:
    assert judged(rounds("ours", 3.0), against_value=2.0, at_most=1.5)["met"]


def test_best_peer_is_the_one_that_is_hardest_to_beat() -> None:
    samples = [
        *rounds("ours", 100, 100),
        *rounds("noop", 999, 999),
        *rounds("documented", 2, 2),
        *rounds("fast", 50, 50),
        # Better in one round, and not in the median of both.
        *rounds("slow", 60, 10),
    ]
    found = judged(samples, against="best-peer", at_least=1)
    assert found["against_server"] == "fast"
    assert found["value"] == 2


def test_best_peer_is_the_lowest_where_less_is_better() -> None:
    samples = [
        sample(server, 0, 1, latency_s={"p99": p99})
        for server, p99 in (("ours", 0.01), ("fast", 0.04), ("slow", 0.03), ("documented", 9))
    ]
    found = judged(samples, measure="latency_s.p99", against="best-peer", at_most=0.5)
    assert found["against_server"] == "slow"
    assert found["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("failure", [{"errors": {"timeout": 1}}, {"refused": {"count": 3}}])
def test_a_peer_that_failed_requests_is_best_only_where_all_did(failure: dict[str, Any]) -> None:
    quick = {**sample("fast", 0, 90), "requests": 100, **failure}
    slow = {**sample("slow", 0, 20), "requests": 100, "refused": {"count": 0}}
    assert best_peer(scenario(), [quick, slow], load="l", measure="rate") == "slow"
    assert best_peer(scenario(), [quick, slow | failure], load="l", measure="rate") == "fast"


def test_idle_applications_are_no_peers() -> None:
    peers = {name for name, server in scenario().servers.items() if is_peer(server)}
    assert peers == {"documented", "fast", "slow"}


def test_figures_of_a_server_that_answered_with_errors_reach_nothing() -> None:
    samples = [sample("ours", 0, 100), sample("ours", 1, 100) | {"errors": {"status_500": 2}}]
    found = judged(samples, at_least=1)
    assert found["value"] == 100
    assert not found["met"]
    assert "ours answered 2 requests of l with errors" in found["why"]


def test_a_bound_on_errors_themselves_is_judged_by_their_number() -> None:
    some = [sample("ours", 0, 1) | {"errors": {"timeout": 1, "status_500": 2}}]
    assert judged(some, measure="failed", at_most=3)["met"]
    assert not judged(some, measure="failed", at_most=2)["met"]


def test_errors_of_the_other_server_are_told_and_do_not_count_against_ours() -> None:
    samples = [*rounds("ours", 2), sample("fast", 0, 1) | {"errors": {"timeout": 7}}]
    found = judged(samples, against="fast", at_least=2)
    assert found["met"]
    assert "fast answered 7 requests" in found["why"]


def test_a_limit_of_the_load_generator_is_told() -> None:
    samples = [sample("ours", 0, 2, generator={"limited": "a worker was busy"})]
    assert judged(samples, at_least=1)["why"] == "ours, l: a worker was busy"


@pytest.mark.parametrize(
    ("samples", "bound", "said"),
    [
        ([], {}, "no sample of ours under l"),
        (rounds("ours", 1), {"against": "fast"}, "no sample of fast under l"),
        (rounds("ours", 1), {"against": "best-peer"}, "no peer has a rate under l"),
        (rounds("ours", 1), {"measure": "latency_s.p99"}, "ours has no latency_s.p99 under l"),
        (rounds("ours", None), {}, "ours has no rate under l"),
        (rounds("ours", 1) + rounds("fast", 0), {"against": "fast"}, "divided by is 0"),
    ],
)
def test_what_cannot_be_judged_is_not_met_and_says_why(
    samples: list[Any], bound: dict[str, Any], said: str
) -> None:
    found = judged(samples, at_least=0, **bound)
    assert found["value"] is None
    assert found["interval"] is None
    assert not found["met"]
    assert found["why"].startswith("not judged: ")
    assert said in found["why"]
