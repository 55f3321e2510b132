"""Another framework's server, in an environment of its own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any

from bench.cluster import clean_environment, free_ports
from bench.peers.environments import (
    PEERS,
    PeerUnavailable,
    command_of,
    environment_of,
    variables_of,
    versions_of,
)
from bench.processes import end_marked, marked
from bench.scenario import PeerServer
from bench.servers.base import (
    NeverRight,
    NotOurs,
    Probe,
    RunContext,
    Unavailable,
    model_of,
    set_paused,
)
from bench.servers.meter import Meter

__all__ = ["Peer"]

_START_S = 120.0
_RESUME_S = 30.0
_END_S = 10.0
_LOG_CHARACTERS = 2000


class Peer(NotOurs):
    """A process that `bench/peers/NAME/server.py` starts, with all that it starts itself."""

    grpc_address: str | None = None
    headers: Mapping[str, str] = {}

    def __init__(self, name: str, server: PeerServer, run: RunContext) -> None:
        self.name = name
        self.server = server
        self.marker = f"{run.marker}/{name}"
        if server.peer not in PEERS:
            raise Unavailable(f"no peer {server.peer!r}; there are {', '.join(PEERS)}")
        (port,) = free_ports(1)
        base = f"http://127.0.0.1:{port}"
        self.url = base + PEERS[server.peer].path(server.model)
        self.metadata_url = f"{base}/v2/models/{server.model}"
        self._port = port
        self._run = run
        self._model = model_of(server)
        self._probe = Probe(self._model)
        self._log = run.folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> dict[str, float]:
        """Makes its environment where that is not there, starts it, and asks until it answers.

        Returns:
            `ready_s`, without the making of the environment.

        Raises:
            Unavailable: It cannot be installed, or gave no right answer; with what it printed.
        """
        try:
            environment_of(self.server.peer)
            self._command()
        except PeerUnavailable as error:
            raise Unavailable(str(error)) from None
        try:
            return {"ready_s": self._launch()}
        except NeverRight as error:
            self.stop()
            raise Unavailable(str(error)) from None

    def restart_model(self) -> float:
        """Ends its processes, and starts them again."""
        self.stop()
        return self._launch()

    def pause(self) -> None:
        """Stops its processes where they are."""
        set_paused(marked(self.marker), True)

    def resume(self) -> None:
        """Lets them go on, and waits for a right answer."""
        set_paused(marked(self.marker), False)
        self._probe.wait(self.url, _RESUME_S, self._ended)

    def meter(self) -> Meter:
        """A meter with the roles server and load."""
        return Meter(self.marker, rest="server")

    def facts(self) -> dict[str, Any]:
        """What is installed in its environment, and its options."""
        return {
            "model": self._model.name,
            "peer": self.server.peer,
            "options": self.server.options,
            "versions": versions_of(self.server.peer),
        }

    def stop(self) -> None:
        """Ends all of its processes."""
        process, self._process = self._process, None
        if process is None:
            return
        # What is stopped cannot end in order.
        set_paused(marked(self.marker), False)
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end_marked(self.marker)

    def _launch(self) -> float:
        command = self._command()
        began_s = time.monotonic()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=_variables(self.server.peer, self.marker),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._run.folder,
                # Ctrl-C is the benchmark's: it ends the server in order.
                start_new_session=True,
            )
        try:
            self._probe.wait(self.url, _START_S, self._ended)
        except NeverRight as error:
            said = self._log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()
            raise NeverRight(f"{error}\nIt printed last:\n{said}") from None
        return time.monotonic() - began_s

    def _command(self) -> list[str]:
        files = self._run.files(self._model)
        return command_of(
            self.server.peer,
            model=self._model.name,
            model_file=files["model_file"].resolve(),
            port=self._port,
            tokenizer=files["tokenizer"],
            options=self.server.options,
        )

    def _ended(self) -> str | None:
        process = self._process
        if process is None or process.poll() is None:
            return None
        return f"{self.server.peer} ended with {process.returncode}"


def _variables(peer: str, marker: str) -> dict[str, str]:
    return {
        **variables_of(peer, clean_environment(marker)),
        # One thread for the model: libraries beside it must not start pools of their own.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
