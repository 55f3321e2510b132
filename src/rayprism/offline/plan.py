"""What a batch job will do: the version, the input, the columns and the shards, all checked."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rayprism.core.shards import Shard, listing_digest, plan_digest, plan_shards
from rayprism.core.tensors import numpy_dtype
from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.fields import DATA_VARIABLE
from rayprism.models.manifest import Manifest
from rayprism.models.repository import ModelVersion, Repository
from rayprism.offline.columns import ColumnMap
from rayprism.offline.files import Listing, list_inputs
from rayprism.offline.images import input_columns, plan_pixels
from rayprism.offline.outputs import inner_shape
from rayprism.offline.parts import map_columns
from rayprism.offline.spec import JobSpec

__all__ = ["Plan", "plan_job", "with_absolute_uris"]

_JOB_MARKS = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID")
"""Set by Ray for what `ray job submit` runs, whose folder is a copy that is thrown away."""


@dataclass(frozen=True)
class Plan:
    """A job that can be done.

    Args:
        spec: With absolute URIs.
        version: The model's.
        listing: The input.
        columns: Which of its columns go where.
        shards: All of them, done or not.
    """

    spec: JobSpec
    version: ModelVersion
    listing: Listing
    columns: ColumnMap
    shards: tuple[Shard, ...]

    @property
    def manifest(self) -> Manifest:
        """Of the version."""
        return self.version.manifest

    @property
    def way(self) -> Literal["stream", "pipeline"]:
        """How the work goes through Ray Data."""
        return self.spec.way(prepares=prepares(self.manifest))

    @cached_property
    def rows(self) -> int | None:
        """Of the input; None where only reading it would tell."""
        counts = [shard.rows for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count is not None)

    def identity(self) -> dict[str, Any]:
        """What must be the same in every run that adds to one output."""
        return {
            "model": self.manifest.model,
            "version": str(self.manifest.version),
            "digest": self.manifest.digest,
            "input": listing_digest(self.listing.files),
            "plan": plan_digest(self.shards),
            "job": self.spec.identity(prepares=prepares(self.manifest)),
        }


def prepares(manifest: Manifest) -> bool:
    """Whether the version has pre-processing of its own."""
    return manifest.code is not None and manifest.runtime != "python"


def plan_job(spec: JobSpec, source: str = "job") -> Plan:
    """Looks at everything that can be known before any work.

    Args:
        spec: The job.
        source: What it was read from, for messages.

    Raises:
        ConfigInvalid: Columns, types or URIs that do not fit, files that cannot be read, code that
            is not allowed.
        RepositoryError: No such version.
        SetupError: There is no input.
    """
    spec = with_absolute_uris(spec, os.environ, source)
    version = Repository(spec.repository_path()).version(spec.model, spec.version)
    manifest = version.manifest
    name = f"model {manifest.model!r} version {manifest.version}"
    if manifest.runs_code and not spec.allow_code:
        message = f"{name} runs Python code that came with it. Read that code; to let it run: true"
        raise ConfigInvalid(source, [Fault("allow_code", message)])
    pixels = plan_pixels(spec.input, manifest, source)
    listing = list_inputs(
        spec.input.uri,
        format=spec.input.format,
        pixels=pixels,
        columns=None if spec.output.passes_all else _wanted(spec, manifest),
        partitioning=spec.input.partitioning,
        delimiter=spec.input.csv.delimiter,
        newlines_in_values=spec.input.csv.newlines_in_values,
        types=_float_columns(spec, manifest),
    )
    columns = map_columns(spec, listing, manifest, source)
    return Plan(spec, version, listing, columns, tuple(_cut(spec, listing, manifest)))


def _cut(spec: JobSpec, listing: Listing, manifest: Manifest) -> list[Shard]:
    rows = spec.shard_rows(prepares=prepares(manifest))
    target_bytes = spec.shard_bytes(prepares=prepares(manifest))
    if listing.pixels is None:
        return plan_shards(listing.files, target_rows=rows, target_bytes=target_bytes)
    # A shard is one file of the output, which lies in one folder.
    folders = [listing.partition_folder(index) for index in range(len(listing.files))]
    return plan_shards(
        listing.files,
        target_rows=rows,
        target_bytes=target_bytes,
        files_per_shard=rows,
        folders=folders if spec.output.partitioned else None,
    )


def _wanted(spec: JobSpec, manifest: Manifest) -> list[str]:
    """Every column that the job needs, each once."""
    mapped = input_columns(spec.input, manifest)
    names = [name for item in manifest.inputs for name in mapped.get(item.name, (item.name,))]
    return list(dict.fromkeys([*names, *spec.output.passthrough]))


def _float_columns(spec: JobSpec, manifest: Manifest) -> dict[str, pa.DataType]:
    """Columns that become floats: the first values of a JSON file may happen to be whole."""
    types: dict[str, pa.DataType] = {}
    for item in manifest.inputs:
        if numpy_dtype(item.datatype).kind != "f":
            continue
        inner = inner_shape(item, manifest.batching.batched)
        columns = spec.input.columns.get(item.name, (item.name,))
        if len(columns) > 1 or not inner:
            types |= dict.fromkeys(columns, pa.float64())
        elif inner != (1,):  # which may be a number or a list of one
            nested = pa.float64()
            for _ in inner:
                nested = pa.list_(nested)
            types[columns[0]] = nested
    return types


def with_absolute_uris(spec: JobSpec, environment: Mapping[str, str], source: str) -> JobSpec:
    """The job with relative paths made absolute.

    They start at what RAYPRISM_DATA says, else in the folder where the command runs; in a Ray job
    that folder is a copy which Ray throws away, so there they need RAYPRISM_DATA.

    Raises:
        ConfigInvalid: A relative path in a Ray job without it.
    """
    root = environment.get(DATA_VARIABLE)
    if root is None and any(mark in environment for mark in _JOB_MARKS):
        named = {"input.uri": spec.input.uri, "output.uri": (spec.output.uri,)}
        message = (
            "{!r} is relative, and in a Ray job that is a copy of --working-dir which is thrown "
            f"away. Write an absolute path or a URI, or set {DATA_VARIABLE} on the cluster "
            "(`rayprism up` sets it to the folder it is started in)"
        )
        faults = [
            Fault(path, message.format(uri))
            for path, uris in named.items()
            for uri in uris
            if _is_relative(uri)
        ]
        if faults:
            raise ConfigInvalid(source, faults)
    base = root or str(Path.cwd())

    def absolute(uri: str) -> str:
        return posixpath.normpath(posixpath.join(base, uri)) if _is_relative(uri) else uri

    return spec.model_copy(
        update={
            # Actors on other nodes have an environment of their own.
            "repository": str(spec.repository_path()),
            "input": spec.input.model_copy(
                update={"uri": tuple(absolute(uri) for uri in spec.input.uri)}
            ),
            "output": spec.output.model_copy(update={"uri": absolute(spec.output.uri)}),
        }
    )


def _is_relative(uri: str) -> bool:
    return "://" not in uri and not uri.startswith("/")
