"""What rayprism itself has to say about a Serve file: models, versions, routes, gRPC."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, DigestMismatch, Fault, RepositoryError
from rayprism.fleet.check_traffic import PlannedVersion, TrafficChecks
from rayprism.fleet.document import Document
from rayprism.models.repository import ModelVersion, Repository
from rayprism.serving.fleet_view import MODEL_IMPORT_PATH
from rayprism.serving.settings import (
    DEPLOYMENT_NAME,
    ModelArgs,
    UserConfig,
    parse_args,
    parse_user_config,
)

__all__ = [
    "FRONT_IMPORT_PATH",
    "GRPC_FUNCTION",
    "MODEL_IMPORT_PATH",
    "ModelChecks",
]

FRONT_IMPORT_PATH = "rayprism.serving.front:build"
"""Of the application that answers for the server as a whole."""

GRPC_FUNCTION = "rayprism.protocol.grpc:add_GRPCInferenceServiceServicer_to_server"
"""What `grpc_options.grpc_servicer_functions` has to name for gRPC clients."""

_FRONT_ROUTES = ("/", "/v2")
_FRONT_DEPLOYMENT = "front"
_SERVES_KEEP_ALIVE_S = 90
_DRAIN_S = 30
"""Serve's own numbers, where nothing else is said (Ray 2.60, serve/_private/constants.py)."""


class ModelChecks:
    """Runs the checks on one file and collects what they find.

    Args:
        document: The file.
        repository: For applications whose `args` name none.
        verify: Whether digests are checked.
    """

    def __init__(self, document: Document, repository: Path | None, *, verify: bool) -> None:
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []
        self.args: dict[int, ModelArgs] = {}
        """Of every model application whose `args` are right, by its place in the file."""
        self.digests: dict[int, str] = {}
        self._document = document
        self._repository = repository
        self._verify = verify
        self._verified: set[Path] = set()
        self._skipped = False
        self._served: list[PlannedVersion] = []
        self._unclear = False
        self._found: dict[
            tuple[Path, str, int], ModelVersion | RepositoryError | ConfigInvalid
        ] = {}

    def run(self) -> None:
        """Checks the file."""
        data = self._document.data
        if not isinstance(data, dict):
            return
        applications = data.get("applications")
        ours = False
        for index, application in enumerate(applications if isinstance(applications, list) else []):
            if not isinstance(application, dict):
                continue
            path = f"applications[{index}]"
            kind = _normal(application.get("import_path"))
            if kind == MODEL_IMPORT_PATH:
                ours = True
                self._model_application(application, path, index)
            elif kind == FRONT_IMPORT_PATH:
                ours = True
                self._front_application(application, path)
            elif kind.startswith(("rayprism.", "rayprism:")):
                self._unclear = True
                known = (MODEL_IMPORT_PATH, FRONT_IMPORT_PATH)
                self._fault(
                    f"{path}.import_path",
                    f"{application['import_path']!r} is nothing of rayprism's."
                    f"{suggest(kind, known)} Allowed: {', '.join(known)}",
                )
        if ours:
            self._grpc(data)
        self._traffic()
        self._host(data)
        self._keep_alive(data)

    def _fault(self, path: str, message: str) -> None:
        self.faults.append(self._document.fault(path, message))

    def _warn(self, path: str, message: str) -> None:
        self.warnings.append(self._document.fault(path, message))

    def _take(self, error: ConfigInvalid) -> None:
        for fault in error.faults:
            self._fault(fault.path, fault.message)

    def _model_application(self, application: Mapping[str, Any], path: str, index: int) -> None:
        args = None
        if application.get("args") is None:
            self._fault(
                f"{path}.args",
                'missing: it names the model and version, {model: NAME, version: "1"}',
            )
        elif isinstance(application["args"], dict):
            try:
                args = parse_args(application["args"], f"{path}.args")
                self.args[index] = args
            except ConfigInvalid as error:
                self._take(error)
        if application.get("logging_config") is not None:
            # Serve gives it only to deployments that have none, and ours has one of its own.
            self._warn(
                f"{path}.logging_config",
                f"has no effect on a model application: write it under its deployment "
                f"{DEPLOYMENT_NAME!r}",
            )
        deployments = application.get("deployments")
        settings: UserConfig | None = None
        settings_path = ""
        for place, deployment in enumerate(deployments if isinstance(deployments, list) else []):
            if isinstance(deployment, dict):
                where = f"{path}.deployments[{place}]"
                settings = self._deployment(deployment, where, place, args)
                settings_path = f"{where}.user_config"
        if args is not None:
            self._route(application, path, args)
            self._version(args, f"{path}.args", index)
        self._remember(application, path, args, settings, settings_path)

    def _remember(
        self,
        application: Mapping[str, Any],
        path: str,
        args: ModelArgs | None,
        settings: UserConfig | None,
        settings_path: str,
    ) -> None:
        # What it was to serve may be plain although other arguments are wrong.
        plain = args or _model_and_version(application.get("args"))
        if plain is None:
            self._unclear = True
            return
        route = application.get("route_prefix", "/")
        root = None if args is None else self._root(args)
        self._served.append(
            PlannedVersion(
                name=str(application.get("name", "default")),
                path=path,
                route=None if route is None else str(route),
                model=plain.model,
                version=plain.version,
                repository=root if root is not None and root.is_dir() else None,
                traffic=settings.traffic if settings else None,
                traffic_path=f"{settings_path}.traffic",
            )
        )

    def _traffic(self) -> None:
        checks = TrafficChecks(self._served, self._look_up, unclear=self._unclear)
        checks.run()
        for fault in checks.faults:
            self._fault(*fault)
        for warning in checks.warnings:
            self._warn(*warning)

    def _deployment(
        self, deployment: Mapping[str, Any], path: str, place: int, args: ModelArgs | None
    ) -> UserConfig | None:
        name = deployment.get("name")
        if isinstance(name, str) and name != DEPLOYMENT_NAME:
            self._fault(
                f"{path}.name",
                f"got {name!r}; a model application has one deployment, {DEPLOYMENT_NAME!r}",
            )
        elif place > 0 and name == DEPLOYMENT_NAME:
            self._fault(
                f"{path}.name", f"{DEPLOYMENT_NAME!r} is given twice; Serve would take the last"
            )
        given = deployment.get("user_config")
        settings: UserConfig | None = None
        if given is None or isinstance(given, dict):
            try:
                settings = parse_user_config(given, f"{path}.user_config")
            except ConfigInvalid as error:
                self._take(error)
        ongoing = deployment.get("max_ongoing_requests")
        if settings and type(ongoing) is int and 0 < ongoing < settings.max_queue_rows:
            self._warn(
                f"{path}.max_ongoing_requests",
                f"{ongoing} is less than the queue of a replica holds (user_config.max_queue_rows "
                f"is {settings.max_queue_rows}): requests would wait in Serve, where autoscaling "
                "does not see them, instead of being refused with 503. Leave it out, or raise it",
            )
        if deployment.get("max_surge_percent") == 0:
            self._warn(
                f"{path}.max_surge_percent",
                "0 stops old replicas before new ones are ready. Leave it out: the default of a "
                "model application is 100",
            )
        options = deployment.get("ray_actor_options")
        gpus = options.get("num_gpus") if isinstance(options, dict) else None
        if args is not None and args.device == "cuda" and not gpus:
            self._warn(
                f"{path}.ray_actor_options",
                "args.device is 'cuda', but no `num_gpus` is asked for: a replica to which Ray "
                "assigns no GPU does not start",
            )
        return settings

    def _route(self, application: Mapping[str, Any], path: str, args: ModelArgs) -> None:
        stable = f"/v2/models/{args.model}"
        candidate = f"{stable}/versions/{args.version}"
        route = application.get("route_prefix", "/")
        where = f"{path}.route_prefix"
        if route is None:
            self._warn(where, "null: no HTTP client can reach this model")
        elif isinstance(route, str) and route not in (stable, candidate):
            shown = repr(route) if "route_prefix" in application else "not given, so '/'"
            self._warn(
                where,
                f"{shown}; clients of the Open Inference Protocol look for this model at "
                f"{stable!r}, or for this version at {candidate!r}",
            )

    def _version(self, args: ModelArgs, path: str, index: int) -> None:
        root = self._root(args)
        if root is None:
            if not self._skipped:
                self._skipped = True
                self._warn(
                    path,
                    "versions were not looked up: give --repository, as to `rayprism up`",
                )
            return
        if not root.is_dir():
            where = f"{path}.repository" if args.repository else path
            self._fault(where, f"the model repository {root} is not a folder on this machine")
            return
        version = self._look_up(root, args.model, args.version)
        if isinstance(version, RepositoryError):
            known = str(version)
            key = "model" if "has no model" in known else "version"
            self._fault(f"{path}.{key}", known)
            return
        if isinstance(version, ConfigInvalid):
            self._fault(f"{path}.version", f"its manifest is broken. {version}")
            return
        self.digests[index] = version.manifest.digest
        if version.manifest.runs_code and not args.allow_code:
            self._fault(
                f"{path}.allow_code",
                f"{args.model} version {args.version} brings code of its own. If you trust it, "
                "write `allow_code: true`",
            )
        if self._verify and version.folder not in self._verified:
            self._verified.add(version.folder)
            try:
                version.verify()
            except DigestMismatch as error:
                self._fault(f"{path}.version", str(error))

    def _root(self, args: ModelArgs) -> Path | None:
        return Path(args.repository) if args.repository else self._repository

    def _look_up(
        self, root: Path, model: str, version: int
    ) -> ModelVersion | RepositoryError | ConfigInvalid:
        """Reads each manifest once, however many applications and shares name it."""
        key = (root, model, version)
        if key not in self._found:
            try:
                self._found[key] = Repository(root).version(model, version)
            except (RepositoryError, ConfigInvalid) as error:
                self._found[key] = error
        return self._found[key]

    def _front_application(self, application: Mapping[str, Any], path: str) -> None:
        if application.get("args"):
            self._fault(f"{path}.args", "the front door takes none")
        if application.get("logging_config") is not None:
            # Serve gives it only to deployments that have none, and ours has one of its own.
            self._warn(
                f"{path}.logging_config",
                f"has no effect on a model application: write it under its deployment "
                f"{DEPLOYMENT_NAME!r}",
            )
        deployments = application.get("deployments")
        for place, deployment in enumerate(deployments if isinstance(deployments, list) else []):
            name = deployment.get("name") if isinstance(deployment, dict) else None
            if isinstance(name, str) and name != _FRONT_DEPLOYMENT:
                self._fault(
                    f"{path}.deployments[{place}].name",
                    f"got {name!r}; the front door has one deployment, {_FRONT_DEPLOYMENT!r}",
                )
        route = application.get("route_prefix", "/")
        if route not in _FRONT_ROUTES:
            self._warn(
                f"{path}.route_prefix",
                f"{route!r}; the front door answers for the whole server at "
                f"{' or '.join(map(repr, _FRONT_ROUTES))}",
            )

    def _grpc(self, data: Mapping[str, Any]) -> None:
        options = data.get("grpc_options")
        if not isinstance(options, dict):
            return
        functions = options.get("grpc_servicer_functions")
        path = "grpc_options.grpc_servicer_functions"
        if not functions:
            self._warn(path, f"not given, so there is no gRPC server. Add {GRPC_FUNCTION}")
            return
        if not isinstance(functions, list):
            return
        names = [_normal(function) for function in functions]
        if GRPC_FUNCTION in names:
            return
        for index, name in enumerate(names):
            if name.startswith("rayprism") or name.endswith(GRPC_FUNCTION.split(":")[1]):
                self._fault(
                    f"{path}[{index}]",
                    f"got {functions[index]!r}, which is not the function for model applications: "
                    f"{GRPC_FUNCTION}",
                )
                return
        self._warn(path, f"model applications answer no gRPC without {GRPC_FUNCTION}")

    def _host(self, data: Mapping[str, Any]) -> None:
        options = data.get("http_options")
        if options is not None and not isinstance(options, dict):
            return
        host = (options or {}).get("host", "0.0.0.0")
        if not isinstance(host, str) or _is_loopback(host):
            return
        shown = repr(host) if options and "host" in options else "not given, so 0.0.0.0"
        self._warn(
            "http_options.host",
            f"{shown}: whoever reaches this machine reaches the models, for Serve has no "
            "authentication. Use 127.0.0.1, or put a gateway in front",
        )

    def _keep_alive(self, data: Mapping[str, Any]) -> None:
        options = data.get("http_options")
        if not isinstance(options, dict):
            return
        seconds = options.get("keep_alive_timeout_s", _SERVES_KEEP_ALIVE_S)
        if not isinstance(seconds, int | float) or seconds < _DRAIN_S:
            return
        shown = (
            f"{seconds:g}" if "keep_alive_timeout_s" in options else f"not given, so {seconds:g}"
        )
        self._warn(
            "http_options.keep_alive_timeout_s",
            f"{shown}: a replica that is replaced answers for {_DRAIN_S} s more, and a connection "
            "that a client left idle for longer leads to it still: the next request on it fails. "
            "Give less than `rayprism up --drain-s`, as 20",
        )


def _model_and_version(args: Any) -> ModelArgs | None:
    if not isinstance(args, dict):
        return None
    try:
        return parse_args({key: args[key] for key in ("model", "version") if key in args})
    except ConfigInvalid:
        return None


def _normal(import_path: Any) -> str:
    """`module.name` and `module:name` are one to Ray."""
    if not isinstance(import_path, str):
        return ""
    if ":" in import_path or "." not in import_path:
        return import_path
    module, _, name = import_path.rpartition(".")
    return f"{module}:{name}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
