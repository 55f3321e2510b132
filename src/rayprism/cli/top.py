"""`rayprism top`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprism.cli.connection import address_option, connect, state_option

if TYPE_CHECKING:
    from rayprism.fleet.metrics import MetricsReader
    from rayprism.fleet.top_rows import View

__all__ = ["top"]

_WINDOW_S = 30.0
# Twice what passes between two messages of a replica, so that there are two of each in it.
_ONCE_WINDOW_S = 10.0


@click.command(
    epilog="\b\nExamples:\n"
    "  rayprism top\n"
    "  rayprism top --model flights --every 5\n"
    "  rayprism top --once\n"
    "  rayprism top --json | jq '.versions[] | {model, version, p99_s}'"
)
@address_option
@state_option
@click.option(
    "--every", "every_s", type=click.FloatRange(0.5), default=2.0, show_default=True,
    metavar="SECONDS", help="How often to look. What is looked at changes every 5 s.",
)  # fmt: skip
@click.option(
    "--window", "window_s", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
    help="What rates and quantiles are over; best a multiple of 5.  "
    f"[default: {_WINDOW_S:g}; {_ONCE_WINDOW_S:g} with --once]",
)  # fmt: skip
@click.option("--model", "models", multiple=True, metavar="NAME", help="Only this; several times.")
@click.option("--once", is_flag=True, help="Look twice, a window apart, and print that.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs, a document a line.")
def top(
    address: str | None,
    state_dir: Path,
    every_s: float,
    window_s: float | None,
    models: Sequence[str],
    once: bool,
    as_json: bool,
) -> None:
    """Watch the fleet: requests, errors, latency, queues, batch jobs, nodes.

    The numbers come from the nodes themselves; no Prometheus has to be there. What is wrong is red
    and has an exclamation mark. Columns for which a terminal is too narrow are left out. Ctrl-C
    ends it.
    """
    from rayprism.fleet.metrics import MetricsReader
    from rayprism.fleet.top import SETTLED_S, WANTED, make_view

    reader = MetricsReader(WANTED, connect(address, state_dir).address)
    if once:
        first = reader.read()
        time.sleep(window_s or _ONCE_WINDOW_S)
        _print(make_view([first, reader.read()], models), reader.address, as_json=as_json)
        return
    window_s = window_s or _WINDOW_S
    views = _watch(reader, every_s, window_s, models, settled_s=min(window_s, SETTLED_S))
    try:
        if as_json or not _is_screen():
            for view in views:
                _print(view, reader.address, as_json=as_json)
        else:
            _show(views, reader.address)
    except KeyboardInterrupt:
        return


def _is_screen() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _watch(
    reader: MetricsReader,
    every_s: float,
    window_s: float,
    models: Sequence[str],
    *,
    settled_s: float,
) -> Iterator[View]:
    from rayprism.fleet.top import keep_recent, make_view

    began_s = time.monotonic()
    samples = [reader.read()]
    while True:
        yield make_view(samples, models, settled_s=settled_s)
        # In step, whatever an answer takes.
        time.sleep(every_s - (time.monotonic() - began_s) % every_s)
        samples = keep_recent([*samples, reader.read()], window_s)


def _show(views: Iterator[View], address: str) -> None:
    from rich.console import Console
    from rich.live import Live

    from rayprism.cli.top_tables import draw

    first = next(views)  # an error of it belongs to the screen that stays
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(draw(first, _head(first, address), console.width), refresh=True)
        for view in views:
            live.update(draw(view, _head(view, address), console.width), refresh=True)


def _print(view: View, address: str, *, as_json: bool) -> None:
    if as_json:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        document = {"at": at, "address": address, **view.to_json()}
        click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
        return
    from rayprism.cli.top_tables import describe_view

    click.echo(describe_view(view, _head(view, address)) + "\n")


def _head(view: View, address: str) -> str:
    over = f"  over {view.interval_s:.0f} s" if view.interval_s else ""
    return f"rayprism top  {address}  {datetime.now():%H:%M:%S}{over}"
