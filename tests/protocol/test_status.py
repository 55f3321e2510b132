from __future__ import annotations

import json

import grpc
import pytest

from rayprism import errors
from rayprism.errors import Overloaded, RayprismError, RequestError, SetupError
from rayprism.protocol.status import (
    code_of_grpc,
    code_of_http,
    error_body,
    grpc_status,
    http_status,
    public_message,
    retry_after_header,
)

EXPECTED = {
    errors.InvalidInput: (400, "INVALID_ARGUMENT"),
    errors.NotFound: (404, "NOT_FOUND"),
    errors.TooLarge: (413, "INVALID_ARGUMENT"),
    errors.Unsupported: (501, "UNIMPLEMENTED"),
    errors.Overloaded: (503, "RESOURCE_EXHAUSTED"),
    errors.NotReady: (503, "UNAVAILABLE"),
    errors.DeadlineExceeded: (504, "DEADLINE_EXCEEDED"),
    errors.ModelFailed: (500, "INTERNAL"),
}


def make(kind: type[RequestError], message: str = "it went wrong") -> RequestError:
    return kind(message, 1.5) if kind is Overloaded else kind(message)


def test_every_request_error_has_a_status() -> None:
    assert set(EXPECTED) == set(RequestError.__subclasses__())


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_status_tells_the_code_again(kind: type[RequestError]) -> None:
    status, name = EXPECTED[kind]
    assert code_of_http(status, has_retry_after=kind is Overloaded) == kind.code
    # Over gRPC two codes share a status; the more general one is meant.
    assert code_of_grpc(name) == ("invalid_input" if kind is errors.TooLarge else kind.code)


def test_what_no_error_of_ours_has() -> None:
    assert [code_of_http(status) for status in (200, 418, 502)] == [
        "ok",
        "invalid_input",
        "internal",
    ]
    assert code_of_grpc("DATA_LOSS") == "internal"


@pytest.mark.parametrize("kind", EXPECTED)
def test_status(kind: type[RequestError]) -> None:
    error = make(kind)
    assert (http_status(error), grpc_status(error)) == EXPECTED[kind]
    assert grpc.StatusCode[grpc_status(error)]
    assert json.loads(error_body(error)) == {"error": "it went wrong"}


@pytest.mark.parametrize(
    "error",
    [
        ValueError("/secret/path"),
        KeyError("password"),
        SetupError("/secret/path"),
        RayprismError("/secret/path"),
        MemoryError(),
        type("Liar", (Exception,), {"code": "invalid_input"})("/secret/path"),
    ],
)
def test_other_errors_tell_nothing(error: BaseException) -> None:
    assert (http_status(error), grpc_status(error)) == (500, "INTERNAL")
    assert public_message(error) == "internal error; the server's log has the details"
    assert b"secret" not in error_body(error)


def test_messages_are_always_valid_and_never_long() -> None:
    error = errors.InvalidInput("\ud800" + 'a"\n' * 10_000)
    message = json.loads(error_body(error))["error"]
    assert message.startswith('\\ud800a"\na')
    assert message.endswith("(26001 more characters)")
    assert len(message) < 4100


@pytest.mark.parametrize(
    ("after_s", "header"),
    [
        (0.0, "1"),
        (-3.0, "1"),
        (0.2, "1"),
        (1.0, "1"),
        (1.01, "2"),
        (59.5, "60"),
        (1e9, "3600"),
        (float("inf"), "3600"),
        (float("nan"), "1"),
    ],
)
def test_retry_after(after_s: float, header: str) -> None:
    assert retry_after_header(Overloaded("full", after_s)) == header


def test_no_retry_after_for_others() -> None:
    assert retry_after_header(errors.InvalidInput("no")) is None
    assert retry_after_header(ValueError()) is None
