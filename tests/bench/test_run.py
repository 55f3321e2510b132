"""What a whole run writes, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.processes import end_marked
from bench.run import MET, MISSED, NOT_RUN, STOPPED, Job, Renderers, run_scenario
from bench.scenario import Scenario
from bench.servers import Unavailable
from tests.bench.fake_servers import World

RENDERERS = Renderers(
    page=lambda results: f"page of {len(results['samples'])} samples",
    tables=lambda results: f"tables of {len(results['samples'])} samples",
)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Looking for marked processes reads all of the machine's."""
    ended: list[str] = []
    monkeypatch.setattr("bench.run.end_marked", ended.append)
    return ended


def job(folder: Path, **bound: Any) -> Job:
    scenario = Scenario.model_validate(
        {
            "title": "t",
            "name": "n",
            "servers": {
                "ours": {"kind": "rayprism", "model": "tiny"},
                "peer": {"kind": "peer", "model": "tiny", "peer": "mosec"},
            },
            "loads": {"l": {"loop": "closed", "seconds": 0.01}},
            "rounds": 2,
            "bounds": [
                {"title": "b", "load": "l", "server": "ours", "against": "peer", **bound},
            ],
        }
    )
    return Job(
        scenario=scenario,
        output=folder / "results" / "n.json",
        trial_output=folder / ".bench" / "n.json",
        command="python -m bench run n.yaml",
    )


def run(job_: Job, world: World) -> int:
    return run_scenario(job_, world.tools, RENDERERS)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_that_meets_its_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_ = job(tmp_path, at_least=2)
    assert run(job_, World(best={"ours": 200, "peer": 100})) == MET
    results = read(job_.output)
    assert results["command"] == "python -m bench run n.yaml"
    assert results["quick"] is False
    assert results["scenario"]["name"] == "n"
    assert set(results["servers"]) == {"ours", "peer"}
    assert len(results["samples"]) == 4
    assert results["unavailable"] == {}
    (bound,) = results["bounds"]
    assert bound["value"] == 2
    assert {"date", "commit", "machine", "versions"} <= set(results)
    assert Scenario.model_validate(results["scenario"]) == job_.scenario
    assert job_.output.with_suffix(".html").read_text() == "page of 4 samples"
    assert job_.output.with_suffix(".md").read_text() == "tables of 4 samples"
    assert "tables of 4 samples" in capsys.readouterr().out
    assert not job_.trial_output.exists(), "what was kept after each round is of no more use"


def test_a_run_that_misses_a_bound(tmp_path: Path) -> None:
    job_ = job(tmp_path, at_least=3)
    assert run(job_, World(best={"ours": 200, "peer": 100})) == MISSED
    assert not read(job_.output)["bounds"][0]["met"]


def test_a_bound_against_a_peer_that_is_not_there_is_missed(tmp_path: Path) -> None:
    job_ = job(tmp_path, at_least=0)
    assert run(job_, World(failing={"start peer": Unavailable("pip said no")})) == MISSED
    results = read(job_.output)
    assert results["unavailable"] == {"peer": "at its start: pip said no"}
    assert results["bounds"][0]["why"] == "not judged: no sample of peer under l"


def test_a_run_that_fails_keeps_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(World):
        def _measure(self, *args: Any, **more: Any) -> dict[str, Any]:
            if len(self.plans) == 3:
                raise OSError("no more memory")
            return super()._measure(*args, **more)

    job_ = job(tmp_path, at_least=1)
    # The second round begins with the peer, and ends with ours.
    assert run(job_, Failing()) == NOT_RUN
    assert not job_.output.exists(), "nothing half goes there"
    assert len(read(job_.trial_output)["samples"]) == 3
    assert job_.trial_output.with_suffix(".html").exists()
    said = capsys.readouterr().err
    assert "ours, in round 2/2, l, ours: no more memory" in said
    assert str(job_.trial_output) in said


def test_a_run_that_fails_at_once_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_ = job(tmp_path, at_least=1)
    assert run(job_, World(failing={"start ours": Unavailable("no ray")})) == NOT_RUN
    assert not job_.trial_output.exists()
    assert "nothing was measured" in capsys.readouterr().err


def test_ctrl_c_keeps_what_there_is_and_ends_the_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_processes: list[str]
) -> None:
    class Stopped(World):
        def _measure(self, *args: Any, **more: Any) -> dict[str, Any]:
            if len(self.plans) == 3:
                raise KeyboardInterrupt
            return super()._measure(*args, **more)

    job_, world = job(tmp_path, at_least=1), Stopped()
    assert run(job_, world) == STOPPED
    assert len(read(job_.trial_output)["samples"]) == 3
    assert not job_.output.exists()
    assert {"stop ours", "stop peer"} <= set(world.done)
    assert len(no_processes) == 1, "nothing with the run's marker is left"
    assert "stopped" in capsys.readouterr().err


def test_everything_is_saved_after_each_round(tmp_path: Path) -> None:
    job_ = job(tmp_path, at_least=1)
    kept: list[int] = []

    class Watching(World):
        def _measure(self, *args: Any, **more: Any) -> dict[str, Any]:
            kept.append(len(read(job_.trial_output)["samples"]) if self.saved else 0)
            return super()._measure(*args, **more)

        @property
        def saved(self) -> bool:
            return job_.trial_output.exists()

    run(job_, Watching())
    assert kept == [0, 0, 2, 2]


def test_servers_end_when_the_run_has_an_error_that_nobody_thought_of(tmp_path: Path) -> None:
    world = World(failing={"drive ours": ZeroDivisionError("our own fault")})
    with pytest.raises(ZeroDivisionError):
        run(job(tmp_path, at_least=1), world)
    assert "stop ours" in world.done


def test_processes_are_ended_by_the_marker_of_the_run(
    tmp_path: Path, no_processes: list[str]
) -> None:
    run(job(tmp_path, at_least=1), World())
    (marker,) = no_processes
    assert marker
    assert end_marked.__name__ == "end_marked"
