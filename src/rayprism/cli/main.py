"""`rayprism`: the command itself, its errors, and its sub-commands."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import click

from rayprism.cli.check import check
from rayprism.cli.cluster import down, status, up, wait
from rayprism.cli.dashboards import dashboards
from rayprism.cli.environment import environment
from rayprism.cli.history import history
from rayprism.cli.models import models
from rayprism.cli.monitoring import monitoring
from rayprism.cli.top import top
from rayprism.cli.traffic import promote, rollback, traffic
from rayprism.errors import RayprismError

__all__ = ["cli", "main"]


class _Group(click.Group):
    """Tells errors as one line, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayprismError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{click.style('error:', fg='red')} {error}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nA first round:\n"
    "  rayprism models push flights model.onnx --example rows.json\n"
    "  rayprism up --repository ./models\n"
    "  rayprism check serve.yaml && serve deploy serve.yaml && rayprism wait\n"
    "  rayprism down",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="rayprism", message="%(prog)s %(version)s")
def cli(debug: bool) -> None:
    """Serve versioned models on Ray Serve.

    Exit codes: 0 done, 1 something is wrong and was said on stderr, 2 wrong usage.
    """


for _command in (models, check, up, down, status, wait, traffic, promote, rollback, history):
    cli.add_command(_command)
cli.add_command(environment)
cli.add_command(dashboards)
cli.add_command(monitoring)
cli.add_command(top)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `rayprism` script."""
    cli.main(None if arguments is None else list(arguments), prog_name="rayprism")


if __name__ == "__main__":
    main()
