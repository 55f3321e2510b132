from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.processes import MARKER
from bench.servers.meter import Meter, per_request_us, role_in_sample

MARK = f"test-meter-{os.getpid()}"
BUSY_S = 0.3
WORK = f"""
import sys, time
sys.stdin.readline()
until = time.process_time() + {BUSY_S}
while time.process_time() < until: pass
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def process(
    mark: str, *, code: str = WORK, arguments: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, MARKER: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def work(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write("\n")
    running.stdin.flush()
    assert running.stdout.readline() == "done\n"


@pytest.mark.parametrize(
    ("command", "rest", "role"),
    [
        (["ray::ServeReplica:tiny:model"], "ray", "replica"),
        (["/opt/haproxy", "-f", "x"], "ray", "proxy"),
        (["ray::ProxyActor"], "ray", "proxy"),
        (["raylet"], "ray", "ray"),
        (["python", "server.py"], "server", "server"),
        (["python", "-m", "bench.loadgen.worker", "spec", "out"], "ray", "load"),
        (["/usr/bin/wrk", "-t1"], "server", "load"),
        ([], "server", "server"),
    ],
)
def test_role(command: list[str], rest: str, role: str) -> None:
    assert role_in_sample(command, rest) == role


def test_cpu_time_is_counted_by_role_and_only_while_it_measures() -> None:
    with (
        process(f"{MARK}/a") as before,
        process(f"{MARK}/a/child") as server,
        process(f"{MARK}/ab") as other,
        process("load", arguments=("bench.loadgen.worker",)) as load,
    ):
        work(before)
        meter = Meter(f"{MARK}/a", rest="server", step_s=0.05)
        meter.start()
        for running in (server, load, other):
            work(running)
        used = meter.stop()
        assert used["cpu_s"].keys() == {"server", "load"}
        assert used["cpu_s"]["server"] == pytest.approx(BUSY_S, abs=0.15)
        assert used["cpu_s"]["load"] == pytest.approx(BUSY_S, abs=0.15)
        # What is not the server's is the machine's.
        assert used["other_cores"] * used["seconds"] >= 0.7 * BUSY_S
        assert used["rss_mib"]["server"][-1] > 5.0


def test_every_role_has_a_figure_for_every_step_also_where_it_came_late() -> None:
    with process("load", arguments=("bench.loadgen.worker",)) as load:
        meter = Meter(f"{MARK}/b", rest="server", step_s=0.05)
        meter.start()
        work(load)
        with process(f"{MARK}/b") as server:
            work(server)
            used = meter.stop()
    cores, rss_mib = used["cpu"]["cores"], used["rss_mib"]
    steps = round(used["seconds"] / 0.05)
    lengths = {len(cores[role]) for role in ("server", "load")}
    lengths |= {len(rss_mib[role]) for role in ("server", "load")}
    assert lengths <= {steps, steps - 1}
    assert len(lengths) == 1
    assert cores["server"][0] == rss_mib["server"][0] == 0.0
    assert sum(cores["server"]) * 0.05 == pytest.approx(used["cpu_s"]["server"], rel=0.3)


def test_children_count_although_their_environment_is_overwritten() -> None:
    code = f"""
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", {WORK!r}], env={{}}, stdin=sys.stdin, stdout=sys.stdout
)
child.wait()
"""
    with process(f"{MARK}/c", code=code) as server:
        meter = Meter(f"{MARK}/c", rest="server", step_s=0.05)
        meter.start()
        work(server)
        used = meter.stop()
        assert used["cpu_s"]["server"] >= 0.8 * BUSY_S


def test_it_waits_for_the_time_at_which_measuring_starts() -> None:
    with process(f"{MARK}/d") as server:
        meter = Meter(f"{MARK}/d", rest="server", step_s=0.05)
        at_s = time.monotonic() + 3600
        meter.start(at_s)
        work(server)
        used = meter.stop()
    assert used["cpu_s"].get("server", 0.0) < 0.5 * BUSY_S
    assert used["seconds"] < 1.0


def test_nothing_is_seen_of_a_server_that_is_not_ours() -> None:
    with process(f"{MARK}/e"):
        meter = Meter(None, step_s=0.05)
        meter.start()
        assert meter.stop()["cpu_s"] == {}


def test_a_meter_that_was_not_started_says_so() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        Meter(None).stop()


def test_cpu_of_a_request() -> None:
    assert per_request_us({"server": 2.0, "load": 0.0}, 1000) == {"server": 2000.0}
    assert per_request_us({"server": 2.0}, 0) == {}
