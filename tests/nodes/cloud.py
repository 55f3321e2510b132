"""A cloud: gives machines to Ray's autoscaler, and takes them back. See `provider.py`."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.nodes.cluster import Cluster
from tests.nodes.machines import Machine

__all__ = ["Cloud"]


class Cloud:
    """Answers on every address of this network; each machine joins the cluster.

    Args:
        cluster: Whose workers they become.
        numbers: Of the machines that it has.
    """

    def __init__(self, cluster: Cluster, numbers: range) -> None:
        self._cluster = cluster
        self._free = list(numbers)
        self._lock = threading.Lock()
        self._machines: dict[str, Machine | None] = {}
        self._numbers: dict[str, int] = {}
        self.types: dict[str, str] = {}
        """Node types of the machines that are given away, by node id."""
        self.faults: list[str] = []
        self._server = ThreadingHTTPServer(("", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def counts(self) -> Counter[str]:
        """How many machines of each type are given away."""
        with self._lock:
            return Counter(self.types.values())

    def create(self, node_id: str, node_type: str, cpus: float) -> None:
        """Gives a machine, which joins soon after."""
        with self._lock:
            self._numbers[node_id] = self._free.pop(0)
            self.types[node_id] = node_type
        threading.Thread(target=self._boot, args=(node_id, node_type, cpus)).start()

    def _boot(self, node_id: str, node_type: str, cpus: float) -> None:
        try:
            self._machines[node_id] = self._cluster.start_worker(
                self._numbers[node_id],
                cpus=cpus,
                RAY_OVERRIDE_NODE_ID_FOR_TESTING=node_id,
                RAY_CLOUD_INSTANCE_ID=node_id,
                RAY_NODE_TYPE_NAME=node_type,
            )
        except AssertionError as error:
            self.faults.append(str(error))

    def terminate(self, node_id: str) -> None:
        """Takes a machine back."""
        with self._lock:
            machine = self._machines.pop(node_id, None)
            del self.types[node_id]
        if machine is not None:
            machine.kill()
        with self._lock:
            self._free.append(self._numbers.pop(node_id))

    def stop(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _document(self) -> dict[str, object]:
            length = int(self.headers.get("content-length", 0))
            found: dict[str, object] = json.loads(self.rfile.read(length))
            return found

        def _done(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            document = self._document()
            resources = document["resources"]
            assert isinstance(resources, dict)
            cloud.create(self.path.strip("/"), str(document["type"]), resources["CPU"])
            self._done()

        def do_DELETE(self) -> None:
            self._document()
            cloud.terminate(self.path.strip("/"))
            self._done()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
