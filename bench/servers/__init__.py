"""The servers under load, each behind the same few methods."""

from __future__ import annotations

from bench.scenario import PeerServer, RayprismServer, RayServeServer, Server, UrlServer
from bench.servers.base import ActionFailed, NeverRight, RunContext, RunningServer, Unavailable
from bench.servers.jobs import JobFailed, run_job
from bench.servers.meter import Meter, per_request_us
from bench.servers.peer import Peer
from bench.servers.ray_serve import RayServe
from bench.servers.rayprism import Rayprism
from bench.servers.replica_metrics import ReplicaReader, difference
from bench.servers.url import AtUrl

__all__ = [
    "ActionFailed",
    "JobFailed",
    "Meter",
    "NeverRight",
    "ReplicaReader",
    "RunContext",
    "RunningServer",
    "Unavailable",
    "difference",
    "make_server",
    "per_request_us",
    "run_job",
]


def make_server(name: str, server: Server, run: RunContext) -> RunningServer:
    """The server that a scenario describes, not started yet.

    Raises:
        Unavailable: Its model or its peer is not there, or do not fit together.
    """
    match server:
        case RayprismServer():
            return Rayprism(name, server, run)
        case RayServeServer():
            return RayServe(name, server, run)
        case PeerServer():
            return Peer(name, server, run)
        case UrlServer():
            return AtUrl(name, server, run)
