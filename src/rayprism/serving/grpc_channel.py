"""The gRPC channel to the proxy, for requests that are sent on as the bytes that they came in."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

__all__ = ["GrpcForwarder"]

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_UNBOUNDED = -1
_OPTIONS = [
    ("grpc.max_receive_message_length", _UNBOUNDED),
    ("grpc.max_send_message_length", _UNBOUNDED),
]


class GrpcForwarder:
    """One channel to the proxy. Made and used on one event loop.

    Args:
        address: As in "127.0.0.1:9000".
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._infer = self._channel.unary_unary(_METHOD)

    async def infer(
        self, request: bytes, metadata: Sequence[tuple[str, str]], timeout_s: float
    ) -> tuple[bytes, dict[str, str]]:
        """Sends one request.

        Returns:
            The answer as it came, and its trailing metadata.

        Raises:
            grpc.aio.AioRpcError: Any status but OK.
        """
        call = self._infer(request, timeout=timeout_s, metadata=tuple(metadata))
        answer = await call
        trailing = {
            key: value for key, value in await call.trailing_metadata() if isinstance(value, str)
        }
        return answer, trailing

    async def close(self) -> None:
        """Ends the channel."""
        await self._channel.close()
