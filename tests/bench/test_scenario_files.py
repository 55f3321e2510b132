"""The scenarios that are checked in: what they name exists, and they ask for what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bench
from bench.bounds import is_peer
from bench.models import MODELS
from bench.peers.environments import PEERS
from bench.progress import expected_s
from bench.scenario import (
    JobLoad,
    PeerServer,
    RateOf,
    RayprismServer,
    RequestLoad,
    Scenario,
    load_scenario,
)
from bench.servers.jobs import job_config
from rayprism.offline.spec import parse_spec
from rayprism.serving.settings import parse_user_config

FOLDER = Path(bench.__file__).parent / "scenarios"
FILES = sorted(FOLDER.glob("*.yaml"))
LONGEST_MIN = 16


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return load_scenario(request.param)


def test_all_that_were_promised_are_there() -> None:
    assert {path.stem for path in FILES} == {
        "overhead",
        "niceness",
        "batching",
        "images",
        "ragged",
        "overload",
        "canary",
        "telemetry",
        "promotion",
        "cold_start",
        "scale_out",
        "batch_jobs",
        "gpu",
        "smoke",
    }


def test_what_a_scenario_names_exists(scenario: Scenario) -> None:
    assert scenario.about, "for the page"
    for name, server in scenario.servers.items():
        assert server.model in MODELS
        if isinstance(server, PeerServer):
            assert server.peer in PEERS
            assert server.model in PEERS[server.peer].models
        if isinstance(server, RayprismServer):
            parse_user_config(server.user_config)
        assert any(load.servers is None or name in load.servers for load in scenario.loads.values())


def test_peers_can_read_the_bodies_that_they_get(scenario: Scenario) -> None:
    for load in scenario.loads.values():
        for name in load.servers or scenario.servers:
            server = scenario.servers[name]
            if isinstance(load, RequestLoad) and isinstance(server, PeerServer):
                assert load.body in PEERS[server.peer].bodies


def test_best_peer_is_asked_for_where_there_are_peers(scenario: Scenario) -> None:
    asked = [bound.against for bound in scenario.bounds] + [
        load.rate.server
        for load in scenario.loads.values()
        if isinstance(load, RequestLoad) and isinstance(load.rate, RateOf)
    ]
    if "best-peer" in asked:
        assert any(map(is_peer, scenario.servers.values()))


def test_configs_of_jobs_are_taken_by_the_job(scenario: Scenario, tmp_path: Path) -> None:
    for load in scenario.loads.values():
        if isinstance(load, JobLoad):
            source, output = tmp_path / "in.parquet", tmp_path / "out"
            parse_spec(job_config("tiny", tmp_path, source, output, load.config))


def test_actions_have_an_end_within_the_load(scenario: Scenario) -> None:
    for load in scenario.loads.values():
        if isinstance(load, RequestLoad) and load.actions:
            assert max(action.at_s for action in load.actions) + 10 <= load.seconds


def test_a_run_takes_minutes(scenario: Scenario) -> None:
    seconds = scenario.rounds * sum(
        expected_s(load) * len(load.servers or scenario.servers) for load in scenario.loads.values()
    )
    assert seconds <= LONGEST_MIN * 60


@pytest.mark.parametrize(
    ("name", "measure", "load", "limit"),
    [
        ("overhead", "rate", "c16", {"against": "bare", "at_least": 1.1}),
        ("overhead", "rate", "c16", {"against": "documented", "at_least": 60}),
        ("overhead", "rate", "c64", {"against": "mosec", "at_least": 0.5}),
        ("overhead", "latency_s.p50", "c1", {"against": "bare", "at_most": 1.7}),
        ("batching", "latency_s.p99", "at70", {"against": "best-peer", "at_most": 0.5}),
        ("batching", "found", "highest", {"against": "best-peer", "at_least": 1.3}),
        ("images", "rate", "c8", {"against": "noop", "at_least": 0.8}),
        (
            "overload",
            "goodput",
            "overload",
            {"against_load": "capacity", "against_measure": "rate", "at_least": 0.95},
        ),
        ("overload", "latency_s.p99", "overload", {"against_value": 1.0, "at_most": 2}),
        ("overload", "refused.latency_s.max", "overload", {"at_most": 0.02}),
        (
            "overload",
            "refused.with_retry_after",
            "overload",
            {"against_measure": "refused.count", "at_least": 1},
        ),
        ("promotion", "failed", "changes", {"at_most": 0}),
    ],
)
def test_the_bounds_are_those_that_were_promised(
    name: str, measure: str, load: str, limit: dict[str, Any]
) -> None:
    scenario = load_scenario(FOLDER / f"{name}.yaml")
    wanted = {"server": "rayprism", "measure": measure, "load": load, **limit}
    said = [bound.model_dump() for bound in scenario.bounds]
    assert any(wanted.items() <= bound.items() for bound in said)


def test_overload_is_held_against_its_own_target() -> None:
    scenario = load_scenario(FOLDER / "overload.yaml")
    load = scenario.loads["overload"]
    assert isinstance(load, RequestLoad)
    assert isinstance(load.rate, RateOf)
    assert load.rate.share == 3
    (bound,) = (item for item in scenario.bounds if item.measure == "latency_s.p99")
    assert bound.against_value == load.target_s
