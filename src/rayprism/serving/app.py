"""`import_path: rayprism.serving.app:build` makes the application of one model version."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from rayprism.errors import CodeNotAllowed
from rayprism.models.repository import Repository
from rayprism.serving.replica import ModelReplica
from rayprism.serving.settings import DEPLOYMENT_NAME, parse_args

__all__ = ["MAX_ONGOING_REQUESTS", "build"]

MAX_ONGOING_REQUESTS = 8192
"""Far above what a replica's own queue lets wait: that queue answers with 503 and a Retry-After,
while requests over this number would wait in Serve, unseen by the autoscaler."""

_Deployment = serve.deployment(
    name=DEPLOYMENT_NAME,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    # New replicas are ready before old ones stop; if they cannot start, the old ones stay.
    max_surge_percent=100,
    # What a draining replica took shortly before its end may take as long as any request. Idle
    # replicas do not use this time.
    graceful_shutdown_timeout_s=120,
    # A line for every request costs about a fifth of a tiny model's throughput. Whoever wants it
    # writes `logging_config: {enable_access_log: true}` in the file.
    logging_config={"enable_access_log": False},
)(serve.ingress()(ModelReplica))


def build(args: dict[str, Any]) -> Application:
    """The application for one model version.

    Args:
        args: See `rayprism.serving.settings.ModelArgs`.

    Raises:
        ConfigInvalid: Faults in `args`, each with its path.
        RepositoryError: No such repository, model or version.
        CodeNotAllowed: The version needs code to run, and `allow_code` is not set.
    """
    settings = parse_args(args)
    repository = settings.repository_path()
    # Told here, once, and not by each replica that cannot start.
    version = Repository(repository).version(settings.model, settings.version)
    if version.manifest.runs_code and not settings.allow_code:
        raise CodeNotAllowed(
            f"{settings.model} version {settings.version} brings code of its own. If you trust "
            "it, write `allow_code: true` under the application's args"
        )
    resolved = settings.model_copy(update={"repository": str(repository.resolve())})
    return _Deployment.bind(resolved.model_dump(mode="json"))
