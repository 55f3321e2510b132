"""What every measured model has: files for other servers, versions for rayprism, requests."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np

from rayprism.core.compare import Tolerance, compare_outputs
from rayprism.core.tensors import Array, Tensors, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import Repository

__all__ = [
    "BenchModel",
    "ModelFiles",
    "ModelUnavailable",
    "OnnxModel",
    "PictureModel",
    "checked_model",
    "constant",
    "float_weights",
    "missing_versions",
    "open_session",
]


class ModelUnavailable(Exception):
    """A file of the model is not on this machine; says how to get it."""


class ModelFiles(TypedDict):
    """What a server needs that does not know rayprism's repository."""

    model_file: Path
    """ONNX."""
    tokenizer: Path | None
    """`tokenizer.json`, where the model takes text."""


@dataclass(frozen=True)
class BenchModel(ABC):
    """A model that servers are measured with."""

    name: str

    inputs: ClassVar[tuple[TensorSpec, ...]]
    """What clients send; axis 0 is the row."""
    tolerance: ClassVar[Tolerance] = Tolerance()
    """How far an answer may be from ONNX Runtime's: the sums of a larger batch are in another
    order."""

    @abstractmethod
    def prepare(self, folder: Path) -> ModelFiles:
        """Finds the files, or writes them into the folder where they are not there yet.

        Raises:
            ModelUnavailable: They come with a package that is not installed.
        """

    @abstractmethod
    def push(self, repository: Path, versions: int) -> None:
        """Pushes versions 1, 2, ... into a repository of rayprism; those that are there stay.

        Raises:
            ModelUnavailable: As `prepare`.
        """

    @abstractmethod
    def requests(self, count: int, rows: int, seed: int) -> list[Tensors]:
        """The inputs of so many requests, each of so many rows, all different."""

    @abstractmethod
    def expected(self, tensors: Tensors) -> Tensors:
        """The outputs of ONNX Runtime itself, on one thread.

        Raises:
            ModelUnavailable: As `prepare`.
        """

    def application_args(self) -> dict[str, Any]:
        """Arguments of rayprism's application beside model, version and repository."""
        return {}

    def signature(self) -> dict[str, Any]:
        """Name and inputs, as in the protocol's model metadata."""
        inputs = [
            {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}
            for spec in self.inputs
        ]
        return {"name": self.name, "inputs": inputs}

    def is_right(self, tensors: Tensors, outputs: Tensors) -> bool:
        """Whether a server's answer to these inputs is the model's.

        Args:
            tensors: Of the request.
            outputs: By name; beside those that the model has, there may be others.
        """
        return not compare_outputs(self.expected(tensors), outputs, self.tolerance)

    def job_input(self, rows: int, folder: Path) -> Path:
        """Writes the input of a batch job.

        Returns:
            A Parquet file in the folder.

        Raises:
            NotImplementedError: There are no batch jobs of this model.
        """
        raise NotImplementedError(
            f"no batch jobs are measured with {self.name}: a load with `loop: job` needs a "
            "server whose model is tiny"
        )


class OnnxModel(BenchModel):
    """A model that is one ONNX file, made here: weights from a fixed seed, every time the same."""

    batching: ClassVar[Batching | None] = None

    @abstractmethod
    def content(self) -> bytes:
        """The ONNX file."""

    @abstractmethod
    def example(self) -> Tensors:
        """What replicas prove the model with."""

    def prepare(self, folder: Path) -> ModelFiles:
        """Writes `NAME.onnx`, where it is not there yet."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.onnx"
        content = self.content()
        if not path.exists() or path.read_bytes() != content:
            # Never half a file: another server may be reading it.
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(content)
            unfinished.replace(path)
        return {"model_file": path, "tokenizer": None}

    def push(self, repository: Path, versions: int) -> None:
        """Pushes what is missing of versions 1, 2, ..."""
        with tempfile.TemporaryDirectory(prefix=f"bench-{self.name}-") as folder:
            for _ in missing_versions(repository, self.name, versions):
                push_model(
                    Repository(repository),
                    self.name,
                    self.prepare(Path(folder))["model_file"],
                    example=self.example(),
                    batching=self.batching,
                )

    def expected(self, tensors: Tensors) -> Tensors:
        """The outputs of ONNX Runtime itself, on one thread."""
        names = [output.name for output in self._session.get_outputs()]
        answers: list[Array] = self._session.run(names, tensors)
        return dict(zip(names, answers, strict=True))

    @cached_property
    def _session(self) -> Any:
        return open_session(self.content())


class PictureModel(OnnxModel):
    """A model of square pictures in colour, which are noise here."""

    def requests(self, count: int, rows: int, seed: int) -> list[Tensors]:
        """Noise.

        Shapes: `image` `[rows, 3, side, side] uint8`.
        """
        [spec] = self.inputs
        random = np.random.default_rng(seed)
        shape = (rows, *spec.shape[1:])
        return [{spec.name: random.integers(0, 256, shape, np.uint8)} for _ in range(count)]


def missing_versions(repository: Path, model: str, versions: int) -> list[int]:
    """Which of versions 1, 2, ... a repository does not hold yet."""
    return [
        version
        for version in range(1, versions + 1)
        if not (repository / model / str(version)).exists()
    ]


def open_session(model: bytes | Path) -> Any:
    """An ONNX Runtime session on one thread: what every server here runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def float_weights(random: np.random.Generator, name: str, *shape: int, scale: float) -> Any:
    """Normal weights around 0 as an ONNX initializer of float32."""
    from onnx import numpy_helper

    return numpy_helper.from_array(random.normal(0.0, scale, shape).astype(np.float32), name)


def constant(name: str, *values: float, kind: Any) -> Any:
    """An ONNX initializer of one axis."""
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, kind), name)


def checked_model(graph: Any) -> bytes:
    """A graph as a file that any ONNX Runtime in use reads."""
    import onnx
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
