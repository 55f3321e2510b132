"""What a scenario file may say, and what is said of one that has faults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.scenario import RequestLoad, Scenario, ScenarioInvalid, load_scenario

GOOD: dict[str, Any] = {
    "title": "t",
    "servers": {
        "ours": {"kind": "rayprism", "model": "tiny"},
        "theirs": {"kind": "peer", "model": "tiny", "peer": "mosec"},
        "running": {"kind": "url", "model": "tiny", "url": "http://127.0.0.1:8000"},
    },
    "loads": {
        "closed": {"loop": "closed"},
        "open": {"loop": "open", "rate": {"load": "closed", "share": 0.7}},
        "search": {"loop": "open", "search": {"at_most_s": 0.1, "low": 1, "high": 10}},
        "ours-only": {"loop": "closed", "servers": ["ours"]},
    },
    "bounds": [{"title": "b", "load": "closed", "server": "ours", "at_least": 1}],
}


def load(folder: Path, content: Any) -> Scenario:
    path = folder / "named.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return load_scenario(path)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    change(content)
    return content


def faults(folder: Path, content: Any) -> str:
    with pytest.raises(ScenarioInvalid) as caught:
        load(folder, content)
    return str(caught.value)


def test_a_file_without_faults(tmp_path: Path) -> None:
    scenario = load(tmp_path, GOOD)
    assert scenario.name == "named", "that of the file"
    assert list(scenario.loads) == ["closed", "open", "search", "ours-only"], "in their order"
    assert scenario.rounds == 5
    closed = scenario.loads["closed"]
    assert isinstance(closed, RequestLoad)
    assert (closed.connections, closed.client, closed.body) == (64, "python", "json")


def test_a_name_of_its_own_wins(tmp_path: Path) -> None:
    assert load(tmp_path, {**GOOD, "name": "mine"}).name == "mine"


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    load_ = {
        "loop": "open",
        "rate": 1,
        "rows_file": "rows.jsonl",
        "arrivals": {"kind": "trace", "file": "day.txt"},
    }
    found = load(tmp_path, {**GOOD, "loads": {"l": load_}, "bounds": []}).loads["l"]
    assert isinstance(found, RequestLoad)
    assert found.rows_file == tmp_path / "rows.jsonl"
    assert found.arrivals.file == tmp_path / "day.txt"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ScenarioInvalid, match=r"none\.yaml: .*No such file"):
        load_scenario(tmp_path / "none.yaml")
    assert "named.yaml: " in faults(tmp_path, "loads: [")


@pytest.mark.parametrize("content", ["", "[]", "text"])
def test_a_file_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    assert "named.yaml: the file: " in faults(tmp_path, content)


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["rounds"] = 0
        content["speed"] = 1
        content["loads"]["closed"]["seconds"] = -1
        del content["servers"]["ours"]["model"]

    lines = faults(tmp_path, changed(change)).splitlines()
    for where in ("rounds", "speed", "loads.closed.closed.seconds", "servers.ours.rayprism.model"):
        assert any(f"named.yaml: {where}: " in line for line in lines), where


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("servers", to={}), "servers: "),
        (_set("loads", to={}), "loads: "),
        (_set("servers", "ours", "kind", to="ours"), "servers.ours: "),
        (_set("servers", "ours", "peer", to="mosec"), "servers.ours.rayprism.peer: "),
        (_set("loads", "closed", "loop", to="round"), "loads.closed: "),
        (_set("loads", "closed", "rate", to=5), "a closed loop has no rate and no search"),
        (
            _set("loads", "closed", "search", to={"at_most_s": 1, "low": 1, "high": 2}),
            "a closed loop has no rate and no search",
        ),
        (_set("loads", "open", "rate", to=None), "an open loop needs either a rate or a search"),
        (_set("loads", "search", "rate", to=5), "an open loop needs either a rate or a search"),
        (
            _set("loads", "open", "client", to="wrk"),
            "client: wrk is for a closed loop of JSON bodies",
        ),
        (
            _set("loads", "closed", to={"loop": "closed", "client": "wrk", "body": "binary"}),
            "client: wrk is for a closed loop of JSON bodies",
        ),
        (
            _set("loads", "open", "arrivals", to={"kind": "bursts", "burst_factor": 10}),
            "burst_factor * burst_s has to be less than every_s",
        ),
        (
            _set("loads", "open", "arrivals", to={"kind": "trace"}),
            "file belongs to kind: trace, and to no other",
        ),
        (
            _set("loads", "open", "arrivals", to={"kind": "poisson", "file": "f"}),
            "file belongs to kind: trace, and to no other",
        ),
        (_set("loads", "closed", "servers", to=["mine"]), "loads.closed.servers: no server 'mine'"),
        (
            _set("loads", "open", "rate", "load", to="ours-only"),
            "loads.open.rate.load: 'ours-only' is no earlier load",
        ),
        (
            _set("loads", "open", "rate", "load", to="open"),
            "loads.open.rate.load: 'open' is no earlier load",
        ),
        (
            _set("loads", "open", "rate", "server", to="mine"),
            "loads.open.rate.server: no server 'mine'",
        ),
        (
            _set("loads", "closed", "actions", to=[{"at_s": 1, "do": "promote"}]),
            "loads.closed: 'theirs' is of kind peer, and actions are for rayprism: name the",
        ),
        (
            _set("loads", "job", to={"loop": "job", "rows": 10}),
            "loads.job: 'running' is of kind url, and jobs are for rayprism: name the servers",
        ),
        (
            _set("loads", "closed", "body", to="grpc"),
            "loads.closed: 'theirs' is of kind peer, and it has no gRPC: name the servers",
        ),
        (_set("bounds", 0, "at_most", to=2), "give either at_least or at_most"),
        (_set("bounds", 0, "at_least", to=None), "give either at_least or at_most"),
        (_set("bounds", 0, "load", to="mine"), "bounds.0: no load 'mine'"),
        (_set("bounds", 0, "against_load", to="mine"), "bounds.0: no load 'mine'"),
        (_set("bounds", 0, "server", to="mine"), "bounds.0: no server 'mine'"),
        (_set("bounds", 0, "against", to="mine"), "bounds.0: no server 'mine'"),
        (
            _set(
                "bounds",
                0,
                to={"title": "b", "load": "ours-only", "server": "theirs", "at_most": 1},
            ),
            "bounds.0: load 'ours-only' is not for server 'theirs'",
        ),
        (
            _set(
                "bounds",
                0,
                to={
                    "title": "b",
                    "load": "closed",
                    "server": "theirs",
                    "against_load": "ours-only",
                    "at_most": 1,
                },
            ),
            "bounds.0: load 'ours-only' is not for server 'theirs'",
        ),
    ],
)
def test_a_fault_says_where_and_what(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    assert said in faults(tmp_path, changed(change))


def test_grpc_is_for_servers_that_have_it(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["loads"]["closed"] |= {"body": "grpc", "servers": ["ours", "running"]}

    assert load(tmp_path, changed(change)).loads["closed"].servers == ("ours", "running")


def test_best_peer_is_no_name_of_a_server(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["loads"]["open"]["rate"]["server"] = "best-peer"
        content["bounds"][0]["against"] = "best-peer"

    load(tmp_path, changed(change))
