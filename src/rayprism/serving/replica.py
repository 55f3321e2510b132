"""The Ray Serve replica of one model version: loads it, and is its HTTP and gRPC ingress."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.experimental import internal_kv

from rayprism.errors import ConfigInvalid
from rayprism.models.gpu import Device, Gpu, choose_device
from rayprism.models.loader import load_model
from rayprism.models.repository import Repository
from rayprism.serving.controller import ask_controller
from rayprism.serving.grpc import GrpcMethods
from rayprism.serving.http import ModelApp
from rayprism.serving.lane import open_lane
from rayprism.serving.links import Links
from rayprism.serving.reporting import Reporting, report_failed_load
from rayprism.serving.service import ModelService
from rayprism.serving.settings import ModelArgs, UserConfig, parse_user_config

__all__ = ["ModelReplica"]

_KV_NAMESPACE = b"rayprism"
logger = logging.getLogger("ray.serve.rayprism")


class ModelReplica(GrpcMethods):
    """One replica. It is ready when its version is loaded, warmed up and proven by its example.

    Args:
        args: The application's checked `args`, as JSON values.
    """

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        settings = ModelArgs.model_validate(args)
        version = Repository(settings.repository_path()).version(settings.model, settings.version)
        context = serve.get_replica_context()
        self._reporting = Reporting(
            settings.model,
            settings.version,
            context.replica_id.unique_id,
            context.app_name,
            ask_controller,
        )
        try:
            device, gpu = _assigned_device(settings.device)
            # In a thread: the event loop has to answer the controller while gigabytes are read.
            model = await asyncio.to_thread(
                load_model,
                version,
                allow_code=settings.allow_code,
                threads=_assigned_threads(),
                device=device,
                gpu=gpu,
                options=settings.options,
            )
        except Exception as error:
            await asyncio.to_thread(report_failed_load, settings.model, settings.version, error)
            raise
        node_id = ray.get_runtime_context().get_node_id()
        links = Links(settings.model, ask_controller, node_id)
        self.service = ModelService(model, UserConfig(), links, self._reporting.telemetry)
        self._reporting.start(model, self.service)
        self._config_key = f"user_config/{context.app_name}/{settings.model}".encode()
        self._configured = False
        steps = ", ".join(f"{step} {seconds:.3f} s" for step, seconds in model.load_s.items())
        logger.info(
            "%s version %s (%s) is loaded on %s with %d threads: %s.",
            settings.model,
            settings.version,
            version.manifest.digest,
            model.device,
            _assigned_threads(),
            steps,
        )

    def __serve_build_asgi_app__(self) -> ModelApp:
        """Called by Serve once the replica is constructed."""
        app = ModelApp(self.service)
        open_lane(app)
        return app

    async def reconfigure(self, user_config: Mapping[str, Any] | None, rank: Any) -> None:
        """Takes a new `user_config` in place; a faulty one is refused and the last good one kept.

        A replica that starts with a faulty one takes the last good one of its application. Where
        there was none, it does not start: the operator sees the faults in Serve's status.

        Args:
            user_config: None where the file has none, which means the defaults.
            rank: Not used. But only for a method that takes it does Serve make the call also when
                a `user_config` is taken out of the file.
        """
        starting, self._configured = not self._configured, True
        # Not waited for: a replica takes no requests while it is being reconfigured.
        asyncio.get_running_loop().run_in_executor(None, self._reporting.look_up_role)
        if self.service.reconfigure(user_config):
            # Not waited for, either.
            asyncio.get_running_loop().run_in_executor(
                None, self._remember, dict(user_config or {})
            )
            return
        if not starting:
            return
        error = self.service.config_error
        last_good = await asyncio.to_thread(self._recall)
        if last_good is None:
            # Raises: the first user_config of an application has nothing to fall back on.
            parse_user_config(user_config)
        self.service.reconfigure(last_good)
        self.service.config_error = error

    async def check_health(self) -> None:
        """Called by Serve now and then; what it raises makes Serve replace the replica."""
        self.service.check_health()

    def _remember(self, user_config: dict[str, Any]) -> None:
        value = json.dumps(user_config).encode()
        try:
            internal_kv._internal_kv_put(self._config_key, value, True, namespace=_KV_NAMESPACE)
        except Exception:
            # Only a replica that starts while the newest one is faulty would miss it.
            logger.warning("The last good user_config could not be kept.", exc_info=True)

    def _recall(self) -> dict[str, Any] | None:
        try:
            value = internal_kv._internal_kv_get(self._config_key, namespace=_KV_NAMESPACE)
            if value is None:
                return None
            user_config: dict[str, Any] = json.loads(value)
            parse_user_config(user_config)
        except ConfigInvalid:
            return None  # kept by another version of rayprism
        except Exception:
            logger.warning("The last good user_config could not be read.", exc_info=True)
            return None
        return user_config

    async def __del__(self) -> None:
        """Called by Serve after draining."""
        service = getattr(self, "service", None)
        if service is not None:
            await service.close()
        reporting = getattr(self, "_reporting", None)
        if reporting is not None:
            await reporting.close()


def _assigned_threads() -> int:
    """The CPUs that Ray gave this replica, at least one."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return max(1, int(resources.get("CPU", 1)))


def _assigned_device(wanted: Device) -> tuple[Device, Gpu]:
    """The GPU that Ray gave this replica, or a part of one; else the CPU."""
    context = ray.get_runtime_context()
    assigned = context.get_accelerator_ids().get("GPU", [])
    return choose_device(wanted, assigned, context.get_assigned_resources().get("GPU", 0))
