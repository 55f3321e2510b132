"""`rayprism dashboards`: push, list and write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rayprism.cli.output import print_json, print_table, say, shown_path
from rayprism.errors import SetupError

if TYPE_CHECKING:
    from rayprism.fleet.grafana import GrafanaClient

__all__ = ["dashboards"]

_VARIABLE = "GRAFANA_TOKEN"
_DONE = {"create": "created", "update": "updated", "keep": "unchanged"}
_TO_DO = {"create": "would be created", "update": "would be updated", "keep": "unchanged"}

_Command = TypeVar("_Command", bound=Callable[..., Any])

_from_option = click.option(
    "--from",
    "source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Take the dashboards from the JSON files of a folder.  [default: those of this version]",
)


def _grafana_options(command: _Command) -> _Command:
    for option in reversed(
        (
            click.option(
                "--url",
                envvar="GRAFANA_URL",
                show_envvar=True,
                required=True,
                help="Where Grafana is, with its sub-path where it has one.",
            ),
            click.option(
                "--token-file",
                type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
                metavar="FILE",
                help=f"A service account's token; - for stdin.  [default: ${_VARIABLE}]",
            ),
            click.option(
                "--token",
                help="The token itself. Everybody on this machine can read it in the list of "
                f"processes, and the shell keeps it: prefer ${_VARIABLE} or --token-file -.",
            ),
            click.option(
                "--ca-file",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="FILE",
                help="Certificates (PEM) to trust instead of the system's.",
            ),
            click.option("--insecure", is_flag=True, help="Trust any certificate."),
        )
    ):
        command = option(command)
    return command


@click.group(
    epilog="\b\nExamples:\n"
    "  rayprism dashboards push --url http://grafana:3000 --prometheus-url http://prometheus:9090\n"
    "  rayprism dashboards list --url http://grafana:3000\n"
    "  rayprism dashboards write ./dashboards"
)
def dashboards() -> None:
    """Bring the dashboards of a fleet into a Grafana, or into files for its provisioning."""


@dashboards.command(
    epilog="\b\nExamples:\n"
    "  GRAFANA_TOKEN=$(cat token) rayprism dashboards push --url http://grafana:3000\n"
    "  rayprism dashboards push --url http://grafana:3000 --token-file token \\\n"
    "      --prometheus-url http://prometheus:9090\n"
    "  pass show grafana | rayprism dashboards push --url https://host/grafana \\\n"
    "      --token-file - --folder ML --datasource Mimir --dry-run"
)
@_grafana_options
@click.option(
    "--folder", default="rayprism", show_default=True, help="Title or uid; is made if need be."
)
@click.option(
    "--datasource",
    metavar="NAME",
    help="Name or uid of a Prometheus datasource that is there.  [default: the one that "
    "--prometheus-url made, else Grafana's default, else the only one]",
)
@click.option(
    "--prometheus-url",
    metavar="URL",
    help="Make a datasource of this Prometheus, as Grafana reaches it. Needs the role Admin.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and write nothing.")
@click.option(
    "--force",
    is_flag=True,
    help="Write over dashboards with our uids that are not ours, and over others' changes.",
)
@_from_option
def push(
    url: str,
    token_file: Path | None,
    token: str | None,
    ca_file: Path | None,
    insecure: bool,
    folder: str,
    datasource: str | None,
    prometheus_url: str | None,
    dry_run: bool,
    force: bool,
    source: Path | None,
) -> None:
    """Create or update the dashboards in a Grafana.

    Writes only what differs from what is there, so it may be run as often as one likes. Changes
    that were made by hand in our dashboards are lost: copy a dashboard to change it. Dashboards
    with our uids that have no tag `rayprism` are left alone, and nothing at all is written then.

    The token is that of a service account: role Editor, or Admin with --prometheus-url.
    """
    from rayprism.fleet.dashboards import PushSettings, load_dashboards, plan_push

    if datasource is not None and prometheus_url is not None:
        raise click.UsageError("--datasource is one that is there, --prometheus-url makes one")
    models = load_dashboards(source)
    client = _connect(url, token_file, token, ca_file, insecure)
    steps = plan_push(client, models, PushSettings(folder, datasource, prometheus_url, force))
    words = _TO_DO if dry_run else _DONE
    width = max(len(step.name) for step in steps)
    for step in steps:
        if not dry_run:
            step.write()
        details = f": {step.details}" if step.details else ""
        click.echo(f"{step.kind:<10}  {step.name:<{width}}  {words[step.action]}{details}")


@dashboards.command(
    "list",
    epilog="\b\nExamples:\n"
    "  rayprism dashboards list --url http://grafana:3000 --token-file token\n"
    "  rayprism dashboards list --url http://grafana:3000 --json",
)
@_grafana_options
@_from_option
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def list_dashboards(
    url: str,
    token_file: Path | None,
    token: str | None,
    ca_file: Path | None,
    insecure: bool,
    source: Path | None,
    as_json: bool,
) -> None:
    """Show which of the dashboards are in a Grafana, and whether they are current.

    States: current; outdated, or changed by hand; missing; foreign, which is another dashboard with
    the same uid; unknown, which has the tag `rayprism` but is not of this version.
    """
    from dataclasses import asdict

    from rayprism.fleet.dashboards import load_dashboards, survey_dashboards

    models = load_dashboards(source)
    found = survey_dashboards(_connect(url, token_file, token, ca_file, insecure), models)
    if as_json:
        print_json([asdict(item) for item in found])
        return
    print_table(
        ("DASHBOARD", "UID", "STATE", "FOLDER", "URL"),
        [(item.title, item.uid, item.state, item.folder, item.url) for item in found],
    )
    for item in found:
        if item.details:
            click.echo(f"\n{item.title}: a push would have {item.details}")


@dashboards.command(epilog="\b\nExamples:\n  rayprism dashboards write ./dashboards")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_from_option
def write(folder: Path, source: Path | None) -> None:
    """Write the dashboards as JSON files, for Grafana's provisioning or to import them by hand."""
    from rayprism.fleet.dashboards import load_dashboards, write_dashboards

    models = load_dashboards(source)
    written = write_dashboards(models, folder)
    for path in written:
        click.echo(shown_path(path))
    say(f"{len(written)} written, {len(models) - len(written)} unchanged")


def _connect(
    url: str, token_file: Path | None, token: str | None, ca_file: Path | None, insecure: bool
) -> GrafanaClient:
    from rayprism.fleet.grafana import GrafanaClient

    if ca_file is not None and insecure:
        raise click.UsageError("--ca-file is of no use with --insecure")
    client = GrafanaClient(url, _find_token(token_file, token), ca_file=ca_file, insecure=insecure)
    version = client.version()
    organization = client.organization()
    of = f", organization {organization}" if organization else ""
    say(f"Grafana {version} at {client.url}{of}".replace("  ", " "))
    return client


def _find_token(file: Path | None, token: str | None) -> str:
    """The token, from where the operator keeps it; empty where there is none."""
    if token is not None and file is not None:
        raise click.UsageError("--token and --token-file say the same; use one")
    if token is not None:
        say(
            "note: others can read --token in the list of processes and in the shell's history. "
            f"Use ${_VARIABLE} or --token-file -"
        )
        return token.strip()
    if file is None:
        return os.environ.get(_VARIABLE, "").strip()
    if str(file) != "-":
        try:
            return file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SetupError(f"the token file cannot be read: {error}") from None
        except UnicodeDecodeError:
            raise SetupError(f"the token file {file} is not text") from None
    if sys.stdin.isatty():
        return str(click.prompt("Token", hide_input=True, err=True)).strip()
    return sys.stdin.read().strip()
