"""A running endpoint, asked with the stock client of the Open Inference Protocol."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from rayprism.core.tensors import Array, Datatype, Tensors, TensorSpec, numpy_dtype
from rayprism.errors import SetupError
from rayprism.models.manifest import Manifest

__all__ = ["Endpoint", "EndpointError", "Refused", "Served", "check_served", "parse_url"]

_TIMEOUT_S = 60.0
_WAITS_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Before each further try at an endpoint that is busy."""

_BUSY = frozenset(
    {"408", "429", "502", "503", "504", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
)
_NOT_FOUND = frozenset({"404", "NOT_FOUND"})
_REFUSED = frozenset({"500", "INTERNAL", "INVALID_ARGUMENT"})


class EndpointError(SetupError):
    """The endpoint cannot be asked, or is not the one that was meant."""

    code = "endpoint"


class Refused(Exception):
    """The endpoint took the request for wrong, or its model failed on it.

    Args:
        status: Of HTTP or gRPC.
        message: What the endpoint said.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint says of the version that it serves.

    Args:
        versions: Those that clients can ask for here.
        inputs: Name to datatype and shape; the row axis is -1.
        outputs: Likewise.
        digest: Of the manifest; None where the endpoint does not tell it.
    """

    versions: tuple[str, ...]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    digest: str | None = None


def parse_url(url: str) -> tuple[str, bool]:
    """`host:port/path`, which is how the client wants it, and whether it is TLS.

    Raises:
        ValueError: Not the address of an HTTP server.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"got {url!r}, allowed is an address as in http://127.0.0.1:8000")
    return f"{parts.netloc}{parts.path.rstrip('/')}", parts.scheme == "https"


class Endpoint:
    """One version of a model behind an address, over HTTP or gRPC. A context manager.

    Args:
        manifest: Of the version that is asked for, by its number.
        url: HTTP address of the fleet; tensors travel as bytes.
        grpc: `host:port`; where it is given, gRPC is spoken instead.
        application: Serve's application for gRPC, by default the model's name.
        sleep: Waits so many seconds.

    Raises:
        SetupError: The client is not installed.
        ValueError: `url` is not an address.
    """

    def __init__(
        self,
        manifest: Manifest,
        url: str = "http://127.0.0.1:8000",
        *,
        grpc: str | None = None,
        application: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._manifest = manifest
        self._version = str(manifest.version)
        self._sleep = sleep
        self._tools = _import("tritonclient.utils")
        self._wire = _import("tritonclient.http" if grpc is None else "tritonclient.grpc")
        self.address = url if grpc is None else f"grpc://{grpc.removeprefix('grpc://')}"
        self._how: dict[str, Any] = {}
        self._as_json: dict[str, Any] = {}
        if grpc is None:
            host, tls = parse_url(url)
            self._client = self._wire.InferenceServerClient(
                host, connection_timeout=_TIMEOUT_S, network_timeout=_TIMEOUT_S, ssl=tls
            )
        else:
            self._how = {"headers": {"application": application or manifest.model}}
            self._as_json = {"as_json": True, **self._how, "client_timeout": _TIMEOUT_S}
            self._client = self._wire.InferenceServerClient(grpc.removeprefix("grpc://"))
            self._how |= {"client_timeout": _TIMEOUT_S}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def describe(self) -> Served:
        """What is served under the model's name and version.

        Raises:
            EndpointError: Nothing answers, there is no such model, or no such version of it.
        """
        model = self._manifest.model
        metadata = self._document("metadata", self._version)
        if metadata is None:
            other = self._document("metadata", "")
            if other is None:
                raise EndpointError(
                    f"{self.address} serves no model {model!r}. Mend: deploy it, or ask where it "
                    "is deployed (over gRPC the application is named too)"
                )
            raise EndpointError(
                f"{self.address} serves model {model!r} in version "
                f"{', '.join(other.get('versions', ())) or 'unknown'}, and the job ran version "
                f"{self._version}. Mend: deploy that version, or name the one that is served in "
                "the job's config and run the job for it"
            )
        config = self._document("config", self._version) or {}
        config = config.get("config", config)
        digest = config.get("parameters", {}).get("digest", {}).get("string_value")
        return Served(
            tuple(metadata.get("versions", ())),
            _signature(metadata.get("inputs", ())),
            _signature(metadata.get("outputs", ())),
            digest,
        )

    def infer(self, inputs: Tensors) -> Tensors:
        """Asks the version for its outputs.

        Args:
            inputs: As the manifest names them; axis 0 is the row where the model is batched.

        Raises:
            Refused: The request was taken for wrong, or the model failed on it.
            EndpointError: It cannot be reached, stays busy, or another version answered.
        """
        answer = self._answer(
            lambda: self._client.infer(
                self._manifest.model,
                [self._tensor(spec, inputs[spec.name]) for spec in self._manifest.inputs],
                model_version=self._version,
                outputs=[
                    self._wire.InferRequestedOutput(name) for name in self._manifest.output_names
                ],
                **self._how,
            )
        )
        said = answer.get_response()
        version = said["model_version"] if isinstance(said, Mapping) else said.model_version
        if version != self._version:
            raise EndpointError(
                f"{self.address} answered with version {version or '(none)'} of "
                f"{self._manifest.model!r}, asked was for {self._version}: is a change of "
                "versions under way?"
            )
        found: Tensors = {}
        for spec in self._manifest.outputs:
            array = answer.as_numpy(spec.name)
            if array is not None:
                # Some releases of the client give BF16 as float32, which holds all of it.
                bf16 = spec.datatype is Datatype.BF16
                found[spec.name] = array.astype(numpy_dtype(spec.datatype)) if bf16 else array
        return found

    def _tensor(self, spec: TensorSpec, array: Array) -> Any:
        tensor = self._wire.InferInput(spec.name, list(array.shape), spec.datatype.value)
        if self._tools.np_to_triton_dtype(array.dtype) != spec.datatype:
            # Older releases of the client take BF16 as float32.
            array = array.astype(np.float32)
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        return tensor

    def _document(self, which: str, version: str) -> dict[str, Any] | None:
        """A document of the model; None where there is none."""
        ask = getattr(self._client, f"get_model_{which}")
        try:
            found: dict[str, Any] = self._answer(
                lambda: ask(self._manifest.model, version, **self._as_json)
            )
        except _NotFound:
            return None
        except Refused as error:
            raise EndpointError(
                f"{self.address} does not tell of the model {self._manifest.model!r}: {error}"
            ) from None
        return found

    def _answer(self, call: Callable[[], Any]) -> Any:
        for wait_s in (*_WAITS_S, None):
            try:
                return call()
            except OSError as error:
                raise self._unreachable(str(error)) from None
            except self._tools.InferenceServerException as error:
                status = str(error.status() or "").removeprefix("StatusCode.")
                message = _first_line(error.message() or "")
            if status == "UNAVAILABLE" and "connect" in message:
                raise self._unreachable(message)
            if status in _NOT_FOUND:
                raise _NotFound(f"{self.address}: {message}")
            if status in _REFUSED or (status not in _BUSY and status.startswith("4")):
                raise Refused(status, message)
            if status not in _BUSY:
                raise EndpointError(f"{self.address} gave no answer ({status}): {message}")
            if wait_s is not None:
                self._sleep(wait_s)
        raise EndpointError(
            f"{self.address} stays busy ({status}, {len(_WAITS_S) + 1} tries): {message}. "
            "Mend: ask when it has room"
        )

    def _unreachable(self, reason: str) -> EndpointError:
        return EndpointError(
            f"nothing answers at {self.address}: {reason}. Is a fleet up there? `rayprism status` "
            "tells the address of a local one"
        )


class _NotFound(EndpointError):
    """What was asked for is not at this address."""


def check_served(manifest: Manifest, served: Served, address: str) -> None:
    """Refuses an endpoint whose version is not the one that the job ran.

    Args:
        manifest: What the job ran.
        served: What the endpoint says of the same name and version.
        address: Of the endpoint, for messages.

    Raises:
        EndpointError: Another digest, or other inputs or outputs.
    """
    name = f"{manifest.model!r} version {manifest.version}"
    if served.digest is not None and served.digest != manifest.digest:
        raise EndpointError(
            f"{address} serves another {name} than the job ran: its digest is {served.digest}, "
            f"the job's is {manifest.digest}. Mend: deploy from the repository that the job reads"
        )
    for what, specs, told in (
        ("inputs", manifest.inputs, served.inputs),
        ("outputs", manifest.outputs, served.outputs),
    ):
        mine = {spec.name: _shape_of(spec, manifest.batching.batched) for spec in specs}
        if mine != told:
            raise EndpointError(
                f"{address} serves another {name} than the job ran: its {what} are "
                f"{_shown(told)}, the job's are {_shown(mine)}. Mend: deploy from the repository "
                "that the job reads"
            )


def _shape_of(spec: TensorSpec, batched: bool) -> tuple[str, tuple[int, ...]]:
    shape = (-1, *spec.shape[1:]) if batched else spec.shape
    return spec.datatype.value, shape


def _signature(tensors: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    # JSON made of gRPC messages has 64-bit numbers as text.
    return {
        item["name"]: (item["datatype"], tuple(int(size) for size in item.get("shape", ())))
        for item in tensors
    }


def _shown(signature: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in signature.items())


def _first_line(message: str) -> str:
    # Of an answer that is not JSON the client tells its own trouble first, then the body.
    return message.strip().partition("\n")[0][:500]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SetupError(
            f"{name} cannot be imported ({error}): the endpoint is asked with the stock client. "
            "Get it with: pip install 'rayprism[client]'"
        ) from None
