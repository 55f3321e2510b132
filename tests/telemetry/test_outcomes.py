"""Outcomes, and what else is read out of a record."""

from __future__ import annotations

import pytest

from rayprism import errors
from rayprism.telemetry.catalogue import REASONS, STAGES
from rayprism.telemetry.outcomes import OUTCOMES, outcome_of
from rayprism.telemetry.readings import shown_id, stages
from rayprism.telemetry.records import RequestRecord


def test_every_reason_has_its_outcome() -> None:
    of = {
        outcome: {reason for reason in REASONS if outcome_of(reason) == outcome}
        for outcome in OUTCOMES
    }
    assert of == {
        "ok": {"ok"},
        "cancelled": {"cancelled"},
        "client_error": {"invalid_input", "not_found", "too_large", "unsupported"},
        "server_error": {
            "deadline_exceeded",
            "internal",
            "model_failed",
            "not_ready",
            "overloaded",
        },
    }


def test_every_error_of_a_request_is_a_reason() -> None:
    codes = {error.code for error in errors.RequestError.__subclasses__()}
    assert codes <= set(REASONS)


def test_what_nobody_knows_is_the_servers_fault() -> None:
    assert outcome_of("unheard_of") == "server_error"


def whole() -> RequestRecord:
    return RequestRecord(
        "http",
        "client",
        "x",
        10.0,
        forward_began_s=11.0,
        forward_ended_s=12.0,
        forwarded_to="4",
        fallback="late",
        decoded_s=13.0,
        prepared_s=14.0,
        started_s=16.0,
        computed_s=19.0,
        ended_s=20.0,
    )


def test_all_stages_of_a_request() -> None:
    found = stages(whole())
    assert {name for name, _, _ in found} == set(STAGES)
    assert found == [
        ("forward", 11.0, 12.0),
        ("decode", 12.0, 13.0),
        ("prepare", 13.0, 14.0),
        ("queue", 14.0, 16.0),
        ("compute", 16.0, 19.0),
        ("encode", 19.0, 20.0),
    ]


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"computed_s": 0.0}, ("queue", 14.0, 16.0)),
        ({"computed_s": 0.0, "started_s": 0.0}, ("prepare", 13.0, 14.0)),
        (
            {"computed_s": 0.0, "started_s": 0.0, "reason": "deadline_exceeded"},
            ("queue", 14.0, 20.0),
        ),
        ({"decoded_s": 0.0}, ("forward", 11.0, 12.0)),
        ({"decoded_s": 0.0, "forward_ended_s": 0.0}, ("forward", 11.0, 20.0)),
    ],
)
def test_a_request_ends_anywhere(changes: dict[str, float | str], last: tuple[str, float]) -> None:
    record = whole()
    for name, value in changes.items():
        setattr(record, name, value)
    assert stages(record)[-1] == last


def test_a_candidate_that_rests_is_not_asked() -> None:
    record = whole()
    record.fallback = "resting"
    assert stages(record)[0] == ("decode", 12.0, 13.0)


def test_ids_are_bounded_text() -> None:
    assert shown_id("a-1") == "a-1"
    assert shown_id("é" * 200) == "é" * 128
    assert shown_id("é\u2028\ud800\x85") == "é\ufffd\ufffd\ufffd"
    assert shown_id("é\n") == "é\n"
