"""The command as a whole: help, errors, start-up, and that nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rayprism.cli.main import cli, main
from rayprism.errors import ConfigInvalid, Fault

RAYPRISM = str(Path(sys.executable).parent / "rayprism")


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
    return found


def test_commands():
    assert set(commands(cli)) == {
        ("models",),
        ("models", "push"),
        ("models", "list"),
        ("models", "show"),
        ("models", "verify"),
        ("models", "copy"),
        ("environment",),
        ("check",),
        ("up",),
        ("down",),
        ("status",),
        ("wait",),
        ("traffic",),
        ("promote",),
        ("rollback",),
        ("history",),
        ("top",),
        ("monitoring",),
        ("monitoring", "up"),
        ("monitoring", "down"),
        ("dashboards",),
        ("dashboards", "push"),
        ("dashboards", "list"),
        ("dashboards", "write"),
    }


@pytest.mark.parametrize("command", commands(cli), ids=" ".join)
def test_help_has_examples(command):
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    if command != ("models",):
        assert "rayprism " in result.output.partition("Examples:\n")[2]


def test_wrong_usage_is_2():
    assert CliRunner().invoke(cli, ["chekc"]).exit_code == 2
    assert CliRunner().invoke(cli, ["check"]).exit_code == 2


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConfigInvalid("there", [Fault("a.b", "is wrong")])

    monkeypatch.setattr("rayprism.fleet.cluster.stop_cluster", fail)


@pytest.mark.usefixtures("failing")
def test_an_error_is_told_without_a_traceback():
    result = CliRunner().invoke(cli, ["down"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: there: 1 fault\n  a.b: is wrong\n"


@pytest.mark.usefixtures("failing")
def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli, ["--debug", "down"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: there" in result.stderr


def test_main_takes_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("rayprism ")


@pytest.mark.e2e
def test_help_imports_nothing_heavy():
    code = (
        "import sys; from rayprism.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('ray', 'numpy', 'pydantic', 'yaml', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.e2e
def test_the_script_is_installed():
    done = subprocess.run([RAYPRISM, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rayprism ")
