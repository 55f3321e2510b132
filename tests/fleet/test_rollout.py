"""Whether an application is as it should be, told from what Serve says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.edits import ABSENT, Edit
from rayprism.fleet.rollout import (
    Mark,
    describe_progress,
    has_failed,
    is_ready,
    only_drains,
    user_config_error,
)
from tests.support.serve_stand_in import ServeStandIn, application, serving


def details(
    *replicas: str,
    status: str = "RUNNING",
    deployment: str = "HEALTHY",
    deployed_s: float = 2.0,
    message: str = "",
) -> dict[str, Any]:
    """`old:RUNNING` is the replica `old`, which is running."""
    found = [dict(zip(("replica_id", "state"), text.split(":"), strict=True)) for text in replicas]
    model = {
        "status": deployment,
        "message": message,
        "target_num_replicas": 1,
        "replicas": found,
    }
    flights = {
        "status": status,
        "last_deployed_time_s": deployed_s,
        "deployments": {"model": model},
    }
    return {"applications": {"flights": flights}}


REPLACED = Mark(1.0, frozenset({"old"}))
IN_PLACE = Mark(1.0, frozenset())


@pytest.mark.parametrize(
    ("edit", "leaving"),
    [
        (Edit("flights", ("args", "version"), "4"), {"old"}),
        (Edit("flights", (), ABSENT), {"old"}),
        (Edit("flights", ("deployments", "model", "user_config", "traffic"), {}), set()),
        (Edit("other", ("args", "version"), "4"), set()),
    ],
)
def test_only_other_args_mean_other_replicas(edit, leaving):
    mark = Mark.of(details("old:RUNNING", deployed_s=1.0), "flights", [edit])
    assert mark == Mark(1.0, frozenset(leaving))


@pytest.mark.parametrize(
    ("found", "mark", "ready"),
    [
        (details("new:RUNNING"), REPLACED, True),
        (details("old:RUNNING"), IN_PLACE, True),
        # An autoscaler is at work; the version is right all the same.
        (details("new:RUNNING", deployment="UPSCALING"), REPLACED, True),
        # RUNNING from before.
        (details("old:RUNNING", deployed_s=1.0), IN_PLACE, False),
        (details("new:RUNNING", "old:STOPPING"), REPLACED, False),
        (details("new:RUNNING", "old:RUNNING"), REPLACED, False),
        (details("old:RUNNING", deployment="UPDATING"), IN_PLACE, False),
        (details("new:RUNNING", status="DEPLOYING"), REPLACED, False),
        ({"applications": {}}, REPLACED, False),
    ],
)
def test_when_it_is_ready(found, mark, ready):
    assert is_ready(found, "flights", mark) is ready


@pytest.mark.parametrize(
    ("replicas", "drains"),
    [
        (("new:RUNNING", "old:STOPPING"), True),
        (("new:RUNNING", "old:RUNNING"), False),
        (("new:STARTING", "old:STOPPING"), False),
        (("old:STOPPING",), False),
        (("new:RUNNING",), False),
    ],
)
def test_when_it_only_drains(replicas, drains):
    found = details(*replicas, status="DEPLOYING", deployment="UPDATING")
    assert only_drains(found, "flights", REPLACED) is drains
    found["applications"]["flights"]["last_deployed_time_s"] = 1.0
    assert not only_drains(found, "flights", REPLACED)


def test_failure_is_that_of_this_change():
    failed = details(status="DEPLOY_FAILED", deployment="DEPLOY_FAILED", message="no weights")
    said = has_failed(failed, "flights", REPLACED)
    assert said == "application 'flights' is DEPLOY_FAILED: no weights"
    assert has_failed(failed, "flights", Mark(2.0, frozenset())) is None
    # While it is built anew, its deployments are those of before.
    building = details(status="DEPLOYING", deployment="UNHEALTHY")
    assert has_failed(building, "flights", REPLACED) is None


def test_progress_counts_only_new_replicas():
    found = details("new:RUNNING", "old:STOPPING", status="DEPLOYING", deployment="UPDATING")
    line = describe_progress(found, "flights", REPLACED)
    assert line == "flights DEPLOYING (model 1/1 ready, 1 of before left)"
    assert describe_progress(found, "flights", Mark(2.0, frozenset())) == ""
    said = describe_progress(found, "flights", Mark(2.0, frozenset()), reason=True)
    assert said == "Serve has not begun with flights"


def test_a_replica_is_asked_for_its_user_config():
    with serving(ServeStandIn(application("flights", 3))) as fleet:
        assert user_config_error(fleet.get(), "flights") == ""
        fleet.user_config_error = "max_queue_rows: got 0"
        assert user_config_error(fleet.get(), "flights") == "max_queue_rows: got 0"
        gone = fleet.get()
    with pytest.raises(ClusterError, match="GET http"):
        user_config_error(gone, "flights")
    gone["http_options"] = {}
    with pytest.raises(ClusterError, match="no HTTP address"):
        user_config_error(gone, "flights")
