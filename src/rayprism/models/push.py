"""Pushing: from a model file and one example to a version that replicas can prove.

Everything that can go wrong with a version goes wrong here, on the desk of the one who pushes,
and leaves nothing behind: the version becomes visible only after it was loaded again in the way
a replica loads it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rayprism.core.compare import Tolerance, compare_outputs
from rayprism.core.tensors import (
    Array,
    Tensors,
    TensorSpec,
    count_rows,
    split_rows,
)
from rayprism.errors import (
    ConfigInvalid,
    Fault,
    GoldenMismatch,
)
from rayprism.models.example import Example, read_example
from rayprism.models.loader import (
    LoadedModel,
    check_code_allowed,
    load_model,
)
from rayprism.models.manifest import (
    Batching,
    Golden,
    Manifest,
    RuntimeKind,
    TensorValue,
    faults_of,
)
from rayprism.models.repository import ModelVersion, Repository, describe_files
from rayprism.models.runtime import RuntimeSettings
from rayprism.models.source import Source, find_source, git_state
from rayprism.models.trial import Trial, TrialResult

__all__ = ["PushResult", "push_model"]

# By how much ragged axes are padded to see whether the answer stays.
_PADDING = 3


@dataclass(frozen=True, slots=True)
class PushResult:
    """A version that was pushed.

    Args:
        version: It can be loaded by now.
        warnings: What its owner should know; each says what to do about it.
    """

    version: ModelVersion
    warnings: tuple[str, ...] = ()


def push_model(
    repository: Repository,
    model: str,
    source: Path,
    *,
    example: Path | Mapping[str, Any],
    runtime: RuntimeKind | None = None,
    file: str | None = None,
    code: str | None = None,
    batching: Batching | None = None,
    tolerance: Tolerance | None = None,
    metadata: Mapping[str, Any] | None = None,
    warmup: Sequence[Mapping[str, Sequence[int]]] = (),
    inputs: Sequence[TensorSpec] = (),
    outputs: Sequence[TensorSpec] = (),
    runtime_inputs: Sequence[TensorSpec] = (),
    options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
) -> PushResult:
    """Pushes a model as the next version.

    Args:
        repository: Where to.
        model: The model's name.
        source: A model file, or a folder that holds one.
        example: A request: a JSON file, or a mapping of the same form (see
            `rayprism.models.example`). What the model makes of it becomes the golden example.
        runtime: By default what the file's suffix says.
        file: Which file of a source folder is the model.
        code: `processor.py:ClassName`, a class around the runtime, or the python model itself.
        batching: By default batched where every tensor's first axis is free, else one at a time.
        tolerance: How exactly a replica has to reproduce the golden example.
        metadata: Free; the git commit and the versions of the engines are added.
        warmup: Shapes that a replica runs besides the usual ones, by the runtime's input names.
        inputs: What clients send, where the model does not declare it or something is to be added
            to what it declares.
        outputs: What clients get, in the same way.
        runtime_inputs: What the runtime takes, where pre-processing makes it and the model does
            not declare it.
        options: For the runtime and the code.
        allow_code: Whether code in the source may run.

    Raises:
        ConfigInvalid: Faults in the example or in the arguments.
        CodeNotAllowed: The source holds code that would run.
        LoadFailed: The model cannot be served, with how to mend it.
        GoldenMismatch: It does not give what the example expects, or not twice the same.
        RepositoryError: The source is not there, or the repository cannot be written.
    """
    found = find_source(Path(source), runtime=runtime, file=file, code=code)
    check_code_allowed(found.code is not None, allow_code, found.file)
    draft = _Draft(
        model=model,
        found=found,
        example=read_example(example),
        batching=batching,
        tolerance=tolerance or Tolerance(),
        metadata={**_provenance(Path(source), found.runtime), **(metadata or {})},
        warmup=tuple({name: tuple(shape) for name, shape in item.items()} for item in warmup),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        runtime_inputs=tuple(runtime_inputs),
        options=dict(options or {}),
        allow_code=allow_code,
    )
    version = repository.add_version(model, draft.write)
    return PushResult(version, tuple(draft.warnings))


@dataclass
class _Draft:
    """A version in the making."""

    model: str
    found: Source
    example: Example
    batching: Batching | None
    tolerance: Tolerance
    metadata: dict[str, Any]
    warmup: tuple[dict[str, tuple[int, ...]], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runtime_inputs: tuple[TensorSpec, ...]
    options: dict[str, Any]
    allow_code: bool
    warnings: list[str] = field(default_factory=list)

    def write(self, number: int, folder: Path) -> Manifest:
        """Copies, runs, describes and proves; what `Repository.add_version` calls."""
        self.found.copy_to(folder)
        manifest = self._describe(number, folder)
        # As a replica will read it: whatever JSON cannot carry shows here.
        manifest = Manifest.from_json(manifest.to_json(), f"{self.model} {number}")
        loaded = load_model(
            ModelVersion(folder, manifest), allow_code=self.allow_code, device="cpu"
        )
        try:
            self.warnings.extend(_check_rows(loaded))
            self.warnings.extend(_check_padding(loaded))
        finally:
            loaded.close()
        return manifest

    def _describe(self, number: int, folder: Path) -> Manifest:
        trial = Trial.open(
            self.model,
            folder,
            self.found,
            RuntimeSettings(device="cpu", options=self.options, allow_code=self.allow_code),
            inputs=self.inputs,
            runtime_inputs=self.runtime_inputs,
            outputs=self.outputs,
        )
        try:
            result = trial.run(self.example, self.batching)
        finally:
            trial.close()
        self.warnings.extend(result.warnings)
        try:
            return Manifest(
                model=self.model,
                version=number,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                runtime=self.found.runtime,
                file=self.found.file,
                code=self.found.code,
                inputs=result.inputs,
                outputs=result.outputs,
                runtime_inputs=result.runtime_inputs,
                batching=result.batching,
                warmup=self.warmup,
                golden=self._golden(result),
                files=describe_files(folder),
                options=self.options,
                metadata=self.metadata,
            )
        except ValidationError as error:
            raise ConfigInvalid(f"{self.model}: manifest", faults_of(error)) from None

    def _golden(self, result: TrialResult) -> Golden:
        expected = self.example.output_arrays(result.outputs)
        differences = compare_outputs(
            {
                name: array[: len(result.results[name])] if result.batching.batched else array
                for name, array in expected.items()
            },
            result.results,
            self.tolerance,
        )
        if differences:
            raise GoldenMismatch(
                f"{self.example.source}: the model does not give the outputs that the example "
                f"expects: {'; '.join(map(str, differences))}"
            )
        return Golden(
            inputs=_written(self.example.source, "inputs", result.arrays),
            outputs=_written(self.example.source, "outputs", result.results),
            tolerance=self.tolerance,
        )


def _written(source: str, part: str, arrays: Tensors) -> tuple[TensorValue, ...]:
    values = []
    for name, array in arrays.items():
        try:
            values.append(TensorValue.from_array(name, array))
        except ValueError as error:
            raise ConfigInvalid(
                source,
                [Fault(f"{part}.{name}", f"a manifest cannot hold it: {error}. Use UTF-8 text")],
            ) from None
    return tuple(values)


def _check_rows(loaded: LoadedModel) -> list[str]:
    """Whether a row's answer depends on the rows beside it."""
    manifest = loaded.manifest
    if not manifest.batching.batched or manifest.batching.max_rows == 1:
        return []
    example = loaded.prepare(manifest.golden.input_arrays())
    rows = count_rows(example)
    if rows == 1:
        return [
            "the example has 1 row, so it was not checked whether a row's answer depends on the "
            "rows beside it. Give an example of a few different rows"
        ]
    together = loaded.run(example)
    single = [loaded.run(split_rows(example, row, row + 1)) for row in range(rows)]
    try:
        alone = {name: np.concatenate([part[name] for part in single]) for name in together}
    except ValueError:
        return ["the shape of a row's answer depends on the rows beside it: set max_rows 1"]
    differences = compare_outputs(together, alone, manifest.golden.tolerance)
    if not differences:
        return []
    largest = max(
        (_largest(together[name], alone[name]) for name in together), key=lambda pair: pair[0]
    )
    return [
        "a row's answer depends on the rows beside it in a batch, by more than the tolerance: "
        f"{'; '.join(map(str, differences))}. The largest difference is {largest[0]:.3g} on "
        f"a value of {largest[1]:.3g}. Quantised models with dynamic ranges do this. Set "
        "batching.max_rows 1, or accept it with a wider tolerance"
    ]


def _largest(want: Array, got: Array) -> tuple[float, float]:
    if want.dtype.kind in "OSUb" or want.size == 0:
        return 0.0, 0.0
    wide = want.astype(np.float64)
    gap = np.nan_to_num(np.abs(got.astype(np.float64) - wide))
    worst = int(np.argmax(gap))
    return float(gap.flat[worst]), float(wide.flat[worst])


def _check_padding(loaded: LoadedModel) -> list[str]:
    """Whether ragged axes can be padded without changing the answer.

    Raises:
        GoldenMismatch: They cannot.
    """
    ragged = loaded.manifest.batching.ragged
    if not ragged:
        return []
    golden = loaded.manifest.golden
    example = loaded.prepare(golden.input_arrays())
    padded = {}
    for name, array in example.items():
        rule = ragged.get(name)
        if rule is not None:
            widths = [(0, 0)] * array.ndim
            widths[rule.axis] = (0, _PADDING)
            array = np.pad(array, widths, constant_values=array.dtype.type(rule.value))
        padded[name] = array
    want, got = golden.output_arrays(), loaded.run(padded)
    longer = [name for name in want if want[name].shape != got[name].shape]
    cut = {
        name: got[name][tuple(slice(size) for size in want[name].shape)]
        if name in longer
        else got[name]
        for name in want
    }
    differences = compare_outputs(want, cut, golden.tolerance)
    if differences:
        raise GoldenMismatch(
            f"{loaded.manifest.model}: padding {', '.join(ragged)} by {_PADDING} changes the "
            f"answer: {'; '.join(map(str, differences))}. Mend: give the mask as an input that is "
            "padded with 0, mask in postprocess, or leave the axis out of batching.ragged"
        )
    forgotten = [name for name in longer if name not in loaded.manifest.batching.ragged_outputs]
    if forgotten:
        return [
            f"outputs {', '.join(forgotten)} grow with the padding: in a batch clients get the "
            "padded length. Name them in batching.ragged_outputs, or pool them in postprocess"
        ]
    return []


def _provenance(source: Path, runtime: RuntimeKind) -> dict[str, Any]:
    engines = {"onnx": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",), "python": ()}
    versions = {"python": platform.python_version()}
    for name in ("numpy", *engines[runtime]):
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return {**git_state(source), "pushed_with": versions}
