"""What a codec makes of a request or an answer, whatever wire it came over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayprism.core.tensors import Tensors

__all__ = ["InferRequest", "InferResponse", "RequestedOutput"]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output that the client asked for.

    Args:
        name: The output's name.
        binary: Whether it comes as binary tensor data (HTTP only; gRPC decides by itself).
    """

    name: str
    binary: bool = False


@dataclass(slots=True)
class InferRequest:
    """A decoded inference request; its tensors are well-formed, but not yet a model's inputs.

    Args:
        tensors: By input name.
        id: The client's own id, echoed in the answer; empty for none.
        outputs: What is asked for; empty means every output.
        binary_by_default: Whether outputs without a word on it come as binary tensor data.
        timeout_s: The time that the client allows, in seconds; None where it named none.
        priority: From 1 (first); 0 means the deployment's default.
        parameters: The request's other parameters, as they came.
    """

    tensors: Tensors
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    binary_by_default: bool = False
    timeout_s: float | None = None
    priority: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """A decoded answer to an inference request.

    Args:
        model: The model that answered.
        version: The version that answered; empty where the answer does not say.
        id: The client's own id, echoed; empty for none.
        outputs: By output name, in the answer's order.
    """

    model: str
    version: str
    id: str
    outputs: Tensors
