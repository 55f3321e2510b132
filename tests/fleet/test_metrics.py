"""Finding and reading the nodes' metrics over HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.errors import ClusterError
from rayprism.fleet.metrics import MetricsReader, parse_metrics, parse_targets
from rayprism.fleet.top import WANTED
from tests.support.metric_pages import Agent, Cluster, Replica, serving_pages, unused_address

ROWS = "ray_rayprism_rows_total"
FLIGHTS = (("model", "flights"), ("version", "3"))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    agents = Agent(), Agent()
    for name, agent in zip("ab", agents, strict=True):
        replica = Replica(agent, "3", name=name)
        replica.serve(4)
        replica.send()
    with serving_pages(Cluster(*agents)) as found:
        yield found


def test_every_node_is_asked(cluster):
    sample = MetricsReader(WANTED, cluster.address).read()
    assert list(sample.nodes) == cluster.targets
    assert sample.silent == {}
    *nodes, other = sample.nodes.values()
    assert [node.series[ROWS] for node in nodes] == [{FLIGHTS: 8.0}] * 2
    assert other.series == {}
    assert all(node.at_s >= sample.at_s for node in sample.nodes.values())


def test_only_what_is_wanted_is_read(cluster):
    reader = MetricsReader({ROWS}, cluster.address)
    assert set(reader.read().nodes[cluster.targets[0]].series) == {ROWS}


def test_a_dead_node_does_not_hide_the_others(cluster):
    dead = unused_address()
    cluster.targets.insert(0, dead)
    sample = MetricsReader(WANTED, cluster.address).read()
    assert list(sample.nodes) == cluster.targets[1:]
    assert sample.silent == {dead: "Connection refused"}


def test_a_node_that_hangs_costs_a_time_out(cluster):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        cluster.targets.append(address)
        sample = MetricsReader(WANTED, cluster.address, timeout_s=0.2).read()
    assert sample.silent == {address: "timed out"}
    assert len(sample.nodes) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nray_rayprism_rows_total 1\n",
            "Incomplete",
        ),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "it answered 500"),
        (b"SSH-2.0-x\r\n", "SSH"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\nray_rayprism_rows_total{a=b}",
            "it answered something else",
        ),
    ],
)
def test_half_an_answer_is_none(cluster, answer, reason):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster.targets.append(address)
        sample = MetricsReader(WANTED, cluster.address).read()
        thread.join()
    assert reason in sample.silent[address]
    assert len(sample.nodes) == 3


def test_a_slow_drip_is_timed_out(cluster):
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
                try:
                    while not ended.wait(0.02):
                        connection.sendall(b"#")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster.targets[:] = [address]
        sample = MetricsReader(WANTED, cluster.address, timeout_s=0.2).read()
        ended.set()
        thread.join()
    assert sample.silent == {address: "timed out"}


def test_a_dashboard_that_goes_away_later_is_named(cluster):
    reader = MetricsReader(WANTED, cluster.address)
    reader.read()
    cluster.sd_reply = (503, b"")
    sample = reader.read()
    assert sample.silent == {cluster.address: "it answered 503"}
    assert len(sample.nodes) == 3


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ((401, b"no token"), "RAY_AUTH_MODE=token"),
        ((404, b""), "it answered 404"),
        ((200, b"<html>"), "something else"),
        ((200, b"{}"), "something else: not a list"),
        ((200, b'[{"targets": "a:1"}]'), "no targets"),
    ],
)
def test_a_dashboard_that_is_none(cluster, reply, word):
    cluster.sd_reply = reply
    with pytest.raises(ClusterError, match=word):
        MetricsReader(WANTED, cluster.address).read()


def test_nobody_is_there():
    with pytest.raises(ClusterError, match=r"no Ray dashboard .*refused.*rayprism up"):
        MetricsReader(WANTED, f"http://{unused_address()}").read()


def test_a_cluster_without_nodes_is_no_error(cluster):
    cluster.targets.clear()
    sample = MetricsReader(WANTED, cluster.address).read()
    assert (sample.nodes, sample.silent) == ({}, {})


def test_only_the_dashboard_gets_the_token(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    MetricsReader(WANTED, cluster.address).read()
    assert cluster.headers["Authorization"] == "Bearer secret"
    assert not any("Authorization" in headers for headers in cluster.node_headers)


def test_targets_are_those_of_all_groups():
    body = b'[{"labels": {}, "targets": ["a:1", "b:2"]}, {"targets": ["a:1", "[::1]:3"]}]'
    assert parse_targets(body) == ["a:1", "b:2", "[::1]:3"]


def test_labels_of_ray_and_of_opentelemetry_are_left_out():
    page = (
        b"# HELP x y\n# TYPE ray_rayprism_rows_total counter\n"
        b'ray_rayprism_rows_total{model="fl\\"ights",otel_scope_name="a,b}",version="3"} 1.5e+03\n'
        b'ray_rayprism_rows_total{model="no",version="3"} NaN\n'
        b"ray_rayprism_rows 3\nray_rayprism_rows_total_ 4\n"
        b'ray_x{of="ray_rayprism_rows_total"} 5\n'
    )
    found = parse_metrics(page, {ROWS.encode()})
    assert found == {ROWS: {(("model", 'fl"ights'), ("version", "3")): 1500.0}}


@given(st.text(), st.floats(allow_nan=False))
def test_whatever_a_label_holds_is_read(text, value):
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    page = f'{ROWS}{{model="{escaped}",version="3"}} {value!r}\n{ROWS} 2 1700000000000\n'.encode()
    assert parse_metrics(page, {ROWS.encode()}) == {
        ROWS: {(("model", text), ("version", "3")): value, (): 2.0}
    }


@pytest.mark.parametrize("line", ["", " ", "{", '{a="b"}', '{a="b"} x', '{a="b" 1', "{a=b} 1"])
def test_a_line_that_is_none_is_an_error(line):
    with pytest.raises(ValueError, match=r".*"):
        parse_metrics(f"{ROWS}{line}\n".encode(), {ROWS.encode()})


def test_a_counter_that_lacks_total_keeps_its_name():
    name = "ray_rayprism_request_seconds_bucket"
    page = f'# TYPE {name} counter\n{name}{{le="0.1"}} 3\n'.encode()
    assert parse_metrics(page, {name.encode()}) == {name: {(("le", "0.1"),): 3.0}}
