"""What servers under load have in common: started, asked until they answer rightly, ended."""

from __future__ import annotations

import contextlib
import http.client
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import psutil

from bench.models import MODELS, BenchModel, ModelFiles, ModelUnavailable
from bench.models.bodies import AnswerInvalid, Body, decode, encode
from bench.scenario import Action, Server
from bench.servers.meter import Meter
from bench.servers.replica_metrics import ReplicaReader

__all__ = [
    "ActionFailed",
    "NeverRight",
    "NotOurs",
    "Probe",
    "RunContext",
    "RunningServer",
    "Unavailable",
    "ask",
    "infer_path",
    "model_of",
    "set_paused",
]

_ASK_EVERY_S = 0.02
_ANSWER_S = 10.0
_PROBE_SEED = 20
_SHOWN = 500


class Unavailable(Exception):
    """This server cannot be measured here: its reason stands in the results, and no figure does."""


class NeverRight(Exception):
    """A server did not give the right answer in time: its speed would mean nothing."""


class ActionFailed(Exception):
    """What should have happened to a server under load did not, or not in time."""


def _print(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class RunContext:
    """What the servers of one run share.

    Args:
        marker: Of the run; see `bench.processes`. That of a server is `MARKER/NAME`.
        folder: For models, logs and outputs; gone after the run.
        say: Is told of progress, a line at a time.
    """

    marker: str
    folder: Path
    say: Callable[[str], None] = field(default=_print)

    @property
    def repository(self) -> Path:
        """Rayprism's model repository of the run."""
        return self.folder / "repository"

    def files(self, model: BenchModel) -> ModelFiles:
        """The model's files for servers that are not rayprism.

        Raises:
            Unavailable: They come with a package that is not installed.
        """
        try:
            return model.prepare(self.folder / "models")
        except ModelUnavailable as error:
            raise Unavailable(str(error)) from None

    def push(self, model: BenchModel, versions: int) -> None:
        """Puts versions 1, 2, ... into the repository.

        Raises:
            Unavailable: As `files`.
        """
        try:
            model.push(self.repository, versions)
        except ModelUnavailable as error:
            raise Unavailable(str(error)) from None


class RunningServer(Protocol):
    """A server of a scenario, from its start to its end."""

    name: str
    marker: str
    """Every process of it carries this in its environment."""
    url: str
    """Where requests are POSTed to. Until `start`, it may not be known."""
    metadata_url: str
    grpc_address: str | None
    """host:port, where it has one."""
    headers: Mapping[str, str]
    """Metadata that its gRPC needs; HTTP needs none."""

    @property
    def server(self) -> Server:
        """What the scenario says of it."""

    def start(self) -> dict[str, float]:
        """Starts it, and asks until the first right answer.

        Returns:
            Seconds by part, and `ready_s` in all.

        Raises:
            Unavailable: It cannot be installed, or not be started; says why.
        """

    def restart_model(self) -> float:
        """Takes the model away, and starts it anew: the application, or the process of a peer.

        Returns:
            Seconds from the command to start to the first right answer.
        """

    def pause(self) -> None:
        """Stops all of its processes where they are, so that they take nothing of the machine."""

    def resume(self) -> None:
        """Lets them go on, takes back what actions changed, and waits for a right answer."""

    def act(self, action: Action) -> str:
        """Changes it under load, and waits until that is done. rayprism only.

        Returns:
            What has happened, in a sentence.

        Raises:
            ActionFailed: It has not.
        """

    def reader(self) -> ReplicaReader | None:
        """Reads what its replicas count; None where they do not."""

    def meter(self) -> Meter:
        """A meter of its processes and the load generator's, which is to be started."""

    def facts(self) -> dict[str, Any]:
        """Versions and options, for the results."""

    def stop(self) -> None:
        """Ends all of its processes. May be called at any time, and more than once."""


def model_of(server: Server) -> BenchModel:
    """The model that a server has to answer with.

    Raises:
        Unavailable: There is none of that name.
    """
    try:
        return MODELS[server.model]
    except KeyError:
        known = ", ".join(sorted(MODELS))
        raise Unavailable(f"no model {server.model!r} in bench.models; there are {known}") from None


def infer_path(model: str) -> str:
    """Where the Open Inference Protocol takes requests for a model."""
    return f"/v2/models/{model}/infer"


class NotOurs:
    """What a server is that rayprism has no hand in: nothing to change, and no batches to count."""

    name: str

    def act(self, action: Action) -> str:
        """There are no actions but of rayprism.

        Raises:
            ActionFailed: Always.
        """
        raise ActionFailed(f"{action.do} is for servers of kind rayprism, {self.name} is none")

    def reader(self) -> ReplicaReader | None:
        """It does not count batches and stages as rayprism does."""
        return None


class Probe:
    """One request of a model, and whether an answer to it is right.

    Args:
        model: Says what is right.
    """

    def __init__(self, model: BenchModel) -> None:
        self.model = model
        (self.tensors,) = model.requests(1, 1, _PROBE_SEED)

    @cached_property
    def body(self) -> Body:
        """The request."""
        return encode(self.model.name, self.tensors, "json")

    def fault(self, url: str, answer_s: float = _ANSWER_S) -> str | None:
        """Asks once. None where the answer is right in time, else what is wrong, in a line."""
        try:
            headers, content = ask(url, self.body, answer_s)
            outputs = decode("json", headers, content)
            if self.model.is_right(self.tensors, outputs):
                return None
        except (OSError, AnswerInvalid) as error:
            return f"{type(error).__name__}: {error}"
        return f"wrong: {content[:_SHOWN].decode(errors='replace')}"

    def wait(
        self, url: str, timeout_s: float, alive: Callable[[], str | None] = lambda: None
    ) -> float:
        """Asks until the answer is right.

        Args:
            url: Where to.
            timeout_s: How long.
            alive: Says why it is of no use to go on; None while it is.

        Returns:
            Seconds that it took.

        Raises:
            NeverRight: It was not in time, or the server has ended.
        """
        began_s = time.monotonic()
        while (fault := self.fault(url)) is not None:
            if (ended := alive()) is not None:
                raise NeverRight(ended)
            if time.monotonic() - began_s > timeout_s:
                raise NeverRight(f"{url} gave no right answer in {timeout_s:g} s: {fault}")
            time.sleep(_ASK_EVERY_S)
        return time.monotonic() - began_s


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Proxies of the environment are for the internet."""


def ask(
    url: str, body: Body | None = None, answer_s: float = _ANSWER_S
) -> tuple[dict[str, str], bytes]:
    """Asks once; a POST where there is a body.

    Returns:
        The headers, in small letters, and the answer.

    Raises:
        OSError: No answer, or one of another status than 200.
    """
    content, headers = (None, {}) if body is None else (body.content, dict(body.headers))
    request = urllib.request.Request(url, data=content, headers=headers)
    try:
        with _opener.open(request, timeout=answer_s) as answer:
            return {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(_SHOWN).decode(errors="replace")
        raise OSError(f"status {error.code}: {text}") from None
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def set_paused(processes: Iterable[psutil.Process], paused: bool) -> None:
    """Stops processes where they are, or lets them go on."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)
