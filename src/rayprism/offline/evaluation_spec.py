"""What an evaluation is told: the YAML that `batch/evaluate.py` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.fields import ModelName, VersionNumber
from rayprism.models.manifest import faults_of
from rayprism.offline.spec import JobSpec, name_of_folder
from rayprism.offline.spec_file import explain, load_file
from rayprism.offline.spec_parts import InputSpec, Limits, Pool, SpecPart

__all__ = [
    "PREFIX",
    "ClassValue",
    "EvaluationSpec",
    "class_text",
    "load_evaluation",
    "parse_evaluation",
]

PREFIX = "predicted_"
"""Of the columns with predictions: a label often has the name of what predicts it."""

_MOST_VERSIONS = 8


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


ClassValue = bool | int | str
_Name = Annotated[str, Field(min_length=1)]
_Task = Literal["binary", "multiclass", "regression"]


def class_text(value: Any) -> str:
    """One text for what files of different formats write for one class: 1, 1.0 and "1"."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


class EvaluationSpec(SpecPart):
    """An evaluation: what a batch job is told, and what is known of the rows.

    Args:
        model: The model's name.
        versions: The baseline first, then what is compared with it. One alone is only measured.
        repository: As of a job.
        allow_code: As of a job.
        device: As of a job.
        input: As of a job.
        output: The folder for the report, and for the predictions: one folder for each version.
        pool: As of a job.
        limits: As of a job.
        mode: As of a job.
        label: The column with what came true.
        task: What kind of prediction it is.
        prediction: The output to be judged; needed where the model has several.
        positive: Of `binary`: the label of positive rows; by default true, or 1.
        threshold: Of `binary`: from this score on a row counts as predicted positive.
        classes: The classes in the order of the scores; by default 0, 1, 2 and so on.
        top_k: Of `multiclass` with scores of more classes than these: a hit is among so many.
        segments: Columns by whose values the quality is told as well.
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        seed: Of the bootstrap: the same rows and seed give the same report.
        max_evaluation_bytes: Of memory for the statistics; more rows than fit are refused.
    """

    model: ModelName
    versions: Annotated[
        tuple[VersionNumber, ...],
        BeforeValidator(_tuple),
        Field(min_length=1, max_length=_MOST_VERSIONS),
    ]
    repository: str | None = None
    allow_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    input: InputSpec
    output: _Name
    pool: Pool = Pool()
    limits: Limits = Limits()
    mode: Literal["auto", "stream", "pipeline"] = "auto"

    label: _Name
    task: _Task
    prediction: _Name | None = None
    positive: ClassValue | None = None
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    classes: Annotated[tuple[ClassValue, ...], BeforeValidator(_tuple)] | None = None
    top_k: Annotated[int, Field(ge=2)] = 5
    segments: Annotated[tuple[_Name, ...], BeforeValidator(_strings), Field(max_length=20)] = ()
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1_000
    seed: Annotated[int, Field(ge=0)] = 0
    max_evaluation_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] = 4 * 1024**3

    @field_validator("versions", "segments", "classes")
    @classmethod
    def _once_each(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        texts = [class_text(item) for item in value or ()]
        twice = [text for text in dict.fromkeys(texts) if texts.count(text) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is given twice")
        return value

    @field_validator("positive")
    @classmethod
    def _only_for_binary(cls, value: ClassValue | None, info: ValidationInfo) -> ClassValue | None:
        if value is not None and info.data.get("task", "binary") != "binary":
            raise ValueError(f"only for task: binary; the task is {info.data['task']}")
        return value

    @field_validator("classes")
    @classmethod
    def _go_with_task(
        cls, value: tuple[ClassValue, ...] | None, info: ValidationInfo
    ) -> tuple[ClassValue, ...] | None:
        task = info.data.get("task")
        if value is None or task is None:
            return value
        if task == "regression":
            raise ValueError("not for task: regression, whose labels are numbers")
        if len(value) < 2 or (task == "binary" and len(value) != 2):
            allowed = "two classes" if task == "binary" else "two classes or more"
            raise ValueError(f"{allowed}; {len(value)} are given")
        positive = info.data.get("positive")
        if positive is not None and class_text(positive) not in map(class_text, value):
            raise ValueError(f"positive is {positive!r}, which is not among them")
        return value

    def job(self, version: int, *, columns: bool = True) -> JobSpec:
        """The batch job that predicts the rows with one version.

        Args:
            version: One of `versions`.
            columns: Whether it copies the label and the segments. Without, only what the model
                needs is looked at.

        Raises:
            ConfigInvalid: What is written is no job.
        """
        copied = dict.fromkeys([self.label, *self.segments]) if columns else {}
        said = self.model_dump(include={*JobSpec.model_fields} - {"output", "version"})
        output = {
            "uri": f"{self.output.rstrip('/')}/version-{version}",
            "passthrough": tuple(copied),
            "prefix": PREFIX,
            "row_position": True,
        }
        try:
            return JobSpec.model_validate(
                {
                    **said,
                    "version": version,
                    "output": output,
                    "name": name_of_folder(self.output),
                }
            )
        except ValidationError as error:
            faults = [
                Fault("output" if fault.path.startswith("output") else fault.path, fault.message)
                for fault in faults_of(error)
            ]
            raise ConfigInvalid("evaluation", faults) from None


def load_evaluation(path: Path, changes: Sequence[str] = ()) -> EvaluationSpec:
    """Reads the YAML of an evaluation.

    Args:
        path: The file.
        changes: What the command line says instead, as in `pool.max_actors=4`: a path and YAML.

    Raises:
        ConfigInvalid: It cannot be read, is not YAML, or has faults: all, with path and line.
    """
    return load_file(path, changes, parse_evaluation)


def parse_evaluation(raw: Any, source: str = "evaluation") -> EvaluationSpec:
    """Checks what a YAML file says.

    Raises:
        ConfigInvalid: Every fault, with its path.
    """
    if not isinstance(raw, Mapping):
        message = (
            f"got {raw!r:.80}, allowed is a mapping with model, versions, input, label, task and "
            "output"
        )
        raise ConfigInvalid(source, [Fault("", message)])
    try:
        spec = EvaluationSpec.model_validate(dict(raw))
        spec.job(spec.versions[0])
    except ValidationError as error:
        faults = [_explained(fault) for fault in faults_of(error)]
        raise ConfigInvalid(source, _merged(faults)) from None
    except ConfigInvalid as error:
        raise ConfigInvalid(source, error.faults) from None
    return spec


_MEMBER = re.compile(r"\.(bool|int|str)$")


def _explained(fault: Fault) -> Fault:
    if fault.message == "unknown key" and "." not in fault.path:
        known = list(EvaluationSpec.model_fields)
        hint = {
            "version": " It takes versions, the baseline first, as in [1, 2].",
        }.get(fault.path, suggest(fault.path, known))
        return Fault(fault.path, f"unknown key.{hint} Allowed: {', '.join(known)}")
    if fault.path == "output" and "valid string" in fault.message:
        return Fault(fault.path, "a folder, as in `output: out/evaluation`")
    if _MEMBER.search(fault.path):
        got = fault.message.rpartition("; got ")[2]
        message = f"allowed is a whole number, text, true or false; got {got}"
        return Fault(_MEMBER.sub("", fault.path), message)
    if "valid tuple" in fault.message:
        return Fault(fault.path, fault.message.replace("Input should be a valid tuple", "a list"))
    return explain(fault, EvaluationSpec)


def _merged(faults: Sequence[Fault]) -> list[Fault]:
    """One fault for a value that is none of several types."""
    return list({(fault.path, fault.message): fault for fault in faults}.values())
