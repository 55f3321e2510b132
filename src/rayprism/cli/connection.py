"""Which cluster a command talks to, and which repository is that cluster's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprism.errors import ClusterError

if TYPE_CHECKING:
    from rayprism.fleet.plans import ModelFleet
    from rayprism.fleet.rest import ServeClient

__all__ = [
    "address_option",
    "connect",
    "find_repository",
    "fleet_repository_option",
    "state_option",
]

state_option = click.option(
    "--state",
    "state_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".rayprism"),
    show_default=True,
    metavar="DIR",
    help="Where the cluster's state and log are kept; one cluster a folder.",
)
address_option = click.option(
    "--address",
    envvar="RAY_DASHBOARD_ADDRESS",
    metavar="URL",
    help="The dashboard's address.  [default: $RAY_DASHBOARD_ADDRESS, else what --state says, "
    "else http://127.0.0.1:8265]",
)
fleet_repository_option = click.option(
    "--repository",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="RAYPRISM_REPOSITORY",
    metavar="DIR",
    help="Where the versions are, and the journal.  [default: $RAYPRISM_REPOSITORY, else what the "
    "application's args say, else that of `rayprism up`]",
)


def connect(address: str | None, state_dir: Path) -> ServeClient:
    """The client of the cluster that the options mean."""
    from rayprism.fleet.rest import DEFAULT_ADDRESS, ServeClient
    from rayprism.fleet.state import find_address

    return ServeClient(address or find_address(state_dir) or DEFAULT_ADDRESS)


def find_repository(
    given: Path | None, fleet: ModelFleet, client: ServeClient, state_dir: Path
) -> Path:
    """The repository of a model that is served.

    Args:
        given: What the operator says.
        fleet: What serves the model.
        client: Of the cluster.
        state_dir: Of a local cluster, which may be another one.

    Raises:
        ClusterError: Nothing says which it is, or it is not on this machine.
    """
    from rayprism.fleet.state import find_cluster

    said = given or fleet.stable.args.repository
    if said is None:
        cluster = find_cluster(state_dir)
        if cluster is not None and cluster.dashboard_address == client.address:
            said = cluster.settings.repository
    if said is None:
        raise ClusterError(
            f"which repository {client.address} takes {fleet.model!r} from is not known here: "
            "neither the application's args nor a cluster of this machine say it. Give it with "
            "--repository, or set RAYPRISM_REPOSITORY"
        )
    root = Path(said)
    if not root.is_dir():
        raise ClusterError(
            f"the repository {root} is not on this machine. Give the folder where it is mounted "
            "here with --repository"
        )
    return root
