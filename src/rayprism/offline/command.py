"""How the commands in batch/ end: a message for a person, and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from rayprism.errors import RayprismError

__all__ = ["resumable"]


@contextmanager
def resumable() -> Iterator[None]:
    """Around the work of a command that goes on where it was stopped.

    An error of ours is told in one message, exit code 1. Ctrl-C and SIGTERM stop it, exit code 130.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except RayprismError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("\nstopped. What is done stays; the same command goes on", err=True)
        sys.exit(130)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
