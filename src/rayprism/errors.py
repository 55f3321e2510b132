"""Every error that rayprism raises on purpose.

    RayprismError
    ├── RequestError            the request could not be answered
    │   ├── InvalidInput        the client's fault: malformed or not what the model takes
    │   ├── NotFound            no such model, version or path
    │   ├── TooLarge            the body is over the configured limit
    │   ├── Unsupported         a protocol extension that rayprism does not offer
    │   ├── Overloaded          the queue is full; carries when to come back
    │   ├── NotReady            the version is loading, or is being taken down
    │   ├── DeadlineExceeded    it could not be served in the time that the request allowed
    │   └── ModelFailed         the model raised, or returned what its manifest forbids
    │       └── OutOfMemory     the batch does not fit into the memory of the device
    └── SetupError              something on the operator's side has to be mended
        ├── ConfigInvalid       faults in a file, each with its path
        ├── RepositoryError     a model repository that cannot be read or written
        ├── CodeNotAllowed      loading would run code, and the operator did not allow it
        ├── LoadFailed          a runtime could not load the model
        ├── DigestMismatch      a file is not the one that was pushed
        ├── GoldenMismatch      the golden example was not reproduced
        └── ClusterError        a local cluster could not be started or stopped

A `code` is stable and is what programs should compare. How a code maps to an HTTP status or to
a gRPC code is the protocol's business (`rayprism.protocol.status`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ClusterError",
    "CodeNotAllowed",
    "ConfigInvalid",
    "DeadlineExceeded",
    "DigestMismatch",
    "Fault",
    "GoldenMismatch",
    "InvalidInput",
    "LoadFailed",
    "ModelFailed",
    "NotFound",
    "NotReady",
    "OutOfMemory",
    "Overloaded",
    "RayprismError",
    "RepositoryError",
    "RequestError",
    "SetupError",
    "TooLarge",
    "Unsupported",
]


class RayprismError(Exception):
    """The root. `str(error)` is written for the person who has to act on it."""

    code = "internal"


class RequestError(RayprismError):
    """One request could not be answered; its neighbours are not concerned."""


class InvalidInput(RequestError):
    """The request is malformed, or is not what the model takes."""

    code = "invalid_input"


class NotFound(RequestError):
    """No such model, version or path."""

    code = "not_found"


class TooLarge(RequestError):
    """The body is over the configured limit."""

    code = "too_large"


class Unsupported(RequestError):
    """A protocol extension that rayprism does not offer."""

    code = "unsupported"


class Overloaded(RequestError):
    """The queue is full.

    Args:
        message: What is full, and its bound.
        retry_after_s: When room is expected, from the measured service rate.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(RequestError):
    """The version is loading, or is being taken down."""

    code = "not_ready"


class DeadlineExceeded(RequestError):
    """The request could not be served in the time that it allowed."""

    code = "deadline_exceeded"


class ModelFailed(RequestError):
    """The model raised, or returned what its manifest forbids. The log has the trace."""

    code = "model_failed"


class OutOfMemory(ModelFailed):
    """The batch does not fit into the memory of the device. A smaller one may."""


class SetupError(RayprismError):
    """Something on the operator's side has to be mended."""

    code = "setup"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in a file.

    Args:
        path: Where, as in `applications[0].args.version`; empty for the whole file.
        message: What was got, what is allowed, how to mend it.
        line: Line in the file, counted from 1, where it is known.
    """

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = self.path or "(whole file)"
        return f"{where}: {self.message}"


class ConfigInvalid(SetupError):
    """Faults in a file or in a set of arguments: all of them at once.

    Args:
        source: The file's name, or what else was read.
        faults: At least one.
    """

    code = "config_invalid"

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        noun = "fault" if len(self.faults) == 1 else "faults"
        super().__init__(f"{source}: {len(self.faults)} {noun}\n{lines}")


class RepositoryError(SetupError):
    """A model repository that cannot be read or written, or has no such version."""

    code = "repository"


class CodeNotAllowed(SetupError):
    """Loading would run code from the repository, and the operator did not allow it."""

    code = "code_not_allowed"


class LoadFailed(SetupError):
    """A runtime could not load the model."""

    code = "load_failed"


class DigestMismatch(SetupError):
    """A file of the version is missing, extra, or is not the one that was pushed."""

    code = "digest_mismatch"


class GoldenMismatch(SetupError):
    """The version did not reproduce its golden example on this machine."""

    code = "golden_mismatch"


class ClusterError(SetupError):
    """A local cluster could not be started, found or stopped."""

    code = "cluster"
