"""HTTP requests that go to another version: the body as it came, and what counts as an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from rayprism.core.tensors import Tensors
from rayprism.protocol.http import decode_infer_response, request_timeout_s
from rayprism.protocol.messages import InferRequest
from rayprism.protocol.status import code_of_http
from rayprism.serving.asgi import Headers, Send, header_length
from rayprism.serving.forward import Answer, Busy, Unreachable, forwardable_headers
from rayprism.serving.links import Link, Links
from rayprism.serving.service import ModelService
from rayprism.serving.shadows import Copy, Reply, keep_copy
from rayprism.serving.traffic import (
    FORWARDED_HEADER,
    SHADOW_MARK,
    TIMEOUT_HEADER,
    VERSION_HEADER,
    NoAnswer,
    Target,
    parse_timeout,
)
from rayprism.telemetry.records import RequestRecord

__all__ = [
    "HttpCall",
    "forward_request",
    "most_seconds",
    "offer_copy",
    "returned_headers",
    "send_answer",
    "shadow_copy",
]

_VERSION = VERSION_HEADER.encode()
_TIMEOUT = TIMEOUT_HEADER.encode()
_CONTEXT = frozenset((b"traceparent", b"tracestate"))
_REPLACED = frozenset({_VERSION, _TIMEOUT, FORWARDED_HEADER.encode(), b"x-request-id"})
_RETURNED = (
    b"content-type",
    b"content-encoding",
    b"vary",
    b"inference-header-content-length",
    b"retry-after",
    _VERSION,
)
"""Headers of another version's answer that its client gets. The proxy adds its own again."""

Context = Sequence[tuple[str, str]]


class HttpCall:
    """One request, to be sent on.

    Args:
        headers: As they came.
        body: As it came.
        request_id: Of the request; the other version logs the same.
        sender: The version that sends it on.
        target: The version that is to answer.
        context: W3C trace context, sent in the place of the client's; empty: that goes on.
    """

    __slots__ = ("_body", "_context", "_headers", "_request_id", "_sender", "_target")

    def __init__(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes | memoryview,
        request_id: str,
        sender: str,
        target: Target,
        context: Context = (),
    ) -> None:
        self._context = context
        self._headers = headers
        self._body = body
        self._request_id = request_id
        self._sender = sender
        self._target = target

    async def deliver(self, budget_s: float, links: Links, link: Link) -> Answer:
        """Sends it.

        Raises:
            NoAnswer: It is not answered, or not by the version that is meant, or (unless the client
                named the version) not with 200.
        """
        extra = _extra_headers(self._request_id, self._sender, budget_s)
        headers = _with_context(self._headers, extra, self._context)
        answer = await _post(links, link, headers, extra, self._body, budget_s)
        version = self._target.version
        # A proxy that cannot reach it answers, too, and its pages mean nothing to a client.
        if not (self._target.named and answer.headers.get(_VERSION) == b"%d" % version):
            _check_answer(answer, version)
        return answer


def _with_context(
    headers: Iterable[tuple[bytes, bytes]], extra: list[tuple[bytes, bytes]], context: Context
) -> Iterable[tuple[bytes, bytes]]:
    """The headers without the client's trace context, where another is sent among the extra."""
    if not context:
        return headers
    extra.extend((name.encode(), value.encode()) for name, value in context)
    return [header for header in headers if header[0] not in _CONTEXT]


def _extra_headers(request_id: str, sender: str, budget_s: float) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", request_id.encode("latin-1")),
        (FORWARDED_HEADER.encode(), sender.encode()),
        (_TIMEOUT, b"%.6f" % budget_s),
    ]


async def _post(
    links: Links,
    link: Link,
    headers: Iterable[tuple[bytes, bytes]],
    extra: list[tuple[bytes, bytes]],
    body: bytes | memoryview,
    budget_s: float,
) -> Answer:
    forwarder = links.http
    if forwarder is None:
        raise NoAnswer("unreachable")
    try:
        sent = [header for header in forwardable_headers(headers) if header[0] not in _REPLACED]
        sent.extend(extra)
        return await forwarder.post(link.route + b"/infer", sent, body, budget_s)
    except TimeoutError:
        raise NoAnswer("late") from None
    except Busy:
        raise NoAnswer("busy") from None
    except Unreachable:
        raise NoAnswer("unreachable") from None
    except ValueError:
        raise NoAnswer("refused") from None  # a header that cannot be sent on


def _check_answer(answer: Answer, version: int) -> None:
    if answer.status != 200:
        raise NoAnswer(_reason(answer))
    if answer.headers.get(_VERSION) != b"%d" % version:
        raise NoAnswer("wrong_version")


def _reason(answer: Answer) -> str:
    if answer.status == 404:
        return "gone"
    if answer.status == 503:
        return "overloaded" if b"retry-after" in answer.headers else "not_ready"
    if answer.status == 504:
        return "late"
    return "refused" if 400 <= answer.status < 500 else "error"


def most_seconds(headers: Headers) -> float | None:
    """What the sender of a request that was sent on allows at most; None where it says nothing.

    Raises:
        InvalidInput: It says what is no time.
    """
    said = headers.get(_TIMEOUT)
    return None if said is None else parse_timeout(said.decode("latin-1"))


async def forward_request(
    service: ModelService,
    target: Target,
    raw_headers: Iterable[tuple[bytes, bytes]],
    headers: Headers,
    body: bytes | memoryview,
    most_s: float | None,
    record: RequestRecord,
) -> Answer | None:
    """Sends a request to the version that it belongs to.

    Args:
        service: The version to which it came.
        target: The version that is to answer.
        raw_headers: As they came.
        headers: The same, by name.
        body: As it came.
        most_s: Most seconds that it may take, whatever it says itself.
        record: Gets where it was sent and what became of it.

    Returns:
        The answer; None where it is to be answered here.

    Raises:
        NotFound, NotReady, DeadlineExceeded: The client named a version that does not answer.
    """
    traffic = service.traffic
    # What a request that is not decoded allows, as far as can be read.
    said_s = None
    if b"content-encoding" not in headers:
        said_s = request_timeout_s(body, header_length(headers))
    allowed_s = said_s or service.config.default_timeout_s
    if most_s is not None:
        allowed_s = min(allowed_s, most_s)
    trace = record.trace
    context = trace.headers(trace.forward_traceparent) if trace else ()
    call = HttpCall(raw_headers, body, record.request_id, service.version, target, context)
    answer = await traffic.send(target, traffic.budget_s(target, allowed_s), call.deliver, record)
    if answer is not None:
        has_retry_after = b"retry-after" in answer.headers
        record.reason = code_of_http(answer.status, has_retry_after=has_retry_after)
    return answer


def returned_headers(answer: Answer) -> list[tuple[bytes, bytes]]:
    """The headers of another version's answer that its client gets, but for its length."""
    return [(name, answer.headers[name]) for name in _RETURNED if name in answer.headers]


async def send_answer(send: Send, answer: Answer) -> None:
    """Gives another version's answer to the client, as it came."""
    headers = returned_headers(answer)
    headers.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def offer_copy(
    service: ModelService,
    raw_headers: Iterable[tuple[bytes, bytes]],
    body: bytes | memoryview,
    record: RequestRecord,
    request: InferRequest,
    outputs: Tensors,
) -> None:
    """Lets the shadows draw for a request that was answered here: see `Shadows.offer`.

    Args:
        service: The version that answered it.
        raw_headers: As they came.
        body: As it came.
        record: Of the request.
        request: What the body says.
        outputs: Its answer.
    """

    def make() -> Copy:
        timeout_s = service.config.default_timeout_s
        if request.timeout_s:
            timeout_s = min(request.timeout_s, timeout_s)
        trace = record.trace
        context = trace.headers(trace.traceparent) if trace else ()
        return shadow_copy(
            raw_headers,
            body,
            record.request_id,
            service.version,
            request,
            outputs,
            timeout_s,
            context,
        )

    service.shadows.offer(make)


def shadow_copy(
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes | memoryview,
    request_id: str,
    sender: str,
    request: InferRequest,
    outputs: Tensors,
    timeout_s: float,
    context: Context = (),
) -> Copy:
    """A copy of a request that was answered here.

    Args:
        headers: As they came.
        body: As it came.
        request_id: Of the request.
        sender: The version that answered it.
        request: What the body says.
        outputs: Its answer.
        timeout_s: How long the shadow may take.
        context: As for `HttpCall`.
    """
    # An answer that is compressed for the client would have to be inflated here.
    plain = [header for header in headers if header[0] != b"accept-encoding"]

    async def deliver(version: int, links: Links, link: Link) -> Reply:
        extra = _extra_headers(f"{request_id}-shadow", sender + SHADOW_MARK, timeout_s)
        headers = _with_context(plain, extra, context)
        answer = await _post(links, link, headers, extra, body, timeout_s)
        _check_answer(answer, version)
        return Reply(len(answer.body), partial(_decode, answer))

    return keep_copy(len(body), outputs, deliver, json_names=_json_outputs(request, outputs))


def _decode(answer: Answer) -> Tensors:
    return decode_infer_response(answer.body, header_length(answer.headers)).outputs


def _json_outputs(request: InferRequest, outputs: Tensors) -> frozenset[str]:
    if request.outputs:
        return frozenset(output.name for output in request.outputs if not output.binary)
    return frozenset() if request.binary_by_default else frozenset(outputs)
