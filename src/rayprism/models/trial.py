"""The first run of a model that is being pushed: what it takes, what it gives, how it batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rayprism.core.tensors import (
    Tensors,
    TensorSpec,
    check_inputs,
    count_rows,
    datatype_of,
    split_rows,
)
from rayprism.errors import ConfigInvalid, Fault, InvalidInput, LoadFailed, RayprismError
from rayprism.models.batches import checked_prepared, fixed_rows, plain_outputs, run_fixed
from rayprism.models.example import Example
from rayprism.models.manifest import Batching
from rayprism.models.python import Processor
from rayprism.models.runtime import Runtime, RuntimeSettings, open_runtime
from rayprism.models.source import Source

__all__ = ["Trial", "TrialResult"]

# Enough to see rows that depend on their neighbours, few enough to read and to run at every start.
_MOST_GOLDEN_ROWS = 16

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What the manifest will say.

    Args:
        inputs: What clients send.
        runtime_inputs: Empty where it is the same.
        outputs: What clients get.
        batching: As given, or as the shapes suggest.
        arrays: The golden inputs.
        results: The golden outputs.
        warnings: For the owner.
    """

    inputs: tuple[TensorSpec, ...]
    runtime_inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: Batching
    arrays: Tensors
    results: Tensors
    warnings: tuple[str, ...]


class Trial:
    """A model that is run for the first time. Made by `Trial.open`."""

    def __init__(
        self,
        model: str,
        runtime: Runtime,
        processor: Processor | None,
        *,
        inputs: tuple[TensorSpec, ...],
        runtime_inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        self._model = model
        self._runtime = runtime
        self._preprocess = processor.preprocess if processor else None
        self._postprocess = processor.postprocess if processor else None
        self._given = (inputs, runtime_inputs, outputs)
        self._declared = runtime.signature()
        self._warnings: list[str] = []

    @classmethod
    def open(
        cls,
        model: str,
        folder: Path,
        found: Source,
        settings: RuntimeSettings,
        *,
        inputs: tuple[TensorSpec, ...],
        runtime_inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> Trial:
        """Opens the runtime and the processor; see `push_model` for the arguments."""
        processor = None
        if found.code is not None and found.runtime != "python":
            processor = Processor(folder, found.code, settings.options)
        makes_outputs = processor is not None and processor.postprocess is not None
        makes_inputs = processor is not None and processor.preprocess is not None
        runtime = open_runtime(
            found.runtime,
            folder,
            found.file,
            settings,
            inputs=runtime_inputs or (() if makes_inputs else inputs),
            outputs=() if makes_outputs else outputs,
            code=found.code,
        )
        return cls(
            model,
            runtime,
            processor,
            inputs=inputs,
            runtime_inputs=runtime_inputs,
            outputs=outputs,
        )

    def close(self) -> None:
        """Lets go of the model."""
        self._runtime.close()

    def run(self, example: Example, batching: Batching | None) -> TrialResult:
        """Runs the example.

        Raises:
            ConfigInvalid: The example is not what the model takes.
            LoadFailed: The model raised, or its inputs have to be told.
        """
        inputs, inner = self._input_specs(example)
        free = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *inner))
        batched = batching.batched if batching else free and self._outputs_have_rows()
        arrays = self._example_arrays(example, inputs, batched)
        prepared = arrays
        if self._preprocess is not None:
            preprocess = self._preprocess
            prepared = checked_prepared(
                self._model,
                _guarded("preprocess", lambda: preprocess(arrays)),
                inner,
                batching.ragged if batching else {},
                count_rows(arrays) if batched else None,
            )
            inner = inner or _specs_of(prepared, batched)
        size = fixed_rows(inner, batched)
        results = _guarded(
            "the model",
            lambda: run_fixed(self._whole, prepared, size) if size else self._whole(prepared),
        )
        if batched and batching is None:
            rows = count_rows(arrays)
            batched = all(a.ndim and a.shape[0] == rows for a in results.values())
        outputs = self._output_specs(results, batched)
        return TrialResult(
            inputs=inputs,
            runtime_inputs=inner if self._preprocess is not None and inner != inputs else (),
            outputs=outputs,
            batching=self._batching(batching, batched, size, (*inputs, *inner)),
            arrays=arrays,
            results={spec.name: results[spec.name] for spec in outputs},
            warnings=tuple(self._warnings),
        )

    def _whole(self, batch: Tensors) -> Tensors:
        outputs = self._runtime.run(batch)
        if self._postprocess is not None:
            outputs = self._postprocess(batch, outputs)
        return plain_outputs(self._model, outputs)

    def _input_specs(
        self, example: Example
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What clients send, and what the runtime takes as far as it is known."""
        given, inner, _ = self._given
        declared = self._declared.inputs
        if self._preprocess is None:
            specs = given or inner or declared
            if not specs:
                specs = self._from_example(example)
            return specs, specs
        inner = inner or declared
        specs = given or self._from_example(example)
        return specs, inner

    def _from_example(self, example: Example) -> tuple[TensorSpec, ...]:
        specs = example.input_specs()
        if not specs:
            raise ConfigInvalid(
                example.source,
                [
                    Fault(
                        "inputs",
                        "this model does not declare its inputs, and the example does not tell "
                        "their datatypes. Write it as a protocol request (name, datatype, shape, "
                        "data), or declare inputs",
                    )
                ],
            )
        self._warnings.append(f"inputs were taken from the example: {_told(specs)}")
        return specs

    def _outputs_have_rows(self) -> bool:
        declared = self._given[2] or (() if self._postprocess else self._declared.outputs)
        return all(spec.shape == () or spec.shape[0] == -1 for spec in declared)

    def _example_arrays(
        self, example: Example, specs: tuple[TensorSpec, ...], batched: bool
    ) -> Tensors:
        arrays = example.input_arrays(specs)
        try:
            rows = check_inputs(specs, arrays, batched=batched)
        except InvalidInput as error:
            raise ConfigInvalid(example.source, [Fault("inputs", str(error))]) from None
        return split_rows(arrays, 0, _MOST_GOLDEN_ROWS) if rows > _MOST_GOLDEN_ROWS else arrays

    def _output_specs(self, results: Tensors, batched: bool) -> tuple[TensorSpec, ...]:
        given = self._given[2]
        if given:
            missing = [spec.name for spec in given if spec.name not in results]
            if missing:
                raise LoadFailed(
                    f"{self._model}: the model gives no output {missing[0]!r}. It gives: "
                    f"{', '.join(results)}"
                )
            return given
        seen = {spec.name: spec for spec in _specs_of(results, batched)}
        if self._postprocess is not None or not self._declared.outputs:
            specs = tuple(seen.values())
            self._warnings.append(f"outputs were taken from the example: {_told(specs)}")
            return specs
        # A declared shape of () where axes came out: the model does not tell their number.
        return tuple(
            replace(spec, shape=seen[spec.name].shape)
            if spec.shape == () and results[spec.name].ndim
            else spec
            for spec in self._declared.outputs
        )

    def _batching(
        self,
        given: Batching | None,
        batched: bool,
        size: int | None,
        specs: tuple[TensorSpec, ...],
    ) -> Batching:
        if given is not None:
            if size and given.max_rows != size:
                raise ConfigInvalid(
                    "batching",
                    [
                        Fault(
                            "max_rows",
                            f"got {given.max_rows}, the model was exported for exactly {size} "
                            f"rows: set {size}, or export it with a free first axis",
                        )
                    ],
                )
            return given
        if batched:
            return Batching()
        sizes = {spec.shape[0] if spec.shape else 0 for spec in specs}
        if len(sizes) == 1 and (only := sizes.pop()) > 1:
            self._warnings.append(
                f"the first axis of every input is fixed at {only}, so requests are run one at a "
                "time and have that shape. If it is the row, export the model with a free first "
                f"axis, or push with batching.max_rows {only}"
            )
        else:
            self._warnings.append(
                "the first axes are not all free, so requests are run one at a time. If they are "
                "rows, export the model with a free first axis"
            )
        return Batching(batched=False, max_rows=1)


def _specs_of(arrays: Tensors, batched: bool) -> tuple[TensorSpec, ...]:
    specs = []
    for name, array in arrays.items():
        try:
            datatype = datatype_of(array)
            shape = (-1, *array.shape[1:]) if batched and array.ndim else array.shape
            specs.append(TensorSpec(name, datatype, shape))
        except ValueError as error:
            raise LoadFailed(f"{name!r}: {error}") from None
    return tuple(specs)


def _told(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in specs)


def _guarded(what: str, run: Callable[[], _T]) -> _T:
    try:
        return run()
    except InvalidInput as error:
        raise ConfigInvalid("example", [Fault("inputs", f"{what} refused it: {error}")]) from error
    except RayprismError:
        raise
    except Exception as error:
        raise LoadFailed(
            f"running the example, {what} raised {type(error).__name__}: {error}"
        ) from error
