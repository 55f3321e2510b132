"""`rayprism traffic`, `promote` and `rollback`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from rayprism.cli.changes import ChangeOptions, change_options, make_change, show_fleet
from rayprism.cli.connection import connect

if TYPE_CHECKING:
    from rayprism.fleet.journal import Entry
    from rayprism.fleet.plans import ModelFleet, Plan, VersionLookup

__all__ = ["promote", "rollback", "traffic"]

_SHARE = re.compile(r"([1-9][0-9]{0,9})=([0-9]+(?:\.[0-9]*)?|\.[0-9]+)%?")


def _parse_shares(
    ctx: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[int, float] | None:
    shares: dict[int, float] = {}
    for value in values:
        match = _SHARE.fullmatch(value.replace(" ", ""))
        if match is None:
            raise click.BadParameter(f"{value!r} is not VERSION=PERCENT, as in 4=5 or 4=0.25")
        version = int(match[1])
        if version in shares:
            raise click.BadParameter(f"version {version} is given twice")
        shares[version] = float(match[2])
    return shares or None


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism traffic flights\n"
    "  rayprism traffic flights 4=5 --sticky x-user-id --why 'first canary'\n"
    "  rayprism traffic flights 4=50 --file serve.yaml\n"
    "  rayprism traffic flights --shadow 5=10 --dry-run\n"
    "  rayprism traffic flights --clear"
)
@click.argument("model")
@click.argument("weights", nargs=-1, metavar="[VERSION=PERCENT]...", callback=_parse_shares)
@click.option(
    "--shadow",
    "shadows",
    multiple=True,
    metavar="VERSION=PERCENT",
    callback=_parse_shares,
    help="Copy so many of the stable version's requests to a version whose answers nobody gets. "
    "Several times for several versions.",
)
@click.option(
    "--sticky",
    metavar="HEADER",
    help="Keep requests with the same value of this HTTP header or gRPC metadata key at one "
    "version.",
)
@click.option("--no-sticky", is_flag=True, help="Draw each request on its own again.")
@click.option("--clear", is_flag=True, help="Give all requests to the stable version.")
@change_options
def traffic(
    model: str,
    weights: dict[int, float] | None,
    shadows: dict[int, float] | None,
    sticky: str | None,
    no_sticky: bool,
    clear: bool,
    options: ChangeOptions,
) -> None:
    """Show or change who gets which share of a model's requests.

    MODEL alone shows what is in force. VERSION=PERCENT gives a version that runs beside the stable
    one a share of the requests; others that are listed keep theirs, and what is left is the stable
    version's. 4=0 takes all requests from version 4. It takes effect in place, within seconds.

    Exit codes: 0 done, or so already; 1 it did not work out, and everything is as before unless the
    message says otherwise; 2 wrong usage.
    """
    changes = weights or shadows or sticky or no_sticky
    if clear and changes:
        raise click.UsageError("--clear takes everything out: give it alone")
    if sticky and no_sticky:
        raise click.UsageError("--sticky or --no-sticky, not both")
    if not changes and not clear:
        show_fleet(connect(options.address, options.state_dir), model, as_json=options.as_json)
        return

    def make_plan(fleet: ModelFleet, lookup: VersionLookup, entries: Sequence[Entry]) -> Plan:
        from rayprism.fleet.edits import ABSENT
        from rayprism.fleet.plans import plan_traffic

        return plan_traffic(
            fleet,
            weights=weights,
            shadows=shadows,
            sticky=ABSENT if no_sticky else sticky,
            clear=clear,
            lookup=lookup,
            allow_signature_change=options.allow_signature_change,
        )

    make_change(model, f"traffic {model}", options, make_plan)


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism promote flights 4 --why 'better on every airport' --file serve.yaml\n"
    "  rayprism promote flights 4 --keep-candidate\n"
    "  rayprism promote flights 4 --dry-run"
)
@click.argument("model")
@click.argument("version", type=click.IntRange(1))
@click.option(
    "--keep-candidate",
    is_flag=True,
    help="Leave the application running that served the version beside the stable one.",
)
@click.option(
    "--without-candidate",
    is_flag=True,
    help="Promote a version that does not run beside the stable one, so that nothing has shown yet "
    "that it loads and answers on this cluster.",
)
@change_options
def promote(
    model: str,
    version: int,
    keep_candidate: bool,
    without_candidate: bool,
    options: ChangeOptions,
) -> None:
    """Make a version the stable one.

    New replicas of the stable application start beside the old ones, which answer until the new
    ones are ready and proven. What was said of traffic is taken out, then the application that
    served the version beside. If the new replicas do not become ready, it is all taken back.

    Exit codes: 0 done; 1 it did not work out, and everything is as before unless the message says
    otherwise; 2 wrong usage.
    """

    def make_plan(fleet: ModelFleet, lookup: VersionLookup, entries: Sequence[Entry]) -> Plan:
        from rayprism.fleet.plans import plan_promote

        return plan_promote(
            fleet,
            version,
            keep_candidate=keep_candidate,
            without_candidate=without_candidate,
            lookup=lookup,
            allow_signature_change=options.allow_signature_change,
        )

    make_change(model, f"promote {model} {version}", options, make_plan)


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism rollback flights --why 'errors on long flights'\n"
    "  rayprism rollback flights --to 2 --file serve.yaml"
)
@click.argument("model")
@click.option(
    "--to",
    "version",
    type=click.IntRange(1),
    metavar="VERSION",
    help="Make this version the stable one.",
)
@change_options
def rollback(model: str, version: int | None, options: ChangeOptions) -> None:
    """Take requests back from candidates, or go back to the version before.

    While candidates or shadows get requests: the stable version gets all of them, in place.
    Otherwise the version that was stable before the last promotion becomes it again, as a
    promotion does it; the journal says which that was (`rayprism history`).

    Exit codes: 0 done, or so already; 1 it did not work out, and everything is as before unless the
    message says otherwise; 2 wrong usage.
    """

    def make_plan(fleet: ModelFleet, lookup: VersionLookup, entries: Sequence[Entry]) -> Plan:
        from rayprism.fleet.journal import previous_version
        from rayprism.fleet.plans import plan_rollback

        return plan_rollback(
            fleet,
            version=version,
            previous=previous_version(entries, fleet.stable.version),
            lookup=lookup,
            allow_signature_change=options.allow_signature_change,
        )

    make_change(model, f"rollback {model}", options, make_plan)
