"""Calls of `ModelInfer` with requests that are bytes already, and answers that stay bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import grpc

from bench.loadgen.connections import Listener, Ticket
from bench.loadgen.records import BROKEN, CONNECT, GRPC, OK, STATUS

__all__ = ["GrpcClient"]

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_OPTIONS = (
    # Otherwise channels to one address share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
)
_NO_CONNECTION = ("failed to connect to all addresses", "dns resolution failed")
_LOST_CONNECTION = ("socket closed", "connection reset", "recvmsg:", "broken pipe", "goaway")
"""What gRPC itself says, with the code UNAVAILABLE, where a server said nothing at all."""


class GrpcClient:
    """Channels to one address, each with a connection of its own.

    Args:
        address: host:port.
        metadata: Of all calls.
        bodies: Serialised requests.
    """

    def __init__(self, address: str, metadata: Mapping[str, str], bodies: Iterable[bytes]) -> None:
        self._address = address
        self._metadata = tuple((name.lower(), value) for name, value in metadata.items())
        self._bodies = list(bodies)

    async def connect(self, listener: Listener) -> GrpcConnection:
        """A new channel that is connected.

        Raises:
            OSError: Nobody answers there.
        """
        channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        try:
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    raise ConnectionRefusedError(f"no connection to {self._address}")
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
        except BaseException:
            await channel.close()
            raise
        return GrpcConnection(channel, self._bodies, self._metadata, listener)


class GrpcConnection:
    """One channel, with one call at a time.

    Calls have no deadline that the server would hear of, as requests over HTTP have none.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        bodies: Sequence[bytes],
        metadata: tuple[tuple[str, str], ...],
        listener: Listener,
    ) -> None:
        self.ticket = Ticket()
        self.busy = False
        self.usable = True
        self._channel = channel
        self._call = channel.unary_unary(_METHOD)
        self._bodies = bodies
        self._metadata = metadata
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def send(self, index: int) -> None:
        """Sends a request; the connection is busy until its listener hears that it has ended."""
        self.busy = True
        self._task = asyncio.get_running_loop().create_task(
            self._ask(self._bodies[index % len(self._bodies)])
        )

    def abandon(self) -> None:
        """Closes it; the call on it is cancelled."""
        self.busy = False
        if self.usable:
            self.usable = False
            if self._task is not None:
                self._task.cancel()
            self._task = asyncio.get_running_loop().create_task(self._close())

    async def _ask(self, body: bytes) -> None:
        reason, status, retry_after, text = OK, GRPC, False, ""
        try:
            await self._call(body, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
            status = GRPC + int(error.code().value[0]) if reason == STATUS else 0
            retry_after = any(key == "retry-after" for key, _ in error.trailing_metadata() or ())
            text = f"{error.code().name}: {error.details()}"
        self.busy = False
        self._task = None
        if reason in (CONNECT, BROKEN):
            # Not left to the channel, which would wait a second before it tries again.
            self.abandon()
        self._listener.ended(self, reason, status, retry_after, text)

    async def _close(self) -> None:
        await self._channel.close()
        self._listener.lost(self)


def _reason(error: grpc.aio.AioRpcError) -> int:
    details = (error.details() or "").lower()
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if details.startswith(_NO_CONNECTION):
            return CONNECT
        if details.startswith(_LOST_CONNECTION):
            return BROKEN
    return STATUS
