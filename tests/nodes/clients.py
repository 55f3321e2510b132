"""Clients that are there before, while and after something happens, and must not notice it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rayprism.core.tensors import Array
from tests.nodes.machines import Machine
from tests.support.load import Load
from tests.support.models import mlp_reference

__all__ = ["clients", "front", "reference"]

_ANSWERS = 200
"""Before and after."""


def reference(version: str, rows: Array) -> Array:
    """What `tiny` answers."""
    return mlp_reference(rows)


def front(machine: Machine) -> tuple[str, str]:
    """HTTP and gRPC of the proxy on a node."""
    return f"http://{machine.address}:8000", f"{machine.address}:9000"


@contextmanager
def clients(*fronts: tuple[str, str]) -> Iterator[list[Load]]:
    """Clients of each front. At the end none of their requests may have failed.

    Args:
        *fronts: Of nodes or of a load balancer: HTTP and gRPC.
    """
    loads = [Load(*each, "tiny", reference) for each in fronts]
    with ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        for load in loads:
            load.wait_for(_ANSWERS)
        yield loads
        for load in loads:
            load.wait_for(_ANSWERS)
    failures = {each: load.failures for each, load in zip(fronts, loads, strict=True)}
    assert not any(failures.values()), failures
