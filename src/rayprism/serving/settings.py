"""What an operator writes in a Serve YAML: `args` of the application, and `user_config`.

A change of `args` starts new replicas. A change of `user_config` takes effect in place, between
two requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.manifest import faults_of, is_model_name

__all__ = [
    "DEPLOYMENT_NAME",
    "REPOSITORY_VARIABLE",
    "ModelArgs",
    "UserConfig",
    "parse_args",
    "parse_user_config",
]

DEPLOYMENT_NAME = "model"
"""The name of the one deployment of every model application; its options go under it."""

REPOSITORY_VARIABLE = "RAYPRISM_REPOSITORY"
"""Environment variable of the cluster that names the repository where `args` does not."""


_T = TypeVar("_T", bound=BaseModel)


class _Settings(BaseModel):
    # Strict: YAML has types of its own, and `true` for a number or "no" for a flag is a mistake.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, protected_namespaces=()
    )


class ModelArgs(_Settings):
    """`args` of a model application: which version runs, and how it is loaded.

    Args:
        model: The model's name.
        version: The version to serve. Always named: nothing is served because it is newest.
        repository: Absolute path of the model repository, the same on every node. By default
            what RAYPRISM_REPOSITORY says in the environment of the cluster.
        allow_code: Whether code in the version's folder may run.
        device: `auto` takes a GPU where Ray assigned one to the replica.
    """

    model: str
    version: Annotated[int, Field(ge=1)]
    repository: str | None = None
    allow_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("model")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not is_model_name(value):
            raise ValueError(
                "a model name has letters, digits, '.', '_' and '-', at most 128, "
                "starting with a letter or digit, no '..'"
            )
        return value

    @field_validator("version", mode="before")
    @classmethod
    def _from_digits(cls, value: Any) -> Any:
        if isinstance(value, (bool, float)):
            raise ValueError('a whole number from 1, as in "3"')
        # People write both 3 and "3", and mean the same.
        return (
            int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        )

    @field_validator("repository")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError(
                "an absolute path: a relative one would mean another folder on every node. Or "
                f"leave it out and set {REPOSITORY_VARIABLE} for the cluster "
                "(`rayprism up --repository PATH`)"
            )
        return value

    def repository_path(self) -> Path:
        """Where the repository is, from `repository` or the environment.

        Raises:
            ConfigInvalid: Neither names one.
        """
        value = self.repository or os.environ.get(REPOSITORY_VARIABLE)
        if not value:
            raise ConfigInvalid(
                "args",
                [
                    Fault(
                        "repository",
                        f"not given, and {REPOSITORY_VARIABLE} is not set in the environment of "
                        "the cluster. Write an absolute path, or start the cluster with "
                        "`rayprism up --repository PATH`",
                    )
                ],
            )
        return Path(value)


class UserConfig(_Settings):
    """`user_config` of the deployment `model`: what may change while it runs.

    Args:
        max_batch_rows: Most rows in one batch; by default the manifest's.
        max_batch_cost: Most `rows * padded length` in one batch; by default the manifest's.
        max_delay_s: How long a batch that is not full may wait for more; by default the
            manifest's.
        max_queue_rows: Rows that may wait. A request that would not fit is refused with 503.
        default_timeout_s: For requests that name no time-out of their own.
        max_body_bytes: Largest body of a request, before and after decompression.
        priority_levels: Priorities run from 1 (first) to this.
        default_priority: For requests that name none.
        execution: `inline`, `thread` or `auto`; by default the manifest's.
    """

    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_batch_cost: Annotated[int, Field(ge=1)] | None = None
    max_delay_s: Annotated[float, Field(ge=0, le=60)] | None = None
    max_queue_rows: Annotated[int, Field(ge=1, le=10_000_000)] = 2048
    default_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**40)] = 64 * 1024 * 1024
    priority_levels: Annotated[int, Field(ge=1, le=100)] = 3
    default_priority: Annotated[int, Field(ge=1, le=100)] = 2
    execution: Literal["auto", "inline", "thread"] | None = None

    @field_validator("default_priority")
    @classmethod
    def _within_levels(cls, value: int, info: Any) -> int:
        levels = info.data.get("priority_levels")
        if levels is not None and value > levels:
            raise ValueError(f"at most priority_levels, which is {levels}")
        return value


def parse_args(raw: Mapping[str, Any], prefix: str = "") -> ModelArgs:
    """Checks `args`.

    Raises:
        ConfigInvalid: Every fault, with its path.
    """
    return _parse(ModelArgs, raw, "args", prefix)


def parse_user_config(raw: Mapping[str, Any] | None, prefix: str = "") -> UserConfig:
    """Checks `user_config`; nothing at all means the defaults.

    Raises:
        ConfigInvalid: Every fault, with its path.
    """
    return _parse(UserConfig, {} if raw is None else raw, "user_config", prefix)


def _parse(kind: type[_T], raw: Any, source: str, prefix: str) -> _T:
    if not isinstance(raw, Mapping):
        raise ConfigInvalid(source, [Fault(prefix, f"got {raw!r:.80}, allowed is a mapping")])
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        known = list(kind.model_fields)
        faults = [
            Fault(
                fault.path,
                f"unknown key.{suggest(fault.path.rsplit('.', 1)[-1], known)} "
                f"Allowed: {', '.join(known)}",
            )
            if fault.message == "unknown key"
            else fault
            for fault in faults_of(error, prefix)
        ]
        raise ConfigInvalid(source, faults) from None
