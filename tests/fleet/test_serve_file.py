"""A Serve file takes a change as if an operator had typed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.errors import ConfigInvalid
from rayprism.fleet.edits import ABSENT, Edit, apply_edits
from rayprism.fleet.serve_file import ServeFile

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))
TRAFFIC = ("deployments", "model", "user_config", "traffic")
VERSION = ("args", "version")
SPLIT = {
    "candidates": [{"version": "4", "weight": 5}],
    "sticky": {"header": "x-user-id"},
    "shadow": [{"version": "5", "sample": 10}],
}
QUICKSTART = next(path for path in CONFIGS if path.stem == "quickstart")


@pytest.fixture
def file(tmp_path: Path) -> ServeFile:
    return load(tmp_path, QUICKSTART.read_text())


def load(folder: Path, text: str) -> ServeFile:
    path = folder / "serve.yaml"
    path.write_bytes(text.encode())
    return ServeFile.load(path)


def lines(file: ServeFile) -> list[str]:
    """Those that change, without the file's name."""
    found = file.difference().splitlines()[2:]
    return [line for line in found if line[:1] in "+-"]


def without_traffic(path: Path) -> tuple[str, Any]:
    """Name and version of the first application that shares its requests with none."""
    for app in yaml.safe_load(path.read_text())["applications"]:
        if "args" in app and "traffic" not in app["deployments"][0]["user_config"]:
            return app["name"], app["args"]["version"]
    raise AssertionError(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_the_lines_that_are_meant_change(path, tmp_path):
    text = path.read_text()
    file = load(tmp_path, text)
    name, version = without_traffic(path)
    edits = [Edit(name, VERSION, "77"), Edit(name, TRAFFIC, SPLIT)]
    file.apply(edits)
    found = lines(file)
    assert found[:2] == [f"-      version: {version}", "+      version: 77"]
    assert [line.strip("+ ") for line in found[2:]] == [
        "traffic:",
        "candidates:",
        '- {version: "4", weight: 5}',
        "sticky: {header: x-user-id}",
        "shadow:",
        '- {version: "5", sample: 10}',
    ]
    file.save()
    expected = yaml.safe_load(text)
    apply_edits(expected, edits)
    assert yaml.safe_load(file.path.read_text()) == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_traffic_that_came_and_went_leaves_no_trace(path, tmp_path):
    file = load(tmp_path, path.read_text())
    name, version = without_traffic(path)
    file.apply([Edit(name, TRAFFIC, SPLIT), Edit(name, VERSION, "9")])
    file.apply([Edit(name, TRAFFIC, {"candidates": []})])
    file.apply([Edit(name, TRAFFIC, ABSENT), Edit(name, VERSION, str(version))])
    assert file.difference() == ""


def test_weights_change_in_their_line(tmp_path):
    written = (
        "applications:\n"
        "- name: flights\n"
        "  deployments:\n"
        "  - name: model\n"
        "    user_config:\n"
        "      traffic:\n"
        "        # On trial since Monday.\n"
        "        candidates:\n"
        "        - version: 4   # the new trees\n"
        "          weight: 5    # per cent\n"
        "        - {version: '5', weight: 1}   # the net\n"
        "        sticky: {header: x-user-id}\n"
    )
    file = load(tmp_path, written)
    candidates = [{"version": "4", "weight": 25}, {"version": "5", "weight": 0.5}]
    sticky = {"header": "x-user-id"}
    file.apply([Edit("flights", TRAFFIC, {"candidates": candidates, "sticky": sticky})])
    assert lines(file) == [
        "-          weight: 5    # per cent",
        "-        - {version: '5', weight: 1}   # the net",
        "+          weight: 25    # per cent",
        "+        - {version: '5', weight: 0.5}   # the net",
    ]
    file.apply([Edit("flights", TRAFFIC, {"candidates": candidates[1:], "sticky": sticky})])
    assert "On trial since Monday" in file._text
    assert "the new trees" not in file._text


def test_an_application_goes_with_its_heading(file):
    file.apply([Edit("flights-1", (), ABSENT)])
    found = lines(file)
    assert (
        found[1]
        == "-  # Version 1 beside it, at an address of its own: to compare, or to go back to."
    )
    assert all(line.startswith("-") for line in found)
    assert file.applications == ["rayprism", "flights"]


def test_what_is_there_already_is_no_change(file):
    file.apply([Edit("flights", VERSION, "2"), Edit("gone", (), ABSENT)])
    assert file.difference() == ""


def test_an_application_that_is_not_in_the_file(file):
    with pytest.raises(ConfigInvalid, match=r"serve.yaml[\s\S]*no application 'flights-9'"):
        file.apply([Edit("flights", VERSION, "9"), Edit("flights-9", VERSION, "9")])
    assert file.difference() == ""


def test_a_change_behind_an_alias_is_left_to_people(tmp_path):
    file = load(
        tmp_path,
        "applications:\n"
        "  - name: a\n"
        "    deployments: &d\n"
        "      - name: model\n"
        "        user_config: {max_queue_rows: 8}\n"
        "  - name: b\n"
        "    deployments: *d\n",
    )
    for name in ("a", "b"):
        with pytest.raises(ConfigInvalid, match=r"alias[\s\S]*by hand"):
            file.apply([Edit(name, TRAFFIC, SPLIT)])
    assert file.difference() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("applications: 3\n", "applications: missing"),
        ("- 1\n", "applications: missing"),
        ("applications: []\napplications: []\n", "given twice"),
    ],
)
def test_a_file_that_is_none_of_serves(text, message, tmp_path):
    with pytest.raises(ConfigInvalid, match=message):
        load(tmp_path, text)


def config(**changes: Any) -> dict[str, Any]:
    flights = {
        "name": "flights",
        "route_prefix": "/v2/models/flights",
        "import_path": "rayprism.serving.app:build",
        "args": {"version": "2", "model": "flights"},
        "deployments": [
            {
                "name": "model",
                "user_config": {"default_timeout_s": 10, "max_queue_rows": 2048},
                "num_replicas": 1,
                "ray_actor_options": {"num_cpus": 0.5},
            }
        ],
    }
    return {"applications": [{**flights, **changes}, {"name": "other"}]}


def test_a_file_that_says_what_runs(file):
    assert file.differences_from(config(), ["flights"]) == ""
    assert file.differences_from(config(), []) == ""


def test_a_file_that_says_something_else(file):
    shown = file.differences_from(config(args={"model": "flights", "version": 1}), ["flights"])
    assert "--- flights as it runs\n+++ flights in serve.yaml\n" in shown
    assert "-  version: '1'\n+  version: '2'\n" in shown
    assert "other" not in shown


def test_a_file_without_the_application(file):
    shown = file.differences_from(config(), ["other"])
    assert shown.startswith("--- other as it runs")
    assert "-name: other" in shown


def test_saving_keeps_mode_and_link_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    load(folder, QUICKSTART.read_text()).path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(folder / "serve.yaml")
    file = ServeFile.load(link)
    file.apply([Edit("flights", VERSION, "3")])
    file.save()
    assert link.is_symlink()
    assert (folder / "serve.yaml").stat().st_mode & 0o777 == 0o640
    assert ServeFile.load(link).difference() == ""
    assert "version: 3" in link.read_text()
    assert list(folder.iterdir()) == [folder / "serve.yaml"]
    assert file.difference() == ""
    file.save()


def test_bytes_that_nobody_meant_to_change_stay(tmp_path):
    text = "\ufeff" + QUICKSTART.read_text().replace("\n", "\r\n").rstrip()
    file = load(tmp_path, text)
    file.apply([Edit("flights", VERSION, "3")])
    file.save()
    assert file.path.read_bytes() == text.replace("version: 2", "version: 3").encode()


def test_a_file_that_somebody_else_changed_is_not_overwritten(file):
    file.apply([Edit("flights", VERSION, "3")])
    file.path.write_text("# mine now\n")
    with pytest.raises(ConfigInvalid, match="changed by somebody else meanwhile"):
        file.save()
    assert file.path.read_text() == "# mine now\n"
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_file_that_is_gone(file):
    file.apply([Edit("flights", VERSION, "3")])
    file.path.unlink()
    with pytest.raises(ConfigInvalid, match="cannot be written: No such file"):
        file.save()
