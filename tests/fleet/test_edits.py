"""Changes of a config: made, taken back, shown."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprism.errors import ConfigInvalid
from rayprism.fleet.edits import (
    ABSENT,
    Edit,
    apply_edits,
    difference,
    inverse_edits,
    live_config,
    masked,
    value_at,
)

TRAFFIC = ("deployments", "model", "user_config", "traffic")
VERSION = ("args", "version")


def config(**user_config: Any) -> dict[str, Any]:
    return {
        "proxy_location": "HeadOnly",
        "applications": [
            {
                "name": "flights",
                "route_prefix": "/v2/models/flights",
                "args": {"model": "flights", "version": 3},
                "deployments": [{"name": "model", "user_config": user_config}],
            },
            {"name": "flights-4", "args": {"model": "flights", "version": "4"}},
        ],
    }


def test_a_value_is_set_and_taken_out():
    changed = config(max_queue_rows=8)
    apply_edits(changed, [Edit("flights", TRAFFIC, {"candidates": []})])
    assert value_at(changed, "flights", TRAFFIC) == {"candidates": []}
    apply_edits(changed, [Edit("flights", TRAFFIC, ABSENT)])
    assert changed == config(max_queue_rows=8)


def test_what_is_missing_on_the_way_is_made():
    changed = config()
    apply_edits(changed, [Edit("flights-4", TRAFFIC, {"sticky": {"header": "a"}})])
    assert changed["applications"][1]["deployments"] == [
        {"name": "model", "user_config": {"traffic": {"sticky": {"header": "a"}}}}
    ]


@pytest.mark.parametrize("holder", ["deployments", "user_config"])
def test_nothing_behind_a_key_is_as_good_as_missing(holder):
    changed = config()
    app = changed["applications"][0]
    if holder == "deployments":
        app["deployments"] = None
    else:
        app["deployments"][0]["user_config"] = None
    apply_edits(changed, [Edit("flights", TRAFFIC, {"a": 1})])
    assert value_at(changed, "flights", TRAFFIC) == {"a": 1}


def test_the_last_key_leaves_an_empty_user_config():
    # Serve reconfigures no replica whose user_config is gone: it would keep the old traffic.
    changed = config(traffic={"candidates": []})
    apply_edits(changed, [Edit("flights", TRAFFIC, ABSENT)])
    assert value_at(changed, "flights", TRAFFIC[:-1]) == {}


def test_taking_out_what_is_not_there_changes_nothing():
    changed = config()
    edits = [Edit("flights-4", TRAFFIC, ABSENT), Edit("other", TRAFFIC, ABSENT)]
    apply_edits(changed, [*edits, Edit("other", (), ABSENT)])
    assert changed == config()


def test_an_application_is_taken_out_and_added():
    changed = config()
    gone = changed["applications"][1]
    apply_edits(changed, [Edit("flights-4", (), ABSENT)])
    assert [app["name"] for app in changed["applications"]] == ["flights"]
    apply_edits(changed, [Edit("flights-4", (), gone)])
    assert changed == config()


@pytest.mark.parametrize(("before", "after"), [(3, 5), ("3", "5")])
@pytest.mark.parametrize("wanted", [5, "5"])
def test_a_version_stays_written_as_it_was(before, after, wanted):
    changed = config(traffic={"candidates": [{"version": before, "weight": 1}]})
    changed["applications"][0]["args"]["version"] = before
    traffic = {"candidates": [{"version": "9", "weight": 2}, {"version": "3", "weight": 3}]}
    apply_edits(changed, [Edit("flights", VERSION, wanted), Edit("flights", TRAFFIC, traffic)])
    assert value_at(changed, "flights", VERSION) == after
    listed = value_at(changed, "flights", TRAFFIC)["candidates"]
    assert listed == [{"version": "9", "weight": 2}, {"version": before, "weight": 3}]


def test_a_change_shares_nothing_with_what_was_planned():
    changed = config()
    planned = {"candidates": [{"version": "4", "weight": 5}]}
    apply_edits(changed, [Edit("flights", TRAFFIC, planned)])
    value_at(changed, "flights", TRAFFIC)["candidates"][0]["weight"] = 99
    assert planned["candidates"][0]["weight"] == 5


def test_an_application_that_is_missing_is_named():
    with pytest.raises(ConfigInvalid, match=r"no application 'fligths'. There are: flights, fl"):
        apply_edits(config(), [Edit("fligths", VERSION, "4")])


def test_a_way_through_a_scalar_is_refused():
    with pytest.raises(ConfigInvalid, match=r"application 'flights'[\s\S]*args.version: got 3"):
        apply_edits(config(), [Edit("flights", ("args", "version", "x"), 1)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
PATHS = st.sampled_from([VERSION, TRAFFIC, TRAFFIC[:-1], ("route_prefix",), ("args", "device")])


@given(st.sampled_from(["flights", "flights-4"]), PATHS, JSON | st.just(ABSENT))
def test_what_was_set_is_there_and_nothing_else_changed(name, path, value):
    changed = config(traffic={"sticky": {"header": "a"}}, max_queue_rows=1)
    other = 1 - ["flights", "flights-4"].index(name)
    before = deepcopy(changed["applications"][other])
    apply_edits(changed, [Edit(name, path, value)])
    found = value_at(changed, name, path)
    assert found == value or (path == VERSION and str(found) == str(value))
    assert changed["applications"][other] == before


@given(
    st.lists(
        st.builds(
            Edit,
            st.just("flights"),
            st.sampled_from([VERSION, TRAFFIC, ("args", "device"), ("route_prefix",)]),
            st.dictionaries(st.text(max_size=3), st.integers()) | st.just(ABSENT) | st.just("7"),
        ),
        max_size=5,
    )
)
def test_the_inverse_brings_back_what_was(edits):
    before = config(max_queue_rows=1)
    changed = deepcopy(before)
    inverse = inverse_edits(changed, edits)
    assert changed == before
    apply_edits(changed, edits)
    apply_edits(changed, inverse)
    assert changed == before


def test_the_inverse_of_a_removal_is_the_application():
    changed = config()
    edits = [Edit("flights-4", (), ABSENT)]
    inverse = inverse_edits(changed, edits)
    apply_edits(changed, edits)
    apply_edits(changed, inverse)
    assert changed == config()


DETAILS = {
    "controller_info": {"node_id": "1"},
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": None},
    "grpc_options": {"port": 9000, "request_timeout_s": None},
    "target_capacity": None,
    "applications": {
        "flights": {
            "status": "RUNNING",
            "deployed_app_config": {"name": "flights", "args": {"model": "flights"}},
        },
        "by-hand": {"status": "RUNNING", "deployed_app_config": None},
        "leaving": {"status": "DELETING", "deployed_app_config": {"name": "leaving"}},
        "default": {"status": "RUNNING", "deployed_app_config": {"import_path": "a:b"}},
    },
}


def test_the_live_config_is_what_would_bring_it_about():
    assert live_config(DETAILS) == {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "grpc_options": {"port": 9000},
        "applications": [
            {"name": "flights", "args": {"model": "flights"}},
            {"name": "default", "import_path": "a:b"},
        ],
    }


def test_target_capacity_is_kept_and_the_details_are_not_shared():
    details = {**DETAILS, "target_capacity": 50.0}
    found = live_config(details)
    assert found["target_capacity"] == 50.0
    found["applications"][0]["args"]["model"] = "other"
    assert DETAILS["applications"]["flights"]["deployed_app_config"]["args"]["model"] == "flights"


def test_the_live_config_of_a_cluster_without_serve():
    assert live_config({"applications": {}, "target_capacity": None}) == {"applications": []}


def test_the_difference_names_only_what_changed():
    after = config()
    apply_edits(after, [Edit("flights", VERSION, "4")])
    shown = difference(config(), after)
    assert shown.startswith("--- flights now\n+++ flights then\n@@")
    assert "\n-  version: 3\n+  version: 4\n" in shown
    assert "flights-4" not in shown
    assert difference(config(), config()) == ""


def test_the_difference_shows_an_application_that_goes():
    after = config()
    del after["applications"][1]
    shown = difference(config(), after)
    assert "+++ flights-4 then" in shown
    assert "-name: flights-4" in shown


def test_secrets_are_masked():
    found = masked(
        {
            "runtime_env": {"env_vars": {"HOME": "/root", "N": "1"}},
            "ssl_keyfile_password": "hunter2",
            "authToken": "abc",
            "secrets": {"a": ["b"]},
            "api_key": None,
            "working_dir": "https://me:pw@host/x.zip",
            "max_tokens": 8,
            "tokenizer": "bpe",
            "tokens": 5,
        }
    )
    assert found == {
        "runtime_env": {"env_vars": {"HOME": "***", "N": "***"}},
        "ssl_keyfile_password": "***",
        "authToken": "***",
        "secrets": {"a": ["***"]},
        "api_key": None,
        "working_dir": "https://***@host/x.zip",
        "max_tokens": 8,
        "tokenizer": "bpe",
        "tokens": 5,
    }


def test_the_difference_shows_no_secrets():
    before, after = config(), config()
    for each, value in ((before, "old-secret"), (after, "new-secret")):
        each["applications"][0]["runtime_env"] = {"env_vars": {"KEY": value}}
    after["applications"][0]["args"]["version"] = 4
    shown = difference(before, after)
    assert "version: 4" in shown
    assert "-secret" not in shown
