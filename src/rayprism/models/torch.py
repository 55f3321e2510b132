"""torch models, on CPU or GPU: torch.export archives (.pt2) and TorchScript (.pt, .ts).

What loading them can run, and what is therefore refused without `allow_code`, stands in
`rayprism.models.torch_archive`: TorchScript always needs it, .pt2 only where it holds more than
plain parts. Anything else that torch writes is a pickle and is refused.

Inputs are passed by name where the model's own names are the manifest's, else in the manifest's
order. A dict of outputs keeps its names; a tuple takes the names of the manifest's outputs, in
order. Guards that torch derived while exporting are not compiled: every request was checked
against the manifest's shapes by then.

Options, under `options.torch`: those of `rayprism.models.torch_gpu`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np

from rayprism.core.tensors import Array, Datatype, Tensors, TensorSpec
from rayprism.errors import CodeNotAllowed, LoadFailed, RayprismError
from rayprism.models.runtime import RuntimeSettings, Signature, runtime_options
from rayprism.models.torch_archive import archive_kind, find_risks
from rayprism.models.torch_gpu import BF16, GPU_OPTIONS, TorchGpu, to_array

__all__ = ["TorchRuntime"]

_log = logging.getLogger(__name__)

_DATATYPES = {
    "bool": Datatype.BOOL,
    "uint8": Datatype.UINT8,
    "uint16": Datatype.UINT16,
    "uint32": Datatype.UINT32,
    "uint64": Datatype.UINT64,
    "int8": Datatype.INT8,
    "int16": Datatype.INT16,
    "int32": Datatype.INT32,
    "int64": Datatype.INT64,
    "float16": Datatype.FP16,
    "bfloat16": Datatype.BF16,
    "float32": Datatype.FP32,
    "float64": Datatype.FP64,
}


class TorchRuntime:
    """A torch module. Opened with `TorchRuntime.open`."""

    def __init__(
        self,
        module: Callable[..., Any],
        device: str,
        signature: Signature,
        positional: tuple[str, ...],
        keywords: tuple[str, ...],
        outputs: tuple[str, ...],
        gpu: TorchGpu | None = None,
    ) -> None:
        import torch

        self.device = device
        self._gpu = gpu
        self._torch = torch
        self._module: Callable[..., Any] | None = module
        self._signature = signature
        self._positional = positional
        self._keywords = keywords
        self._outputs = outputs

    @classmethod
    def open(
        cls,
        folder: Path,
        file: str,
        settings: RuntimeSettings,
        *,
        inputs: tuple[TensorSpec, ...] = (),
        outputs: tuple[TensorSpec, ...] = (),
    ) -> Self:
        """Loads a model.

        Args:
            folder: The version's folder.
            file: The model file in it.
            settings: Threads, device, and whether code may run.
            inputs: What the runtime takes; the order in which TorchScript is called.
            outputs: The names of a tuple's members.

        Raises:
            CodeNotAllowed: Loading could run code, and it is not allowed.
            LoadFailed: torch is not installed, the file is a pickle or cannot be loaded, or a GPU
                was asked for and not got.
        """
        options = runtime_options(settings, "torch", GPU_OPTIONS)
        path = folder / file
        try:
            import torch
        except ImportError as error:
            raise LoadFailed(
                f"torch cannot be imported ({error}). Install it: pip install 'rayprism[torch]'"
            ) from error
        kind = archive_kind(path)
        device = _device(torch, path.name, settings)
        torch.set_num_threads(settings.threads)
        gpu = None if device == "cpu" else TorchGpu(torch, device, settings.gpu, options)
        if gpu:
            gpu.expect(outputs)
        names = tuple(spec.name for spec in outputs)
        try:
            if kind == "script":
                _check_code(path.name, ["it is a TorchScript program"], settings)
                return cls._open_script(torch, path, device, gpu, inputs, names)
            _check_code(path.name, find_risks(path), settings)
            return cls._open_export(torch, path, device, gpu, names)
        except RayprismError:
            raise
        except Exception as error:
            raise LoadFailed(
                f"{file}: torch {torch.__version__} cannot load it: {type(error).__name__}: "
                f"{_first_line(error)}. Mend: export the model again with this version of torch"
            ) from error

    @classmethod
    def _open_export(
        cls, torch: Any, path: Path, device: str, gpu: TorchGpu | None, outputs: tuple[str, ...]
    ) -> Self:
        # Not torch.export.load: where this fails, that one tries an older, pickled format.
        from torch.export.pt2_archive._package import load_pt2

        program = load_pt2(str(path)).exported_programs.get("model")
        if program is None:
            raise LoadFailed(f"{path.name} holds no exported program")
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        positional, keywords = _argument_names(path.name, program)
        declared_outputs = _output_names(path.name, program, outputs)
        signature = Signature(
            inputs=_specs(
                path.name, program, program.graph_signature.user_inputs, (*positional, *keywords)
            ),
            outputs=_specs(
                path.name, program, program.graph_signature.user_outputs, declared_outputs
            ),
        )
        if gpu:
            gpu.expect(signature.outputs)
        module = program.module(check_guards=False)
        # Its hooks would check shapes once more, and take longer than a small model does.
        run = module.forward if gpu is None else gpu.compile(module.forward)
        return cls(run, device, signature, positional, keywords, declared_outputs, gpu)

    @classmethod
    def _open_script(
        cls,
        torch: Any,
        path: Path,
        device: str,
        gpu: TorchGpu | None,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[str, ...],
    ) -> Self:
        if gpu is not None and gpu.compiles:
            raise LoadFailed(
                f"{path.name}: options.torch.compile needs a torch.export archive (.pt2), and this "
                "is TorchScript, which torch.compile does not take. Export it with torch.export"
            )
        with warnings.catch_warnings():
            # torch asks for torch.export instead; who has an archive cannot follow that here.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()
        own = [argument.name for argument in module.forward.schema.arguments[1:]]
        given = tuple(spec.name for spec in inputs)
        if set(given) == set(own):
            return cls(module, device, Signature(), (), given, outputs, gpu)
        return cls(module, device, Signature(), given, (), outputs, gpu)

    def signature(self) -> Signature:
        """As an exported program declares it; TorchScript declares nothing."""
        return self._signature

    def run(self, inputs: Tensors) -> Tensors:
        """Runs one batch."""
        module = self._module
        if module is None:
            raise RuntimeError("the model was closed")
        torch = self._torch
        positional = self._positional
        if not positional and not self._keywords:
            positional = tuple(inputs)
        gpu = self._gpu
        with torch.inference_mode(), gpu.running() if gpu else nullcontext():
            given = module(
                *[self._to_tensor(inputs[name]) for name in positional],
                **{name: self._to_tensor(inputs[name]) for name in self._keywords},
            )
            named = self._named(given)
            if gpu:
                return gpu.fetch(named)
            return {name: to_array(torch, value) for name, value in named.items()}

    def _named(self, given: Any) -> dict[str, Any]:
        if isinstance(given, self._torch.Tensor):
            given = (given,)
        if isinstance(given, Mapping):
            return {str(name): value for name, value in given.items()}
        names = self._outputs or _numbered(len(given))
        if len(names) != len(given):
            raise ValueError(
                f"the model gives {len(given)} outputs, the manifest names {len(names)}"
            )
        return dict(zip(names, given, strict=True))

    def _to_tensor(self, array: Array) -> Any:
        if self._gpu:
            return self._gpu.put(array)
        if not array.flags.writeable or not array.flags.c_contiguous:
            # torch has no tensors that are read-only, and warns where it is given one.
            array = array.copy()
        if array.dtype == BF16:
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def close(self) -> None:
        """Lets go of the module."""
        self._module = None


def _check_code(name: str, risks: list[str], settings: RuntimeSettings) -> None:
    if risks and not settings.allow_code:
        raise CodeNotAllowed(
            f"loading {name} could run code that came with the model: {'; '.join(risks)}. Export "
            "it as a plain torch.export archive; or, where you trust its origin, set "
            "args.allow_code: true (on the command line: --allow-code)"
        )


def _device(torch: Any, name: str, settings: RuntimeSettings) -> str:
    if not settings.wants_gpu:
        return "cpu"
    if torch.cuda.is_available():
        return f"cuda:{settings.gpu.index}"
    message = (
        f"{name}: a GPU was asked for, and torch {torch.__version__} sees none. Check nvidia-smi, "
        "that CUDA_VISIBLE_DEVICES names a device, and that torch is a CUDA build"
    )
    if settings.device == "cuda":
        raise LoadFailed(f"{message}; or set device: cpu")
    _log.warning("%s; running on the CPU", message)
    return "cpu"


def _argument_names(file: str, program: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of positional and of keyword arguments."""
    arguments, keywords = program.call_spec.in_spec.children()
    if any(not child.is_leaf() for child in (*arguments.children(), *keywords.children())):
        raise LoadFailed(
            f"{file}: an input is a list or a dict. Mend: wrap the model in a module whose "
            "forward takes tensors only, and export that"
        )
    count = arguments.num_leaves
    names = program.module_call_graph[0].signature.forward_arg_names
    if names is None or len(names) < count:
        names = program.graph_signature.user_inputs
    return tuple(names[:count]), tuple(keywords.context)


def _output_names(file: str, program: Any, outputs: tuple[str, ...]) -> tuple[str, ...]:
    spec = program.call_spec.out_spec
    if any(not child.is_leaf() for child in spec.children()):
        raise LoadFailed(
            f"{file}: an output is a list or a dict in another one. Mend: wrap the model in a "
            "module whose forward returns tensors, a tuple of them, or a dict of them"
        )
    if spec.type is not None and issubclass(spec.type, dict):
        return tuple(str(key) for key in spec.context)
    if outputs and len(outputs) != spec.num_leaves:
        raise LoadFailed(
            f"{file}: it gives {spec.num_leaves} outputs, and {len(outputs)} are named: "
            f"{', '.join(outputs)}"
        )
    return outputs or _numbered(spec.num_leaves)


def _numbered(count: int) -> tuple[str, ...]:
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def _specs(
    file: str, program: Any, nodes: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    specs = []
    for node, name in zip(nodes, names, strict=True):
        value = values.get(node) if isinstance(node, str) else None
        dtype = str(getattr(value, "dtype", type(node).__name__)).removeprefix("torch.")
        if value is None or dtype not in _DATATYPES:
            raise LoadFailed(
                f"{file}: {name!r} is a {dtype}, not a tensor that can be served. Mend: make the "
                "model take and give tensors of plain datatypes only"
            )
        shape = tuple(size if type(size) is int and size > 0 else -1 for size in value.shape)
        specs.append(TensorSpec(name, _DATATYPES[dtype], shape))
    return tuple(specs)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else ""
