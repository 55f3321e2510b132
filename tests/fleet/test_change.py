"""Carrying out a plan, against a stand-in for Serve: everything, or nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.change import carry_out
from rayprism.fleet.edits import ABSENT, Edit
from rayprism.fleet.journal import Entry, Journal
from rayprism.fleet.plans import Plan, Stage
from rayprism.fleet.rest import ServeClient
from tests.support.serve_stand_in import ServeStandIn, application, beside, serving

TRAFFIC = {"candidates": [{"version": "4", "weight": 5}]}
TRAFFIC_PATH = ("deployments", "model", "user_config", "traffic")
GOLDEN = (
    "Error:\nTraceback (most recent call last):\n"
    '  File "loader.py", line 1, in load\n'
    "GoldenMismatch: the golden example was not reproduced"
)

PROMOTE = Plan(
    "promote",
    "flights",
    {"version": 3, "traffic": TRAFFIC},
    {"version": 4, "traffic": None},
    (
        Stage(
            (Edit("flights", ("args", "version"), "4"), Edit("flights", TRAFFIC_PATH, ABSENT)),
            ("flights",),
            "start version 4",
        ),
        Stage((Edit("flights-4", (), ABSENT),), (), "take out flights-4"),
    ),
)
SPLIT = Plan(
    "traffic",
    "flights",
    {"version": 3, "traffic": TRAFFIC},
    {"version": 3, "traffic": {"candidates": [{"version": "4", "weight": 50}]}},
    (
        Stage(
            (Edit("flights", TRAFFIC_PATH, {"candidates": [{"version": "4", "weight": 50}]}),),
            ("flights",),
            "give version 4 half",
        ),
    ),
)


class Desk:
    """A fleet of flights 3 with 5 % at 4, an application of somebody else, and a journal."""

    def __init__(self, root: Path, fleet: ServeStandIn) -> None:
        self.fleet = fleet
        self.journal = Journal(root, "flights")
        self.client = ServeClient(fleet.address)
        self.planned = self.client.details()
        self.said: list[str] = []
        self.on_line: dict[str, Callable[[], Any]] = {}
        """What happens once a line is said for the first time."""
        self.now_s = 0.0

    def carry_out(self, plan: Plan, timeout_s: float = 30.0) -> str:
        return carry_out(
            self.client,
            plan,
            details=self.planned,
            journal=self.journal,
            why="because",
            say=self._say,
            timeout_s=timeout_s,
            sleep=self._sleep,
            clock=lambda: self.now_s,
        )

    def fail(self, plan: Plan) -> str:
        with pytest.raises(ClusterError) as raised:
            self.carry_out(plan)
        return str(raised.value)

    def entry(self) -> Entry:
        (entry,) = self.journal.read()
        return entry

    def is_as_before(self) -> bool:
        return (
            self.fleet.version("flights") == 3
            and self.fleet.config("flights") == application("flights", 3, traffic=TRAFFIC)
            and self.fleet.config("flights-4") == beside("flights", 4)
            and self.client.state().is_running
        )

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.on_line.pop(line, lambda: None)()

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    fleet = ServeStandIn(
        application("flights", 3, traffic=TRAFFIC),
        beside("flights", 4),
        {"name": "theirs", "route_prefix": "/theirs", "import_path": "m:app"},
    )
    with serving(fleet):
        yield Desk(tmp_path, fleet)


def later(count: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Acts at the `count`-th time that Serve is asked, and only then."""
    asked = [0]

    def on_get() -> None:
        asked[0] += 1
        if asked[0] == count:
            act()

    return on_get


def test_a_promotion(desk):
    assert desk.carry_out(PROMOTE) == ""
    assert desk.fleet.version("flights") == 4
    assert desk.fleet.traffic("flights") is None
    assert desk.fleet.config("flights-4") is None
    # The candidate is there until its successor is ready.
    first, second = desk.fleet.puts
    assert [app["name"] for app in first["applications"]] == ["flights", "flights-4", "theirs"]
    assert [app["name"] for app in second["applications"]] == ["flights", "theirs"]
    assert first["http_options"] == {"host": "127.0.0.1", "port": desk.fleet.port}
    assert desk.said == [
        "start version 4",
        "  flights DEPLOYING",
        "  flights DEPLOYING (model 0/1 ready, 1 of before left)",
        "  flights DEPLOYING (model 1/1 ready, 1 of before left)",
        "  flights RUNNING (model 1/1 ready)",
        "take out flights-4",
    ]
    # Everything, also what every PUT makes DEPLOYING for a moment.
    assert {app["status"] for app in desk.fleet.get()["applications"].values()} == {"RUNNING"}
    entry = desk.entry()
    assert (entry.outcome, entry.reason, entry.why) == ("done", "", "because")
    assert (entry.before["version"], entry.after["version"]) == (3, 4)
    assert entry.cluster == desk.fleet.address
    # What this model was, and nothing of other people's.
    assert [app["name"] for app in entry.config_before] == ["flights", "flights-4"]


def test_traffic(desk):
    desk.carry_out(SPLIT)
    assert desk.fleet.traffic("flights")["candidates"][0]["weight"] == 50
    assert desk.entry().outcome == "done"
    assert desk.client.state().is_running


def test_nothing_to_do_writes_nothing(desk):
    desk.carry_out(Plan("traffic", "flights", {}, {}, ()))
    assert desk.fleet.puts == []
    assert desk.journal.read() == []


def test_a_version_that_does_not_start_is_taken_back(desk):
    desk.fleet.bad_versions["4"] = GOLDEN
    said = desk.fail(PROMOTE)
    assert said == (
        "version 4 did not become ready: application 'flights' is DEPLOY_FAILED: "
        "GoldenMismatch: the golden example was not reproduced\n"
        "Version 3 answers as before; the change was taken back."
    )
    assert desk.is_as_before()
    assert (desk.entry().outcome, desk.entry().reason) == ("failed", said)


def test_a_version_that_takes_too_long_is_taken_back(desk):
    desk.fleet.stuck_versions["4"] = "no node has 8 CPUs"
    said = desk.fail(PROMOTE)
    assert "not ready after 30 s: flights DEPLOYING" in said
    assert "no node has 8 CPUs" in said
    assert "Version 3 answers as before" in said
    assert desk.is_as_before()


def test_old_replicas_that_finish_what_they_took_do_not_undo_a_promotion(desk):
    desk.fleet.draining_versions.add("3")
    desk.carry_out(PROMOTE)
    assert desk.fleet.version("flights") == 4
    assert desk.entry().outcome == "done"
    assert "  the replicas of before still finish what they took" in desk.said


def test_other_applications_may_be_broken(desk):
    desk.fleet.on_get = lambda: desk.fleet.set_status("theirs", "DEPLOY_FAILED")
    desk.carry_out(PROMOTE)
    assert desk.entry().outcome == "done"


def test_a_stable_application_that_was_broken_before_can_be_changed(desk):
    desk.fleet.set_status("flights", "UNHEALTHY")
    desk.planned = desk.client.details()
    desk.carry_out(PROMOTE)
    assert desk.entry().outcome == "done"


def test_a_config_that_changed_in_between_stops_it(desk):
    desk.fleet.replace(application("flights", 2), beside("flights", 4))
    desk.fleet.puts.clear()
    said = desk.fail(PROMOTE)
    assert "flights, theirs changed in between" in said
    assert "run it again" in said
    assert desk.fleet.puts == []
    assert desk.journal.read() == []


def test_somebody_elses_change_on_the_way_is_left_alone(desk):
    desk.fleet.stuck_versions["4"] = ""
    theirs = [application("flights", 7), beside("flights", 4)]
    desk.fleet.on_get = later(4, lambda: desk.fleet.replace(*theirs))
    said = desk.fail(PROMOTE)
    assert "somebody else changed flights in the meantime" in said
    assert "left as it is" in said
    assert desk.fleet.config("flights") == theirs[0]
    assert desk.entry().outcome == "failed"


def test_what_somebody_else_changed_elsewhere_survives_taking_back(desk):
    desk.fleet.stuck_versions["4"] = ""
    # Serve's own answer to a `serve deploy` by somebody who kept our change and added replicas.
    ours = application("flights", 4)
    ours["deployments"][0]["num_replicas"] = 2
    desk.fleet.on_get = later(4, lambda: desk.fleet.replace(ours, beside("flights", 4)))
    desk.fail(PROMOTE)
    config = desk.fleet.config("flights")
    assert config["args"]["version"] == 3
    assert config["deployments"][0]["num_replicas"] == 2
    assert desk.fleet.config("theirs") is None


def test_a_refused_config_changes_nothing(desk):
    desk.fleet.refusal = (400, "1 validation error for ServeDeploySchema")
    said = desk.fail(PROMOTE)
    assert "refused the config: 1 validation error" in said
    assert said.endswith("Nothing was changed.")
    assert desk.is_as_before()
    assert desk.entry().outcome == "failed"


def test_a_user_config_that_the_replicas_refuse_is_taken_back(desk):
    desk.fleet.user_config_error = "traffic.candidates: wrong"
    said = desk.fail(SPLIT)
    assert said.startswith("the traffic of flights was not changed: the replicas of flights refuse")
    assert "traffic.candidates: wrong" in said
    assert desk.is_as_before()


def test_replicas_that_cannot_be_asked_are_only_mentioned(desk, monkeypatch):
    def unreachable(*_: Any) -> str:
        raise ClusterError("GET gave nothing")

    monkeypatch.setattr("rayprism.fleet.change.user_config_error", unreachable)
    desk.carry_out(SPLIT)
    assert desk.entry().outcome == "done"
    assert desk.said[-1].endswith("is not known: GET gave nothing")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_taken_back(desk, number):
    before = signal.getsignal(signal.SIGTERM)
    desk.on_line["  flights DEPLOYING"] = lambda: os.kill(os.getpid(), number)
    said = desk.fail(PROMOTE)
    assert "did not become ready: interrupted" in said
    assert "Version 3 answers as before" in said
    assert desk.is_as_before()
    assert desk.entry().outcome == "failed"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interruption_ends_only_the_waiting(desk):
    def twice() -> None:
        desk.on_line["  flights DEPLOYING (model 1/1 UPDATING)"] = interrupt
        interrupt()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    desk.on_line["  flights DEPLOYING"] = twice
    said = desk.fail(PROMOTE)
    assert "was taken back, but flights is not healthy yet: interrupted" in said
    assert desk.fleet.config("flights") == application("flights", 3, traffic=TRAFFIC)
    assert desk.entry().outcome == "failed"


def test_a_hiccup_of_the_dashboard_is_waited_out(desk, monkeypatch):
    details, asked = desk.client.details, [0]

    def hiccup() -> dict[str, Any]:
        asked[0] += 1
        if asked[0] in (3, 4):
            raise ClusterError("no Serve API at there")
        return {**details(), "controller_info": {}} if asked[0] == 5 else details()

    monkeypatch.setattr(desk.client, "details", hiccup)
    desk.carry_out(PROMOTE)
    assert desk.entry().outcome == "done"
    assert "  waiting on: no Serve API at there" in desk.said
    assert "  waiting on: Serve's controller does not answer" in desk.said


def test_a_dashboard_that_stays_away(desk, monkeypatch):
    details, asked = desk.client.details, [0]

    def gone() -> dict[str, Any]:
        asked[0] += 1
        if asked[0] > 2:
            raise ClusterError("no Serve API at there")
        return details()

    monkeypatch.setattr(desk.client, "details", gone)
    said = desk.fail(PROMOTE)
    assert "not ready after 30 s: no Serve API at there" in said
    assert "could not be taken back: no Serve API at there" in said
    assert desk.entry().outcome == "failed"


def test_a_promotion_stays_when_only_clearing_away_fails(desk, monkeypatch):
    put, count = desk.client.put, [0]

    def second_fails(config: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise ClusterError("Serve refused the config: no")
        put(config)

    monkeypatch.setattr(desk.client, "put", second_fails)
    said = desk.carry_out(PROMOTE)
    assert "the change is in force, but its last step (take out flights-4) failed" in said
    assert desk.fleet.version("flights") == 4
    assert desk.fleet.config("flights-4") is not None
    assert desk.entry().outcome == "done"


def test_a_journal_that_is_full_does_not_undo_a_change(desk, monkeypatch):
    def full(*_: Any) -> None:
        raise ClusterError("the journal cannot be written: No space left on device")

    monkeypatch.setattr(desk.journal, "end", full)
    said = desk.carry_out(PROMOTE)
    assert said.startswith("the change is in force, but the journal cannot be written")
    assert desk.fleet.version("flights") == 4


def test_secrets_do_not_reach_the_journal(desk):
    secret = application("flights", 3, traffic=TRAFFIC)
    secret["runtime_env"] = {"env_vars": {"KEY": "hunter2"}}
    desk.fleet.replace(secret, beside("flights", 4))
    desk.planned = desk.client.details()
    desk.carry_out(PROMOTE)
    assert "hunter2" not in desk.journal.path.read_text()
    assert desk.fleet.config("flights")["runtime_env"] == {"env_vars": {"KEY": "hunter2"}}
