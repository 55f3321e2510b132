"""Python code in a version's folder: a whole model, or a processor around another runtime.

It runs only where the operator allows code (`args.allow_code: true`), and only after its file has
been found to be the one that was pushed.

A model (`runtime: python`)::

    class Model:
        def __init__(self, folder: Path, options: Mapping[str, Any]) -> None: ...
        def predict(self, inputs: Tensors) -> Tensors: ...

A processor around another runtime; both methods are optional::

    class Processor:
        def __init__(self, folder: Path, options: Mapping[str, Any]) -> None: ...
        def preprocess(self, inputs: Tensors) -> Tensors: ...
        def postprocess(self, inputs: Tensors, outputs: Tensors) -> Tensors: ...

`folder` is the version's folder, `options` the manifest's. `preprocess` is called for each
request, before it is queued, and makes the runtime's inputs: one row out for each row in.
`postprocess` is called for each batch with the runtime's inputs (padded, where there are ragged
axes) and its outputs. Any of them may raise `rayprism.errors.InvalidInput` for a request that is
the client's fault. BYTES tensors are object arrays of `bytes`.

A model chooses its device itself, by what CUDA_VISIBLE_DEVICES names. One that says where it runs,
in an attribute `device` (`"cuda:0"`), is shown so.

Other files of the version are imported relatively (`from .helpers import clean`), so that modules
of two versions in one process never mix.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Self

from rayprism.core.tensors import Tensors, suggest
from rayprism.errors import LoadFailed, RayprismError
from rayprism.models.manifest import Code
from rayprism.models.runtime import RuntimeSettings, Signature

__all__ = ["Processor", "PythonRuntime", "load_class"]

_PACKAGE = "_rayprism_version_"
_serial = itertools.count(1)


class PythonRuntime:
    """A Python class as a model. Opened with `PythonRuntime.open`."""

    def __init__(self, model: Any) -> None:
        told = str(getattr(model, "device", ""))
        self.device = told if told.startswith("cuda") else "cpu"
        self._model = model
        self.run: Callable[[Tensors], Tensors] = model.predict

    @classmethod
    def open(cls, folder: Path, code: Code, settings: RuntimeSettings) -> Self:
        """Imports the code and makes the model.

        Raises:
            LoadFailed: The module, the class or its constructor fails, or it has no `predict`.
        """
        model = _construct(folder, code, settings.options)
        if not callable(getattr(model, "predict", None)):
            raise LoadFailed(
                f"{code.file}: class {code.class_name} has no method predict(inputs), which a "
                "python model needs"
            )
        return cls(model)

    def signature(self) -> Signature:
        """Nothing: a Python class declares no tensors."""
        return Signature()

    def close(self) -> None:
        """Calls the model's own `close`, where it has one."""
        close = getattr(self._model, "close", None)
        if callable(close):
            close()


class Processor:
    """Pre- and post-processing around another runtime.

    Attributes:
        preprocess: None where the class has none.
        postprocess: None where the class has none.
    """

    def __init__(self, folder: Path, code: Code, options: Mapping[str, Any]) -> None:
        instance = _construct(folder, code, options)
        self.preprocess: Callable[[Tensors], Tensors] | None = getattr(instance, "preprocess", None)
        self.postprocess: Callable[[Tensors, Tensors], Tensors] | None = getattr(
            instance, "postprocess", None
        )
        if self.preprocess is None and self.postprocess is None:
            raise LoadFailed(
                f"{code.file}: class {code.class_name} has neither preprocess(inputs) nor "
                "postprocess(inputs, outputs)"
            )


def _construct(folder: Path, code: Code, options: Mapping[str, Any]) -> Any:
    kind = load_class(folder, code)
    try:
        return kind(folder, options)
    except RayprismError:
        raise
    except Exception as error:
        raise LoadFailed(
            f"{code.file}: {code.class_name}(folder, options) raised "
            f"{type(error).__name__}: {error}"
        ) from error


def load_class(folder: Path, code: Code) -> type[Any]:
    """Imports a class from a version's folder, under a name that no other import shares.

    Raises:
        LoadFailed: The module fails, or has no such class.
    """
    path = folder / code.file
    package = f"{_PACKAGE}{next(_serial)}"
    parts = code.file.removesuffix(".py").split("/")
    if not code.file.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise LoadFailed(f"{code.file}: code is a .py file whose path is made of identifiers")
    _Finder.add(package, folder)
    name = ".".join((package, *parts))
    try:
        module = import_module(name)
    except Exception as error:
        where = f"{type(error).__name__}: {error}"
        raise LoadFailed(f"{path.name}: importing it raised {where}") from error
    found = getattr(module, code.class_name, None)
    if not isinstance(found, type):
        names = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise LoadFailed(
            f"{code.file}: no class {code.class_name!r}.{suggest(code.class_name, names)} "
            f"It has: {', '.join(names) or 'no class'}"
        )
    return found


class _Finder(MetaPathFinder):
    """Finds the modules of versions' folders; each folder is a package of its own."""

    folders: dict[str, Path] = {}  # noqa: RUF012 - one table for the process, like sys.modules

    @classmethod
    def add(cls, package: str, folder: Path) -> None:
        cls.folders[package] = folder
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, *parts = fullname.split(".")
        folder = self.folders.get(package)
        if folder is None:
            return None
        place = folder.joinpath(*parts)
        if place.is_dir():
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py") if parts else place
        if not file.is_file():
            return None
        return spec_from_file_location(fullname, file, loader=_SourceOnly(file))


class _SourceOnly(InspectLoader):
    """Runs source as it lies there.

    Bytecode is neither read nor written: a `__pycache__` would be a file that the manifest does
    not list, and one that was planted would run in place of the source that was verified.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def get_source(self, fullname: str) -> str:
        return self._file.read_text(encoding="utf-8")

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._file.read_bytes(), str(self._file), "exec", dont_inherit=True)
