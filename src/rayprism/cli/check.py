"""`rayprism check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprism.cli.output import print_json, print_table

if TYPE_CHECKING:
    from rayprism.errors import Fault
    from rayprism.fleet.check import CheckReport

__all__ = ["check"]


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism check serve_configs/flights.yaml --repository ./models\n"
    "  rayprism check *.yaml --no-verify --json"
)
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path)
)
@click.option(
    "--repository",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="RAYPRISM_REPOSITORY",
    show_default="$RAYPRISM_REPOSITORY",
    help="Where versions are looked up whose `args` name no repository.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read every file of every version and compare it with its digest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list with one report a file.")
@click.pass_context
def check(
    ctx: click.Context,
    files: tuple[Path, ...],
    repository: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Check Serve files before they are deployed. Needs no cluster.

    Looks for what Ray would refuse, what Ray would silently ignore, and what rayprism would refuse:
    models and versions that are not there, files that are not the ones that were pushed, settings
    that do not exist. Every fault is told at once, with its line.

    Exit codes: 0 no faults (there may be warnings), 1 faults, 2 wrong usage.
    """
    from rayprism.fleet.check import check_file

    reports = [check_file(path, repository=repository, verify=verify) for path in files]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        for report in reports:
            _print_report(report)
    ctx.exit(0 if all(report.ok for report in reports) else 1)


def _print_report(report: CheckReport) -> None:
    for fault in report.faults:
        click.echo(_line(report.source, fault, click.style("fault", fg="red")))
    for warning in report.warnings:
        click.echo(_line(report.source, warning, click.style("warning", fg="yellow")))
    counted = f", {_count(len(report.warnings), 'warning')}" if report.warnings else ""
    if not report.ok:
        click.echo(f"{report.source}: {_count(len(report.faults), 'fault')}{counted}")
        return
    click.echo(f"{report.source}: OK, {_count(len(report.applications), 'application')}{counted}")
    print_table(
        ("APPLICATION", "ROUTE", "MODEL", "VERSION", "REPLICAS", "DIGEST"),
        [
            (
                app.name,
                app.route or "-",
                app.model or "-",
                app.version or "-",
                app.replicas or "default",
                app.digest.removeprefix("sha256:")[:12] or "-",
            )
            for app in report.applications
        ],
        indent="  ",
    )


def _line(source: str, fault: Fault, word: str) -> str:
    where = f"{source}:{fault.line}" if fault.line else source
    path = f" {fault.path}:" if fault.path else ""
    return f"{where}: {word}:{path} {fault.message}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
