"""From metrics to what `rayprism top` shows: no cluster, no HTTP, no clock."""

from __future__ import annotations

import json

import pytest

from rayprism.fleet.metrics import NodeSample, Sample, parse_metrics
from rayprism.fleet.top import SETTLED_S, WANTED, keep_recent, make_view
from rayprism.fleet.top_rows import VersionRow, View
from rayprism.telemetry.catalogue import exported_names
from rayprism.telemetry.recorder import Recorder
from tests.support.metric_pages import Agent, Replica

NAMES = frozenset(name.encode() for name in WANTED)


def sample(at_s: float, *agents: Agent | None) -> Sample:
    """What the nodes say now; None: a node that does not answer."""
    nodes, silent = {}, {}
    for number, agent in enumerate(agents):
        address = f"10.0.0.{number}:4000"
        if agent is None:
            silent[address] = "timed out"
        else:
            nodes[address] = NodeSample(at_s, parse_metrics(agent.page(), NAMES))
    return Sample(at_s, nodes, silent)


def row(view: View, version: str) -> VersionRow:
    return next(row for row in view.versions if row.version == version)


@pytest.fixture
def node() -> Agent:
    agent = Agent()
    agent.set_application("flights")
    return agent


@pytest.fixture
def stable(node: Agent) -> Replica:
    replica = Replica(node, "3")
    replica.send()
    return replica


def test_what_is_read_is_in_the_catalogue():
    assert {name for name in WANTED if "rayprism" in name} <= exported_names()


def test_rates_and_quantiles_are_of_the_interval(node, stable):
    stable.serve(1000, 5.0)
    stable.send()
    before = sample(0.0, node)
    stable.serve(80, 0.012)
    stable.serve(20, outcome="server_error", reason="model_failed")
    stable.send()
    found = row(make_view([before, sample(10.0, node)]), "3")
    assert found.requests_per_s == pytest.approx(10.0)
    assert found.errors_per_s == pytest.approx(2.0)
    assert found.error_ratio == pytest.approx(0.2)
    assert found.rejected_per_s == 0.0
    assert 0.010 <= found.p50_s <= found.p99_s <= 0.015
    assert found.rows_per_s == pytest.approx(16.0)
    assert found.batch_rows_mean == pytest.approx(8.0)
    assert found.padding_ratio == pytest.approx(1 / 3)
    assert found.slowest_stage == "compute"
    assert found.stage_mean_s == pytest.approx(
        {"decode": 0.0012, "queue": 0.0036, "compute": 0.006}
    )


def test_nodes_are_added_up(node, stable):
    other = Agent()
    second = Replica(other, "3", name="b")
    second.queue_rows, second.queue_age_s = 5.0, 0.4
    stable.queue_rows, stable.queue_age_s = 2.0, 0.1
    node.set_application("flights", target=2, healthy=2)
    second.send()
    stable.send()
    before = sample(0.0, node, other)
    stable.serve(90, 0.001)
    second.serve(10, 2.0)
    stable.send()
    second.send()
    view = make_view([before, sample(10.0, node, other)])
    found = row(view, "3")
    assert found.requests_per_s == pytest.approx(10.0)
    assert found.p50_s < 0.002
    assert found.p99_s > 1.0
    assert (found.queue_rows, found.queue_age_s) == (7.0, 0.4)
    assert (found.ready_replicas, found.target_replicas) == (2, 2)
    assert [node.address for node in view.nodes] == ["10.0.0.0", "10.0.0.1"]


def test_counters_of_an_agent_that_began_again_count_from_0(node, stable):
    stable.serve(1000, 5.0)
    stable.send()
    samples = [sample(0.0, node)]
    stable.serve(20, 0.012)
    stable.send()
    samples.append(sample(10.0, node))
    node.restart()
    stable.serve(40, 0.012)
    stable.send()
    samples.append(sample(20.0, node))
    found = row(make_view(samples), "3")
    assert found.requests_per_s == pytest.approx(3.0)
    assert found.p99_s <= 0.015
    assert found.padding_ratio == pytest.approx(1 / 3)


def test_a_series_that_comes_up_counts_from_0(node, stable):
    before = sample(0.0, node)
    stable.serve(5, outcome="server_error", reason="internal")
    stable.send()
    found = row(make_view([before, sample(10.0, node)]), "3")
    assert found.errors_per_s == pytest.approx(0.5)
    assert found.error_ratio == 1.0


def test_a_node_that_comes_up_does_not_bring_its_past(node, stable):
    other = Agent()
    second = Replica(other, "3", name="b")
    second.serve(10_000)
    second.send()
    samples = [sample(0.0, node), sample(10.0, node, other)]
    second.serve(100)
    second.send()
    samples.append(sample(20.0, node, other))
    assert row(make_view(samples), "3").requests_per_s == pytest.approx(10.0)


def test_a_node_that_does_not_answer_is_named_and_left_out(node, stable):
    other = Agent()
    second = Replica(other, "3", name="b")
    second.send()
    samples = [sample(0.0, node, other)]
    stable.serve(50)
    second.serve(50)
    stable.send()
    second.send()
    samples += [sample(10.0, node, other), sample(20.0, node, None)]
    view = make_view(samples)
    assert row(view, "3").requests_per_s == pytest.approx(2.5)
    assert row(view, "3").ready_replicas == 1
    assert view.silent == {"10.0.0.1:4000": "timed out"}
    assert "10.0.0.1:4000 does not answer (timed out)" in view.notes[0]
    assert [node.address for node in view.nodes] == ["10.0.0.0"]


def test_a_node_that_was_away_for_a_moment_is_whole_again(node, stable):
    samples = [sample(0.0, node)]
    stable.serve(50)
    stable.send()
    samples.append(sample(10.0, None))
    stable.serve(50)
    stable.send()
    samples.append(sample(20.0, node))
    assert row(make_view(samples), "3").requests_per_s == pytest.approx(5.0)


def test_stable_and_candidate_stand_side_by_side(node):
    stable = Replica(node, "10", weights={"10": 0.75, "9": 0.25})
    candidate = Replica(node, "9", application="flights-9", role="version")
    node.set_application("flights-9")
    stable.target_p99(0.5)
    stable.send()
    candidate.send()
    before = sample(0.0, node)
    recorder = candidate.recorder
    recorder.count("rayprism_fallbacks_total", reason="timeout").add(5)
    for outcome, outputs in (("agreed", 99), ("disagreed", 1)):
        recorder.count("rayprism_shadow_outputs_total", output="y", outcome=outcome).add(outputs)
    labels = {"protocol": "http", "outcome": "ok", "reason": "ok"}
    recorder.count("rayprism_requests_total", **labels, source="split").add(70)
    stable.serve(10, outcome="server_error", reason="overloaded")
    stable.send()
    candidate.send()
    view = make_view([before, sample(10.0, node)])
    assert [(row.role, row.version) for row in view.versions] == [
        ("stable", "10"),
        ("version", "9"),
    ]
    first, second = view.versions
    assert (first.weight_ratio, second.weight_ratio) == (0.75, 0.25)
    assert (first.target_p99_s, second.target_p99_s) == (0.5, None)
    assert first.rejected_per_s == pytest.approx(1.0)
    assert second.fallbacks_per_s == pytest.approx(0.5)
    assert second.shadow_agreement_ratio == pytest.approx(0.99)
    assert second.requests_per_s == 0.0, "what the stable version asks for is not a client's"
    assert (first.fallbacks_per_s, first.shadow_agreement_ratio) == (0.0, None)


def test_what_was_served_once_is_not_shown_for_ever(node, stable):
    old = Replica(node, "2", application="flights-2", role="version")
    old.serve(100)
    old.send()
    samples = [sample(0.0, node)]
    old.end()
    samples.append(sample(10.0, node))
    assert [row.version for row in make_view(samples).versions] == ["3"]


def test_an_application_without_replicas_shows_what_it_lacks(node, stable):
    before = sample(0.0, node)
    stable.end()
    node.set_application("flights", status=2, target=2, healthy=0)
    view = make_view([before, sample(10.0, node)])
    assert (row(view, "3").ready_replicas, row(view, "3").target_replicas) == (0, 2)
    (application,) = view.applications
    assert (application.application, application.status) == ("flights", "UNHEALTHY")
    assert (application.healthy_replicas, application.target_replicas) == (0, 2)


def test_between_two_versions_nobody_says_how_many_of_which(node, stable):
    before = sample(0.0, node)
    new = Replica(node, "4", name="b")
    new.send()
    view = make_view([before, sample(10.0, node)])
    assert [(row.version, row.ready_replicas, row.target_replicas) for row in view.versions] == [
        ("3", 1, None),
        ("4", 1, None),
    ]
    stable.end()
    view = make_view([before, sample(20.0, node)])
    assert [(row.version, row.ready_replicas, row.target_replicas) for row in view.versions] == [
        ("4", 1, 1)
    ]


@pytest.mark.parametrize(
    ("status", "healthy", "shown"),
    [(6, 2, []), (6, 1, ["RUNNING"]), (5, 2, ["DEPLOYING"]), (1, 0, ["DEPLOY_FAILED"])],
)
def test_applications_that_are_as_they_should_be_are_not_shown(status, healthy, shown):
    agent = Agent()
    agent.set_application("flights", status, target=2, healthy=healthy)
    view = make_view([sample(0.0, agent)])
    assert [found.status for found in view.applications] == shown


def test_a_target_that_an_old_controller_told_does_not_count_twice(node, stable):
    other = Agent()
    other.set_application("flights", target=1, healthy=0)
    view = make_view([sample(0.0, node, other)])
    assert row(view, "3").target_replicas == 1


def job(node: Agent, **gauges: float) -> Recorder:
    recorder = Recorder(batch_job="nightly", model="flights", version="3")
    for name, value in gauges.items():
        recorder.gauge(f"rayprism_job_{name}", lambda value=value: value)
    for outcome in ("predicted", "dead_letter"):
        recorder.count("rayprism_job_rows_total", outcome=outcome)
    node.take("job", recorder)
    return recorder


def commit(recorder: Recorder, shards: int, shard_s: float = 2.0) -> None:
    recorder.count("rayprism_job_rows_total", outcome="predicted").add(1000 * shards)
    recorder.count("rayprism_job_shards_total", outcome="done").add(shards)
    for _ in range(shards):
        recorder.histogram("rayprism_job_shard_seconds").observe(shard_s)


def test_a_batch_job_and_when_it_will_end(node):
    recorder = job(node, shards_left=30, actors=4)
    commit(recorder, 4, shard_s=20.0)
    node.take("job", recorder)
    samples = [sample(0.0, node)]
    (early,) = make_view(samples).jobs
    assert early.left_s == pytest.approx(150.0), "by all shards so far"
    commit(recorder, 10)
    recorder.count("rayprism_job_rows_total", outcome="dead_letter").add(3)
    node.take("job", recorder)
    (found,) = make_view([*samples, sample(10.0, node)]).jobs
    assert found.rows_per_s == pytest.approx(1000.0)
    assert found.dead_letter_rows == 3
    assert (found.shards_done, found.shards_failed, found.shards_left) == (14, 0, 30)
    assert found.actors == 4
    assert found.left_s == pytest.approx(15.0), "by those of the interval"


def test_a_batch_job_that_has_ended_goes(node):
    recorder = job(node, shards_left=1, actors=1)
    commit(recorder, 4)
    node.take("job", recorder)
    before = sample(0.0, node)
    node.forget("job")
    assert make_view([before, sample(10.0, node)]).jobs == ()


def test_a_batch_job_that_stands_still_has_no_end(node):
    recorder = job(node, shards_left=3, actors=0)
    commit(recorder, 4)
    node.take("job", recorder)
    assert make_view([sample(0.0, node)]).jobs[0].left_s is None


def test_only_the_models_that_are_asked_for(node, stable):
    job(node, shards_left=1, actors=1)
    view = make_view([sample(0.0, node)], ["flights"])
    assert view.versions
    assert view.jobs
    view = make_view([sample(0.0, node)], ["fligths"])
    assert not view.versions
    assert not view.jobs
    assert view.notes == ("Nothing is heard of a model 'fligths'. There is flights.",)


def test_rates_wait_for_an_interval_that_holds_enough(node, stable):
    samples = [sample(0.0, node)]
    stable.serve(100)
    stable.send()
    first = make_view(samples, settled_s=SETTLED_S)
    assert row(first, "3").requests_per_s is None
    assert row(first, "3").p50_s is None
    samples.append(sample(4.0, node))
    early = make_view(samples, settled_s=SETTLED_S)
    assert row(early, "3").requests_per_s is None
    assert row(early, "3").p50_s is not None
    assert "Rates are told from 10 s on" in early.notes[0]
    samples.append(sample(10.0, node))
    settled = make_view(samples, settled_s=SETTLED_S)
    assert row(settled, "3").requests_per_s == pytest.approx(10.0)
    assert not settled.notes


def test_nothing_is_said_in_words(node):
    assert make_view([Sample(0.0, {}, {})]).notes == (
        "The dashboard does not know of any node yet.",
    )
    assert make_view([sample(0.0, Agent())]).notes == ("Nothing is deployed.",)
    assert "No model has sent metrics yet" in make_view([sample(0.0, node)]).notes[0]
    (alone,) = make_view([sample(0.0, None)]).notes
    assert "10.0.0.0:4000 does not answer" in alone


def test_no_traffic_is_said_in_words(node, stable):
    view = make_view([sample(0.0, node), sample(30.0, node)])
    assert view.notes == ("No client has asked for anything in the last 30 s.",)
    assert row(view, "3").error_ratio is None


def test_series_that_were_lumped_together_are_nobodys(node, stable):
    page = node.page() + b'ray_rayprism_rows_total{otel_metric_overflow="true"} 5\n'
    later = Sample(9.0, {"10.0.0.0:4000": NodeSample(9.0, parse_metrics(page, NAMES))}, {})
    view = make_view([sample(0.0, node), later])
    assert [row.model for row in view.versions] == ["flights"]


def test_nodes_of_one_host_are_told_apart_by_their_ports():
    nodes = {f"h:{port}": NodeSample(0.0, parse_metrics(Agent().page(), NAMES)) for port in (1, 2)}
    view = make_view([Sample(0.0, nodes, {})])
    assert [node.address for node in view.nodes] == ["h:1", "h:2"]
    assert view.nodes[0].cpu_ratio == pytest.approx(0.1)
    assert view.nodes[0].memory_used_bytes == 2 * 2**30


def test_a_view_is_plain_json(node, stable):
    document = make_view([sample(0.0, node), sample(10.0, node)]).to_json()
    assert json.loads(json.dumps(document, allow_nan=False))["versions"][0]["model"] == "flights"


def test_a_window_keeps_what_came_a_little_late():
    samples = [Sample(at_s, {}, {}) for at_s in (0.0, 4.0, 6.5, 16.6, 36.0)]
    assert [one.at_s for one in keep_recent(samples, 30.0)] == [4.0, 6.5, 16.6, 36.0]
    assert keep_recent([], 30.0) == []
