"""Asks Serve's controller what runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.serve.context import _get_global_client

__all__ = ["ask_controller"]

_CONTROLLER_TIMEOUT_S = 5.0


def ask_controller() -> Mapping[str, Any]:
    """Everything that Serve says of itself. Blocks; to be called in a thread.

    Raises:
        RuntimeError: This process is not connected to Serve.
        ray.exceptions.GetTimeoutError: The controller is away.
    """
    client = _get_global_client()
    if client is None:
        raise RuntimeError("this process is not connected to Ray Serve")
    # Not `client.get_serve_details()`, which waits for ever where the controller is gone.
    details: Mapping[str, Any] = ray.get(
        client._controller.get_serve_instance_details.remote(), timeout=_CONTROLLER_TIMEOUT_S
    )
    return details
