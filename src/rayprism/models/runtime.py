"""What runs a model file: the small protocol that every runtime keeps, and how one is opened.

A runtime knows one model file and nothing of requests, queues or versions. The modules behind
this protocol import their engine (onnxruntime, torch) only when a model is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rayprism.core.tensors import Tensors, TensorSpec
from rayprism.errors import LoadFailed
from rayprism.models.gpu import Device, Gpu, gpu_is_assigned
from rayprism.models.manifest import Code, RuntimeKind

__all__ = [
    "Runtime",
    "RuntimeSettings",
    "Signature",
    "merge_options",
    "open_runtime",
    "runtime_options",
]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model says of itself.

    Args:
        inputs: Empty where the model declares nothing.
        outputs: Empty where the model declares nothing. A shape of `()` may also mean that the
            model does not tell the number of axes.
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How a model is run on this machine.

    Args:
        threads: Threads of one run; a replica gives its CPUs.
        device: `auto` takes a GPU where CUDA_VISIBLE_DEVICES names one, and the CPU where that
            cannot be used. In a process of Ray it was decided before, by `choose_device`.
        options: The manifest's `options`; a runtime reads the part under its own name.
        allow_code: Whether loading may run code that is in the model file.
        gpu: Which GPU, and how much of it.
        engines: Where TensorRT keeps what it made of the model for this GPU.
    """

    threads: int = 1
    device: Device = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_code: bool = False
    gpu: Gpu = field(default_factory=Gpu)
    engines: Path | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads {self.threads}: 1 or more")

    @property
    def wants_gpu(self) -> bool:
        """Whether the model is to run on a GPU, if it can."""
        return self.device == "cuda" or (self.device == "auto" and gpu_is_assigned())


class Runtime(Protocol):
    """A model that is ready to run."""

    @property
    def device(self) -> str:
        """Where it really runs: `cpu`, or `cuda:` and CUDA's number of the GPU."""

    def signature(self) -> Signature:
        """Inputs and outputs as the model itself declares them, where it can."""

    def run(self, inputs: Tensors) -> Tensors:
        """Runs one batch. Its own exceptions go through as they are."""

    def close(self) -> None:
        """Lets go of the model's memory; it cannot run afterwards."""


def open_runtime(
    kind: RuntimeKind,
    folder: Path,
    file: str,
    settings: RuntimeSettings,
    *,
    inputs: tuple[TensorSpec, ...] = (),
    outputs: tuple[TensorSpec, ...] = (),
    code: Code | None = None,
) -> Runtime:
    """Opens a model file.

    Args:
        kind: Which runtime.
        folder: The version's folder.
        file: The model file in it.
        settings: Threads, device and options.
        inputs: What the runtime takes, where that is known already. torch passes its inputs in
            this order.
        outputs: Which outputs are wanted, where that is known already. torch names a tuple's
            members in this order.
        code: For `python`: the class that is the model.

    Raises:
        LoadFailed: The engine is not installed, or the file cannot be loaded, with how to mend.
    """
    if kind == "onnx":
        from rayprism.models.onnx import OnnxRuntime

        return OnnxRuntime.open(folder, file, settings, outputs=outputs)
    if kind == "torch":
        from rayprism.models.torch import TorchRuntime

        return TorchRuntime.open(folder, file, settings, inputs=inputs, outputs=outputs)
    from rayprism.models.python import PythonRuntime

    if code is None:
        raise LoadFailed(f"{file}: the python runtime needs code: {{file, class_name}}")
    return PythonRuntime.open(folder, code, settings)


def merge_options(manifest: Mapping[str, Any], operator: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's options, with those of the operator laid over them, one by one.

    Args:
        manifest: Of a version.
        operator: By runtime, as there.
    """
    merged = dict(manifest)
    for name, value in operator.items():
        before = merged.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        merged[name] = value
    return merged


def runtime_options(
    settings: RuntimeSettings, kind: str, allowed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The options under a runtime's own name.

    Args:
        settings: Its `options` may hold a mapping under `kind`.
        kind: The runtime.
        allowed: Each option and the values that it takes; the first is the default.

    Raises:
        LoadFailed: An option or a value that the runtime does not know.
    """
    given = settings.options.get(kind, {})
    if not isinstance(given, Mapping):
        raise LoadFailed(f"options.{kind}: got {given!r:.80}, allowed is a mapping")
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise LoadFailed(
            f"options.{kind}: unknown key {unknown[0]!r}, allowed: {', '.join(allowed)}"
        )
    for name, value in given.items():
        if value not in allowed[name]:
            raise LoadFailed(
                f"options.{kind}.{name}: got {value!r:.80}, allowed: "
                f"{', '.join(map(repr, allowed[name]))}"
            )
    return {name: given.get(name, values[0]) for name, values in allowed.items()}
