"""Servers of a scenario, without Ray: what they deploy, how they are asked, started and ended."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import cluster as bench_cluster
from bench.cluster import BenchCluster, ClusterFailed
from bench.models import MODELS
from bench.models.bodies import decode
from bench.peers.environments import PeerUnavailable
from bench.processes import MARKER, marked
from bench.scenario import Action, JobLoad, PeerServer, RayprismServer, RayServeServer, UrlServer
from bench.servers import RunContext, Unavailable, make_server, run_job
from bench.servers import peer as peer_module
from bench.servers import rayprism as rayprism_module
from bench.servers.actions import edits_for
from bench.servers.base import ActionFailed, NeverRight, Probe
from bench.servers.jobs import job_config
from bench.servers.on_ray import enough_cpus
from bench.servers.ray_serve import answer_to
from bench.servers.rayprism import applications_of
from rayprism.errors import LoadFailed
from rayprism.fleet.edits import apply_edits
from rayprism.serving.settings import parse_args

TRAFFIC = {"candidates": [{"version": "2", "weight": 5}]}


def rayprism(**fields: Any) -> RayprismServer:
    return RayprismServer(kind="rayprism", model="tiny", **fields)


@pytest.fixture
def run(tmp_path: Path) -> RunContext:
    return RunContext(f"test-servers-{os.getpid()}", tmp_path, say=lambda text: None)


@pytest.fixture(scope="session")
def probe() -> Probe:
    return Probe(MODELS["tiny"])


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, the last one for ever; and the paths asked for."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            status, content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# What is right


@pytest.mark.parametrize("model", ["tiny", "images", "ragged"])
def test_what_a_no_op_answers_is_right(model: str) -> None:
    asked = Probe(MODELS[model])
    assert asked.model.is_right(asked.tensors, decode("json", {}, answer_to(asked)))


def test_a_probe_asks_until_the_answer_is_right(probe: Probe) -> None:
    right = answer_to(probe)
    wrong = json.loads(right)
    wrong["outputs"][0]["data"][0] += 0.1
    answers = [(404, b"no route"), (200, b"{}"), (200, json.dumps(wrong).encode()), (200, right)]
    with answering(*answers) as (url, asked):
        probe.wait(url, 30.0)
        assert len(asked) == 4


@pytest.mark.parametrize(
    ("answer", "why"),
    [((503, b"busy"), "status 503: busy"), ((200, b'{"outputs": []}'), "wrong: ")],
)
def test_a_server_that_is_never_right(probe: Probe, answer: tuple[int, bytes], why: str) -> None:
    with answering(answer) as (url, _), pytest.raises(NeverRight, match=why):
        probe.wait(url, 0.1)


def test_a_probe_does_not_wait_for_what_has_ended(probe: Probe) -> None:
    with pytest.raises(NeverRight, match="it ended"):
        probe.wait("http://127.0.0.1:9", 60.0, lambda: "it ended")


# rayprism


def test_versions_stand_beside_each_other() -> None:
    server = rayprism(versions=2, replicas=3, num_cpus=0.25, user_config={"traffic": TRAFFIC})
    stable, beside = applications_of(server, {"repository": "/models"})
    assert stable["route_prefix"] == "/v2/models/tiny"
    assert beside["route_prefix"] == "/v2/models/tiny/versions/2"
    assert stable["name"] != beside["name"]
    assert stable["args"] == {"model": "tiny", "version": 1, "repository": "/models"}
    assert beside["args"]["version"] == 2
    (deployment,) = stable["deployments"]
    assert deployment["num_replicas"] == 3
    assert deployment["user_config"] == {"traffic": TRAFFIC}
    assert "user_config" not in beside["deployments"][0]


def test_replicas_may_share_a_gpu_with_options_of_their_own(
    run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"onnx": {"provider": "tensorrt"}}
    server = rayprism(num_gpus=0.25, replicas=4, options=options)
    (application,) = make_server("gpu", server, run).applications()  # type: ignore[attr-defined]
    (deployment,) = application["deployments"]
    assert deployment["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 0.25}
    assert application["args"]["options"] == options
    parse_args(application["args"])
    (plain,) = make_server("cpu", rayprism(), run).applications()  # type: ignore[attr-defined]
    assert plain["deployments"][0]["ray_actor_options"] == {"num_cpus": 0.5}
    assert "options" not in plain["args"]


def test_a_server_that_needs_a_gpu_says_that_there_is_none(
    run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(index: int) -> Any:
        raise LoadFailed("this machine has no NVIDIA driver")

    monkeypatch.setattr(rayprism_module, "read_gpu", missing)
    with pytest.raises(Unavailable, match="no NVIDIA driver"):
        make_server("gpu", rayprism(num_gpus=1), run).start()


def test_autoscaling_is_instead_of_replicas() -> None:
    (application,) = applications_of(rayprism(autoscaling={"max_replicas": 4}), {})
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"] == {"max_replicas": 4}
    assert "num_replicas" not in deployment


def test_a_cluster_has_room_for_new_replicas_beside_old_ones() -> None:
    assert enough_cpus(0.5) == 4
    assert enough_cpus(4) >= 8


def changed(action: Action, application: Mapping[str, Any], first: Mapping[str, Any]) -> Any:
    config = {"applications": [json.loads(json.dumps(application))]}
    apply_edits(config, edits_for(action, "tiny", first))
    (after,) = config["applications"]
    return after


def act(do: Any, value: Any = None) -> Action:
    return Action(at_s=0, do=do, value=value)


def test_actions_change_the_stable_application() -> None:
    (first,) = applications_of(rayprism(user_config={"max_queue_rows": 7}), {})
    split = changed(act("traffic", TRAFFIC), first, first)
    assert split["deployments"][0]["user_config"] == {"max_queue_rows": 7, "traffic": TRAFFIC}
    promoted = changed(act("promote"), split, first)
    assert int(promoted["args"]["version"]) == 2
    # The weights were meant beside the old version.
    assert promoted["deployments"][0]["user_config"] == {"max_queue_rows": 7}
    assert changed(act("rollback"), promoted, first) == first
    assert changed(act("traffic"), split, first) == first


def test_rollback_brings_back_the_traffic_of_the_beginning() -> None:
    (first,) = applications_of(rayprism(user_config={"traffic": TRAFFIC}), {})
    promoted = changed(act("promote"), first, first)
    assert changed(act("rollback"), promoted, first) == first


def test_scaling_takes_the_place_of_autoscaling() -> None:
    (first,) = applications_of(rayprism(autoscaling={"max_replicas": 4}), {})
    (deployment,) = changed(act("scale", 3), first, first)["deployments"]
    assert deployment["num_replicas"] == 3
    assert "autoscaling_config" not in deployment


@pytest.mark.parametrize(
    ("action", "why"),
    [
        (act("scale", "3"), "scale takes a number"),
        (act("scale", 0), "scale takes a number"),
        (act("scale", True), "scale takes a number"),
        (act("traffic", [1]), "traffic takes"),
        (act("kill-replica"), "changes no config"),
    ],
)
def test_actions_that_cannot_be(action: Action, why: str) -> None:
    (first,) = applications_of(rayprism(), {})
    with pytest.raises(ActionFailed, match=why):
        edits_for(action, "tiny", first)


# Clusters


def test_what_the_caller_sets_wins_over_the_defaults() -> None:
    given = {"RAY_SERVE_HAPROXY_RETRIES": "7", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "1234"}
    cluster = BenchCluster("test-cluster", rayprism=True, environment=given)
    try:
        variables = cluster._variables()
    finally:
        cluster.stop()
    assert given.items() <= variables.items()
    assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_ray_has_its_defaults_where_rayprism_is_not() -> None:
    cluster = BenchCluster("test-cluster", rayprism=False, environment={"RAY_X": "1"})
    try:
        variables = cluster._variables()
    finally:
        cluster.stop()
    assert variables["RAY_X"] == "1"
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED" not in variables


def test_clusters_do_not_share_the_ports_of_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = bench_cluster._FIRST_HTTP + 3
    monkeypatch.setattr(bench_cluster, "_slots", iter(range(100)))
    monkeypatch.setattr(bench_cluster, "_is_free", lambda port: port != taken)
    first, second = bench_cluster._replica_ports(), bench_cluster._replica_ports()
    for one, other, start in zip(
        first, second, (bench_cluster._FIRST_HTTP, bench_cluster._FIRST_GRPC), strict=True
    ):
        # The first ones are in use.
        assert start + bench_cluster._REPLICA_PORTS <= one
        assert one + bench_cluster._REPLICA_PORTS <= other


def test_ports_are_given_once_and_are_not_those_of_clients() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        ephemeral = listening.getsockname()[1]
        assert ephemeral not in bench_cluster._FREE_PORTS
    ports = [*bench_cluster.free_ports(5), *bench_cluster.free_ports(5)]
    assert len(set(ports)) == 10
    assert set(ports) <= set(bench_cluster._FREE_PORTS)


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        (port,) = bench_cluster.free_ports(1)
        listening.bind(("127.0.0.1", port))
        monkeypatch.setattr(bench_cluster, "_FREE_PORTS", range(port, port + 1))
        monkeypatch.setattr(bench_cluster, "_given", set())
        with pytest.raises(ClusterFailed, match="no 1 free ports"):
            bench_cluster.free_ports(1)


@pytest.mark.parametrize("pattern", ["tuned", "noop", "noop-lane"])
def test_nothing_of_rayprism_is_in_the_replicas_of_others(run: RunContext, pattern: Any) -> None:
    server = make_server(
        "other", RayServeServer(kind="ray-serve", model="tiny", pattern=pattern), run
    )
    cluster = server.make_cluster()  # type: ignore[attr-defined]
    try:
        middlewares = cluster._variables()["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    finally:
        cluster.stop()
    assert "rayprism" not in middlewares
    assert (middlewares == "") == (pattern != "noop-lane")


# Which servers there can be


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (RayprismServer(kind="rayprism", model="huge"), "no model 'huge'"),
        (PeerServer(kind="peer", model="tiny", peer="nobody"), "no peer 'nobody'"),
        (
            RayServeServer(kind="ray-serve", model="images", pattern="documented"),
            "not for images",
        ),
    ],
)
def test_servers_that_cannot_be(run: RunContext, server: Any, why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        make_server("a", server, run)


# A server that runs already


def test_a_server_at_a_url_is_ready_when_it_answers_rightly(run: RunContext, probe: Probe) -> None:
    with answering((503, b""), (200, answer_to(probe))) as (url, asked):
        server = make_server("a", UrlServer(kind="url", model="tiny", url=f"{url}/"), run)
        server.start()
        assert asked == ["/v2/models/tiny/infer"] * 2
        assert server.facts()["url"] == f"{url}/"


def test_a_model_that_nobody_knows_has_to_tell_its_inputs(run: RunContext) -> None:
    with answering((200, b'{"inputs": [1]}'), (200, b"{}")) as (url, asked):
        server = make_server("a", UrlServer(kind="url", model="theirs", url=url), run)
        server.start()
        assert asked == ["/v2/models/theirs"]
        with pytest.raises(Unavailable, match="no inputs"):
            server.start()


def test_a_server_at_a_url_is_never_touched(run: RunContext) -> None:
    server = make_server("a", UrlServer(kind="url", model="tiny", url="http://127.0.0.1:9"), run)
    for leave in (server.pause, server.resume, server.stop):
        leave()
    with pytest.raises(Unavailable):
        server.restart_model()
    with pytest.raises(ActionFailed):
        server.act(act("promote"))


# A peer: a process that is a stand-in for a framework

PEER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

answer = open(sys.argv[2], "rb").read()

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass

print("starting", flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def assert_soon(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture
def peer(
    run: RunContext, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[peer_module.Peer]:
    answer = tmp_path / "answer"
    answer.write_bytes(answer_to(probe))

    def command(name: str, *, port: int, **_: Any) -> list[str]:
        return [sys.executable, "-c", PEER, str(port), str(answer)]

    monkeypatch.setattr(peer_module, "environment_of", lambda name: tmp_path)
    monkeypatch.setattr(peer_module, "command_of", command)
    server = make_server("stand-in", PeerServer(kind="peer", model="tiny", peer="mosec"), run)
    assert isinstance(server, peer_module.Peer)
    try:
        yield server
    finally:
        server.stop()


def test_a_peer_from_start_to_end(peer: peer_module.Peer, probe: Probe) -> None:
    assert peer.start()["ready_s"] > 0
    (process,) = marked(peer.marker)
    assert process.environ()[MARKER] == peer.marker
    peer.pause()
    assert_soon(lambda: process.status() == psutil.STATUS_STOPPED)
    assert probe.fault(peer.url, answer_s=0.1) is not None
    peer.resume()
    assert probe.fault(peer.url) is None
    url = peer.url
    assert peer.restart_model() > 0
    assert not process.is_running()
    assert peer.url == url
    assert probe.fault(url) is None
    peer.stop()
    assert marked(peer.marker) == []
    peer.stop()


def test_a_peer_that_is_paused_can_be_ended(peer: peer_module.Peer) -> None:
    peer.start()
    peer.pause()
    peer.stop()
    assert marked(peer.marker) == []


def test_a_peer_that_ends_tells_what_it_said(
    peer: peer_module.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.exit('no such option')"
    monkeypatch.setattr(peer_module, "command_of", lambda name, **_: [sys.executable, "-c", code])
    with pytest.raises(Unavailable, match=r"mosec ended with 1(.|\n)*no such option"):
        peer.start()


def test_a_peer_that_cannot_be_installed(
    peer: peer_module.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Path:
        raise PeerUnavailable("pip failed")

    monkeypatch.setattr(peer_module, "environment_of", fail)
    with pytest.raises(Unavailable, match="pip failed"):
        peer.start()


def test_a_peer_has_no_actions(peer: peer_module.Peer) -> None:
    with pytest.raises(ActionFailed, match="promote is for servers of kind rayprism"):
        peer.act(act("promote"))


# Jobs


def test_what_a_load_has_beside_comes_into_the_sections_of_a_job(tmp_path: Path) -> None:
    config = job_config(
        "tiny",
        tmp_path / "models",
        tmp_path / "in.parquet",
        tmp_path / "out",
        {"output": {"passthrough": "*"}, "pool": {"max_actors": 2}},
    )
    assert config["output"] == {"uri": str(tmp_path / "out"), "passthrough": "*"}
    assert config["pool"] == {"max_actors": 2}
    assert config["input"] == {"uri": str(tmp_path / "in.parquet")}
    assert config["version"] == "1"


def test_there_are_jobs_of_rayprism_only(run: RunContext, peer: peer_module.Peer) -> None:
    with pytest.raises(Unavailable, match="no rayprism"):
        run_job(peer, JobLoad(loop="job", rows=1), run)
