"""The workflows call what exists, and the template for a model's repository does what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from rayprism.cli.main import cli
from rayprism.fleet.check import check_file

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "model-repository"
OURS = ROOT / ".github" / "workflows" / "ci.yml"
THEIRS = TEMPLATE / ".github" / "workflows" / "model.yml"


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def scripts(path: Path) -> str:
    return "\n".join(step["run"] for step in steps(path) if "run" in step).replace("\\\n", " ")


@pytest.mark.parametrize("path", [OURS, THEIRS], ids=["ours", "theirs"])
def test_actions_are_pinned_and_permissions_least(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120


def test_ours_runs_what_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\S+)$", scripts(OURS), re.M)
    assert {"check", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_ours_builds_the_images():
    job = load(OURS)["jobs"]["image"]
    [build] = [step for step in job["steps"] if "build-push" in step.get("uses", "")]
    path = ROOT / build["with"]["file"]
    if not path.exists():
        pytest.skip(f"there is no {path.name}")
    stages = re.findall(r"^FROM .* AS (\S+)$", path.read_text(encoding="utf-8"), re.M)
    assert {image["flavor"] for image in job["strategy"]["matrix"]["include"]} <= set(stages)


def test_theirs_uses_commands_and_options_that_exist():
    text = scripts(THEIRS)
    found = re.findall(r"rayprism ((?:models )?[a-z]+)\b([^|;\n]*)", text)
    assert {name for name, _ in found} == {
        *("models push", "models verify", "models show"),
        *("check", "traffic", "promote", "rollback", "wait"),
    }
    shared = re.search(r"said=\((.*)\)", text)
    assert shared
    for name, rest in found:
        command: Any = cli
        for part in name.split():
            assert isinstance(command, click.Group)
            command = command.commands[part]
        allowed = {option for parameter in command.params for option in parameter.opts}
        if "said[@]" in rest:
            rest += shared[1]
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= allowed, name


def test_their_serve_file_is_right():
    report = check_file(TEMPLATE / "serve.yaml")
    assert report.faults == ()
    model = load(THEIRS)["env"]["MODEL"]
    assert model in {application.model for application in report.applications}


@pytest.mark.e2e
def test_the_template_from_training_to_judgement(tmp_path):
    """What its README says, which is what the workflow does, with two versions."""
    shutil.copytree(TEMPLATE, tmp_path, dirs_exist_ok=True)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"## Here, without a cluster\n\n```sh\n(.*?)```", readme, re.S)
    commands = block.replace("\\\n", " ").replace("/path/to/rayprism", str(ROOT)).splitlines()
    install, train, push, verify, check, evaluate = commands
    assert install == "pip install -r requirements.txt"

    run(train, tmp_path)
    assert "tumours version 1 is in" in run(push, tmp_path)
    run(f"{train} --strength 0.01", tmp_path)
    run(push, tmp_path)
    run(verify, tmp_path)
    run(check, tmp_path)
    report = run(f'{evaluate} --set "versions=[1,2]"', tmp_path)
    assert "report.html" in report
    judged = json.loads((tmp_path / "build" / "evaluation" / "report.json").read_text())
    assert judged["model"] == load(THEIRS)["env"]["MODEL"]


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = re.sub(r"^rayprism ", f"{sys.executable} -m rayprism.cli.main ", command)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "PWD": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
