"""`rayprism environment`: one list for `rayprism up` and for nodes that are started alone."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from rayprism.cli.main import cli
from rayprism.fleet.environment import cluster_environment, node_variables

RUN = (sys.executable, "-c", "from rayprism.cli.main import main; main()", "environment")


def printed(*arguments: str, **environment: str) -> dict[str, str]:
    blank = dict.fromkeys(["RAY_TMPDIR", "TMPDIR"])
    result = CliRunner().invoke(cli, ["environment", *arguments], env=blank | environment)
    assert result.exit_code == 0, result.stderr
    return dict(word.split("=", 1) for word in shlex.split(result.stdout))


def test_it_is_what_up_sets(tmp_path):
    found = printed("--temp-dir", str(tmp_path))
    up = cluster_environment("id", tmp_path, None, base={})
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert " " in found["RAY_SERVE_HAPROXY_RETRY_ON"]  # in a shell, too
    assert found.items() <= up.items()
    left = up.keys() - found.keys()
    # What is one machine's own: ports that are free there, where its files are, that it is alone.
    assert {name for name in left if not name.endswith("_PORT")} == {
        "PATH",
        "RAYPRISM_CLUSTER",
        "RAYPRISM_DATA",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    }


def test_files_lie_where_ray_puts_its_own():
    assert printed()["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/tmp/ray/h/a.sock"
    assert printed(RAY_TMPDIR="/big")["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/big/ray/h/a.sock"
    assert printed().items() >= node_variables(Path("/tmp/ray")).items()


def test_what_is_set_wins():
    assert printed(RAY_SERVE_HAPROXY_RETRIES="9")["RAY_SERVE_HAPROXY_RETRIES"] == "9"


def test_a_command_takes_its_place():
    code = "import os, sys; print(os.getpid(), os.environ['RAY_worker_niceness'], sys.argv[1:])"
    with subprocess.Popen(
        [*RUN, sys.executable, "-c", code, "--head", "--", "-x"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output, _ = process.communicate(timeout=60)
    assert output.split(maxsplit=2) == [str(process.pid), "0", "['--head', '--', '-x']\n"]


def test_a_command_that_is_not_there():
    result = CliRunner().invoke(cli, ["environment", "no-such-command", "start"])
    assert result.exit_code == 1
    assert result.stderr == "error: no-such-command cannot be run: No such file or directory\n"
