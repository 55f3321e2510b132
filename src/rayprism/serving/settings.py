"""What an operator writes in a Serve YAML: `args` of the application, and `user_config`.

A change of `args` starts new replicas. A change of `user_config` takes effect in place, between
two requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault
from rayprism.models.fields import REPOSITORY_VARIABLE, ModelName, VersionNumber
from rayprism.models.gpu import Device
from rayprism.models.manifest import faults_of

__all__ = [
    "DEPLOYMENT_NAME",
    "REPOSITORY_VARIABLE",
    "Candidate",
    "ModelArgs",
    "Shadow",
    "Sticky",
    "TelemetryConfig",
    "TrafficConfig",
    "UserConfig",
    "parse_args",
    "parse_user_config",
]

DEPLOYMENT_NAME = "model"
"""The name of the one deployment of every model application; its options go under it."""


class _Settings(BaseModel):
    # Strict: YAML has types of its own, and `true` for a number or "no" for a flag is a mistake.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, protected_namespaces=()
    )


_T = TypeVar("_T", bound=_Settings)


class ModelArgs(_Settings):
    """`args` of a model application: which version runs, and how it is loaded.

    Args:
        model: The model's name.
        version: The version to serve. Always named: nothing is served because it is newest.
        repository: Absolute path of the model repository, the same on every node. By default
            what RAYPRISM_REPOSITORY says in the environment of the cluster.
        allow_code: Whether code in the version's folder may run.
        device: `auto` takes a GPU where Ray assigned one to the replica.
        options: Of the runtime, by its name, laid over those of the manifest one by one: what
            belongs to the machine and not to the model.
    """

    model: ModelName
    version: VersionNumber
    repository: str | None = None
    allow_code: bool = False
    device: Device = "auto"
    options: dict[str, Any] = Field(default_factory=dict)

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


def _hundredths(value: float) -> float:
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise ValueError("a percentage with at most two decimals, as in 0.25")
    return value


_Percent = Annotated[float, Field(ge=0, le=100), AfterValidator(_hundredths)]


class Candidate(_Settings):
    """A version that gets a share of the requests.

    Args:
        version: Of the same model; an application of its own serves it.
        weight: Percent, with at most two decimals.
        allow_signature_change: Whether its inputs and outputs may differ from the stable
            version's.
    """

    version: VersionNumber
    weight: _Percent
    allow_signature_change: bool = False

    @property
    def slots(self) -> int:
        """The weight in hundredths of a percent."""
        return round(self.weight * 100)


class Sticky(_Settings):
    """What keeps one user at one version.

    Args:
        header: Name of an HTTP header, or of a key of gRPC metadata. Requests without it are drawn
            on their own.
    """

    header: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$")]


class Shadow(_Settings):
    """A version that gets copies of requests; nobody sees its answers.

    Args:
        version: Of the same model; an application of its own serves it.
        sample: Percent of the requests that the stable version answers.
        allow_signature_change: As for candidates.
    """

    version: VersionNumber
    sample: _Percent
    allow_signature_change: bool = False


class TrafficConfig(_Settings):
    """`user_config.traffic` of the stable application: who else gets its requests.

    Args:
        candidates: Versions that answer a share of the requests.
        sticky: How requests of one user are recognised.
        shadow: Versions that get copies.
        candidate_timeout_s: How long a candidate may take before the stable version answers
            instead; by default half of what the request allows.
        max_shadow_requests: Copies that may wait or be on their way, in each replica.
        max_shadow_bytes: Of their bodies, together.
    """

    candidates: tuple[Candidate, ...] = ()
    sticky: Sticky | None = None
    shadow: tuple[Shadow, ...] = ()
    candidate_timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    max_shadow_requests: Annotated[int, Field(ge=1, le=10_000)] = 32
    max_shadow_bytes: Annotated[int, Field(ge=1024, le=2**40)] = 32 * 1024 * 1024

    @field_validator("candidates", "shadow", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("a list")
        return tuple(value)

    @field_validator("candidates", "shadow")
    @classmethod
    def _once_each(cls, value: tuple[Candidate | Shadow, ...]) -> Any:
        versions = [item.version for item in value]
        twice = sorted({version for version in versions if versions.count(version) > 1})
        if twice:
            raise ValueError(f"version {twice[0]} is given twice")
        return value

    @field_validator("candidates")
    @classmethod
    def _at_most_all(cls, value: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        total = sum(candidate.slots for candidate in value)
        if total > 10_000:
            raise ValueError(f"the weights are {total / 100:g} % together, allowed are 100")
        return value


class TelemetryConfig(_Settings):
    """`user_config.telemetry`: what is logged and traced, and what the model promises.

    Args:
        log_percent: Of the successful requests that the request log gets; failures always are in
            it.
        trace_percent: Of the requests that come without a trace of their own, where traces are
            exported at all.
        p99_target_s: The time that 99 of 100 requests should take at most; over it an alert fires.
        availability_percent: Requests that should not fail by the server's fault; an alert fires
            where the rest is used up too fast.
    """

    log_percent: _Percent = 0.0
    trace_percent: _Percent = 100.0
    p99_target_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    availability_percent: Annotated[float, Field(ge=50, lt=100)] = 99.9


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
        traffic: Which other versions get requests of this one's address.
        telemetry: What is logged and traced, and what the model promises.
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
    traffic: TrafficConfig | None = None
    telemetry: TelemetryConfig = TelemetryConfig()

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
        raise ConfigInvalid(
            source, [_with_known_keys(kind, fault) for fault in faults_of(error, prefix)]
        ) from None


_NESTED: dict[str, type[_Settings]] = {
    "traffic": TrafficConfig,
    "candidates": Candidate,
    "sticky": Sticky,
    "shadow": Shadow,
    "telemetry": TelemetryConfig,
}


def _with_known_keys(kind: type[_Settings], fault: Fault) -> Fault:
    if fault.message != "unknown key":
        return fault
    parent, _, key = fault.path.rpartition(".")
    known = list(_NESTED.get(parent.rpartition(".")[2].partition("[")[0], kind).model_fields)
    return Fault(fault.path, f"unknown key.{suggest(key, known)} Allowed: {', '.join(known)}")
