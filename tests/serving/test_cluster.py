"""Served for real: a Ray cluster, Serve's declarative path, stock clients. Behind both proxies."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.serving.conftest import write_code
from tests.support.fleet import (
    FRONT_DOOR,
    Fleet,
    kill,
    model_application,
    running_fleet,
    wait_for,
)
from tests.support.models import mlp_example, mlp_reference, save_mlp

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# Sleeps as long as its input says, and fails where it is negative.
SLEEPY = """
import time
from rayprism.errors import InvalidInput

class Sleepy:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        seconds = inputs["seconds"]
        if (seconds == -1).any():
            raise RuntimeError("the model's own secret")
        if (seconds < -1).any():
            raise InvalidInput("seconds: 0 or more")
        time.sleep(float(seconds.max()))
        return {"slept": seconds}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1 and 2 (other weights), `sleepy` 1, and `broken` 1, whose golden is wrong."""
    folder = tmp_path_factory.mktemp("cluster-models")
    repository = Repository(folder / "models")
    for seed in (0, 1):
        path = save_mlp(folder / f"tiny-{seed}.onnx", seed=seed)
        push_model(repository, "tiny", path, example=mlp_example())
    push_model(
        repository,
        "sleepy",
        write_code(folder / "sleepy", SLEEPY),
        example={"seconds": [0.0, 0.0]},
        code="model.py:Sleepy",
        inputs=[TensorSpec("seconds", Datatype.FP32, (-1,))],
        outputs=[TensorSpec("slept", Datatype.FP32, (-1,))],
        batching=Batching(max_rows=4),
        allow_code=True,
    )
    shutil.copytree(folder / "models/tiny", folder / "models/broken")
    shutil.rmtree(folder / "models/broken/2")
    manifest = folder / "models/broken/1/manifest.json"
    document = json.loads(manifest.read_text())
    document["model"] = "broken"
    document["golden"]["outputs"][0]["data"][0] += 1
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(document))
    return folder / "models"


def usual_applications() -> list[dict[str, Any]]:
    return [
        FRONT_DOOR,
        model_application("tiny", 1),
        model_application("tiny", 2, name="tiny-2", route="/v2/models/tiny/versions/2"),
        model_application(
            "sleepy", 1, allow_code=True, user_config={"max_queue_rows": 4, "default_timeout_s": 30}
        ),
    ]


@pytest.fixture(scope="module", params=["haproxy", "python-proxy"])
def fleet(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    state_dir = tmp_path_factory.mktemp("state")
    with running_fleet(models, state_dir, haproxy=request.param == "haproxy") as fleet:
        fleet.deploy(usual_applications())
        yield fleet


@pytest.fixture
def http(fleet: Fleet) -> Iterator[triton_http.InferenceServerClient]:
    client = triton_http.InferenceServerClient(f"127.0.0.1:{fleet.http_port}", concurrency=8)
    yield client
    client.close()


@pytest.fixture
def grpc(fleet: Fleet) -> Iterator[triton_grpc.InferenceServerClient]:
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{fleet.grpc_port}")
    yield client
    client.close()


ROWS = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
TINY = {"application": "tiny"}


def test_stock_http_client_reads_everything(http: triton_http.InferenceServerClient) -> None:
    assert http.is_server_live()
    assert http.is_server_ready()
    assert http.is_model_ready("tiny")
    assert http.is_model_ready("tiny", "1")
    assert http.is_model_ready("tiny", "2")
    assert not http.is_model_ready("tiny", "3")
    assert not http.is_model_ready("nothing")
    assert http.get_server_metadata()["name"] == "rayprism"
    metadata = http.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert http.get_model_config("tiny")["max_batch_size"] == 64
    index = {
        (entry["name"], entry["version"]): entry for entry in http.get_model_repository_index()
    }
    assert index["tiny", "1"]["state"] == "READY"
    assert index["tiny", "2"]["state"] == "READY"


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_stock_http_client_infers(
    http: triton_http.InferenceServerClient, binary: bool, compression: str | None
) -> None:
    sent = triton_http.InferInput("x", [5, 4], "FP32")
    sent.set_data_from_numpy(ROWS, binary_data=binary)
    wanted = triton_http.InferRequestedOutput("y", binary_data=binary)
    for version, seed in (("", 0), ("1", 0), ("2", 1)):
        result = http.infer(
            "tiny",
            [sent],
            model_version=version,
            outputs=[wanted],
            request_id="mine",
            timeout=5_000_000,
            priority=1,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        np.testing.assert_allclose(
            result.as_numpy("y"), mlp_reference(ROWS, seed), rtol=1e-4, atol=1e-5
        )
        assert result.get_response()["id"] == "mine"
        assert result.get_response()["model_version"] == (version or "1")


def test_statistics_grow(http: triton_http.InferenceServerClient) -> None:
    def count() -> int:
        (stats,) = http.get_inference_statistics("tiny", "2")["model_stats"]
        found: int = stats["inference_count"]
        return found

    before = count()
    sent = triton_http.InferInput("x", [5, 4], "FP32")
    sent.set_data_from_numpy(ROWS)
    http.infer("tiny", [sent], model_version="2")
    assert count() == before + 5


def test_stock_grpc_client_reads_everything(grpc: triton_grpc.InferenceServerClient) -> None:
    assert grpc.is_server_live(headers=TINY)
    assert grpc.is_server_ready(headers=TINY)
    assert grpc.is_model_ready("tiny", "1", headers=TINY)
    assert grpc.get_server_metadata(headers=TINY).name == "rayprism"
    metadata = grpc.get_model_metadata("tiny", headers=TINY)
    assert list(metadata.inputs[0].shape) == [-1, 4]
    config = grpc.get_model_config("tiny", headers=TINY).config
    assert config.max_batch_size == 64
    assert grpc.get_inference_statistics("tiny", headers=TINY).model_stats[0].version == "1"
    index = grpc.get_model_repository_index(headers={"application": "rayprism"}).models
    assert {(entry.name, entry.version) for entry in index} >= {("tiny", "1"), ("tiny", "2")}


def test_stock_grpc_client_infers(grpc: triton_grpc.InferenceServerClient) -> None:
    sent = triton_grpc.InferInput("x", [5, 4], "FP32")
    sent.set_data_from_numpy(ROWS)
    for application, seed in (("tiny", 0), ("tiny-2", 1)):
        result = grpc.infer(
            "tiny",
            [sent],
            request_id="mine",
            timeout=5_000_000,
            headers={"application": application},
        )
        np.testing.assert_allclose(
            result.as_numpy("y"), mlp_reference(ROWS, seed), rtol=1e-4, atol=1e-5
        )
        assert result.get_response().id == "mine"


@pytest.mark.parametrize(
    ("headers", "model", "name", "status", "word"),
    [
        (TINY, "tiny", "z", "INVALID_ARGUMENT", "'z'"),
        (TINY, "other", "x", "NOT_FOUND", "'other'"),
        ({"application": "rayprism"}, "tiny", "x", "NOT_FOUND", "application=tiny"),
        ({"application": "rayprism"}, "timy", "x", "NOT_FOUND", "Did you mean 'tiny'"),
        ({"application": "nothing"}, "tiny", "x", "NOT_FOUND", "nothing"),
        (
            {"application": "sleepy"},
            "sleepy",
            "x",
            "INVALID_ARGUMENT",
            "'seconds'",
        ),
    ],
)
def test_grpc_errors_have_their_status(
    grpc: triton_grpc.InferenceServerClient,
    headers: dict[str, str],
    model: str,
    name: str,
    status: str,
    word: str,
) -> None:
    sent = triton_grpc.InferInput(name, [5, 4], "FP32")
    sent.set_data_from_numpy(ROWS)
    with pytest.raises(InferenceServerException) as caught:
        grpc.infer(model, [sent], headers=headers)
    assert caught.value.status() == f"StatusCode.{status}"
    assert word in caught.value.message()


def test_curl_gets_an_answer_and_a_request_id(fleet: Fleet) -> None:
    sent = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    done = subprocess.run(
        ["curl", "-s", "-i", "-d", json.dumps(sent), f"{fleet.url}/v2/models/tiny/infer"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert " 200 " in done.stdout.splitlines()[0]
    assert "x-request-id" in done.stdout.lower()
    expected = mlp_reference(np.array([[1, 2, 3, 4]], np.float32))[0]
    got = json.loads(done.stdout.splitlines()[-1])["outputs"][0]["data"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("POST", "/v2/models/timy/infer", 404, "Did you mean 'tiny'"),
        ("POST", "/v2/models/tiny/versions/9/infer", 404, "version '9'"),
        ("GET", "/v2/nothing", 404, "/v2/nothing"),
        ("POST", "/v2/models/tiny/infer", 400, "empty"),
        ("GET", "/v2/models/tiny/infer", 405, "POST"),
        ("POST", "/v2/repository/models/tiny/load", 501, "serve deploy"),
    ],
)
def test_http_errors_are_json_everywhere(
    fleet: Fleet, method: str, path: str, status: int, word: str
) -> None:
    answer = httpx.request(method, fleet.url + path)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]


def test_the_front_door_shows_the_documentation(fleet: Fleet) -> None:
    for path in ("/", "/v2/docs", "/v2/models/tiny/docs"):
        answer = httpx.get(fleet.url + path, follow_redirects=True)
        assert answer.status_code == 200
        assert "<html" in answer.text
    document = httpx.get(f"{fleet.url}/v2/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert "tiny" in json.dumps(document)


def sleep(fleet: Fleet, *seconds: float, **parameters: Any) -> httpx.Response:
    document = {
        "inputs": [
            {
                "name": "seconds",
                "datatype": "FP32",
                "shape": [len(seconds)],
                "data": list(seconds),
            }
        ],
        "parameters": parameters,
    }
    return httpx.post(f"{fleet.url}/v2/models/sleepy/infer", json=document, timeout=60)


def test_a_full_queue_says_when_to_come_back(fleet: Fleet) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: sleep(fleet, 0.5, 0.5), range(12)))
    counted = Counter(answer.status_code for answer in answers)
    assert set(counted) == {200, 503}, counted
    for answer in answers:
        if answer.status_code == 503:
            assert "queue is full" in answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1


def test_deadlines_are_kept(fleet: Fleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(sleep, fleet, 3.0)
        # Whether it waits behind the slow one or runs beside it in one batch: it is late.
        late = pool.submit(sleep, fleet, 3.0, timeout=100_000).result()
        assert late.status_code == 504, late.text
        assert "0.1 s" in late.json()["error"]
        assert not slow.done(), "told at the deadline, not when the model is free"
        assert slow.result().status_code == 200


def test_only_the_request_at_fault_fails(fleet: Fleet) -> None:
    with ThreadPoolExecutor(4) as pool:
        blocker = pool.submit(sleep, fleet, 0.5)
        bad = pool.submit(sleep, fleet, -1.0)
        wrong = pool.submit(sleep, fleet, -2.0)
        good = pool.submit(sleep, fleet, 0.0)
        assert blocker.result().status_code == 200
        assert good.result().status_code == 200
        assert bad.result().status_code == 500
        assert "secret" not in bad.result().text
        assert wrong.result().status_code == 400
        assert wrong.result().json()["error"] == "seconds: 0 or more"


def test_serves_own_time_out_holds(fleet: Fleet) -> None:
    """Also on a connection that has carried requests before: that of the fast lane."""
    headers = {"x-request-timeout-seconds": "0.3"}
    document = {"inputs": [{"name": "seconds", "datatype": "FP32", "shape": [1], "data": [3.0]}]}
    with httpx.Client(base_url=fleet.url, timeout=60) as client:
        for _ in range(3):
            assert sleep(fleet, 0.0).status_code == 200
        answer = client.post("/v2/models/sleepy/infer", json=document, headers=headers)
        assert answer.status_code == 408, answer.text
        assert sleep(fleet, 0.0).status_code == 200


def test_serves_own_limits_hold(fleet: Fleet) -> None:
    """`max_ongoing_requests` and `max_queued_requests`, for whoever wants them."""
    limited = model_application(
        "sleepy", 1, name="limited", route="/v2/models/limited", allow_code=True
    )
    limited["deployments"][0] |= {"max_ongoing_requests": 2, "max_queued_requests": 2}
    fleet.deploy([*usual_applications(), limited])
    document = {"inputs": [{"name": "seconds", "datatype": "FP32", "shape": [1], "data": [0.0]}]}

    def ask(seconds: float) -> httpx.Response:
        document["inputs"][0]["data"] = [seconds]
        return httpx.post(f"{fleet.url}/v2/models/limited/infer", json=document, timeout=60)

    # Connections that are kept alive behind the proxy, so that the fast lane has them.
    assert {ask(0.0).status_code for _ in range(20)} == {200}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, [1.0] * 12))
    counted = Counter(answer.status_code for answer in answers)
    # Two run and two wait; a proxy may try a refused one again when one of them is through.
    assert set(counted) == {200, 503}, counted
    assert counted[503] >= 4, counted
    assert {ask(0.0).status_code for _ in range(5)} == {200}, "every slot was given back"
    fleet.deploy(usual_applications())


def test_load_makes_replicas_and_idleness_takes_them_away(fleet: Fleet) -> None:
    scaled = model_application(
        "sleepy", 1, name="scaled", route="/v2/models/scaled", allow_code=True
    )
    (deployment,) = scaled["deployments"]
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
    }
    fleet.deploy([*usual_applications(), scaled])
    assert len(fleet.replica_pids("scaled")) == 1
    document = {"inputs": [{"name": "seconds", "datatype": "FP32", "shape": [1], "data": [0.2]}]}
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=fleet.url, timeout=30) as client:
            while not stop.is_set():
                try:
                    answer = client.post("/v2/models/scaled/infer", json=document)
                    outcomes[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(fleet.replica_pids("scaled")) == 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wait_for(lambda: len(fleet.replica_pids("scaled")) == 1)
    assert set(outcomes) == {"200"}, outcomes
    fleet.deploy(usual_applications())


def test_user_config_changes_in_place_and_a_bad_one_is_refused(fleet: Fleet) -> None:
    applications = usual_applications()
    config = applications[1]["deployments"][0]["user_config"] = {"max_body_bytes": 1024}
    before = fleet.replica_pids("tiny")
    large = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [100, 4], "data": [0.5] * 400}]}

    def status() -> int:
        return httpx.post(f"{fleet.url}/v2/models/tiny/infer", json=large).status_code

    assert status() == 200
    fleet.deploy(applications)
    wait_for(lambda: status() == 413)
    config["max_body_byte"] = 5000
    fleet.deploy(applications)
    wait_for(
        lambda: "max_body_byte: unknown key" in httpx.get(f"{fleet.url}/v2/models/tiny/config").text
    )
    assert status() == 413, "the last good one is in force"
    # A replica that dies now comes back with the last good one.
    kill(before[0])
    wait_for(lambda: fleet.replica_pids("tiny") not in ([], before))
    wait_for(lambda: status() == 413)
    after = fleet.replica_pids("tiny")
    fleet.deploy(usual_applications())
    wait_for(lambda: status() == 200)
    assert fleet.replica_pids("tiny") == after, "no replica was restarted by a user_config"


def test_versions_that_are_not_sound_do_not_serve_and_say_why(fleet: Fleet) -> None:
    broken = [
        model_application("broken", 1),
        model_application("sleepy", 1, name="no-code", route="/v2/models/no-code"),
        model_application("tiny", 9, name="tiny-9", route="/v2/models/tiny/versions/9"),
    ]
    fleet.put([*usual_applications(), *broken])

    def messages() -> dict[str, str] | None:
        details = fleet.client.details()["applications"]
        found = {app["name"]: details.get(app["name"], {}) for app in broken}
        if any(app.get("status") != "DEPLOY_FAILED" for app in found.values()):
            return None
        return {
            name: app["message"] + json.dumps(app.get("deployments", {}))
            for name, app in found.items()
        }

    told = wait_for(messages, timeout_s=180)
    assert "does not reproduce its golden example" in told["broken"]
    assert "allow_code: true" in told["no-code"]
    assert "9" in told["tiny-9"]
    answer = httpx.post(f"{fleet.url}/v2/models/broken/infer", json={})
    assert answer.status_code in (404, 500, 503)
    assert httpx.get(f"{fleet.url}/v2/models/tiny").status_code == 200, "the others go on"
    assert httpx.get(f"{fleet.url}/v2/health/ready").status_code == 503
    fleet.deploy(usual_applications())


def test_a_new_version_takes_over_without_a_failed_request(fleet: Fleet) -> None:
    """`args.version` changes under load: new replicas are ready before the old ones stop."""
    stop, outcomes, seeds = threading.Event(), Counter[str](), set[str]()

    def load() -> None:
        with httpx.Client(base_url=fleet.url, timeout=30) as client:
            while not stop.is_set():
                sent = {
                    "inputs": [
                        {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
                    ]
                }
                try:
                    answer = client.post("/v2/models/tiny/infer", json=sent)
                    outcomes[str(answer.status_code)] += 1
                    seeds.add(answer.json().get("model_version", answer.text))
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        applications = usual_applications()
        applications[1]["args"]["version"] = 2
        fleet.deploy(applications)
        wait_for(lambda: "2" in seeds)
        # The old replica drains for a second; what it still gets has to be answered.
        wait_for(lambda: len(fleet.application("tiny")["deployments"]["model"]["replicas"]) == 1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        fleet.deploy(usual_applications())
    assert set(outcomes) == {"200"}, outcomes
    assert seeds == {"1", "2"}


def test_a_killed_replica_costs_at_most_what_was_in_its_hands(fleet: Fleet) -> None:
    if not fleet.haproxy:
        pytest.skip("Serve's Python proxy does not send a broken request again; HAProxy does")
    applications = usual_applications()
    applications[1]["deployments"][0]["num_replicas"] = 2
    fleet.deploy(applications)
    pids = wait_for(lambda: len(found := fleet.replica_pids("tiny")) == 2 and found)
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=fleet.url, timeout=30) as client:
            while not stop.is_set():
                sent = {
                    "inputs": [
                        {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
                    ]
                }
                try:
                    outcomes[str(client.post("/v2/models/tiny/infer", json=sent).status_code)] += 1
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: outcomes["200"] > 100)
        kill(pids[0])
        seen = outcomes["200"]
        wait_for(lambda: outcomes["200"] > seen + 500)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        fleet.deploy(usual_applications())
    # HAProxy sends a request again only where it had the whole of it in its buffer, and this client
    # sends header and body apart: each of the four may lose the one that was on its way.
    broken = sum(count for outcome, count in outcomes.items() if outcome != "200")
    assert broken <= 4, outcomes
