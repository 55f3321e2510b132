"""`rayprism up`, `down`, `status` and `wait`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprism.cli.connection import address_option, connect, state_option
from rayprism.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from rayprism.fleet.rest import ServeState
    from rayprism.fleet.state import ClusterState

__all__ = ["down", "status", "up", "wait"]


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism up --repository ./models\n"
    "  rayprism up --num-cpus 4 --drain-s 5 --dashboard-port 8365 --state /tmp/other\n"
    "  RAY_SERVE_HAPROXY_NBTHREAD=8 rayprism up"
)
@click.option(
    "--repository",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="RAYPRISM_REPOSITORY",
    show_default="$RAYPRISM_REPOSITORY",
    help="The model repository of applications whose `args` name none.",
)
@click.option("--dashboard-port", type=click.IntRange(1, 65535), default=8265, show_default=True)
@click.option(
    "--num-cpus",
    type=click.IntRange(1),
    help="CPUs that Ray hands out; more than there are is allowed.  [default: the machine's]",
)
@click.option(
    "--no-haproxy",
    is_flag=True,
    help="Use Serve's Python proxy, which is slower. Always so but on Linux.",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(0),
    help="Seconds that a replica goes on answering when it is stopped.  [default: Serve's 30]",
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1), default=120.0, show_default=True,
    help="Seconds that the start may take.",
)  # fmt: skip
@state_option
def up(
    repository: Path | None,
    dashboard_port: int,
    num_cpus: int | None,
    no_haproxy: bool,
    drain_s: float | None,
    timeout_s: float,
    state_dir: Path,
) -> None:
    """Start a Ray cluster of one node on this machine, ready for `serve deploy`.

    The ports of HTTP and gRPC are those in the file that is deployed first (`http_options`,
    `grpc_options`); Serve keeps them until `rayprism down`, whatever later files say. A variable of
    Ray that is set in the environment wins over the one that this command would set.

    Ray's dashboard answers on 127.0.0.1 only. Its GCS, raylet and workers, HAProxy's statistics and
    the replicas' gRPC ports listen on every interface, which Ray offers no way to change, and
    without a password: on a network that you do not trust, use a firewall, or make a token with
    `ray get-auth-token --generate` and set RAY_AUTH_MODE=token here and wherever you run `serve`,
    `ray` and `rayprism`.

    Up already with the same settings: says so, exit code 0.
    """
    from rayprism.fleet.cluster import start_cluster
    from rayprism.fleet.state import ClusterSettings

    settings = ClusterSettings(
        repository=None if repository is None else str(repository.resolve()),
        dashboard_port=dashboard_port,
        num_cpus=num_cpus,
        haproxy=not no_haproxy and sys.platform == "linux",
        drain_s=drain_s,
    )
    state, fresh = start_cluster(settings, state_dir, timeout_s=timeout_s, say=say)
    click.echo(f"Ray {state.versions['ray']} is up{'' if fresh else ' already'}")
    _print_cluster(state)
    click.echo(
        f"\nNext:\n  serve deploy --address {state.dashboard_address} FILE\n"
        f"  rayprism wait --address {state.dashboard_address}"
    )


def _print_cluster(state: ClusterState) -> None:
    rows = [
        ("dashboard", state.dashboard_address),
        ("repository", state.settings.repository or "none; `args` have to name it"),
        ("RAY_ADDRESS", state.ray_address),
        ("log", state.log),
        ("Ray's logs", f"{state.temp_dir}/session_latest/logs"),
    ]
    for name, value in rows:
        click.echo(f"  {name:<12} {value}")


@click.command(epilog="\b\nExamples:\n  rayprism down\n  rayprism down --state /tmp/other")
@state_option
def down(state_dir: Path) -> None:
    """Stop the cluster that `rayprism up` started, and all that is left of it.

    Also when its head was killed. Ends no process that is not its own. Not up: says so, exit
    code 0.
    """
    from rayprism.fleet.cluster import stop_cluster

    stopped = stop_cluster(state_dir, say=say)
    click.echo("the cluster is down" if stopped else "no cluster is up")


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism status\n"
    "  rayprism status --address http://127.0.0.1:8365 --json"
)
@address_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@click.pass_context
def status(ctx: click.Context, address: str | None, state_dir: Path, as_json: bool) -> None:
    """Show the cluster and what runs on it.

    Exit codes: 0 every application is running and there is at least one, 1 otherwise.
    """
    from dataclasses import asdict

    from rayprism.fleet.state import find_cluster

    cluster = find_cluster(state_dir)
    serve = connect(address, state_dir).state()
    if as_json:
        print_json(
            {
                "cluster": None if cluster is None else asdict(cluster),
                "serve": asdict(serve),
                "running": serve.is_running,
            }
        )
    else:
        if cluster is not None and address in (None, cluster.dashboard_address):
            click.echo(f"Ray {cluster.versions['ray']} is up since {cluster.started}")
            _print_cluster(cluster)
        _print_serve(serve)
    ctx.exit(0 if serve.is_running else 1)


def _print_serve(serve: ServeState) -> None:
    if not serve.applications:
        click.echo("Serve has no applications. `serve deploy FILE` starts them")
        return
    click.echo(f"Serve answers HTTP at {serve.http_address}")
    if serve.grpc_address:
        click.echo(f"Serve answers gRPC at {serve.grpc_address}")
    rows = []
    for app in serve.applications:
        replicas = ", ".join(
            f"{deployment.name} {deployment.running}/{deployment.target} {deployment.status}"
            for deployment in app.deployments
        )
        rows.append((app.name, app.route_prefix or "-", app.status, replicas))
    print_table(("APPLICATION", "ROUTE", "STATUS", "REPLICAS"), rows, indent="  ")
    for app in serve.applications:
        if app.cause:
            click.echo(f"\n{app.name}: {app.cause}")


@click.command(
    epilog="\b\nExamples:\n"
    "  serve deploy serve.yaml && rayprism wait\n"
    "  rayprism wait --timeout 300 --address http://127.0.0.1:8365"
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0), default=120.0, show_default=True,
    help="Seconds to wait at most.",
)  # fmt: skip
@address_option
@state_option
def wait(timeout_s: float, address: str | None, state_dir: Path) -> None:
    """Wait until every application is running, and show what changes.

    Exit codes: 0 all are running, 1 one has failed (its reason is shown) or the time is over.
    """
    from rayprism.fleet.waiting import wait_until_running

    state = wait_until_running(connect(address, state_dir), timeout_s=timeout_s, say=say)
    count = len(state.applications)
    click.echo(f"{count} application{'' if count == 1 else 's'} running at {state.http_address}")
