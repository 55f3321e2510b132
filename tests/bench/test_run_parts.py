"""Scenarios made smaller, shorter, or aimed at a server that runs already."""

from __future__ import annotations

from typing import Any

import pytest

from bench.parts import aimed_at, only, quick
from bench.scenario import JobLoad, RateOf, RequestLoad, Scenario, ScenarioInvalid, UrlServer

WHOLE = Scenario.model_validate(
    {
        "title": "t",
        "name": "whole",
        "servers": {
            "ours": {"kind": "rayprism", "model": "minilm"},
            "peer": {"kind": "peer", "model": "minilm", "peer": "mosec"},
            "noop": {"kind": "ray-serve", "model": "minilm", "pattern": "noop"},
        },
        "loads": {
            "closed": {"loop": "closed", "seconds": 8, "warm_up_s": 2},
            "search": {
                "loop": "open",
                "search": {"at_most_s": 0.1, "low": 1, "high": 9, "precision": 0.05},
                "servers": ["ours", "peer"],
            },
            "at70": {
                "loop": "open",
                "rate": {"load": "search", "share": 0.7, "server": "best-peer"},
            },
            "as-noop": {
                "loop": "open",
                "rate": {"load": "closed", "share": 0.5, "server": "noop"},
            },
            "promotion": {
                "loop": "open",
                "rate": 5,
                "seconds": 30,
                "actions": [{"at_s": 20, "do": "promote"}],
                "servers": ["ours"],
            },
            "job": {"loop": "job", "rows": 10_000_000, "servers": ["ours"]},
            "start": {"loop": "start"},
        },
        "bounds": [
            {
                "title": "best",
                "load": "at70",
                "server": "ours",
                "against": "best-peer",
                "at_most": 1,
            },
            {"title": "noop", "load": "closed", "server": "ours", "against": "noop", "at_least": 1},
            {
                "title": "loads",
                "load": "at70",
                "server": "ours",
                "against_load": "closed",
                "at_least": 1,
            },
            {"title": "alone", "load": "closed", "server": "ours", "at_least": 1},
            {"title": "peer's", "load": "closed", "server": "peer", "at_least": 1},
        ],
    }
)


def titles(scenario: Scenario) -> set[str]:
    return {bound.title for bound in scenario.bounds}


def test_only_nothing_is_everything() -> None:
    assert only(WHOLE) == WHOLE


def test_bounds_that_need_a_server_that_is_left_out_are_left_out() -> None:
    found = only(WHOLE, servers=["ours", "noop"], loads=["closed"])
    assert list(found.servers) == ["ours", "noop"]
    assert titles(found) == {"noop", "alone"}


def test_bounds_that_need_a_load_that_is_left_out_are_left_out() -> None:
    found = only(WHOLE, loads=["search", "at70"])
    assert list(found.loads) == ["search", "at70"]
    assert titles(found) == {"best"}


def test_loads_lose_the_servers_that_are_left_out() -> None:
    found = only(WHOLE, servers=["peer"], loads=["search", "closed", "promotion"])
    assert found.loads["search"].servers == ("peer",)
    assert "promotion" not in found.loads, "it is for none of the servers"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"servers": ["mine"]}, "no server 'mine': the scenario has ours, peer, noop"),
        ({"loads": ["mine"]}, "no load 'mine': the scenario has closed, search"),
        ({"loads": ["at70"]}, "at70 runs at the rate that search finds: take both"),
        (
            {"servers": ["ours"], "loads": ["search", "at70"]},
            "at70 runs at the rate of the best peer: take one at least",
        ),
        (
            {"servers": ["ours"], "loads": ["closed", "as-noop"]},
            "as-noop runs at the rate of noop: take that, too",
        ),
        ({"servers": ["noop"], "loads": ["job"]}, "no load is left"),
    ],
)
def test_a_choice_that_makes_no_sense(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioInvalid, match=said):
        only(WHOLE, **choice)


def test_quick_is_short() -> None:
    found = quick(WHOLE)
    assert found.rounds == 2
    closed, search, job = (found.loads[name] for name in ("closed", "search", "job"))
    assert isinstance(closed, RequestLoad)
    assert closed.seconds <= 2
    assert closed.warm_up_s < 1
    assert isinstance(search, RequestLoad)
    assert search.search is not None
    assert search.search.precision > 0.05
    assert isinstance(job, JobLoad)
    assert job.rows < 100_000
    assert quick(found) == found


def test_quick_leaves_actions_the_time_that_they_take() -> None:
    assert quick(WHOLE).loads["promotion"] == WHOLE.loads["promotion"]


def test_at_a_url_only_loads_of_requests_are_left() -> None:
    found = aimed_at(WHOLE, "http://127.0.0.1:8000/", "127.0.0.1:9000")
    (server,) = found.servers.values()
    assert isinstance(server, UrlServer)
    assert server.url == "http://127.0.0.1:8000"
    assert server.grpc_url == "127.0.0.1:9000"
    assert server.model == "minilm"
    assert list(found.loads) == ["closed", "search", "at70", "as-noop"]
    for load in found.loads.values():
        assert load.servers is None
        assert isinstance(load, RequestLoad)
        if isinstance(load.rate, RateOf):
            assert load.rate.server == "itself"
    # What is against nobody else is asked of it, too.
    assert titles(found) == {"loads", "alone"}
    assert Scenario.model_validate(found.model_dump()) == found


def test_at_a_url_the_model_may_be_another() -> None:
    assert aimed_at(WHOLE, "http://h", model="mine").servers["url"].model == "mine"


def test_at_a_url_some_load_has_to_be_left() -> None:
    started = WHOLE.model_copy(update={"loads": {"start": WHOLE.loads["start"]}, "bounds": ()})
    with pytest.raises(ScenarioInvalid, match="choose another scenario"):
        aimed_at(started, "http://h")
