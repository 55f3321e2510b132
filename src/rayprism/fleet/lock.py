"""One change of a fleet at a time: a lock in the model repository.

The lock is the kernel's: it goes when its holder ends, however that was.

Source: flock(2). On NFS, Linux turns it into a lock of the server's, so it holds between machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rayprism.errors import ClusterError

__all__ = ["LOCK_FILE", "lock_fleet", "whoami"]

LOCK_FILE = ".fleet.lock"
_MAX_BYTES = 64 * 1024


@contextlib.contextmanager
def lock_fleet(root: Path, command: str) -> Iterator[None]:
    """Holds the lock of a repository. Does not wait for it.

    Args:
        root: Of the repository.
        command: What it is held for, as others are told: `promote flights 4`.

    Raises:
        ClusterError: Somebody else holds it (says who), or the repository cannot be written.
    """
    path = root / LOCK_FILE
    try:
        # Not truncated: what is in it is somebody's until the lock is ours.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ClusterError(
            f"{path} cannot be written ({error.strerror}). The repository also holds the lock and "
            "the journal of the fleet's changes: give one that can be written with --repository"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(_held(root, os.pread(handle, _MAX_BYTES, 0))) from None
        except OSError as error:
            raise ClusterError(f"{path} cannot be locked: {error.strerror}") from None
        note = {
            "who": whoami(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode() + b"\n", 0)
        try:
            yield
        finally:
            # The file stays: taking it away would let a third one lock a new file of that name.
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def whoami() -> str:
    """`user@host`, for the lock and the journal."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # In a container the user may have a number only.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _held(root: Path, note: bytes) -> str:
    try:
        held = json.loads(note)
        by = f"{held['who']} ({held['command']}, since {held['since']}, pid {held['pid']})"
    except (ValueError, TypeError, KeyError):
        by = "somebody else"  # who has not written it yet
    return (
        f"the fleet of {root} is being changed by {by}. Nothing was changed; run this again once "
        "that has ended"
    )
