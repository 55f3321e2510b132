"""`rayprism history`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprism.cli.connection import (
    address_option,
    connect,
    find_repository,
    fleet_repository_option,
    state_option,
)
from rayprism.cli.output import print_json, print_table, say
from rayprism.errors import ClusterError

if TYPE_CHECKING:
    from rayprism.fleet.journal import Entry

__all__ = ["history"]


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism history flights\n"
    "  rayprism history flights --repository ./models --limit 100 --json"
)
@click.argument("model")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N")
@address_option
@state_option
@fleet_repository_option
@click.option("--json", "as_json", is_flag=True, help="Print it for programs, with all there is.")
def history(
    model: str,
    limit: int,
    address: str | None,
    state_dir: Path,
    repository: Path | None,
    as_json: bool,
) -> None:
    """Show what was changed in a model's fleet with rayprism, newest first.

    With --repository no cluster has to be up. A change that was killed on its way, and one that is
    under way, is `unfinished`.
    """
    from rayprism.fleet.journal import Journal

    root = repository or _ask(model, address, state_dir)
    journal = Journal(root, model)
    entries = journal.read(say)[::-1][:limit]
    if as_json:
        print_json([entry.to_json() for entry in entries])
    elif entries:
        print_table(
            ("WHEN", "WHO", "WHAT", "FROM", "TO", "OUTCOME", "WHY"),
            [_row(entry) for entry in entries],
        )
    else:
        click.echo(f"no changes of {model} in {journal.path}")


def _ask(model: str, address: str | None, state_dir: Path) -> Path:
    from rayprism.fleet.plans import find_model

    try:
        client = connect(address, state_dir)
        return find_repository(None, find_model(client.details(), model), client, state_dir)
    except ClusterError as error:
        raise ClusterError(f"{error}\nWith --repository DIR, no cluster is asked") from None


def _row(entry: Entry) -> tuple[str, ...]:
    when = datetime.fromisoformat(entry.time).astimezone()
    # The first line of a reason is why; the others are what became of it.
    said = [entry.why, *entry.reason.splitlines()[:1]]
    return (
        f"{when:%Y-%m-%d %H:%M:%S}",
        entry.who,
        entry.action,
        _state(entry.before),
        _state(entry.after),
        entry.outcome,
        " / ".join(text for text in said if text),
    )


def _state(state: Mapping[str, Any]) -> str:
    """`3 (4: 5 %, 5: copies of 10 %)`: the stable version, and who else got requests."""
    traffic = state.get("traffic") or {}
    shares = [
        f"{item['version']}: {item['weight']:g} %"
        for item in traffic.get("candidates") or ()
        if item["weight"]
    ]
    shares += [
        f"{item['version']}: copies of {item['sample']:g} %"
        for item in traffic.get("shadow") or ()
        if item["sample"]
    ]
    return f"{state.get('version')}" + (f" ({', '.join(shares)})" if shares else "")
