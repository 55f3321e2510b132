"""Canaries, shadows, promotion and rollback on a real fleet, under real load: nothing may fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rayprism.core.tensors import Array, Datatype, TensorSpec
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.support.fleet import (
    FRONT_DOOR,
    Fleet,
    kill,
    model_application,
    running_fleet,
    wait_for,
)
from tests.support.load import Load
from tests.support.models import mlp_example, mlp_reference, save_mlp

pytestmark = [pytest.mark.cluster, pytest.mark.e2e, pytest.mark.timeout(600)]

# Reproduces its example, and fails on everything else.
FAILING = """
import numpy as np

class Failing:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        if inputs["x"].any():
            raise RuntimeError("always")
        return {"y": np.zeros((len(inputs["x"]), 3), np.float32)}
"""
STABLE, CANDIDATE, ERRORS, BROKEN, OTHER_SIGNATURE = 1, 2, 3, 4, 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1 and 2 (other weights), 3 fails always, 4 is never ready, 5 takes something else."""
    folder = tmp_path_factory.mktemp("traffic-models")
    repository = Repository(folder / "models")
    for seed in (0, 1):
        path = save_mlp(folder / f"tiny-{seed}.onnx", seed=seed)
        push_model(repository, "tiny", path, example=mlp_example())
    code = folder / "failing"
    code.mkdir()
    (code / "model.py").write_text(FAILING)
    spec = [TensorSpec("x", Datatype.FP32, (-1, 4))]
    for inputs in (spec, [TensorSpec("z", Datatype.FP32, (-1, 4))]):
        name = inputs[0].name
        (code / "model.py").write_text(FAILING.replace('"x"', f'"{name}"'))
        push_model(
            repository,
            "tiny",
            code,
            example={name: np.zeros((1, 4), np.float32).tolist()},
            code="model.py:Failing",
            inputs=inputs,
            outputs=[TensorSpec("y", Datatype.FP32, (-1, 3))],
            allow_code=True,
        )
    tiny = folder / "models/tiny"
    (tiny / "4").rename(tiny / "5")
    _rewrite(tiny / "5", version=OTHER_SIGNATURE)
    shutil.copytree(tiny / "2", tiny / "4")
    _rewrite(tiny / "4", version=BROKEN, break_golden=True)
    push_model(repository, "other", folder / "tiny-0.onnx", example=mlp_example())
    return folder / "models"


def _rewrite(folder: Path, *, version: int, break_golden: bool = False) -> None:
    manifest = folder / "manifest.json"
    document = json.loads(manifest.read_text())
    document["version"] = version
    if break_golden:
        document["golden"]["outputs"][0]["data"][0] += 1
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(document))


def beside(version: int, *, replicas: int = 1, **args: Any) -> dict[str, Any]:
    return model_application(
        "tiny",
        version,
        name=f"tiny-{version}",
        route=f"/v2/models/tiny/versions/{version}",
        replicas=replicas,
        **args,
    )


def stable(version: int = STABLE, **traffic: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"default_timeout_s": 20}
    if traffic:
        config["traffic"] = traffic
    return model_application("tiny", version, user_config=config)


@pytest.fixture(scope="module")
def fleet(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    state_dir = tmp_path_factory.mktemp("state")
    # Longer than httpx keeps a connection that nobody uses (5 s): a HAProxy that was replaced holds
    # such a connection until its next request, and sends that to the replicas that it knew.
    with running_fleet(models, state_dir, haproxy=True, drain_s=6) as fleet:
        yield fleet


def reference(version: str, rows: Array) -> Array:
    return mlp_reference(rows, {"1": 0, "2": 1}[version])


@pytest.fixture
def load(fleet: Fleet) -> Load:
    return Load(fleet.url, f"127.0.0.1:{fleet.grpc_port}", "tiny", reference)


def rayprism(fleet: Fleet, models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("rayprism")), *arguments]
    command += ["--address", fleet.state.dashboard_address, "--repository", str(models)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def done(fleet: Fleet, models: Path, *arguments: str) -> str:
    outcome = rayprism(fleet, models, *arguments)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


def in_force(fleet: Fleet) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{fleet.url}/v2/models/tiny/traffic").json()
    return document


def check_nothing_failed(load: Load) -> None:
    assert not load.failures, (load.failures, load.versions)
    assert set(load.by_client) == {"closed", "open", "grpc"}, "every kind of client got answers"


def test_ten_weight_changes(fleet: Fleet, models: Path, load: Load) -> None:
    fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
    pids = fleet.replica_pids("tiny")
    with load:
        load.wait_for(50)
        assert load.versions["2"] == 0, "a version that is loaded gets nothing by that"
        for weight in ("5", "0.25", "50", "100", "0", "33.33", "1", "75", "100", "10"):
            done(fleet, models, "traffic", "tiny", f"2={weight}")
            assert in_force(fleet)["weights"]["2"] == float(weight)
            if weight == "100":
                load.wait_for(20)
                before = load.versions["1"]
                load.wait_for(100)
                assert load.versions["1"] == before, "100 is all of them"
            elif weight == "0":
                load.wait_for(20)
                before = load.versions["2"]
                load.wait_for(100)
                assert load.versions["2"] == before, "0 is none of them"
            else:
                load.wait_for(50)
    check_nothing_failed(load)
    assert fleet.replica_pids("tiny") == pids, "weights change in place"
    assert in_force(fleet)["candidates"]["2"]["fallbacks"] == {}


def test_promotion_and_rollback(fleet: Fleet, models: Path, load: Load) -> None:
    traffic = {"candidates": [{"version": "2", "weight": 20}]}
    fleet.deploy([FRONT_DOOR, stable(**traffic), beside(CANDIDATE)])
    with load:
        load.wait_for(20, "2")
        told = done(fleet, models, "promote", "tiny", "2", "--why", "better on held-out rows")
        assert "version" in told
        load.wait_for(20)
        before = load.versions["1"]
        load.wait_for(200)
        assert load.versions["1"] == before, "the old version is gone"
        # Nobody needs the candidate's application any more; it ends what it has taken, and goes.
        wait_for(lambda: "tiny-2" not in fleet.client.details()["applications"])
        config = fleet.application("tiny")["deployed_app_config"]
        assert "traffic" not in json.dumps(config)
        done(fleet, models, "rollback", "tiny", "--why", "worse on real ones")
        load.wait_for(20)
        before = load.versions["2"]
        load.wait_for(200)
        assert load.versions["2"] == before
    check_nothing_failed(load)
    history = json.loads(done(fleet, models, "history", "tiny", "--json"))
    newest, older = history[:2]
    assert (newest["action"], newest["outcome"], newest["to"]["version"]) == ("rollback", "done", 1)
    assert (older["action"], older["to"]["version"]) == ("promote", 2)
    assert older["why"] == "better on held-out rows"
    assert older["config_before"], "the state before can be read from the journal"


def test_a_killed_candidate(fleet: Fleet, models: Path, load: Load) -> None:
    traffic = {"candidates": [{"version": "2", "weight": 50}]}
    fleet.deploy([FRONT_DOOR, stable(**traffic), beside(CANDIDATE)])
    with load:
        load.wait_for(100, "2")
        for _ in range(2):
            (pid,) = wait_for(lambda: fleet.replica_pids("tiny-2"))
            kill(pid)
            load.wait_for(100, "1")
            # It comes back by itself, and its share with it.
            wait_for(lambda pid=pid: fleet.replica_pids("tiny-2") not in ([], [pid]))
            load.wait_for(50, "2")
    check_nothing_failed(load)
    assert sum(in_force(fleet)["candidates"]["2"]["fallbacks"].values()) > 0, "counted by reason"


def test_a_candidate_that_answers_only_errors(fleet: Fleet, models: Path, load: Load) -> None:
    traffic = {"candidates": [{"version": "3", "weight": 50}]}
    fleet.deploy([FRONT_DOOR, stable(**traffic), beside(ERRORS, allow_code=True)])
    with load:
        load.wait_for(300)
        # While it is new, its proxy may say `gone` before it gives errors, and after five failures
        # of either kind it is tried ever more seldom.
        wait_for(lambda: in_force(fleet)["candidates"]["3"]["fallbacks"].get("error", 0) > 0)
    check_nothing_failed(load)
    assert set(load.versions) == {"1"}
    found = in_force(fleet)["candidates"]["3"]
    assert found["answered"] == 0
    assert found["fallbacks"]["resting"] > 0, "it is not asked every time"


def test_a_candidate_that_never_becomes_ready(fleet: Fleet, models: Path, load: Load) -> None:
    fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
    pids = fleet.replica_pids("tiny")
    with load:
        load.wait_for(20)
        # By file, as nobody but a file can do it: it has a weight, and is never ready.
        traffic = {"candidates": [{"version": "4", "weight": 50}]}
        fleet.put([FRONT_DOOR, stable(**traffic), beside(CANDIDATE), beside(BROKEN)])
        wait_for(lambda: fleet.application("tiny-4")["status"] == "DEPLOY_FAILED", 120)
        load.wait_for(300)
        refused = rayprism(fleet, models, "traffic", "tiny", "4=60")
        assert refused.returncode == 1
        assert "DEPLOY_FAILED" in refused.stderr
        fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
        # By command: promoted, it does not start, and the old version stays.
        failed = rayprism(fleet, models, "promote", "tiny", "4", "--without-candidate")
        assert failed.returncode == 1
        assert "golden" in failed.stderr, failed.stderr
        load.wait_for(100)
    check_nothing_failed(load)
    assert set(load.versions) == {"1"}
    assert fleet.replica_pids("tiny") == pids, "the old replicas never stopped"
    config = fleet.application("tiny")["deployed_app_config"]
    assert str(config["args"]["version"]) == "1", "the change was taken back"
    newest = json.loads(done(fleet, models, "history", "tiny", "--json"))[0]
    assert newest["outcome"] == "failed"
    assert "golden" in newest["reason"]


def test_shadows_are_compared_and_never_seen(fleet: Fleet, models: Path, load: Load) -> None:
    fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
    done(fleet, models, "traffic", "tiny", "--shadow", "2=100")

    def disagreed() -> int:
        outputs = in_force(fleet)["shadows"].get("2", {}).get("outputs", {})
        return outputs.get("y", {}).get("disagreed", 0)

    with load:
        wait_for(lambda: disagreed() > 20)
    check_nothing_failed(load)
    assert set(load.versions) == {"1"}
    assert in_force(fleet)["shadows"]["2"]["outputs"]["y"]["agreed"] == 0, "other weights"


def test_a_key_stays_with_its_version(fleet: Fleet, models: Path) -> None:
    fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
    body = mlp_example(1)

    def versions(**headers: str) -> dict[str, str]:
        with httpx.Client(base_url=fleet.url) as client:
            found = {}
            for user in map(str, range(60)):
                headers["x-user-id"] = user
                answer = client.post("/v2/models/tiny/infer", json=body, headers=headers)
                found[user] = answer.headers["x-rayprism-version"]
                assert answer.json()["model_version"] == found[user]
            return found

    done(fleet, models, "traffic", "tiny", "2=20", "--sticky", "X-User-Id")
    few = versions()
    assert versions() == few
    done(fleet, models, "traffic", "tiny", "2=60")
    more = versions()
    assert {user for user in few if few[user] == "2"} < {u for u in more if more[u] == "2"}
    assert set(versions(**{"x-rayprism-version": "2"}).values()) == {"2"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("traffic", "tiny", "2=60", "9=1"), ["9"]),
        (("traffic", "tiny", "2=100.01"), ["100"]),
        (("traffic", "tiny", "2=0.001"), ["decimals"]),
        (("traffic", "tiny", "3=5"), ["not deployed", "route_prefix"]),
        (("traffic", "tiny", "5=5"), ["--allow-signature-change", "'z'"]),
        (("traffic", "tiny", "1=5"), ["stable"]),
        (("traffic", "timy", "2=5"), ["tiny"]),
        (("promote", "tiny", "9"), ["no version 9"]),
        (("promote", "tiny", "3"), ["--without-candidate"]),
        (("promote", "tiny", "1"), ["already"]),
        (("promote", "tiny", "5"), ["--allow-signature-change"]),
        (("rollback", "other"), ["--to"]),
    ],
    ids=" ".join,
)
def test_bad_input_changes_nothing(
    fleet: Fleet, models: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    if "tiny-5" not in fleet.client.details()["applications"]:
        others = [beside(OTHER_SIGNATURE, allow_code=True), model_application("other", 1)]
        fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE), *others])
    before = fleet.client.details()["applications"]
    refused = rayprism(fleet, models, *arguments)
    assert refused.returncode in (1, 2), refused.stdout
    for word in words:
        assert word in refused.stderr, refused.stderr
    after = fleet.client.details()["applications"]
    for name, application in before.items():
        assert after[name]["last_deployed_time_s"] == application["last_deployed_time_s"], name


def test_nobody_there(models: Path) -> None:
    command = [str(Path(sys.executable).with_name("rayprism")), "traffic", "tiny", "2=5"]
    command += ["--address", "http://127.0.0.1:9", "--repository", str(models)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "Is the cluster up" in refused.stderr


def test_file_and_fleet_agree(fleet: Fleet, models: Path, tmp_path: Path) -> None:
    import yaml

    fleet.deploy([FRONT_DOOR, stable(), beside(CANDIDATE)])
    path = tmp_path / "serve.yaml"
    document = {"applications": [FRONT_DOOR, stable(), beside(CANDIDATE)]}
    path.write_text("# who serves what\n" + yaml.safe_dump(document, sort_keys=False))
    done(fleet, models, "traffic", "tiny", "2=5", "--file", str(path))
    text = path.read_text()
    assert text.startswith("# who serves what\n")
    live = {
        name: application["deployed_app_config"]
        for name, application in fleet.client.details()["applications"].items()
    }
    written = {
        application["name"]: application for application in yaml.safe_load(text)["applications"]
    }
    assert written == live
