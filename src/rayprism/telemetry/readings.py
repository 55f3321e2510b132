"""What is read out of a request's record, for the request log and for traces alike."""

from __future__ import annotations

import re

from rayprism.telemetry.records import RequestRecord

__all__ = ["MOST_ID_CHARACTERS", "shown_id", "stages"]

MOST_ID_CHARACTERS = 128

_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Ends of lines that JSON does not escape, and halves of characters, which are not text."""


def stages(record: RequestRecord) -> list[tuple[str, float, float]]:
    """The stages that a request came to, each with its beginning and its end, in their order.

    A request that fails in the middle of a stage leaves no end of it, so the stage is missing. Two
    are worth more than that: what waited until its deadline has been in the queue, and what was
    sent on and then left by its client has been on its way.
    """
    found = []
    if record.forward_began_s and record.fallback != "resting":
        ended_s = record.forward_ended_s or record.ended_s
        found.append(("forward", record.forward_began_s, ended_s))
    ready_s = record.decoded_s
    if not ready_s:
        return found
    found.append(("decode", record.forward_ended_s or record.began_s, ready_s))
    if record.prepared_s:
        found.append(("prepare", ready_s, record.prepared_s))
        ready_s = record.prepared_s
    if record.started_s:
        found.append(("queue", ready_s, record.started_s))
        if record.computed_s:
            found.append(("compute", record.started_s, record.computed_s))
            found.append(("encode", record.computed_s, record.ended_s))
    elif record.reason == "deadline_exceeded":
        found.append(("queue", ready_s, record.ended_s))
    return found


def shown_id(request_id: str) -> str:
    """A request's id, which its client may have chosen, as it can be written anywhere."""
    bounded = request_id[:MOST_ID_CHARACTERS]
    return bounded if bounded.isascii() else _UNSAFE.sub("\ufffd", bounded)
