"""`rayprism environment`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from rayprism.errors import ClusterError

__all__ = ["environment"]


def _ray_folder() -> Path:
    """Where Ray puts its folder by itself.

    Source: Ray 2.60, _common/utils.py, `get_default_ray_temp_dir`.
    """
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    return Path(named or "/tmp") / "ray"


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="\b\nExamples:\n"
    "  rayprism environment\n"
    "  rayprism environment ray start --head --block\n"
    "  RAY_SERVE_HAPROXY_NBTHREAD=8 rayprism environment ray start --address head:6379 --block",
)
@click.option(
    "--temp-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Ray's folder, where COMMAND has a --temp-dir too.  [default: Ray's own, /tmp/ray]",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def environment(temp_dir: Path | None, command: tuple[str, ...]) -> None:
    """Run COMMAND with the variables that Serve needs on every node; without one, print them.

    Most of Serve's settings are only read from the environment when Ray starts. `rayprism up` sets
    them for one machine; this does for `ray start` on many. A variable that is set already wins.
    They are printed as a shell takes them.

    COMMAND takes the place of this process, so signals reach it.
    """
    from rayprism.fleet.environment import node_variables, search_path

    folder = (temp_dir or _ray_folder()).absolute()
    values = {
        name: os.environ.get(name, value)
        for name, value in node_variables(folder, haproxy=sys.platform == "linux").items()
    }
    if not command:
        for name, value in values.items():
            click.echo(f"{name}={shlex.quote(value)}")
        return
    inherited = os.environ | values | {"PATH": search_path(os.environ)}
    try:
        os.execvpe(command[0], command, inherited)
    except OSError as error:
        raise ClusterError(f"{command[0]} cannot be run: {error.strerror}") from None
