"""What a batch job is told: the YAML that `batch/predict.py` takes.

PyYAML reads it, as it reads Serve's files. It speaks YAML 1.1: `on` and `no` are booleans there,
and `1e-3` is a string.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator

from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.fields import REPOSITORY_VARIABLE, ModelName, VersionNumber
from rayprism.models.gpu import Device
from rayprism.models.manifest import faults_of
from rayprism.offline.spec_file import explain, load_file
from rayprism.offline.spec_parts import (
    CsvOptions,
    Format,
    ImageOptions,
    InputSpec,
    Limits,
    OutputSpec,
    Pool,
    SpecPart,
)

__all__ = [
    "REPOSITORY_VARIABLE",
    "CsvOptions",
    "Format",
    "ImageOptions",
    "InputSpec",
    "JobSpec",
    "Limits",
    "OutputSpec",
    "Pool",
    "load_spec",
    "name_of_folder",
    "parse_spec",
]

_MOST_NAME = 64


def _is_job_name(value: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{_MOST_NAME}}}", value):
        raise ValueError(
            f"a job's name has letters, digits, '.', '_' and '-', at most {_MOST_NAME}"
        )
    return value


class JobSpec(SpecPart):
    """A batch job.

    Args:
        model: The model's name.
        version: Always named: nothing is run because it is newest.
        repository: Absolute path of the model repository, the same on every node. By default what
            RAYPRISM_REPOSITORY says.
        allow_code: Whether code in the version's folder may run.
        device: `auto` takes a GPU where Ray assigned one to the actor.
        options: Of the runtime, by its name, laid over those of the manifest one by one.
        input: What is read.
        output: What is written.
        pool: The actors.
        limits: Of batches, shards, dead letters and memory.
        mode: How the work goes through Ray Data; see `way`.
        name: For metrics; see `job_name`.
    """

    model: ModelName
    version: VersionNumber
    repository: str | None = None
    allow_code: bool = False
    device: Device = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    input: InputSpec
    output: OutputSpec
    pool: Pool = Pool()
    limits: Limits = Limits()
    mode: Literal["auto", "stream", "pipeline"] = "auto"
    name: Annotated[str, AfterValidator(_is_job_name)] | None = None

    @field_validator("repository")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError(
                "an absolute path: a relative one would mean another folder on every node. Or "
                f"leave it out and set {REPOSITORY_VARIABLE}"
            )
        return value

    @field_validator("output")
    @classmethod
    def _apart_from_input(cls, value: OutputSpec, info: ValidationInfo) -> OutputSpec:
        source = info.data.get("input")
        if source is None:
            return value
        if value.partitioned and source.partitioning != "hive":
            raise ValueError("partitioned: needs input.partitioning: hive")
        inside = [uri for uri in source.uri if _would_read(uri, value.uri)]
        if inside:
            raise ValueError(
                f"uri: {value.uri} lies in the input {inside[0]}, so the next run would read what "
                "this one wrote. Write somewhere else"
            )
        return value

    @property
    def job_name(self) -> str:
        """What metrics call it: its name, else that of the folder it writes to."""
        return self.name or name_of_folder(self.output.uri)

    def repository_path(self) -> Path:
        """Where the repository is, from `repository` or the environment.

        Raises:
            ConfigInvalid: Neither names one.
        """
        value = self.repository or os.environ.get(REPOSITORY_VARIABLE)
        if not value:
            message = (
                f"not given, and {REPOSITORY_VARIABLE} is not set in the environment. Write an "
                "absolute path, or set the variable"
            )
            raise ConfigInvalid("job", [Fault("repository", message)])
        return Path(value)

    def way(self, *, prepares: bool) -> Literal["stream", "pipeline"]:
        """How the work goes through Ray Data.

        `pipeline` where there is work for CPUs to do beside a GPU: the actors ask for a GPU, and
        the model has pre-processing or reads images. Else `stream`, which moves no rows between
        processes.

        Args:
            prepares: Whether the model has pre-processing.
        """
        if self.mode != "auto":
            return self.mode
        beside_gpu = prepares or self.input.images is not None
        return "pipeline" if self.pool.gpus > 0 and beside_gpu else "stream"

    def shard_rows(self, *, prepares: bool) -> int:
        """Rows, or images, that are committed as a whole: a second to a minute of work.

        By default 262,144 rows, 2,048 where the model has pre-processing, 256 images.

        Args:
            prepares: Whether the model has pre-processing.
        """
        if self.limits.shard_rows is not None:
            return self.limits.shard_rows
        if self.input.images is not None:
            return 256
        return 2_048 if prepares else 262_144

    def shard_bytes(self, *, prepares: bool) -> int:
        """Bytes of a text file that are committed as a whole, for about as much work.

        By default 64 MiB, 512 KiB where the model has pre-processing.

        Args:
            prepares: Whether the model has pre-processing.
        """
        if self.limits.shard_bytes is not None:
            return self.limits.shard_bytes
        return 512 * 1024 if prepares else 64 * 1024 * 1024

    def identity(self, *, prepares: bool) -> dict[str, Any]:
        """What must be the same in every run that adds to one output.

        Not in it: how fast and where it is done, when to give up, and where the model was read
        from, which its digest says better. What shards were cut by is in it as a number, whether
        it was said or a default of this release.

        Args:
            prepares: Whether the model has pre-processing, as for `shard_rows`.
        """
        said: dict[str, Any] = self.model_dump(mode="json")
        for key in ("pool", "mode", "name", "repository", "allow_code"):
            del said[key]
        for key in ("max_dead_letters", "batch_rows", "max_memory_bytes"):
            del said["limits"][key]
        if not said["options"]:
            del said["options"]  # outputs that were begun before there were any go on
        said["limits"]["shard_rows"] = self.shard_rows(prepares=prepares)
        said["limits"]["shard_bytes"] = self.shard_bytes(prepares=prepares)
        return said


def name_of_folder(uri: str) -> str:
    """The last part of a URI as a job's name: its other characters become `_`."""
    path = uri.partition("?")[0] if "://" in uri else uri
    last = path.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", last)[:_MOST_NAME]
    return name if name.strip(".") else "job"


def _would_read(source: str, output: str) -> bool:
    """Whether a later listing of `source` would find what is written to the folder `output`."""
    folder, pattern = re.match(r"([^*?\[]*)(.*)", source, re.DOTALL).groups()  # type: ignore[union-attr]
    if pattern and "**" not in pattern:
        return False
    if pattern:
        folder = folder.rpartition("/")[0] or ("/" if folder.startswith("/") else ".")
    inner, outer = (posixpath.normpath(uri.removeprefix("file://")) for uri in (output, folder))
    if outer == ".":
        return not inner.startswith(("/", "..")) and "://" not in output
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def load_spec(path: Path, changes: Sequence[str] = ()) -> JobSpec:
    """Reads the YAML of a job.

    Args:
        path: The file.
        changes: What the command line says instead, as in `pool.max_actors=4`: a path and YAML.

    Raises:
        ConfigInvalid: It cannot be read, is not YAML, or has faults: all, with path and line.
    """
    return load_file(path, changes, parse_spec)


def parse_spec(raw: Any, source: str = "job") -> JobSpec:
    """Checks what a YAML file says.

    Raises:
        ConfigInvalid: Every fault, with its path.
    """
    if not isinstance(raw, Mapping):
        message = f"got {raw!r:.80}, allowed is a mapping with model, version, input and output"
        raise ConfigInvalid(source, [Fault("", message)])
    try:
        return JobSpec.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigInvalid(
            source, [explain(fault, JobSpec) for fault in faults_of(error)]
        ) from None
