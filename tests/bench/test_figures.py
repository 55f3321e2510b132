from __future__ import annotations

from typing import Any

import pytest

from bench.figures import (
    Target,
    across_phases,
    clean,
    cpu_groups,
    median_of,
    paired_ratio,
    per_request_us,
    select,
    spread,
)


def sample(server: str, number: int, rate: float, **more: Any) -> dict[str, Any]:
    return {"server": server, "round": number, "rate": rate, "errors": {}, **more}


def test_median_is_over_rounds() -> None:
    samples = [sample("a", number, rate) for number, rate in enumerate((10.0, 30.0, 20.0))]
    assert median_of(samples) == 20.0
    assert spread(samples) == pytest.approx(1.0)


def test_median_of_nothing_is_nothing() -> None:
    assert median_of([]) is None
    assert spread([]) is None


def test_median_takes_a_path() -> None:
    samples = [sample("a", 0, 1.0, latency_s={"p50": 0.25})]
    assert median_of(samples, "latency_s.p50") == 0.25


def test_select_sorts_by_round() -> None:
    samples = [sample("a", 1, 1.0), sample("b", 0, 2.0), sample("a", 0, 3.0)]
    assert [item["rate"] for item in select(samples, server="a")] == [3.0, 1.0]


def test_paired_ratio_forgives_a_slow_round() -> None:
    # In the second round the whole machine was five times slower.
    ours = [sample("a", 0, 100.0), sample("a", 1, 20.0), sample("a", 2, 102.0)]
    peer = [sample("b", 0, 50.0), sample("b", 1, 10.0), sample("b", 2, 51.0)]
    assert paired_ratio(ours, peer) == pytest.approx(2.0)


def test_paired_ratio_leaves_out_rounds_with_one_side() -> None:
    ours = [sample("a", 0, 100.0), sample("a", 1, 900.0)]
    assert paired_ratio(ours, [sample("b", 0, 50.0)]) == pytest.approx(2.0)
    assert paired_ratio(ours, []) is None


def test_ratio_across_phases_goes_through_the_common_server() -> None:
    # 2 x the common one in one phase, 0.1 x in the other.
    assert across_phases(2.0, 0.1) == pytest.approx(20.0)
    assert across_phases(None, 0.1) is None
    assert across_phases(2.0, None) is None


@pytest.mark.parametrize(
    ("sense", "value", "met"),
    [
        ("at least", 0.85, True),
        ("at least", 0.8499, False),
        ("at most", 0.85, True),
        ("at most", 0.86, False),
        ("at most", None, False),
    ],
)
def test_target(sense: Any, value: float | None, met: bool) -> None:
    assert Target("t", 0.85, sense).judge(value).met is met


def test_a_target_is_not_met_by_figures_with_errors() -> None:
    assert not Target("t", 1.0, "at least").judge(2.0, valid=False).met


def test_clean_means_samples_without_errors() -> None:
    good = sample("a", 0, 1.0) | {"errors": {"status": 0, "read": 0}}
    assert clean([good])
    assert not clean([good, good | {"errors": {"status": 1, "read": 0}}])
    assert not clean([])


def test_cpu_per_request_is_over_all_rounds() -> None:
    samples = [
        sample("a", 0, 1.0, requests=100, cpu_s={"haproxy": 0.001, "bare": 0.0}),
        sample("a", 1, 1.0, requests=300, cpu_s={"haproxy": 0.003}),
    ]
    assert per_request_us(samples) == {"haproxy": pytest.approx(10.0)}


def test_cpu_of_idle_neighbours_is_not_the_servers() -> None:
    roles = {
        "replica:tiny:model": 60.0,
        "replica:noop:noop": 1.0,
        "haproxy": 20.0,
        "bare": 0.5,
        "ray": 3.0,
        "load": 10.0,
    }
    assert cpu_groups(roles, "tiny") == {
        "server": 60.0,
        "proxy": 20.0,
        "client": 10.0,
        "rest": 4.5,
    }
    assert cpu_groups({"bare": 50.0, "haproxy": 1.0, "load": 10.0}, None) == {
        "server": 50.0,
        "proxy": 0.0,
        "client": 10.0,
        "rest": 1.0,
    }
