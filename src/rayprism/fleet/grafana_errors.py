"""What goes wrong with a Grafana, in words, and what can be told before it is asked."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rayprism.errors import SetupError

__all__ = [
    "NEW_TOKEN",
    "GrafanaError",
    "check_token",
    "find_cause",
    "parse_url",
    "read_refusal",
]

_MAX_SHOWN = 300
_TOKEN = re.compile(r"[!-~]+")
NEW_TOKEN = (
    "In Grafana: Administration > Users and access > Service accounts > Add service account "
    "(role Editor; Admin where a datasource is to be made) > Add token"
)


class GrafanaError(SetupError):
    """Grafana cannot be reached, or did not do what it was asked for.

    Args:
        message: For the person who has to act on it.
        status: Of the answer; 0 where there was none.
    """

    code = "grafana"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def parse_url(url: str) -> SplitResult:
    """The parts of Grafana's URL.

    Raises:
        GrafanaError: It is none, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not host:
        # What cannot be read may hold a password.
        raise GrafanaError("--url is not an HTTP URL. It is Grafana's, as in http://grafana:3000")
    if "@" in parts.netloc:
        raise GrafanaError(
            "--url holds a user or a password, which others could read. Use a service account's "
            "token in GRAFANA_TOKEN or --token-file"
        )
    return parts


def check_token(token: str) -> None:
    """Sees that a token can be one. What cannot is not shown, nor left to be shown by others.

    Raises:
        GrafanaError: There is none, or it has signs that no token has.
    """
    if not token:
        raise GrafanaError(
            f"no token. Set GRAFANA_TOKEN, or use --token-file FILE (- for stdin). {NEW_TOKEN}"
        )
    if not _TOKEN.fullmatch(token):
        raise GrafanaError(
            "the token holds spaces, line breaks or signs that no token has. Was more than the "
            "token put into the file or the variable?"
        )


def read_refusal(response: Any) -> str:
    """What a refusal says, whatever its form."""
    if isinstance(response, dict):
        response = response.get("message") or response
    text = str(response).strip()
    if text.startswith("<"):
        return "an HTML page"
    text = text.removesuffix(".")
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def find_cause(error: BaseException) -> str:
    """The innermost reason: `requests` wraps that of urllib3, which wraps that of the system."""
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        inner = inner or error.__cause__
        if inner is None:
            break
        error = inner
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"\s*\(_ssl\.c:\d+\)", "", text).strip()
