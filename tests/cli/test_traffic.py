"""`rayprism traffic`, `promote`, `rollback` and `history`, against a stand-in for Serve."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from rayprism.cli.main import cli
from rayprism.fleet.journal import Journal
from tests.support.models import mlp_example, save_mlp
from tests.support.serve_stand_in import ServeStandIn, application, beside, serving

RAYPRISM = str(Path(sys.executable).parent / "rayprism")
FILE = """\
# Who answers what.
applications:
  - name: flights
    route_prefix: /v2/models/flights
    import_path: rayprism.serving.app:build
    args: {model: flights, version: 1}
    deployments:
      - name: model
        num_replicas: 1
        user_config:
          max_queue_rows: 2048  # rows
  - name: flights-2
    route_prefix: /v2/models/flights/versions/2
    import_path: rayprism.serving.app:build
    args: {model: flights, version: 2}
    deployments:
      - name: model
        num_replicas: 1
        user_config: {max_queue_rows: 2048}
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flights` 1 to 3."""
    folder = tmp_path_factory.mktemp("pushed")
    (folder / "rows.json").write_text(json.dumps(mlp_example()))
    model = save_mlp(folder / "model.onnx")
    for _ in range(3):
        options = ["--example", str(folder / "rows.json"), "--repository", str(folder / "models")]
        done = CliRunner().invoke(cli, ["models", "push", "flights", str(model), *options])
        assert done.exit_code == 0, done.stderr
    return folder / "models"


class Desk:
    """A repository, a fleet of flights 1 with 2 beside it, and the commands."""

    def __init__(self, repository: Path, fleet: ServeStandIn) -> None:
        self.repository = repository
        self.fleet = fleet
        self.journal = Journal(repository, "flights")
        self.file = repository.parent / "serve.yaml"
        self.file.write_text(FILE)

    def options(self, *options: str) -> list[str]:
        return ["--address", self.fleet.address, "--repository", str(self.repository), *options]

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, *self.options()])

    def done(self, *arguments: str) -> Result:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    def fail(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 1, result.stdout
        assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
        return result.stderr


@pytest.fixture
def desk(tmp_path: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr("rayprism.fleet.change._POLL_S", 0.001)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYPRISM_REPOSITORY", raising=False)
    shutil.copytree(pushed, tmp_path / "models")
    with serving(ServeStandIn(application("flights", 1), beside("flights", 2))) as fleet:
        yield Desk(tmp_path / "models", fleet)


def rows(result: Result) -> list[list[str]]:
    """The table of what is in force."""
    lines = result.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["ROLE"])
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :]]


def test_a_model_alone_shows_what_is_in_force(desk):
    desk.fleet.replace(
        application(
            "flights",
            1,
            traffic={
                "candidates": [{"version": "2", "weight": 33.33}],
                "shadow": [{"version": "3", "sample": 10}],
                "sticky": {"header": "x-user-id"},
            },
        ),
        beside("flights", 2),
        beside("flights", 9),
    )
    desk.fleet.settle()
    result = CliRunner().invoke(cli, ["traffic", "flights", "--address", desk.fleet.address])
    assert result.exit_code == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[2:]] == [
        ["stable", "1", "flights", "RUNNING", "66.67", "%", "-"],
        ["candidate", "2", "flights-2", "RUNNING", "33.33", "%", "-"],
        ["shadow", "3", "-", "not", "deployed", "-", "10", "%"],
        ["beside", "9", "flights-9", "RUNNING", "-", "-"],
        ["requests", "with", "the", "same", "x-user-id", "stay", "at", "one", "version"],
    ]
    shown = json.loads(desk.done("traffic", "flights", "--json").stdout)
    assert shown["versions"][1] == {
        "role": "candidate",
        "version": 2,
        "application": "flights-2",
        "route": "/v2/models/flights/versions/2",
        "status": "RUNNING",
        "weight": 33.33,
        "shadow": None,
    }
    assert shown["sticky"] == "x-user-id"
    assert not (desk.repository / ".fleet.lock").exists()


def test_what_the_replicas_refuse_is_told(desk):
    desk.fleet.user_config_error = "max_queue_rows: got 0"
    assert "keep the one before: max_queue_rows: got 0" in desk.done("traffic", "flights").stderr


def test_a_canary_and_its_end(desk):
    result = desk.done("traffic", "flights", "2=5", "--sticky", "x-user-id", "--why", "try it")
    assert "+        header: x-user-id\n" in result.stdout
    assert [row[:2] + row[4:] for row in rows(result)[:2]] == [
        ["stable", "1", "95 %", "-"],
        ["candidate", "2", "5 %", "-"],
    ]
    assert "  flights RUNNING (model 1/1)" in result.stderr
    assert desk.fleet.traffic("flights") == {
        "candidates": [{"version": "2", "weight": 5}],
        "sticky": {"header": "x-user-id"},
    }
    # Everything at once: takes the requests back, and the version stays.
    desk.done("rollback", "flights")
    assert desk.fleet.traffic("flights")["candidates"] == [{"version": "2", "weight": 0}]
    assert desk.fleet.version("flights") == 1
    desk.done("traffic", "flights", "--clear")
    assert not desk.fleet.traffic("flights")
    assert [entry.action for entry in desk.journal.read()] == ["traffic", "rollback", "traffic"]


def test_what_is_so_already_changes_nothing(desk):
    desk.done("traffic", "flights", "2=5")
    puts = len(desk.fleet.puts)
    assert "so already" in desk.done("traffic", "flights", "2=5").stdout
    assert len(desk.fleet.puts) == puts
    assert len(desk.journal.read()) == 1


def test_promotions_and_rollbacks_and_their_history(desk):
    result = desk.done("promote", "flights", "2", "--why", "better")
    assert rows(result) == [["stable", "2", "flights", "RUNNING", "100 %", "-"]]
    assert desk.fleet.version("flights") == 2
    assert desk.fleet.config("flights-2") is None
    desk.done("promote", "flights", "3", "--without-candidate")
    desk.done("rollback", "flights", "--why", "worse")
    assert desk.fleet.version("flights") == 2
    # Further back, and not forth again.
    desk.done("rollback", "flights")
    assert desk.fleet.version("flights") == 1
    assert "--to VERSION" in desk.fail("rollback", "flights")
    desk.done("rollback", "flights", "--to", "3")
    assert desk.fleet.version("flights") == 3

    lines = desk.done("history", "flights", "--limit", "4").stdout.splitlines()
    assert lines[0].split() == ["WHEN", "WHO", "WHAT", "FROM", "TO", "OUTCOME", "WHY"]
    assert [line.split()[3:7] for line in lines[1:]] == [
        ["rollback", "1", "3", "done"],
        ["rollback", "2", "1", "done"],
        ["rollback", "3", "2", "done"],
        ["promote", "2", "3", "done"],
    ]
    assert lines[3].endswith("worse")
    entries = json.loads(desk.done("history", "flights", "--json").stdout)
    assert entries[-1]["why"] == "better"
    assert (entries[-1]["from"]["version"], entries[-1]["to"]["version"]) == (1, 2)


def test_a_promotion_on_another_cluster_is_not_gone_back_to(desk):
    begun = desk.journal.begin(
        "promote",
        who="ana@desk",
        before={"version": 3, "traffic": None},
        after={"version": 1, "traffic": None},
        why="",
        cluster="http://another:8265",
        config_before=[],
    )
    desk.journal.end(begun, "done")
    assert "--to VERSION" in desk.fail("rollback", "flights")
    assert "promote" in desk.done("history", "flights").stdout


def test_a_promotion_that_fails_is_told_and_taken_back(desk):
    desk.fleet.bad_versions["2"] = "the golden example was not reproduced"
    said = desk.fail("promote", "flights", "2", "--file", str(desk.file))
    assert "error: version 2 did not become ready: " in said
    assert "the golden example was not reproduced" in said
    assert "Version 1 answers as before; the change was taken back." in said
    assert desk.fleet.version("flights") == 1
    assert desk.file.read_text() == FILE
    table = desk.done("history", "flights").stdout
    assert "failed" in table
    assert "golden example" in table
    assert "answers as before" not in table


def test_a_dry_run_changes_nothing(desk):
    result = desk.done("promote", "flights", "2", "--dry-run", "--file", str(desk.file))
    assert "-  version: 1" in result.stdout
    assert "args: {model: flights, version: 2}" in result.stdout
    assert desk.fleet.puts == []
    assert desk.file.read_text() == FILE
    assert desk.journal.read() == []
    shown = json.loads(desk.done("traffic", "flights", "2=5", "--dry-run", "--json").stdout)
    assert (shown["changed"], shown["dry_run"]) == (False, True)
    assert shown["to"]["traffic"]["candidates"] == [{"version": "2", "weight": 5}]
    assert shown["fleet"]["versions"][0]["weight"] == 100
    assert desk.fleet.puts == []


def test_the_file_follows(desk):
    result = desk.done("traffic", "flights", "2=5", "--file", str(desk.file))
    assert "wrote serve.yaml" in result.stderr
    assert "warning" not in result.stderr
    text = desk.file.read_text()
    assert text.startswith("# Who answers what.\n")
    assert "max_queue_rows: 2048  # rows\n" in text
    assert yaml.safe_load(text)["applications"] == list(desk.fleet.puts[-1]["applications"])


def test_a_file_that_differs_already_is_warned_of(desk):
    desk.file.write_text(FILE.replace("max_queue_rows: 2048  # rows", "max_queue_rows: 7"))
    result = desk.done("traffic", "flights", "2=5", "--file", str(desk.file))
    assert "warning: serve.yaml differs from what runs already" in result.stderr
    assert "max_queue_rows: 7" in desk.file.read_text()
    assert desk.fleet.config("flights")["deployments"][0]["user_config"]["max_queue_rows"] == 2048


def test_a_file_without_the_application_stops_everything(desk):
    desk.file.write_text(FILE.replace("name: flights\n", "name: other\n"))
    assert "flights" in desk.fail("traffic", "flights", "2=5", "--file", str(desk.file))
    assert desk.fleet.puts == []
    assert desk.journal.read() == []


def test_a_file_that_cannot_be_written_in_the_end(desk, monkeypatch):
    desk.fleet.on_get = lambda: desk.file.write_text("[") if desk.fleet.puts else None
    said = desk.fail("traffic", "flights", "2=5", "--file", str(desk.file))
    assert "the change is in force, but it is not in serve.yaml: " in said
    assert desk.fleet.traffic("flights") is not None
    assert desk.journal.read()[0].outcome == "done"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["traffic", "flights", "4"], "VERSION=PERCENT"),
        (["traffic", "flights", "4=x"], "VERSION=PERCENT"),
        (["traffic", "flights", "4=nan"], "VERSION=PERCENT"),
        (["traffic", "flights", "0=5"], "VERSION=PERCENT"),
        (["traffic", "flights", "4=-5"], "VERSION=PERCENT"),
        (["traffic", "flights", "4=5", "4=6"], "given twice"),
        (["traffic", "flights", "--shadow", "5"], "VERSION=PERCENT"),
        (["traffic", "flights", "--clear", "4=5"], "give it alone"),
        (["traffic", "flights", "--sticky", "a", "--no-sticky"], "not both"),
        (["promote", "flights"], "VERSION"),
        (["promote", "flights", "0"], "range"),
        (["rollback", "flights", "--to", "x"], "integer"),
        (["history", "flights", "--limit", "0"], "range"),
    ],
)
def test_wrong_usage(desk, arguments, word):
    result = desk.run(*arguments)
    assert result.exit_code == 2
    assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["traffic", "fligths"], "Did you mean 'flights'?"),
        (["traffic", "flights", "2=101"], "100"),
        (["traffic", "flights", "3=5"], "not deployed"),
        (["promote", "flights", "3"], "--without-candidate"),
        (["promote", "flights", "1"], "already"),
        (["promote", "flights", "8", "--without-candidate"], "8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(desk, arguments, word):
    assert word in desk.fail(*arguments)
    assert desk.fleet.puts == []
    assert desk.journal.read() == []


def test_where_the_repository_is(desk, tmp_path):
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--address", desk.fleet.address])

    unknown = run("traffic", "flights", "2=5")
    assert unknown.exit_code == 1
    assert "Give it with --repository, or set RAYPRISM_REPOSITORY" in unknown.stderr
    known = str(desk.repository)
    desk.fleet.replace(
        application("flights", 1, repository=known), beside("flights", 2, repository=known)
    )
    desk.fleet.settle()
    assert run("traffic", "flights", "2=5").exit_code == 0
    assert len(desk.journal.read()) == 1
    assert "done" in run("history", "flights").stdout
    desk.fleet.replace(application("flights", 1, repository=str(tmp_path / "away")))
    away = run("history", "flights")
    assert away.exit_code == 1
    assert "is not on this machine" in away.stderr
    assert "With --repository DIR, no cluster is asked" in away.stderr


def test_history_needs_no_cluster(tmp_path):
    options = ["--repository", str(tmp_path), "--address", "http://127.0.0.1:9"]
    result = CliRunner().invoke(cli, ["history", "flights", *options])
    assert result.exit_code == 0
    assert "no changes of flights" in result.stdout


@pytest.mark.e2e
def test_two_commands_at_once(desk):
    """The first one, in a process of its own, waits for a version that is never scheduled."""
    desk.fleet.stuck_versions["2"] = "no node has 8 CPUs"
    was_put = threading.Event()
    desk.fleet.on_get = lambda: was_put.set() if desk.fleet.puts else None
    command = [RAYPRISM, "promote", "flights", "2", *desk.options()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        assert was_put.wait(60)
        said = desk.fail("traffic", "flights", "2=50")
        assert "(promote flights 2, since 20" in said
        assert f"pid {first.pid}" in said
        assert len(desk.fleet.puts) == 1
        # As a CI job that is cancelled.
        first.terminate()
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "Version 1 answers as before; the change was taken back." in stderr
    assert desk.fleet.config("flights")["args"]["version"] == 1
    desk.done("traffic", "flights", "2=50")
    assert [entry.outcome for entry in desk.journal.read()] == ["failed", "done"]
