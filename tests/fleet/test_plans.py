"""What a change of traffic, a promotion and a rollback would do, and when they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import ClusterError, ConfigInvalid, RepositoryError
from rayprism.fleet.edits import ABSENT, Edit, apply_edits, live_config, value_at
from rayprism.fleet.plans import (
    ModelFleet,
    Plan,
    find_model,
    plan_promote,
    plan_rollback,
    plan_traffic,
)
from rayprism.models.manifest import Code, FileEntry, Golden, Manifest, TensorValue
from rayprism.serving.settings import ModelArgs, parse_user_config

TRAFFIC = ("deployments", "model", "user_config", "traffic")
SPLIT = {"candidates": [{"version": "4", "weight": 5}], "shadow": [{"version": "5", "sample": 10}]}


def app(
    name: str,
    version: int | str,
    route: str | None = None,
    *,
    status: str = "RUNNING",
    model: str = "flights",
    traffic: Any = None,
    **args: Any,
) -> dict[str, Any]:
    config = {
        "name": name,
        "route_prefix": route or f"/v2/models/{model}/versions/{version}",
        "import_path": "rayprism.serving.app:build",
        "args": {"model": model, "version": version, **args},
        "deployments": [{"name": "model", "num_replicas": 2, "user_config": {}}],
    }
    if traffic is not None:
        config["deployments"][0]["user_config"]["traffic"] = traffic
    return {"status": status, "route_prefix": config["route_prefix"], "deployed_app_config": config}


def details(*others: dict[str, Any], traffic: Any = None, **stable: Any) -> dict[str, Any]:
    home = app("flights", 3, "/v2/models/flights", traffic=traffic, **stable)
    apps = [home, *(others or (app("flights-4", 4), app("flights-5", "5")))]
    return {"applications": {item["deployed_app_config"]["name"]: item for item in apps}}


def fleet(*others: dict[str, Any], traffic: Any = None, **stable: Any) -> ModelFleet:
    return find_model(details(*others, traffic=traffic, **stable), "flights")


def manifest(version: int, *, width: int = 2, code: bool = False) -> Manifest:
    x = np.ones((1, width), np.float32)
    value = TensorValue.from_array("x", x), TensorValue.from_array("y", x)
    files = {"model.onnx": FileEntry(sha256="0" * 64, size_bytes=1)}
    if code:
        files["processor.py"] = FileEntry(sha256="0" * 64, size_bytes=1)
    return Manifest(
        model="flights",
        version=version,
        created="2026-01-02T03:04:05+00:00",
        runtime="onnx",
        file="model.onnx",
        code=Code(file="processor.py", class_name="Processor") if code else None,
        inputs=(TensorSpec("x", Datatype.FP32, (-1, width)),),
        outputs=(TensorSpec("y", Datatype.FP32, (-1, width)),),
        golden=Golden(inputs=(value[0],), outputs=(value[1],)),
        files=files,
    )


def lookup(*missing: int, wider: int = 0, code: int = 0) -> Callable[[ModelArgs], Manifest]:
    """A repository with every version but some."""

    def read(args: ModelArgs) -> Manifest:
        if args.version in missing:
            raise RepositoryError(f"model 'flights' has no version {args.version}")
        wide = 3 if args.version == wider else 2
        return manifest(args.version, width=wide, code=args.version == code)

    return read


def traffic(found: ModelFleet, **wanted: Any) -> Plan:
    wanted.setdefault("lookup", lookup())
    return plan_traffic(found, **wanted)


def edit(value: Any, *path: str) -> Edit:
    return Edit("flights", path or TRAFFIC, value)


# Finding the model.


def test_the_stable_application_is_at_the_address_of_the_model():
    found = fleet(app("flights-4", 4), app("other", 7, "/somewhere"), traffic=SPLIT)
    assert found.stable.application == "flights"
    assert [(other.application, other.version) for other in found.others] == [
        ("flights-4", 4),
        ("other", 7),
    ]
    assert found.raw_traffic == SPLIT
    assert found.traffic is not None
    assert found.traffic.candidates[0].slots == 500


def test_without_one_it_is_the_one_that_is_not_at_its_versions_address():
    apps = {"mine": app("mine", 3, "/my/route"), "flights-4": app("flights-4", 4)}
    assert find_model({"applications": apps}, "flights").stable.application == "mine"


def test_a_route_that_serve_does_not_know_yet_is_that_of_the_config():
    given = details()
    given["applications"]["flights"]["route_prefix"] = None
    assert find_model(given, "flights").stable.route_prefix == "/v2/models/flights"


@pytest.mark.parametrize("routes", [("/a", "/b"), (None, None)])
def test_no_clear_stable_application(routes):
    apps = {name: app(name, n, routes[n - 1]) for n, name in ((1, "one"), (2, "two"))}
    with pytest.raises(ClusterError, match=r"not clear.*one at .*two at .*route_prefix: /v2/"):
        find_model({"applications": apps}, "flights")


def test_a_model_that_is_not_served():
    with pytest.raises(ClusterError, match=r"'fligths' is not served. Did you mean 'flights'"):
        find_model(details(), "fligths")


def test_broken_traffic_is_refused_with_its_path():
    with pytest.raises(ConfigInvalid, match=r"flights\.deployments.*traffic.*weights are 120 %"):
        fleet(
            traffic={"candidates": [{"version": "4", "weight": 60}, {"version": "5", "weight": 60}]}
        )


# Traffic.


def test_a_first_candidate():
    plan = traffic(fleet(), weights={4: 5.0}, sticky="x-user-id")
    wanted = {"candidates": [{"version": "4", "weight": 5}], "sticky": {"header": "x-user-id"}}
    assert plan.all_edits == (edit(wanted),)
    assert plan.stages[0].wait_for == ("flights",)
    assert "version 3 95 %, version 4 5 %" in plan.stages[0].says
    assert plan.before == {"version": 3, "traffic": None}
    assert plan.after == {"version": 3, "traffic": wanted}


def test_what_is_not_named_stays():
    raw = {**SPLIT, "candidate_timeout_s": 2, "sticky": {"header": "a"}}
    plan = traffic(fleet(traffic=raw), weights={5: 0.25}, shadows={5: 0})
    assert plan.after["traffic"] == {
        "candidates": [{"version": "4", "weight": 5}, {"version": "5", "weight": 0.25}],
        "shadow": [{"version": "5", "sample": 0}],
        "candidate_timeout_s": 2,
        "sticky": {"header": "a"},
    }
    assert raw["shadow"] == [{"version": "5", "sample": 10}]


def test_clear_takes_the_whole_key_out():
    plan = traffic(fleet(traffic=SPLIT), clear=True)
    assert plan.all_edits == (edit(ABSENT),)
    assert plan.after == {"version": 3, "traffic": None}


def test_clear_and_new_weights_begin_anew():
    plan = traffic(fleet(traffic=SPLIT), clear=True, weights={5: 1})
    assert plan.after["traffic"] == {"candidates": [{"version": "5", "weight": 1}]}


def test_no_sticky_header():
    raw = {"sticky": {"header": "a"}}
    assert traffic(fleet(traffic=raw), sticky=ABSENT).all_edits == (edit(ABSENT),)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"weights": {4: 5}},
        {"shadows": {5: 10}},
        {"sticky": ABSENT},
        {"weights": {}},
    ],
)
def test_what_is_so_already_needs_no_stage(wanted):
    raw = {**SPLIT, "candidates": [{"version": 4, "weight": 5.0}]}
    plan = traffic(fleet(traffic=raw), **wanted)
    assert plan.stages == ()
    assert plan.before == plan.after


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({4: -1}, "got -1 %, allowed is 0 to 100"),
        ({4: 101}, "got 101 %"),
        ({4: float("nan")}, "got nan %"),
        ({4: 0.125}, "two decimals"),
        ({4: 60, 5: 60}, r"120 % together \(4=60, 5=60\), allowed are 100"),
        ({3: 5}, "version 3: is the stable version"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(ConfigInvalid, match=message):
        traffic(fleet(), weights=weights)


def test_listed_weights_count():
    with pytest.raises(ConfigInvalid, match=r"105 % together \(4=5, 5=100\)"):
        traffic(fleet(traffic=SPLIT), weights={5: 100})


def test_a_sticky_header_that_is_none():
    with pytest.raises(ConfigInvalid, match=r"traffic\.sticky\.header"):
        traffic(fleet(), sticky="no spaces")


def test_every_fault_at_once():
    with pytest.raises(ConfigInvalid) as caught:
        traffic(fleet(), weights={3: 1, 4: 200, 9: 1}, shadows={8: 1})
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["version 3", "version 4", "version 9", "version 8"]


def test_a_version_that_is_not_deployed_comes_with_an_application_to_paste():
    with pytest.raises(ConfigInvalid) as caught:
        traffic(fleet(traffic=SPLIT, repository="/r"), weights={9: 5})
    [fault] = caught.value.faults
    head, _, snippet = fault.message.partition(":\n")
    assert "Deployed beside version 3: 4 (flights-4), 5 (flights-5)" in head
    assert yaml.safe_load(f"applications:\n{snippet}") == {
        "applications": [
            {
                "name": "flights-9",
                "route_prefix": "/v2/models/flights/versions/9",
                "import_path": "rayprism.serving.app:build",
                "args": {"model": "flights", "version": 9, "repository": "/r"},
                "deployments": [{"name": "model", "num_replicas": 2}],
            }
        ]
    }


def test_a_version_that_is_not_deployed_is_not_even_listed():
    with pytest.raises(ConfigInvalid, match="version 9: is not deployed"):
        traffic(fleet(), weights={9: 0})


def test_an_application_of_that_name_that_serves_another_model():
    with pytest.raises(ConfigInvalid) as caught:
        traffic(fleet(app("flights-9", 9, model="digits")), weights={9: 5})
    assert "application 'flights-9' serves digits version 9" in str(caught.value)
    assert "- name: flights-9-beside" in str(caught.value)


@pytest.mark.parametrize(("weight", "refused"), [(6, True), (5, False), (4, False), (0, False)])
def test_only_more_traffic_needs_a_version_that_runs(weight, refused):
    found = fleet(app("flights-4", 4, status="UNHEALTHY"), traffic=SPLIT)
    if refused:
        with pytest.raises(ConfigInvalid, match=r"'flights-4' is UNHEALTHY, and has to be RUNNING"):
            traffic(found, weights={4: weight})
    else:
        traffic(found, weights={4: weight})


def test_traffic_can_be_taken_from_a_version_that_is_gone():
    found = fleet(app("flights-7", 7), traffic=SPLIT)
    plan = traffic(found, weights={4: 0}, shadows={5: 0}, lookup=lookup(4, 5))
    assert plan.after["traffic"] == {
        "candidates": [{"version": "4", "weight": 0}],
        "shadow": [{"version": "5", "sample": 0}],
    }


def test_a_version_without_a_route_cannot_get_traffic():
    given = app("flights-4", 4)
    given["route_prefix"] = given["deployed_app_config"]["route_prefix"] = None
    with pytest.raises(ConfigInvalid, match="route_prefix: /v2/models/flights/versions/4"):
        traffic(fleet(given), weights={4: 1})


def test_a_version_that_the_repository_lacks():
    with pytest.raises(ConfigInvalid, match="version 4: model 'flights' has no version 4"):
        traffic(fleet(), weights={4: 1}, lookup=lookup(4))


def test_another_signature_needs_a_word():
    with pytest.raises(ConfigInvalid, match=r"input 'x' is .*--allow-signature-change"):
        traffic(fleet(), weights={4: 1}, lookup=lookup(wider=4))
    plan = traffic(
        fleet(), weights={4: 1, 5: 1}, lookup=lookup(wider=4), allow_signature_change=True
    )
    assert plan.after["traffic"]["candidates"] == [
        {"version": "4", "weight": 1, "allow_signature_change": True},
        {"version": "5", "weight": 1},
    ]
    # What was allowed once stays allowed.
    found = fleet(traffic=plan.after["traffic"])
    traffic(found, weights={4: 2}, lookup=lookup(wider=4))


def test_a_stable_version_that_is_gone_from_the_repository():
    with pytest.raises(ConfigInvalid, match=r"version 3: .*cannot be compared.*no version 3"):
        traffic(fleet(), weights={4: 1}, lookup=lookup(3))
    traffic(fleet(), weights={4: 1}, lookup=lookup(3), allow_signature_change=True)


PERCENT = st.integers(0, 10_000).map(lambda slots: slots / 100)
RAW = st.builds(
    lambda weights, sample: {
        "candidates": [{"version": str(v), "weight": w / 2} for v, w in weights.items()],
        "shadow": [{"version": 5, "sample": sample}],
        "max_shadow_requests": 4,
    },
    st.dictionaries(st.sampled_from([4, 5]), st.integers(0, 100)),
    PERCENT,
)


@given(RAW, st.dictionaries(st.sampled_from([4, 5]), PERCENT))
def test_what_is_planned_is_valid_and_is_what_was_asked_for(raw, weights):
    found = fleet(traffic=raw)
    before = {int(item["version"]): item["weight"] for item in raw["candidates"]}
    if sum(round(weight * 100) for weight in {**before, **weights}.values()) > 10_000:
        with pytest.raises(ConfigInvalid, match="% together"):
            traffic(found, weights=weights)
        return
    plan = traffic(found, weights=weights)
    config = live_config(details(traffic=raw))
    apply_edits(config, plan.all_edits)
    now = parse_user_config({"traffic": value_at(config, "flights", TRAFFIC)}).traffic
    assert now is not None
    got = {candidate.version: candidate.weight for candidate in now.candidates}
    assert got == {**before, **weights}
    assert now.max_shadow_requests == 4
    # To ask again changes nothing.
    again = details(traffic=value_at(config, "flights", TRAFFIC))
    assert traffic(find_model(again, "flights"), weights=weights).stages == ()


# Promotion.


def test_a_promotion_replaces_the_version_and_then_takes_the_candidate_out():
    plan = plan_promote(fleet(traffic=SPLIT), 4, lookup=lookup())
    first, second = plan.stages
    assert first.edits == (edit("4", "args", "version"), edit(ABSENT))
    assert first.wait_for == ("flights",)
    assert second.edits == (Edit("flights-4", (), ABSENT),)
    assert second.wait_for == ()
    assert plan.before == {"version": 3, "traffic": SPLIT}
    assert plan.after == {"version": 4, "traffic": None}
    config = live_config(details(traffic=SPLIT))
    apply_edits(config, plan.all_edits)
    assert [item["name"] for item in config["applications"]] == ["flights", "flights-5"]
    assert value_at(config, "flights", ("args", "version")) == 4


def test_a_promotion_may_keep_the_candidate():
    plan = plan_promote(fleet(), 4, keep_candidate=True, lookup=lookup())
    assert plan.all_edits == (edit("4", "args", "version"),)


def test_a_promotion_of_what_nothing_serves_needs_a_word():
    with pytest.raises(ConfigInvalid, match=r"not deployed beside[\s\S]*--without-candidate"):
        plan_promote(fleet(), 9, lookup=lookup())
    plan = plan_promote(fleet(), 9, without_candidate=True, lookup=lookup())
    assert plan.all_edits == (edit("9", "args", "version"),)


@pytest.mark.parametrize(
    ("read", "args", "message"),
    [
        (lookup(4), {}, "has no version 4"),
        (lookup(wider=4), {}, "--allow-signature-change"),
        (lookup(code=4), {}, "runs code.*args.allow_code: true"),
    ],
)
def test_a_promotion_that_cannot_be(read, args, message):
    with pytest.raises(ConfigInvalid, match=message):
        plan_promote(fleet(**args), 4, lookup=read)


def test_code_that_is_allowed_is_promoted():
    assert plan_promote(fleet(allow_code=True), 4, lookup=lookup(code=4)).stages


def test_another_signature_that_is_allowed_is_promoted():
    found = plan_promote(fleet(), 4, lookup=lookup(wider=4), allow_signature_change=True)
    assert found.stages


@pytest.mark.parametrize("without_candidate", [False, True])
def test_a_candidate_that_does_not_run_is_not_promoted(without_candidate):
    found = fleet(app("flights-4", 4, status="DEPLOY_FAILED"))
    with pytest.raises(ConfigInvalid, match="is DEPLOY_FAILED"):
        plan_promote(found, 4, without_candidate=without_candidate, lookup=lookup())


def test_what_is_stable_already_is_not_promoted():
    with pytest.raises(ClusterError, match="version 3 is the stable version of 'flights' already"):
        plan_promote(fleet(), 3, lookup=lookup())


def test_a_promotion_that_stopped_half_way_is_finished():
    found = fleet(app("flights-3", 3))
    plan = plan_promote(found, 3, lookup=lookup())
    assert plan.all_edits == (Edit("flights-3", (), ABSENT),)
    with pytest.raises(ClusterError, match="already"):
        plan_promote(found, 3, keep_candidate=True, lookup=lookup())
    with pytest.raises(ClusterError, match="UNHEALTHY"):
        plan_promote(fleet(app("flights-3", 3), status="UNHEALTHY"), 3, lookup=lookup())


# Rollback.


def test_a_rollback_first_takes_the_traffic_back():
    raw = {**SPLIT, "sticky": {"header": "a"}}
    plan = plan_rollback(fleet(traffic=raw), previous=2, lookup=lookup(2, 4, 5))
    assert plan.after == {
        "version": 3,
        "traffic": {"candidates": [{"version": "4", "weight": 0}], "sticky": {"header": "a"}},
    }
    assert len(plan.stages) == 1
    assert plan.all_edits == (edit(plan.after["traffic"]),)


def test_then_it_goes_back_to_the_version_before():
    raw = {"candidates": [{"version": "4", "weight": 0}]}
    plan = plan_rollback(fleet(traffic=raw), previous=2, lookup=lookup())
    assert plan.all_edits == (edit("2", "args", "version"), edit(ABSENT))
    assert plan.after == {"version": 2, "traffic": None}
    assert plan.stages[0].wait_for == ("flights",)


def test_a_version_that_is_named_comes_before_the_traffic():
    plan = plan_rollback(fleet(traffic=SPLIT), version=2, previous=1, lookup=lookup())
    assert plan.after == {"version": 2, "traffic": None}


def test_a_rollback_to_the_stable_version():
    assert plan_rollback(fleet(), version=3, lookup=lookup()).stages == ()
    plan = plan_rollback(fleet(traffic=SPLIT), version=3, lookup=lookup())
    assert plan.after["traffic"] == {"candidates": [{"version": "4", "weight": 0}]}


def test_a_rollback_to_nobody_knows_what():
    with pytest.raises(ClusterError, match=r"rayprism history flights.*--to VERSION"):
        plan_rollback(fleet(), lookup=lookup())


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lookup(2), "has no version 2"),
        (lookup(wider=2), "--allow-signature-change"),
        (lookup(code=2), "runs code"),
    ],
)
def test_a_rollback_that_cannot_be(read, message):
    with pytest.raises(ConfigInvalid, match=message):
        plan_rollback(fleet(), version=2, lookup=read)
