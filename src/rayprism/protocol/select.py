"""Which outputs a request asks for."""

from __future__ import annotations

from collections.abc import Sequence

from rayprism.core.tensors import suggest
from rayprism.errors import InvalidInput
from rayprism.protocol.messages import InferRequest

__all__ = ["select_outputs"]


def select_outputs(request: InferRequest, known: Sequence[str]) -> list[str]:
    """The names of the outputs that a request wants, in its order; all where it names none.

    Args:
        request: A decoded request.
        known: The model's outputs.

    Raises:
        InvalidInput: It asks for one that the model does not give.
    """
    if not request.outputs:
        return list(known)
    for output in request.outputs:
        if output.name not in known:
            raise InvalidInput(
                f"outputs names {output.name!r}, which is not an output of this model."
                f"{suggest(output.name, known)} Its outputs: {', '.join(known)}"
            )
    return [output.name for output in request.outputs]
