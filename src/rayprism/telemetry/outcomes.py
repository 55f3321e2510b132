"""How a request ended, in one of four words."""

from __future__ import annotations

from typing import Literal

__all__ = ["OUTCOMES", "Outcome", "outcome_of"]

Outcome = Literal["ok", "client_error", "server_error", "cancelled"]

OUTCOMES: tuple[Outcome, ...] = ("ok", "client_error", "server_error", "cancelled")

_OUTCOMES: dict[str, Outcome] = {
    "ok": "ok",
    "cancelled": "cancelled",
    "invalid_input": "client_error",
    "not_found": "client_error",
    "too_large": "client_error",
    "unsupported": "client_error",
}


def outcome_of(reason: str) -> Outcome:
    """The outcome that a reason belongs to.

    Args:
        reason: `ok`, `cancelled`, or the code of an error. A code that is not known here is the
            server's fault: it has failed in a way that nobody thought of.
    """
    return _OUTCOMES.get(reason, "server_error")
