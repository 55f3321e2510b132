"""`rayprism monitoring up` and `down`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprism.cli.connection import state_option
from rayprism.cli.output import say, shown_path

if TYPE_CHECKING:
    from rayprism.fleet.monitoring import MonitoringState

__all__ = ["monitoring"]


@click.group(
    epilog="\b\nExamples:\n  rayprism up && rayprism monitoring up\n  rayprism monitoring down"
)
def monitoring() -> None:
    """Prometheus and Alertmanager for the cluster of `rayprism up`."""


@monitoring.command(
    "up",
    epilog="\b\nExamples:\n"
    "  rayprism up && rayprism monitoring up\n"
    "  rayprism monitoring up --prometheus-port 9190 --retention 2d --state /tmp/other",
)
@click.option("--prometheus-port", type=click.IntRange(1, 65535), default=9090, show_default=True)
@click.option("--alertmanager-port", type=click.IntRange(1, 65535), default=9093, show_default=True)
@click.option(
    "--retention", default="15d", show_default=True, metavar="TIME",
    help="How long Prometheus keeps what it saw.",
)  # fmt: skip
@state_option
def up(prometheus_port: int, alertmanager_port: int, retention: str, state_dir: Path) -> None:
    """Start both, with rayprism's rules and alerts, on 127.0.0.1.

    They have to be installed: `apt install prometheus prometheus-alertmanager`. Without
    Alertmanager Prometheus shows the alerts alone. A port that is taken is replaced by another one.
    Data, logs and configuration are in the folder `monitoring` of --state; what you write into
    `alertmanager.yml` there is kept.

    They go on when the cluster ends, and find the next one that `rayprism up` starts with the same
    --state and ports. Up already: says so, and tells Prometheus where the ports are others now.
    """
    from rayprism.fleet.monitoring import MonitoringSettings, start_monitoring

    settings = MonitoringSettings(
        prometheus_port=prometheus_port, alertmanager_port=alertmanager_port, retention=retention
    )
    state, fresh = start_monitoring(settings, state_dir, say=say)
    click.echo(f"monitoring is up{'' if fresh else ' already'}")
    _print_state(state)
    option = "" if state_dir == Path(".rayprism") else f" --state {state_dir}"
    click.echo(f"\nStop it with: rayprism monitoring down{option}")


def _print_state(state: MonitoringState) -> None:
    rows = [
        ("Prometheus", state.prometheus_address),
        ("alerts", f"{state.prometheus_address}/alerts"),
        ("targets", f"{state.prometheus_address}/targets"),
        ("Alertmanager", state.alertmanager_address or "not installed"),
        ("data, logs", shown_path(Path(state.folder))),
    ]
    for name, value in rows:
        click.echo(f"  {name:<12} {value}")


@monitoring.command(
    "down",
    epilog="\b\nExamples:\n"
    "  rayprism monitoring down\n"
    "  rayprism monitoring down --state /tmp/other",
)
@state_option
def down(state_dir: Path) -> None:
    """Stop both. Data and logs stay.

    Also where the cluster is gone. Ends no process that is not its own. Not up: says so, exit
    code 0.
    """
    from rayprism.fleet.monitoring import stop_monitoring

    stopped = stop_monitoring(state_dir, say=say)
    click.echo("monitoring is down" if stopped else "no monitoring is up")
