"""`rayprism dashboards`, against a stand-in for Grafana."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayprism.cli.main import cli
from tests.support.grafana import ADMIN, EDITOR, VIEWER, GrafanaStandIn, serving

RAYPRISM = str(Path(sys.executable).parent / "rayprism")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("GRAFANA_TOKEN", raising=False)
    monkeypatch.delenv("GRAFANA_URL", raising=False)


@pytest.fixture
def grafana() -> Iterator[GrafanaStandIn]:
    with serving(GrafanaStandIn()) as stand_in:
        stand_in.add_datasource("Prometheus", "prom")
        yield stand_in


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "dashboards"
    folder.mkdir()
    for name in ("fleet", "model"):
        write_file(folder, name, "Requests")
    return folder


def write_file(folder: Path, name: str, *titles: str) -> None:
    panels = [{"type": "stat", "title": title} for title in titles]
    model = {"uid": f"rayprism-{name}", "title": name.title(), "tags": ["rayprism"]}
    (folder / f"{name}.json").write_text(json.dumps({**model, "panels": panels}))


def run(*arguments: str, token: str | None = EDITOR, stdin: str | None = None) -> Result:
    environment = {} if token is None else {"GRAFANA_TOKEN": token}
    result = CliRunner().invoke(cli, ["dashboards", *arguments], input=stdin, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for secret in (VIEWER, EDITOR, ADMIN):
        assert secret not in result.output
    return result


def push(grafana: GrafanaStandIn, files: Path, *options: str, **how: str | None) -> Result:
    return run("push", "--url", grafana.url, "--from", str(files), *options, **how)


def test_push(grafana, files):
    result = push(grafana, files)
    assert result.exit_code == 0
    assert result.stderr == f"Grafana 11.6.0 at {grafana.url}, organization Main Org.\n"
    assert result.stdout.splitlines() == [
        "datasource  Prometheus  unchanged",
        "folder      rayprism    created",
        "dashboard   Fleet       created",
        "dashboard   Model       created",
    ]
    assert grafana.history["rayprism-fleet"][0].startswith(
        f"rayprism {metadata.version('rayprism')} ("
    )
    write_file(files, "model", "Requests", "Errors")
    grafana.requests.clear()
    result = push(grafana, files)
    assert result.stdout.splitlines() == [
        "datasource  Prometheus  unchanged",
        "folder      rayprism    unchanged",
        "dashboard   Fleet       unchanged",
        "dashboard   Model       updated: added Errors",
    ]
    assert grafana.writes == [("POST", "/api/dashboards/db")]


def test_dry_run_writes_nothing(grafana, files):
    options = ["--dry-run", "--prometheus-url", "http://prometheus:9090"]
    result = push(grafana, files, *options, token=VIEWER)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "datasource  rayprism Prometheus  would be created: http://prometheus:9090",
        "folder      rayprism             would be created",
        "dashboard   Fleet                would be created",
        "dashboard   Model                would be created",
    ]
    assert grafana.writes == []


def test_a_foreign_dashboard_needs_force(grafana, files):
    grafana.add_dashboard({"uid": "rayprism-model", "title": "Theirs"})
    result = push(grafana, files)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: nothing was written:\n  Model: the uid" in result.stderr
    assert grafana.writes == []
    assert push(grafana, files, "--force").exit_code == 0


def test_what_was_done_before_an_error_is_told(grafana, files):
    def edit() -> None:
        if len(grafana.dashboards) == 1:
            grafana.add_dashboard({"uid": "rayprism-model", "title": "Theirs"})

    grafana.before_save = edit
    result = push(grafana, files)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "dashboard   Fleet       created"
    assert "error: " in result.stderr
    assert "Somebody saved it since it was read" in result.stderr


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "error: no token. Set GRAFANA_TOKEN"),
        ("glsa_bad", "does not accept the token: Invalid API key"),
        (VIEWER, "error: the token may not create the folder 'rayprism'"),
    ],
)
def test_tokens_that_do_not_do(grafana, files, token, said):
    result = push(grafana, files, token=token)
    assert result.exit_code == 1
    assert said in result.stderr
    assert grafana.dashboards == {}


def test_where_the_token_comes_from(grafana, files, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{EDITOR}\n")
    assert push(grafana, files, "--token-file", str(file), token="wrong").exit_code == 0
    done = push(grafana, files, "--token-file", "-", token=None, stdin=f"{EDITOR}\n")
    assert done.exit_code == 0
    result = push(grafana, files, "--token", EDITOR, token=None)
    assert result.exit_code == 0
    assert "Use $GRAFANA_TOKEN or --token-file -" in result.stderr
    file.write_bytes(b"\xff\xfe")
    result = push(grafana, files, "--token-file", str(file))
    assert (result.exit_code, "is not text" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    "options",
    [
        ["--token", "a", "--token-file", "-"],
        ["--datasource", "a", "--prometheus-url", "http://b"],
        ["--insecure", "--ca-file", __file__],
    ],
)
def test_options_that_contradict_each_other(grafana, files, options):
    result = push(grafana, files, *options)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_the_url_is_needed(files):
    result = run("push", "--from", str(files))
    assert (result.exit_code, "GRAFANA_URL" in result.stderr) == (2, True)


def test_not_even_debug_shows_the_token(grafana, files, caplog):
    caplog.set_level(logging.DEBUG)
    grafana.before_save = lambda: setattr(
        grafana, "instead", lambda path: (500, {}, json.dumps({"message": EDITOR}))
    )
    arguments = ["--debug", "dashboards", "push", "--url", grafana.url, "--from", str(files)]
    push(grafana, files)
    result = CliRunner().invoke(cli, arguments, env={"GRAFANA_TOKEN": EDITOR})
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "***" in result.stderr
    assert EDITOR not in result.output
    assert EDITOR not in caplog.text


def test_list(grafana, files):
    push(grafana, files)
    write_file(files, "fleet", "Requests", "Errors")
    write_file(files, "batch", "Rows")
    result = run("list", "--url", grafana.url, "--from", str(files), token=VIEWER)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["DASHBOARD", "UID", "STATE", "FOLDER", "URL"]
    assert rows[1] == ["Batch", "rayprism-batch", "missing"]
    assert rows[2][:4] == ["Fleet", "rayprism-fleet", "outdated", "rayprism"]
    assert rows[3][2:] == ["current", "rayprism", f"{grafana.url}/d/rayprism-model/model"]
    assert result.stdout.endswith("\nFleet: a push would have added Errors\n")
    result = run("list", "--url", grafana.url, "--from", str(files), "--json")
    found = json.loads(result.stdout)
    assert [item["state"] for item in found] == ["missing", "outdated", "current"]


def test_write(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("write", "out", "--from", str(files), token=None)
    assert result.stdout == "out/fleet.json\nout/model.json\n"
    assert result.stderr == "2 written, 0 unchanged\n"
    assert json.loads((tmp_path / "out" / "fleet.json").read_text())["title"] == "Fleet"
    result = run("write", "out", "--from", str(files), token=None)
    assert (result.stdout, result.stderr) == ("", "0 written, 2 unchanged\n")
    (tmp_path / "taken").write_text("")
    result = run("write", "taken/out", "--from", str(files), token=None)
    assert (result.exit_code, "error: cannot write" in result.stderr) == (1, True)


def test_without_the_library(grafana, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "grafana_api", None)
    monkeypatch.delitem(sys.modules, "grafana_api.grafana_face", raising=False)
    result = push(grafana, files)
    assert result.exit_code == 1
    assert "pip install 'rayprism[grafana]'" in result.stderr


@pytest.mark.e2e
def test_the_command(grafana, files):
    arguments = [RAYPRISM, "dashboards", "push", "--url", grafana.url, "--from", str(files)]
    environment = {key: value for key, value in os.environ.items() if key != "GRAFANA_TOKEN"}
    done = subprocess.run(
        [*arguments, "--token-file", "-"],
        input=EDITOR,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Fleet       created" in done.stdout
    assert EDITOR not in done.stdout + done.stderr + "".join(done.args)
