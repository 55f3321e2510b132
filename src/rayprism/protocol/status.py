"""From an error to what a client sees of it: a status, a message, when to come back.

| code              | HTTP | gRPC               |
|-------------------|------|--------------------|
| invalid_input     | 400  | INVALID_ARGUMENT   |
| not_found         | 404  | NOT_FOUND          |
| too_large         | 413  | INVALID_ARGUMENT   |
| unsupported       | 501  | UNIMPLEMENTED      |
| overloaded        | 503  | RESOURCE_EXHAUSTED |
| not_ready         | 503  | UNAVAILABLE        |
| deadline_exceeded | 504  | DEADLINE_EXCEEDED  |
| model_failed      | 500  | INTERNAL           |
| anything else     | 500  | INTERNAL           |

`too_large` is not RESOURCE_EXHAUSTED: that code means `overloaded` here, and clients that retry on
it would send the same large request again and again.
"""

from __future__ import annotations

import math

import orjson

from rayprism.errors import Overloaded, RequestError

__all__ = [
    "code_of_grpc",
    "code_of_http",
    "error_body",
    "grpc_status",
    "http_status",
    "public_message",
    "retry_after_header",
]

_STATUSES = {
    "invalid_input": (400, "INVALID_ARGUMENT"),
    "not_found": (404, "NOT_FOUND"),
    "too_large": (413, "INVALID_ARGUMENT"),
    "unsupported": (501, "UNIMPLEMENTED"),
    "overloaded": (503, "RESOURCE_EXHAUSTED"),
    "not_ready": (503, "UNAVAILABLE"),
    "deadline_exceeded": (504, "DEADLINE_EXCEEDED"),
    "model_failed": (500, "INTERNAL"),
}
_OTHER = (500, "INTERNAL")
# Of codes that share a status, the first.
_BY_HTTP = {http: code for code, (http, _) in reversed(_STATUSES.items())}
_BY_GRPC = {grpc: code for code, (_, grpc) in reversed(_STATUSES.items())}
_NEUTRAL = "internal error; the server's log has the details"
# gRPC sends the message in HTTP/2 trailers, which proxies commonly bound at 8 KiB.
_MAX_MESSAGE = 4000
_MAX_RETRY_AFTER_S = 3600


def _status(error: BaseException) -> tuple[int, str]:
    return _STATUSES.get(error.code, _OTHER) if isinstance(error, RequestError) else _OTHER


def http_status(error: BaseException) -> int:
    """The HTTP status for an error."""
    return _status(error)[0]


def grpc_status(error: BaseException) -> str:
    """The name of the gRPC status code for an error, as in `grpc.StatusCode`."""
    return _status(error)[1]


def code_of_http(status: int, *, has_retry_after: bool = False) -> str:
    """The code of the error in an answer over HTTP, as far as it tells; `ok` for 200.

    Args:
        status: Of the answer.
        has_retry_after: Whether it says when to come back, as a full queue does.
    """
    if status == 503:
        return "overloaded" if has_retry_after else "not_ready"
    if status == 200:
        return "ok"
    return _BY_HTTP.get(status, "invalid_input" if status < 500 else "internal")


def code_of_grpc(name: str) -> str:
    """The code of the error that belongs to a gRPC status, as far as that tells.

    Args:
        name: As in `grpc.StatusCode`.
    """
    return _BY_GRPC.get(name, "internal")


def public_message(error: BaseException) -> str:
    """What a client may read of an error: always valid Unicode, and never long.

    Messages of a `RequestError` are written for clients. Those of all other errors may hold paths
    or values of the server, so they get one neutral sentence.
    """
    if not isinstance(error, RequestError):
        return _NEUTRAL
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}... ({len(message) - _MAX_MESSAGE} more characters)"
    return message.encode("utf-8", "backslashreplace").decode()


def error_body(error: BaseException) -> bytes:
    """The JSON body for an error: `{"error": "..."}`.

    Source: Open Inference Protocol v2, "Inference Response JSON Error Object".
    """
    return orjson.dumps({"error": public_message(error)})


def retry_after_header(error: BaseException) -> str | None:
    """The value of the header Retry-After: whole seconds, from 1; None where it has no place.

    Source: RFC 9110, section 10.2.3.
    """
    if not isinstance(error, Overloaded):
        return None
    after_s = error.retry_after_s
    if not after_s >= 1:  # also NaN
        return "1"
    return str(math.ceil(min(after_s, _MAX_RETRY_AFTER_S)))
