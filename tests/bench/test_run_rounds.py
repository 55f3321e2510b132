"""In which order servers are started and loaded, and what becomes of those that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.loadgen.plan import LoadFailed
from bench.models.bodies import RowsInvalid
from bench.rounds import RunFailed, request_bodies
from bench.samples import value_at
from bench.scenario import RequestLoad, Scenario, UrlServer
from bench.servers import NeverRight, Unavailable
from tests.bench.fake_servers import FakeServer, World

SERVERS: dict[str, Any] = {
    "ours": {"kind": "rayprism", "model": "tiny"},
    "fast": {"kind": "peer", "model": "tiny", "peer": "mosec"},
    "slow": {"kind": "ray-serve", "model": "tiny", "pattern": "tuned"},
}
CLOSED = {"loop": "closed", "seconds": 0.01}


def scenario(loads: dict[str, Any], rounds: int = 1, **more: Any) -> Scenario:
    return Scenario.model_validate(
        {"title": "t", "servers": SERVERS, "loads": loads, "rounds": rounds, "seed": 5, **more}
    )


def driven(world: World) -> list[str]:
    return [line.removeprefix("drive ") for line in world.done if line.startswith("drive ")]


def test_servers_are_started_one_at_a_time_and_paused() -> None:
    world = World()
    rounds = world.rounds(scenario({"l": CLOSED}))
    rounds.start()
    assert world.done == [
        *("start ours", "pause ours"),
        *("start fast", "pause fast"),
        *("start slow", "pause slow"),
    ]
    assert rounds.facts["ours"] == {
        "versions": {},
        "start_s": {"deploy_s": 1.0, "ready_s": 1.5},
    }


def test_only_the_server_under_load_runs() -> None:
    world = World()
    rounds = world.rounds(scenario({"l": CLOSED}))
    rounds.start()
    del world.done[:]
    rounds.run(0)
    assert world.done == [
        *("resume ours", "drive ours", "pause ours"),
        *("resume fast", "drive fast", "pause fast"),
        *("resume slow", "drive slow", "pause slow"),
    ]


def test_each_round_begins_with_another_server() -> None:
    world = World()
    world.run(scenario({"l": CLOSED}, rounds=4))
    orders = [driven(world)[start : start + 3] for start in range(0, 12, 3)]
    assert orders == [
        ["ours", "fast", "slow"],
        ["fast", "slow", "ours"],
        ["slow", "ours", "fast"],
        ["ours", "fast", "slow"],
    ]


def test_loads_come_in_their_order_in_every_round() -> None:
    world = World()
    loads = {"a": {**CLOSED, "servers": ["ours"]}, "b": {**CLOSED, "servers": ["fast"]}}
    rounds = world.run(scenario(loads, rounds=2))
    assert [(item["load"], item["round"]) for item in rounds.samples] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
    ]


def test_a_sample_has_everything() -> None:
    (sample,) = World().run(scenario({"l": {**CLOSED, "servers": ["ours"]}})).samples
    assert sample["server"] == "ours"
    assert sample["load"] == "l"
    assert sample["round"] == 0
    assert sample["rate"] == 100
    assert sample["search"] is None
    assert sample["events"] == []
    assert sample["cpu"]["cores"] == {"server": [0.5]}
    assert sample["rss_mib"]["server"] == [100.0]
    assert sample["cpu_us_per_request"] == {"server": 5000.0, "load": 2500.0}
    assert sample["replica"]["batches"] == 10


def test_counts_of_replicas_are_read_once_between_two_loads() -> None:
    world = World()
    only_ours = {**CLOSED, "servers": ["ours"]}
    rounds = world.run(scenario({"a": only_ours, "b": only_ours}))
    assert world.readings == 3
    assert [item["replica"]["batches"] for item in rounds.samples] == [10, 10]


def test_servers_are_stopped_in_reverse() -> None:
    world = World()
    world.run(scenario({"l": CLOSED}))
    assert world.done[-3:] == ["stop slow", "stop fast", "stop ours"]


def test_a_plan_is_what_the_load_says() -> None:
    world = World()
    load = {
        "loop": "open",
        "rate": 50,
        "seconds": 0.02,
        "warm_up_s": 0.5,
        "connections": 7,
        "body": "grpc",
        "processes": 2,
        "timeout_s": 3,
        "arrivals": {"kind": "constant"},
        "servers": ["ours"],
    }
    world.run(scenario({"l": load}))
    (plan,) = world.plans
    assert (plan.url, plan.headers) == ("ours:9000", {"application": "m"})
    assert (plan.rate, plan.seconds, plan.warm_up_s, plan.connections) == (50, 0.02, 0.5, 7)
    assert (plan.body_kind, plan.processes, plan.timeout_s) == ("grpc", 2, 3)
    assert plan.arrivals.kind == "constant"


def test_http_needs_no_metadata_of_grpc() -> None:
    world = World()
    world.run(scenario({"l": {**CLOSED, "servers": ["ours"]}}))
    assert (world.plans[0].url, world.plans[0].headers) == ("http://ours", {})


def test_all_servers_of_a_round_see_the_same_arrivals_and_rounds_see_others() -> None:
    world = World()
    world.run(scenario({"l": {"loop": "open", "rate": 5, "seconds": 0.01}}, rounds=2))
    seeds = [plan.seed for plan in world.plans]
    assert len(set(seeds[:3])) == 1
    assert len(set(seeds)) == 2


def test_bodies_are_made_once_for_all_servers_of_a_model() -> None:
    world = World()
    loads = {"a": CLOSED, "b": CLOSED, "binary": {**CLOSED, "body": "binary"}}
    world.run(scenario(loads, rounds=2))
    assert world.bodies_made == ["tiny json 1", "tiny binary 1"]


def test_a_server_at_an_address_says_itself_what_it_takes() -> None:
    url = {"kind": "url", "model": "tiny", "url": "http://h"}
    world = World()
    world.run(scenario({"l": CLOSED}, servers={**SERVERS, "url": url}))
    assert len(world.bodies_made) == 2


@pytest.mark.parametrize(
    ("server", "wanted"),
    [("itself", [50.0, 100.0, 20.0]), ("best-peer", [100.0] * 3), ("slow", [20.0] * 3)],
)
def test_a_rate_of_another_load(server: str, wanted: list[float]) -> None:
    world = World(best={"ours": 100, "fast": 200, "slow": 40})
    rate = {"load": "closed", "share": 0.5, "server": server}
    open_ = {"loop": "open", "rate": rate, "seconds": 0.01}
    world.run(scenario({"closed": CLOSED, "open": open_}))
    assert [plan.rate for plan in world.plans[3:]] == wanted


def test_a_rate_is_that_of_the_same_round() -> None:
    best = {"ours": 100.0, "fast": 200.0, "slow": 40.0}
    world = World(best=best)
    open_ = {"loop": "open", "rate": {"load": "closed", "share": 1}, "seconds": 0.01}
    rounds = world.rounds(scenario({"closed": CLOSED, "open": open_}, rounds=2))
    rounds.start()
    rounds.run(0)
    best["ours"] = 70.0
    rounds.run(1)
    found = [plan.rate for plan in world.plans if plan.rate and plan.url == "http://ours"]
    assert found == [100, 70]


SEARCHED = {
    "loop": "open",
    "seconds": 0.01,
    "search": {"at_most_s": 0.1, "low": 10, "high": 400, "precision": 0.1},
}


def test_a_search_finds_what_each_server_holds() -> None:
    world = World(best={"ours": 150, "fast": 90, "slow": 400})
    rounds = world.run(scenario({"s": SEARCHED}))
    found = {item["server"]: value_at(item, "found") for item in rounds.samples}
    assert found["ours"] == pytest.approx(150, rel=0.1)
    assert found["fast"] == pytest.approx(90, rel=0.1)
    assert found["slow"] == 400
    assert any("slow" in line and "higher `high`" in line for line in rounds.warnings)
    assert all(item["search"] for item in rounds.samples)


def test_a_server_that_fell_behind_has_to_answer_before_the_next_rate() -> None:
    world = World(best={"ours": 15})
    world.run(scenario({"s": {**SEARCHED, "servers": ["ours"]}}))
    # 10/s is held, and 20/s is not.
    begin = world.done.index("drive ours")
    assert world.done[begin : begin + 4] == [
        *("drive ours", "drive ours"),
        *("resume ours", "drive ours"),
    ]


def test_a_search_begins_where_that_of_the_round_before_ended() -> None:
    world = World(best={"ours": 150})
    rounds = world.run(scenario({"s": {**SEARCHED, "servers": ["ours"]}}, rounds=2))
    first, second = (item["search"] for item in rounds.samples)
    assert second[0]["rate"] == value_at(rounds.samples[0], "found")
    assert len(second) < len(first)


def test_a_rate_of_a_search_is_what_it_found() -> None:
    world = World(best={"ours": 150, "fast": 90, "slow": 50})
    rate = {"load": "s", "share": 0.7, "server": "best-peer"}
    loads = {"s": SEARCHED, "at70": {"loop": "open", "rate": rate, "seconds": 0.01}}
    rounds = world.run(scenario(loads))
    (found,) = (
        value_at(item, "found")
        for item in rounds.samples
        if (item["server"], item["load"]) == ("fast", "s")
    )
    assert found is not None
    assert world.plans[-1].rate == pytest.approx(0.7 * found)


def test_where_a_search_found_nothing_loads_at_its_rate_are_left_out() -> None:
    world = World(best={"ours": 5})
    rate = {"load": "s", "share": 0.7}
    only_ours = {"servers": ["ours"]}
    loads = {
        "s": {**SEARCHED, **only_ours},
        "at70": {"loop": "open", "rate": rate, "seconds": 0.01, **only_ours},
    }
    rounds = world.run(scenario(loads))
    assert [item["load"] for item in rounds.samples] == ["s"]
    assert any("at70" in line and "no rate was found" in line for line in rounds.warnings)


def test_searches_do_not_wait_long_for_late_answers() -> None:
    world = World(best={"ours": 150})
    world.run(scenario({"s": {**SEARCHED, "servers": ["ours"]}}))
    assert {plan.timeout_s for plan in world.plans} == {2.0}


def test_starts() -> None:
    world = World()
    rounds = world.run(scenario({"start": {"loop": "start", "servers": ["ours"]}}))
    assert rounds.samples == [
        {"server": "ours", "load": "start", "round": 0, "ready_s": 2.5, "parts_s": {}}
    ]
    assert world.done[2:5] == ["resume ours", "restart ours", "pause ours"]


def test_a_server_of_jobs_alone_is_not_started() -> None:
    world = World()
    rounds = world.run(scenario({"job": {"loop": "job", "rows": 10, "servers": ["ours"]}}))
    assert "start ours" not in world.done
    (sample,) = rounds.samples
    assert (sample["rows"], sample["rate"]) == (10, 5.0)


def test_actions_reach_the_server_and_are_told() -> None:
    world = World()
    actions = [{"at_s": 0, "do": "promote"}]
    load = {**CLOSED, "seconds": 0.01, "servers": ["ours"], "actions": actions}
    (sample,) = world.run(scenario({"l": load})).samples
    assert [event["what"] for event in sample["events"]] == ["promote"]
    assert "promote ours" in world.done


@pytest.mark.parametrize("what", ["make fast", "start fast", "pause fast"])
def test_a_peer_that_cannot_be_started_is_left_out_with_its_reason(what: str) -> None:
    world = World(failing={what: Unavailable("pip said no")})
    rounds = world.run(scenario({"l": CLOSED}))
    assert {item["server"] for item in rounds.samples} == {"ours", "slow"}
    assert rounds.unavailable == {"fast": "at its start: pip said no"}


def test_a_peer_that_fails_under_load_is_stopped_and_left_out_from_there() -> None:
    world = World()
    rounds = world.rounds(scenario({"l": CLOSED}, rounds=2))
    rounds.start()
    rounds.run(0)
    world.failing["resume slow"] = NeverRight("it gave no right answer")
    rounds.run(1)
    assert [item["round"] for item in rounds.samples if item["server"] == "slow"] == [0]
    assert "it gave no right answer" in rounds.unavailable["slow"]
    assert "round 2/2, l" in rounds.unavailable["slow"]
    assert world.done.count("stop slow") == 1
    rounds.stop()
    assert world.done.count("stop slow") == 1


@pytest.mark.parametrize("what", ["start ours", "resume ours", "drive ours"])
def test_what_is_measured_itself_may_not_fail(what: str) -> None:
    world = World(failing={what: LoadFailed("nothing was answered")})
    with pytest.raises(RunFailed, match=r"ours.*nothing was answered"):
        world.run(scenario({"l": CLOSED}))


def test_a_mistake_of_the_scenario_is_no_servers_fault() -> None:
    world = World(failing={"drive fast": RowsInvalid("line 3 is not JSON")})
    with pytest.raises(RunFailed, match="line 3 is not JSON"):
        world.run(scenario({"l": CLOSED}))


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({**CLOSED, "rows_file": "none.jsonl"}, "loads.l.rows_file: .*none.jsonl is not there"),
        (
            {"loop": "open", "rate": 5, "arrivals": {"kind": "trace", "file": "none.txt"}},
            "loads.l.arrivals: .*none.txt",
        ),
    ],
)
def test_files_are_looked_for_before_anything_is_started(load: dict[str, Any], said: str) -> None:
    world = World()
    with pytest.raises(RunFailed, match=said):
        world.run(scenario({"l": load}))
    assert world.done == []


def test_metrics_that_cannot_be_read_cost_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any) -> Any:
        raise OSError("no dashboard")

    monkeypatch.setattr("tests.bench.fake_servers._Reader.read", read)
    rounds = World().run(scenario({"l": {**CLOSED, "servers": ["ours"]}}))
    assert rounds.samples[0]["replica"] is None
    assert any("no dashboard" in line for line in rounds.warnings)


def test_a_server_that_does_not_end_in_order_does_not_keep_the_others_from_it() -> None:
    world = World(failing={"stop fast": OSError("it hangs")})
    rounds = world.run(scenario({"l": CLOSED}))
    assert world.done[-3:] == ["stop slow", "stop fast", "stop ours"]
    assert any("it hangs" in line for line in rounds.warnings)


def test_progress_tells_each_sample() -> None:
    world = World()
    world.run(scenario({"l": {**CLOSED, "servers": ["ours"]}}))
    assert any(
        line.endswith("round 1/1, l, ours: 100/s, p50 10.00 ms, p99 10.00 ms")
        for line in world.lines
    )


def test_bodies_fit_into_memory() -> None:
    server = Scenario.model_validate(
        {
            "title": "t",
            "servers": {"i": {"kind": "rayprism", "model": "images"}},
            "loads": {"l": CLOSED},
        }
    ).servers["i"]
    load = RequestLoad(loop="closed", body="binary")
    bodies = request_bodies(FakeServer("i", server, World()), load, 1)  # type: ignore[arg-type]
    assert 4 <= len(bodies) <= 20
    assert all(len(body.content) > 600_000 for body in bodies)


def test_bodies_of_a_model_that_nobody_knows_are_made_from_what_its_server_says(
    tmp_path: Path,
) -> None:
    metadata = tmp_path / "metadata.json"
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    metadata.write_text(json.dumps({"name": "mine", "inputs": inputs}))
    running = FakeServer("u", UrlServer(kind="url", model="mine", url="http://h"), World())
    running.metadata_url = metadata.as_uri()
    load = RequestLoad(loop="closed", rows=2)
    bodies = request_bodies(running, load, 1)  # type: ignore[arg-type]
    (tensor,) = json.loads(bodies[0].content)["inputs"]
    assert (tensor["name"], tensor["shape"]) == ("x", [2, 3])
    assert len({body.content for body in bodies}) == len(bodies) == 256


def test_bodies_of_real_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "first"}\n{"text": "second"}\n')
    server = UrlServer(kind="url", model="minilm", url="http://h")
    load = RequestLoad(loop="closed", rows_file=rows)
    bodies = request_bodies(FakeServer("u", server, World()), load, 1)  # type: ignore[arg-type]
    texts = [json.loads(body.content)["inputs"][0]["data"] for body in bodies]
    assert texts == [["first"], ["second"]]
