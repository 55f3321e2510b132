"""The gRPC channel to the proxy, for requests that are sent on as the bytes that they came in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio

__all__ = ["GrpcForwarder"]

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_UNBOUNDED = -1
_OPTIONS = [
    ("grpc.max_receive_message_length", _UNBOUNDED),
    ("grpc.max_send_message_length", _UNBOUNDED),
    # An address within the cluster: never through the proxy that the environment may name.
    ("grpc.enable_http_proxy", 0),
    # By default a proxy that was restarted would be left alone for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcForwarder:
    """One channel to the proxy. Made and used on one event loop.

    Args:
        host: Name or IP address.
        port: TCP port.
        max_requests: That may be on their way at a time.
    """

    def __init__(self, host: str, port: int, *, max_requests: int = 256) -> None:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._infer = self._channel.unary_unary(_METHOD)
        self._max_requests = max_requests
        self._on_their_way = 0
        self._closing: asyncio.Task[None] | None = None
        self._retired = False

    @property
    def is_busy(self) -> bool:
        """Whether as many requests are on their way as are allowed."""
        return self._on_their_way >= self._max_requests

    async def infer(
        self, request: bytes, metadata: Sequence[tuple[str, str]], timeout_s: float
    ) -> tuple[bytes, dict[str, str]]:
        """Sends one request.

        Returns:
            The answer as it came, and its trailing metadata.

        Raises:
            grpc.aio.AioRpcError: Any status but OK.
        """
        self._on_their_way += 1
        try:
            call = self._infer(request, timeout=timeout_s, metadata=tuple(metadata))
            answer = await call
            trailing = {
                key: value
                for key, value in await call.trailing_metadata()
                if isinstance(value, str)
            }
        finally:
            self._on_their_way -= 1
            if self._retired:
                self.retire()
        return answer, trailing

    def retire(self) -> None:
        """Ends the channel as soon as nothing is on its way over it."""
        self._retired = True
        if self._on_their_way == 0 and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self.close())

    async def close(self) -> None:
        """Ends the channel."""
        await self._channel.close()
