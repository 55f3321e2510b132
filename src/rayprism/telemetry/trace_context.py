"""W3C trace context: the two headers by which a trace goes from one program to the next.

Source: https://www.w3.org/TR/trace-context-2/. OpenTelemetry's propagator does the same by way of
contexts and carriers, in several times the time, on the path of every request that has a parent;
the tests compare the two.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "RANDOM",
    "SAMPLED",
    "Parent",
    "format_traceparent",
    "parse_traceparent",
    "tracestate_of",
]

SAMPLED = 0x01
RANDOM = 0x02
"""Whether the trace's id is random in its last 56 bits."""

_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_MOST_TRACEPARENT = 512
_MEMBER = re.compile(
    r"([a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_MOST_TRACESTATE = 512
_MOST_MEMBERS = 32


class Parent(NamedTuple):
    """The span of another program that a request belongs to.

    Args:
        trace: The trace's id.
        span: The span's id.
        flags: Only those that are known.
    """

    trace: int
    span: int
    flags: int


def parse_traceparent(header: str) -> Parent | None:
    """What the header says; None where it is not valid, which is to be as if it were not there.

    Later versions than 00 may go on after the flags, and are read as far as they are known.
    """
    if len(header) > _MOST_TRACEPARENT:
        return None
    match = _TRACEPARENT.fullmatch(header.strip(" \t"))
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if more is not None and version == "00":
        return None
    return Parent(int(trace, 16), int(span, 16), int(flags, 16) & (SAMPLED | RANDOM))


def format_traceparent(trace: int, span: int, flags: int) -> str:
    """The header, of version 00."""
    return f"00-{trace:032x}-{span:016x}-{flags:02x}"


def tracestate_of(header: str) -> str:
    """The header as it is passed on; empty where it is not valid, or longer than must be kept."""
    if len(header) > _MOST_TRACESTATE:
        return ""
    members = [member for part in header.split(",") if (member := part.strip(" \t"))]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    if len(keys) != len(members) or len(keys) > _MOST_MEMBERS:
        return ""
    return ",".join(members)
