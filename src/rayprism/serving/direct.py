"""Plain inference requests of the fast lane, answered without a task.

The same steps as in `http.ModelApp`'s own handling, which may await; here each step calls the next.
Only a request that goes to another version gets a task, from there on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rayprism.core.tensors import Tensors
from rayprism.errors import RequestError
from rayprism.protocol.compression import compress
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.protocol.messages import InferRequest
from rayprism.protocol.status import error_body, http_status
from rayprism.serving.asgi import (
    Headers,
    answer_encoding,
    answer_headers,
    compressed_headers,
    compresses_at_once,
    error_to_tell,
    header_length,
)
from rayprism.serving.forward_http import (
    forward_request,
    most_seconds,
    offer_copy,
    returned_headers,
)
from rayprism.serving.scheduler import Job
from rayprism.serving.service import ModelService
from rayprism.serving.traffic import FORWARDED_HEADER, VERSION_HEADER, Target
from rayprism.telemetry.records import RequestRecord

__all__ = ["DirectCall", "Reply", "is_plain"]

Reply = Callable[[int, list[tuple[bytes, bytes]], bytes], None]
"""Sends an answer: status, headers, body."""
_AWAITED = frozenset({VERSION_HEADER.encode(), b"content-encoding"})
"""Headers of requests that may have to wait for something else than the model."""
_FORWARDED = FORWARDED_HEADER.encode()


def is_plain(service: ModelService, headers: Headers) -> bool:
    """Whether a request can be answered by a `DirectCall`."""
    return service.is_direct and service.telemetry.tracer is None and _AWAITED.isdisjoint(headers)


class DirectCall:
    """One request for which `is_plain` holds.

    Args:
        service: The version that answers it.
        signature: Headers of every answer of that version.
        headers: Of the request, as they came.
        found: The same, by name.
        body: The whole of it.
        record: Gets what it takes at each step.
        reply: Called once with the answer, but not before `begin` returns.
    """

    __slots__ = (
        "_body",
        "_found",
        "_headers",
        "_job",
        "_most_s",
        "_record",
        "_reply",
        "_request",
        "_service",
        "_signature",
        "_task",
    )

    def __init__(
        self,
        service: ModelService,
        signature: tuple[tuple[bytes, bytes], ...],
        headers: Sequence[tuple[bytes, bytes]],
        found: Headers,
        body: bytes | memoryview,
        record: RequestRecord,
        reply: Reply,
    ) -> None:
        self._service = service
        self._signature = signature
        self._headers = headers
        self._found = found
        self._body = body
        self._record = record
        self._reply = reply
        self._most_s: float | None = None
        self._request: InferRequest | None = None
        self._job: Job | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, *, names_version: bool) -> None:
        """Lets the request wait for its turn, or sends it on.

        Args:
            names_version: Whether its path names this version: then no other answers it.
        """
        service = self._service
        try:
            self._most_s = most_seconds(self._found)
            traffic = service.traffic
            if traffic.is_split and not names_version and _FORWARDED not in self._found:
                target = traffic.target(None, traffic.sticky_key(self._found))
                if target is not None:
                    loop = asyncio.get_running_loop()
                    self._task = loop.create_task(self._forward(target))
                    return
            self._submit()
        except Exception as error:
            asyncio.get_running_loop().call_soon(self._done, None, error)

    def cancel(self) -> None:
        """Takes the request back: its client has left."""
        task, job = self._task, self._job
        if task is not None:
            # By then it says how long the other version had it, if it had it at all.
            task.add_done_callback(self._cancelled)
            task.cancel()
        elif job is not None and not job.is_done:
            self._service.cancel(job)
            self._cancelled()

    def _cancelled(self, _: asyncio.Task[None] | None = None) -> None:
        self._record.reason = "cancelled"
        self._service.telemetry.finish(self._record)

    def _submit(self) -> None:
        self._request = decode_infer_request(self._body, header_length(self._found))
        self._job = self._service.submit(
            self._request, self._record, self._done, most_s=self._most_s
        )

    async def _forward(self, target: Target) -> None:
        try:
            answer = await forward_request(
                self._service,
                target,
                self._headers,
                self._found,
                self._body,
                self._most_s,
                self._record,
            )
            self._task = None
            if answer is None:
                self._submit()
                return
        except Exception as error:
            self._task = None
            self._done(None, error)
            return
        self._finish(answer.status, returned_headers(answer), answer.body)

    def _done(self, outputs: Tensors | None, error: Exception | None) -> None:
        service, request = self._service, self._request
        if outputs is None or request is None:
            self._reply_error(error or RequestError("no answer"))
            return
        try:
            answer = encode_infer_response(service.model_name, service.version, request, outputs)
        except Exception as raised:
            self._reply_error(raised)
            return
        self._reply_outputs(*answer)
        if service.shadows.is_on and _FORWARDED not in self._found:
            offer_copy(service, self._headers, self._body, self._record, request, outputs)

    def _reply_outputs(self, body: bytes, json_length: int | None) -> None:
        headers = answer_headers(json_length, self._signature)
        encoding = answer_encoding(body, self._found)
        if encoding is None:
            self._finish(200, headers, body)
            return
        headers += compressed_headers(encoding)
        if compresses_at_once(body):
            self._finish(200, headers, compress(body, encoding))
            return

        def compressed(future: asyncio.Future[bytes]) -> None:
            self._finish(200, headers, future.result())

        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, compress, body, encoding).add_done_callback(compressed)

    def _reply_error(self, error: Exception) -> None:
        record = self._record
        record.reason = error.code if isinstance(error, RequestError) else "internal"
        told, extra = error_to_tell(error, record.request_id, self._signature)
        self._finish(http_status(told), answer_headers(None, extra), error_body(told))

    def _finish(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        headers.append((b"content-length", b"%d" % len(body)))
        self._reply(status, headers, body)
        self._service.telemetry.finish(self._record)
