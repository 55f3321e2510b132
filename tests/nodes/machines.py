"""Machines on one machine: Linux namespaces with an address, processes and folders of their own.

Ray, Serve and HAProxy run in them with the ports and paths that they have on real machines. What
these lack of real ones is a kernel and a clock of their own. It needs no root and no container
engine: `unshare` (util-linux) and `ip` (iproute2). All of it lies in the namespaces in which the
tests themselves run (`make test-cluster`), and goes with them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["HOME", "Machine", "address_of", "connect_network", "gateway_of", "is_inside"]

_ROOT = Path(__file__).resolve().parents[2]

_LINK = "node"
"""Begins the names of links to machines."""

HOME = "/mnt/home"
"""Of whoever runs commands in a machine."""

_INIT = "while :; do sleep 3600; done"
"""The first process of a machine. A shell that waits also takes care of what daemons leave."""


def is_inside() -> bool:
    """Whether this process has a network of its own, so that it may add machines to it."""
    return os.geteuid() == 0 and all(
        name == "lo" or name.startswith(_LINK) for _, name in socket.if_nameindex()
    )


def connect_network() -> None:
    """Makes this network a router between the machines that will be added."""
    _run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
    _run("ip", "link", "set", "lo", "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def address_of(number: int) -> str:
    """Of a machine, also of one that is not there yet."""
    return f"10.77.{number}.2"


def gateway_of(number: int) -> str:
    """Where a machine reaches the network of the tests."""
    return f"10.77.{number}.1"


class Machine:
    """A machine: starts when it is made.

    Args:
        number: From 1; gives its address.
        folder: For its `/tmp` and home.
        mounts: Folders that it sees, by the path at which it sees them.
        home: Files and folders in its home, by their path in it.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        *,
        mounts: Mapping[str, Path] | None = None,
        home: Mapping[str, Path] | None = None,
    ) -> None:
        self.number = number
        self.address = address_of(number)
        self.folder = folder
        self._link = f"{_LINK}{number}"
        self._mounts = dict(mounts or {})
        self._home = dict(home or {})
        self._start()

    def _start(self) -> None:
        self._starter = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork"),
                *("--kill-child", "--mount-proc", "--", "bash", "-c", _INIT),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._init = self._find_init()
        tmp, home = self.folder / "tmp", self.folder / "home"
        for path in (tmp, home):
            path.mkdir(parents=True, exist_ok=True)
        for name, source in self._home.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # A file may lie where the machine does not see it.
            path.symlink_to(source) if source.is_dir() else shutil.copyfile(source, path)
        # Before its /tmp hides them, since they may lie there.
        lines = [
            "set -e",
            "mount -t tmpfs -o size=512m tmpfs /dev/shm",
            f"hostname node-{self.number}",
            "ip link set lo up",
        ]
        for path, source in self._mounts.items():
            lines.append(f"mkdir -p {path} && mount --bind {shlex.quote(str(source))} {path}")
        lines.append(f"mkdir -p {HOME} && mount --bind {shlex.quote(str(home))} {HOME}")
        for source in (_ROOT, Path(sys.prefix)):
            if source.is_relative_to("/tmp"):
                target = shlex.quote(f"{tmp}/{source.relative_to('/tmp')}")
                lines.append(
                    f"mkdir -p {target} && mount --bind {shlex.quote(str(source))} {target}"
                )
        lines.append(f"mount --rbind {shlex.quote(str(tmp))} /tmp")
        self.run("\n".join(lines), home=False)
        self._plug_in()

    def _find_init(self) -> int:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for child in psutil.Process(self._starter.pid).children():
                with contextlib.suppress(psutil.Error):
                    # Its namespaces are complete when it runs the shell.
                    if child.name() == "bash":
                        return int(child.pid)
            time.sleep(0.02)
        raise AssertionError("no namespaces here; see `make test-cluster`")

    def _plug_in(self) -> None:
        inside, outside = self.address, gateway_of(self.number)
        # Where the machine before it was unplugged.
        subprocess.run(["ip", "route", "del", "blackhole", inside], stderr=subprocess.DEVNULL)
        peer = ("peer", "name", "eth0", "netns", str(self._init))
        _run("ip", "link", "add", self._link, "type", "veth", *peer)
        _run("ip", "address", "add", f"{outside}/24", "dev", self._link)
        _run("ip", "link", "set", self._link, "up")
        self.run(
            f"set -e; ip address add {inside}/24 dev eth0; ip link set eth0 up; "
            f"ip route add default via {outside}"
        )

    def unplug(self) -> None:
        """Cuts its network for good; nothing goes in or out, and nobody is told."""
        _run("ip", "route", "add", "blackhole", self.address)
        self.run("ip link set eth0 down")

    def kill(self) -> None:
        """Ends all of its processes at once. The kernel still closes their connections."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._starter.wait(timeout=30)
        # The kernel does so too, but takes its time.
        subprocess.run(["ip", "link", "del", self._link], stderr=subprocess.DEVNULL)

    def cut_power(self) -> None:
        """Everything ends at once, and nobody is told."""
        self.unplug()
        self.kill()

    def command(self, script: str, *, home: bool = True) -> list[str]:
        """What runs a script in it."""
        spaces = ("--net", "--mount", "--pid", "--uts", "--ipc")
        directory = [f"--wd={HOME}"] if home else []
        return [
            *("nsenter", f"--target={self._init}", *spaces, *directory),
            *("--", "env", "-i", *_environment(), "bash", "-c", script),
        ]

    def write(self, name: str, text: str) -> None:
        """Writes a file into its home."""
        (self.folder / "home" / name).write_text(text)

    def run(self, script: str, *, timeout_s: float = 120, home: bool = True) -> str:
        """Runs a script in it, and gives what it printed.

        Raises:
            AssertionError: It failed; says what it printed.
        """
        done = subprocess.run(
            self.command(script, home=home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def _environment() -> list[str]:
    """Nothing of the tests' own settings, as on another machine."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"
    values = [f"PATH={path}", f"HOME={HOME}", "LANG=C.UTF-8", "USER=root"]
    if "PYTHONPATH" in os.environ:  # where the code under test is from
        values.append(f"PYTHONPATH={os.environ['PYTHONPATH']}")
    return values


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
