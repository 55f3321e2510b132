"""`python -m bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.run import Job
from bench.scenario import UrlServer, load_scenario
from tests.bench.made_results import made_results

SCENARIOS = Path(command.__file__).parent / "scenarios"
OVERHEAD = str(SCENARIOS / "overhead.yaml")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would be run."""
    found: list[Job] = []

    def run_scenario(job: Job) -> int:
        found.append(job)
        return 0

    monkeypatch.setattr("bench.run.run_scenario", run_scenario)
    return found


def test_a_whole_run_goes_to_the_results(jobs: list[Job]) -> None:
    assert command.main(["run", OVERHEAD]) == 0
    (job,) = jobs
    assert job.output.parts[-3:] == ("bench", "results", "overhead.json")
    assert job.trial_output.parts[-2:] == (".bench", "overhead.json")
    assert job.command == f"python -m bench run {OVERHEAD}"
    assert not job.quick


def test_the_name_of_a_scenario_will_do(jobs: list[Job]) -> None:
    command.main(["run", "overhead"])
    assert jobs[0].scenario.name == "overhead"


@pytest.mark.parametrize(
    "options",
    [
        ["--quick"],
        ["--rounds", "1"],
        ["--seed", "9"],
        ["--only-servers", "rayprism,bare"],
        ["--only-loads", "c16"],
        ["--url", "http://127.0.0.1:8000"],
    ],
)
def test_all_other_runs_go_to_where_no_table_is_made_from(
    jobs: list[Job], options: list[str]
) -> None:
    command.main(["run", OVERHEAD, *options])
    assert jobs[0].output.parts[-2:] == (".bench", "overhead.json")
    assert jobs[0].command.endswith(" ".join(options)), "the command that does it again"


def test_options_change_the_scenario(jobs: list[Job], tmp_path: Path) -> None:
    output = tmp_path / "mine.json"
    options = ["--rounds", "7", "--seed", "3", "--only-loads", "c1,c16", "--output", str(output)]
    command.main(["run", OVERHEAD, *options, "--only-servers", "rayprism, bare"])
    (job,) = jobs
    assert (job.scenario.rounds, job.scenario.seed) == (7, 3)
    assert list(job.scenario.loads) == ["c1", "c16"]
    assert list(job.scenario.servers) == ["rayprism", "bare"]
    assert job.output == output


def test_quick_is_said_in_the_results(jobs: list[Job]) -> None:
    command.main(["run", OVERHEAD, "--quick"])
    assert jobs[0].quick
    assert jobs[0].scenario.rounds == 2


def test_a_url_takes_the_place_of_all_servers(jobs: list[Job]) -> None:
    at = ["--url", "http://127.0.0.1:8000", "--grpc-url", "127.0.0.1:9000", "--model", "mine"]
    command.main(["run", OVERHEAD, *at])
    (server,) = jobs[0].scenario.servers.values()
    assert isinstance(server, UrlServer)
    assert (server.url, server.grpc_url, server.model) == (
        "http://127.0.0.1:8000",
        "127.0.0.1:9000",
        "mine",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "none.yaml"], "none.yaml"),
        (["run", OVERHEAD, "--only-servers", "mine"], "no server 'mine'"),
        (["run", OVERHEAD, "--only-loads", "mine"], "no load 'mine'"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    jobs: list[Job], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not jobs


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["run", OVERHEAD, "--rounds", "0"],
        ["run", OVERHEAD, "--rounds", "many"],
        ["run", OVERHEAD, "--only-loads", ","],
        ["run", OVERHEAD, "--grpc-url", "h:1"],
        ["run", OVERHEAD, "--model", "mine"],
    ],
)
def test_wrong_usage_ends_with_2(
    jobs: list[Job], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m bench" in capsys.readouterr().err


def test_list_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    said = capsys.readouterr().out
    for path in SCENARIOS.glob("*.yaml"):
        assert f"{path.stem} " in said
    overhead = load_scenario(SCENARIOS / "overhead.yaml")
    assert f"loads: c1, c16, c64; {overhead.rounds} rounds, 4 bounds" in said


def test_peers_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["peers"]) == 0
    said = capsys.readouterr().out
    for name in ("bare", "mosec", "litserve", "bentoml", "mlserver"):
        assert any(line.startswith(f"{name} ") for line in said.splitlines())


def test_compare_is_handed_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("bench.compare.main", lambda arguments: seen.append(arguments) or 1)
    assert command.main(["compare", "a.json", "b.json", "--bound", "rate>=0.9"]) == 1
    assert seen == [["a.json", "b.json", "--bound", "rate>=0.9"]]


def test_page_writes_page_and_tables_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made.json"
    path.write_text(
        json.dumps(
            made_results(
                {"c1": {"loop": "closed", "connections": 1}}, ["rayprism"], rounds=1, seconds=1.0
            )
        )
    )
    assert command.main(["page", str(path)]) == 0
    assert "<html" in path.with_suffix(".html").read_text()
    assert "requests/s" in path.with_suffix(".md").read_text()


def test_page_of_what_is_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.json"
    path.write_text("[")
    assert command.main(["page", str(path)]) == 2
    assert "made.json" in capsys.readouterr().err
