"""What a loop needs of a client, and a client of a loop."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Client", "Connection", "Listener", "Ticket"]


class Ticket:
    """The request that is on a connection; see `Recorder.add`."""

    __slots__ = ("intended", "late_s", "sent", "waited")

    def __init__(self) -> None:
        self.intended = self.late_s = self.sent = 0.0
        self.waited = False


class Connection(Protocol):
    """One request at a time."""

    ticket: Ticket
    busy: bool
    """It has a request that has not ended."""
    usable: bool
    """It may be given another request, when it is not busy."""

    def send(self, index: int) -> None:
        """Sends the request of this index; then it is busy."""

    def abandon(self) -> None:
        """Closes it; nothing is said of a request on it, but that it is lost."""


class Listener(Protocol):
    """Hears of all connections of a client."""

    def ended(
        self, connection: Connection, reason: int, status: int, retry_after: bool, text: str
    ) -> None:
        """The request on a connection has ended; `text` is what a failure said."""

    def lost(self, connection: Connection) -> None:
        """A connection is closed, for whichever reason; said once of each."""


class Client(Protocol):
    """Makes connections."""

    async def connect(self, listener: Listener) -> Connection:
        """A new connection.

        Raises:
            OSError: Nobody answers there.
        """
