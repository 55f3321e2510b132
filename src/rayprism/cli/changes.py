"""What `traffic`, `promote` and `rollback` share: plan, show, carry out, write the file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
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
from rayprism.cli.output import print_json, print_table, say, shown_path
from rayprism.errors import ClusterError, RayprismError

if TYPE_CHECKING:
    from rayprism.fleet.journal import Entry, Journal
    from rayprism.fleet.plans import ModelFleet, Plan, ServedVersion, VersionLookup
    from rayprism.fleet.rest import ServeClient
    from rayprism.fleet.serve_file import ServeFile
    from rayprism.models.manifest import Manifest
    from rayprism.serving.settings import ModelArgs

__all__ = ["ChangeOptions", "change_options", "make_change", "show_fleet"]


@dataclass(frozen=True, slots=True)
class ChangeOptions:
    """The options that every command has that changes a fleet.

    Args:
        why: For the journal.
        file: The Serve file to be changed alike.
        dry_run: Whether the difference is shown, and nothing done.
        allow_signature_change: Whether inputs and outputs may differ.
        timeout_s: How long a version may take to become ready.
        address: Of the dashboard.
        state_dir: Of the local cluster.
        repository: Of versions and journal.
        as_json: Whether to print for programs.
    """

    why: str
    file: Path | None
    dry_run: bool
    allow_signature_change: bool
    timeout_s: float
    address: str | None
    state_dir: Path
    repository: Path | None
    as_json: bool


_OPTIONS = (
    click.option("--why", default="", metavar="TEXT", help="The reason, for the journal."),
    click.option(
        "--file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The Serve file of this fleet. It is changed alike, once the change is in force; "
        "comments and order stay.",
    ),
    click.option("--dry-run", is_flag=True, help="Show the difference, and change nothing."),
    click.option(
        "--allow-signature-change",
        is_flag=True,
        help="Let a version in whose inputs or outputs differ from the stable version's.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(1),
        default=300.0,
        show_default=True,
        help="Seconds that it may take until all replicas are ready. Then it is taken back.",
    ),
    address_option,
    state_option,
    fleet_repository_option,
    click.option("--json", "as_json", is_flag=True, help="Print it for programs."),
)


def change_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options, packed into one argument `options`."""

    @functools.wraps(command)
    def packed(**values: Any) -> None:
        mine = {field.name: values.pop(field.name) for field in fields(ChangeOptions)}
        command(options=ChangeOptions(**mine), **values)

    decorated: Callable[..., None] = packed
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def make_change(
    model: str,
    command: str,
    options: ChangeOptions,
    make_plan: Callable[[ModelFleet, VersionLookup, Sequence[Entry]], Plan],
) -> None:
    """Plans a change, shows it, carries it out, and shows what is in force then.

    Args:
        model: The model's name.
        command: As somebody else is told who is kept waiting.
        options: The operator's.
        make_plan: Decides what is to be done, knowing what runs, what the repository holds, and
            what was changed on this cluster before.

    Raises:
        RayprismError: It cannot be planned, or did not work out.
    """
    from rayprism.fleet.journal import Journal
    from rayprism.fleet.lock import lock_fleet
    from rayprism.fleet.plans import find_model

    client = connect(options.address, options.state_dir)
    fleet = find_model(client.details(), model)
    root = find_repository(options.repository, fleet, client, options.state_dir)
    lookup = functools.partial(_look_up, options.repository, root)
    with contextlib.nullcontext() if options.dry_run else lock_fleet(root, command):
        # Read again: what was read before the lock may be from before somebody else's change.
        details = client.details()
        journal = Journal(root, model)
        # One repository may feed several clusters: what was done elsewhere says nothing here.
        entries = [entry for entry in journal.read(say) if entry.cluster == client.address]
        plan = make_plan(find_model(details, model), lookup, entries)
        change = _Change(client, plan, details, options)
        change.show()
        leftover = "" if options.dry_run else change.carry_out(journal)
    if options.as_json:
        print_json({**change.to_json(), "fleet": _fleet_json(client, model)})
    elif not options.dry_run:
        show_fleet(client, model, as_json=False)
    if leftover:
        raise ClusterError(leftover)


def _look_up(given: Path | None, root: Path, args: ModelArgs) -> Manifest:
    from rayprism.models.repository import Repository

    # `given` wins: the path in `args` is the nodes', and may be another one here.
    repository = Repository(given or Path(args.repository or root))
    return repository.version(args.model, args.version).manifest


class _Change:
    """A planned change, and the file that is to follow it."""

    def __init__(
        self, client: ServeClient, plan: Plan, details: dict[str, Any], options: ChangeOptions
    ) -> None:
        from rayprism.fleet.edits import apply_edits, difference, live_config

        self._client = client
        self._plan = plan
        self._details = details
        self._options = options
        before = live_config(details)
        after = deepcopy(before)
        apply_edits(after, plan.all_edits)
        self._difference = difference(before, after)
        self._file: ServeFile | None = None
        if options.file is not None:
            self._file = self._load(options.file)
            names = {edit.application for edit in plan.all_edits}
            differences = self._file.differences_from(before, names)
            if differences:
                say(
                    f"{click.style('warning:', fg='yellow')} {shown_path(options.file)} differs "
                    f"from what runs already, before this change:\n{differences.rstrip()}"
                )
            # Whether it can be made is found out before anything is done.
            self._file.apply(plan.all_edits)

    @staticmethod
    def _load(path: Path) -> ServeFile:
        from rayprism.fleet.serve_file import ServeFile

        return ServeFile.load(path)

    def show(self) -> None:
        """Prints what is going to change, unless it is for programs."""
        if self._options.as_json:
            return
        if not self._plan.stages:
            click.echo("everything is so already")
        _print_difference(self._difference)
        if self._options.dry_run and self._file is not None:
            _print_difference(self._file.difference())

    def carry_out(self, journal: Journal) -> str:
        """Brings it into force, then into the file.

        Returns:
            What did not work out although the change is in force.
        """
        from rayprism.fleet.change import carry_out

        leftover = carry_out(
            self._client,
            self._plan,
            details=self._details,
            journal=journal,
            why=self._options.why,
            say=say,
            timeout_s=self._options.timeout_s,
        )
        path = self._options.file
        if path is not None and self._plan.stages:
            try:
                # Read again: it may have been edited while replicas started.
                file = self._load(path)
                file.apply(self._plan.all_edits)
                file.save()
            except RayprismError as error:
                text = f"the change is in force, but it is not in {shown_path(path)}: {error}"
                return f"{leftover}\n{text}" if leftover else text
            say(f"wrote {shown_path(path)}")
        return leftover

    def to_json(self) -> dict[str, Any]:
        """What is done, for programs."""
        plan, options = self._plan, self._options
        return {
            "action": plan.action,
            "model": plan.model,
            "from": plan.before,
            "to": plan.after,
            "changed": bool(plan.stages) and not options.dry_run,
            "dry_run": options.dry_run,
            "difference": self._difference,
            "file": None if options.file is None else str(options.file),
            "file_difference": "" if self._file is None else self._file.difference(),
        }


def _print_difference(text: str) -> None:
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in text.splitlines():
        heading = line.startswith(("+++ ", "--- "))
        click.secho(line, fg=None if heading else colours.get(line[:1]), bold=heading)


def show_fleet(client: ServeClient, model: str, *, as_json: bool) -> None:
    """Prints which versions of a model run, and who gets which share of its requests."""
    fleet = _fleet_json(client, model)
    if as_json:
        print_json(fleet)
        return
    click.echo(f"{model} at {client.address}")
    rows = [
        (
            item["role"],
            str(item["version"]),
            item["application"] or "-",
            item["status"],
            _percent(item["weight"]),
            _percent(item["shadow"]),
        )
        for item in fleet["versions"]
    ]
    print_table(("ROLE", "VERSION", "APPLICATION", "STATUS", "WEIGHT", "SHADOW"), rows, indent="  ")
    if fleet["sticky"]:
        click.echo(f"  requests with the same {fleet['sticky']} stay at one version")
    if fleet["user_config_error"]:
        say(
            f"{click.style('warning:', fg='yellow')} the replicas refuse this user_config and keep "
            f"the one before: {fleet['user_config_error']}"
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:g} %"


def _fleet_json(client: ServeClient, model: str) -> dict[str, Any]:
    from rayprism.fleet.plans import find_model
    from rayprism.fleet.rollout import user_config_error

    details = client.details()
    fleet = find_model(details, model)
    error = ""
    with contextlib.suppress(ClusterError):  # not from this machine
        error = user_config_error(details, fleet.stable.application)
    traffic = fleet.traffic
    return {
        "model": model,
        "address": client.address,
        "versions": _versions(fleet),
        "sticky": traffic.sticky.header if traffic and traffic.sticky else None,
        "traffic": fleet.raw_traffic,
        "user_config_error": error,
    }


def _versions(fleet: ModelFleet) -> list[dict[str, Any]]:
    traffic = fleet.traffic
    weights = {item.version: item.weight for item in traffic.candidates} if traffic else {}
    shadows = {item.version: item.sample for item in traffic.shadow} if traffic else {}
    # In hundredths: 100 - 33.33 is not 66.67 to a computer.
    left = 10_000 - sum(item.slots for item in traffic.candidates) if traffic else 10_000
    served = {app.version: app for app in reversed(fleet.others)}
    versions = [_version("stable", fleet.stable.version, fleet.stable, left / 100, None)]
    for version in sorted({*served, *weights, *shadows} - {fleet.stable.version}):
        role = "candidate" if version in weights else "shadow" if version in shadows else "beside"
        app = served.get(version)
        versions.append(_version(role, version, app, weights.get(version), shadows.get(version)))
    return versions


def _version(
    role: str, version: int, app: ServedVersion | None, weight: float | None, shadow: float | None
) -> dict[str, Any]:
    return {
        "role": role,
        "version": version,
        "application": None if app is None else app.application,
        "route": None if app is None else app.route_prefix,
        "status": "not deployed" if app is None else app.status,
        "weight": weight,
        "shadow": shadow,
    }
