"""Whether two versions of a model can stand in for each other: the same inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

from rayprism.core.tensors import TensorSpec
from rayprism.models.manifest import Manifest

__all__ = ["signature_differences"]


def signature_differences(stable: Manifest, other: Manifest) -> list[str]:
    """What a client of one version would have to know of the other; empty where nothing.

    The order of tensors does not matter: they go by name.

    Args:
        stable: What clients were made for.
        other: What is to answer them.
    """
    return [
        *_differences("input", stable.inputs, other.inputs),
        *_differences("output", stable.outputs, other.outputs),
    ]


def _differences(kind: str, stable: Sequence[TensorSpec], other: Sequence[TensorSpec]) -> list[str]:
    before = {spec.name: spec for spec in stable}
    after = {spec.name: spec for spec in other}
    found = [f"{kind} {name!r} is gone" for name in before if name not in after]
    found += [f"{kind} {name!r} is new" for name in after if name not in before]
    for name, spec in before.items():
        if name in after and _shown(after[name]) != _shown(spec):
            found.append(f"{kind} {name!r} is {_shown(after[name])}, was {_shown(spec)}")
    return found


def _shown(spec: TensorSpec) -> str:
    nan = " without NaN" if spec.datatype.is_float and not spec.allow_nan else ""
    return f"{spec.datatype} {list(spec.shape)}{nan}"
