"""`rayprism top`, against the pages of two nodes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayprism.cli.main import cli
from rayprism.cli.top_tables import Cell, Column, describe_view, fit
from rayprism.fleet.metrics import NodeSample, Sample, parse_metrics
from rayprism.fleet.top import WANTED, make_view
from rayprism.telemetry.recorder import Recorder
from tests.support.metric_pages import Agent, Cluster, Replica, serving_pages, unused_address

RAYPRISM = str(Path(sys.executable).parent / "rayprism")
DOCS = Path(__file__).parents[2] / "docs/top.md"


class Fleet:
    """flights 3 on two nodes, its candidate 4 on one, a batch job."""

    def __init__(self) -> None:
        self.agents = Agent(), Agent()
        first, second = self.agents
        first.set_application("flights", target=2, healthy=2)
        first.set_application("flights-4")
        second.set_node(63.0, 15.5 * 2**30)
        weights = {"3": 0.95, "4": 0.05}
        self.stable = Replica(first, "3", name="a", weights=weights)
        self.second = Replica(second, "3", name="b", weights=weights)
        self.candidate = Replica(second, "4", name="c", application="flights-4", role="version")
        self.stable.target_p99(0.05)
        self.job = Recorder(batch_job="nightly", model="flights", version="3")
        self.job.gauge("rayprism_job_shards_left", lambda: 120.0)
        self.job.gauge("rayprism_job_actors", lambda: 2.0)
        for outcome in ("predicted", "dead_letter"):
            self.job.count("rayprism_job_rows_total", outcome=outcome)
        self.send()

    def work(self, times: int = 1) -> None:
        """What happens between two messages."""
        self.stable.serve(400 * times, 0.004)
        self.second.serve(560 * times, 0.006)
        self.candidate.serve(48 * times, 0.009)
        self.candidate.serve(2 * times, outcome="server_error", reason="model_failed")
        self.second.queue_rows, self.second.queue_age_s = 12.0, 0.031
        self.job.count("rayprism_job_rows_total", outcome="predicted").add(40_000 * times)
        self.job.count("rayprism_job_shards_total", outcome="done").add(times)
        self.job.histogram("rayprism_job_shard_seconds").observe(3.0)
        self.send()

    def send(self) -> None:
        for replica in (self.stable, self.second, self.candidate):
            replica.send()
        self.agents[0].take("job", self.job)

    def sample(self, at_s: float) -> Sample:
        names = frozenset(name.encode() for name in WANTED)
        return Sample(
            at_s,
            {
                f"10.0.0.{number}:4000": NodeSample(at_s, parse_metrics(agent.page(), names))
                for number, agent in enumerate(self.agents, 1)
            },
            {},
        )


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def cluster(fleet: Fleet) -> Iterator[Cluster]:
    with serving_pages(Cluster(*fleet.agents)) as found:
        found.on_page = lambda turn: fleet.work() if turn > 1 else None
        yield found


def run(cluster: Cluster, *options: str) -> Result:
    result = CliRunner().invoke(cli, ["top", "--address", cluster.address, *options])
    assert result.exit_code == 0, result.stderr
    return result


def lines_of(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(head))
    table = lines[start + 1 :]
    end = table.index("") if "" in table else len(table)
    return [re.split(r"\s{2,}", line.strip()) for line in table[:end]]


def test_once_prints_what_came_in_the_window(cluster):
    text = run(cluster, "--once", "--window", "0.1").stdout
    assert cluster.turns == 2
    stable, candidate = lines_of(text, "MODEL")
    assert stable[:5] == ["flights", "3", "stable", "95 %", "2/2"]
    assert candidate[:5] == ["flights", "4", "version", "5 %", "1/1"]
    assert candidate[7] == "4 %!"
    assert lines_of(text, "BATCH JOB")[0][0] == "nightly"
    assert lines_of(text, "BATCH JOB")[0][-1] == "3:00"
    assert len(lines_of(text, "NODE")) == 2
    assert "APPLICATION" not in text, "all is as it should be"
    assert "\x1b" not in text


def test_json_has_everything_in_units(cluster):
    (line,) = run(cluster, "--once", "--json", "--window", "0.1").stdout.splitlines()
    document = json.loads(line)
    assert document["address"] == cluster.address
    assert document["interval_s"] >= 0.1
    stable, candidate = document["versions"]
    assert stable["requests_per_s"] > candidate["requests_per_s"] > 0
    assert candidate["error_ratio"] == pytest.approx(0.04)
    assert 0.003 < stable["p50_s"] <= stable["p99_s"] <= 0.0075
    assert stable["stage_mean_s"].keys() == {"decode", "queue", "compute"}
    assert document["jobs"][0]["left_s"] == pytest.approx(180.0)
    assert sorted(node["cpu_ratio"] for node in document["nodes"]) == pytest.approx([0.1, 0.63])
    assert document["silent"] == {}
    assert document["notes"] == []


def test_only_some_models(cluster):
    document = json.loads(
        run(cluster, "--once", "--json", "--window", "0.1", "--model", "x").stdout
    )
    assert document["versions"] == document["jobs"] == []
    assert "'x'. There is flights." in document["notes"][0]


def test_a_dead_node_and_an_application_that_failed_are_named(cluster, fleet):
    dead = unused_address()
    cluster.targets.append(dead)
    fleet.agents[0].set_application("flights-5", 1, target=1, healthy=0)
    text = run(cluster, "--once", "--window", "0.1").stdout
    assert f"{dead} does not answer (Connection refused)." in text
    assert lines_of(text, "APPLICATION") == [["flights-5", "DEPLOY_FAILED!", "0/1!"]]
    assert len(lines_of(text, "MODEL")) == 2


def test_a_cluster_that_is_not_there():
    result = CliRunner().invoke(cli, ["top", "--address", f"http://{unused_address()}"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no Ray dashboard at http://127.0.0.1")
    assert result.stdout == ""


@pytest.mark.parametrize("option", ["--every=0", "--window=0", "--window=-1"])
def test_wrong_usage(option):
    assert CliRunner().invoke(cli, ["top", option]).exit_code == 2


def test_the_page_of_the_docs_shows_what_is_printed(fleet):
    samples = [fleet.sample(0.0)]
    for turn in range(1, 7):
        fleet.work()
        samples.append(fleet.sample(5.0 * turn))
    fleet.agents[0].set_application("flights-5", 1, target=1, healthy=0)
    samples[-1] = fleet.sample(30.0)
    samples[-1].silent["10.0.0.3:52365"] = "timed out"
    head = "rayprism top  http://127.0.0.1:8265  12:00:30  over 30 s"
    text = describe_view(make_view(samples, settled_s=10.0), head)
    stable, candidate = lines_of(text, "MODEL")
    # 192 requests/s, of which 80 take 4 ms and 112 take 6: buckets end at 3, 5 and 7.5 ms.
    assert stable[5:11] == ["192", "0", "0 %", "0", "5.36 ms", "7.46 ms"]
    assert stable[11:] == ["compute 2.58 ms", "384", "8", "33.3 %", "12", "31.0 ms", "0", "-"]
    assert candidate[5:9] == ["10", "0.40!", "4 %!", "0"]
    assert lines_of(text, "BATCH JOB") == [
        ["nightly", "flights", "3", "8,000", "0", "6", "0", "120", "2", "3:00"]
    ]
    assert lines_of(text, "NODE")[1] == ["10.0.0.2", "63 %", "2", "15.5 of 16.0 GiB!"]
    shown = re.search(r"```\n(rayprism top .*?)\n```", DOCS.read_text(), re.S)
    assert shown
    assert shown[1] == text


def columns(*specs: tuple[str, int, str]) -> list[Column]:
    return [
        Column(title, [Cell(text.rstrip("!"), text.endswith("!"))], rank)
        for title, rank, text in specs
    ]


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (None, "AAAA BBBB CCCC DDDD EEEE"),
        (28, "AAAA BBBB CCCC DDDD EEEE"),
        (27, "AAAA BBBB CCCC EEEE"),  # nothing is in D
        (21, "AAAA CCCC EEEE"),  # of the others B has the higher rank
        (15, "AAAA CCCC"),
        (9, "AAAA"),  # something is wrong in C, but A is who
        (1, "AAAA"),
    ],
)
def test_what_says_least_goes_first(width, kept):
    table = columns(
        ("AAAA", 0, "x"), ("BBBB", 2, "1"), ("CCCC", 3, "7!"), ("DDDD", 1, "0"), ("EEEE", 1, "1")
    )
    assert " ".join(column.title for column in fit(table, width)) == kept


def test_what_a_terminal_would_obey_is_not_shown(fleet):
    fleet.agents[0].set_application("fl\x1b[2Jights\n", 1)
    view = make_view([fleet.sample(0.0)])
    assert lines_of(describe_view(view, "x"), "APPLICATION")[0][0] == "fl?[2Jights?"


class Terminal:
    """`rayprism top` in a terminal of its own."""

    def __init__(self, *options: str, columns: int) -> None:
        self._own, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
        self._process = subprocess.Popen(
            [RAYPRISM, "top", *options],
            stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def wait_for(self, word: str, timeout_s: float = 30.0) -> None:
        """Reads until it comes."""
        deadline = time.monotonic() + timeout_s
        while word not in self.text:
            assert time.monotonic() < deadline, self.text
            self._read(0.1)

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._own], [], [], timeout_s)
        if not ready:
            return False
        with contextlib.suppress(OSError):  # Linux' word for its end
            found = os.read(self._own, 65536).decode()
            self.text += found
            return bool(found)
        return False

    def end(self) -> tuple[int, str]:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        _, errors = self._process.communicate(timeout=30)
        while self._read(0.0):
            pass
        os.close(self._own)
        return self._process.returncode, errors.decode()


def test_a_terminal_is_drawn_over_and_left_as_it_was(cluster):
    terminal = Terminal("--address", cluster.address, "--every", "0.5", columns=70)
    terminal.wait_for("\x1b[?1049h")
    terminal.wait_for("P99")
    terminal.wait_for("4 %!")
    code, errors = terminal.end()
    assert (code, errors) == (0, "")
    assert terminal.text.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in terminal.text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
    heads = [line for line in plain.splitlines() if "MODEL" in line and "VERSION" in line]
    assert heads
    assert all("PADDING" not in head and len(head.rstrip()) <= 70 for head in heads)
    assert "31m" in terminal.text, "what is wrong is red"


def test_where_there_is_no_terminal_tables_follow_each_other(cluster):
    process = subprocess.Popen(
        [RAYPRISM, "top", "--address", cluster.address, "--every", "0.5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    heads = 0
    for line in process.stdout:
        heads += line.startswith("rayprism top")
        assert "\x1b" not in line
        if heads == 3:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
