"""The front door over a controller that the test plays, in plain dicts as Serve gives them."""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rayprism.errors import ConfigInvalid, NotReady
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.protocol import grpc as codec
from rayprism.serving.fleet_view import (
    MODEL_IMPORT_PATH,
    FleetView,
    explain_missing,
    parse_details,
)
from tests.serving.conftest import GrpcContext
from tests.support.asyncs import async_test
from tests.support.models import mlp_example, save_mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving import controller
    from rayprism.serving.app import build as build_model
    from rayprism.serving.front import FrontApp, FrontDoor, build


class Status(str, Enum):  # noqa: UP042 - as Serve's own, whose str() is not its value
    RUNNING = "RUNNING"
    DEPLOYING = "DEPLOYING"


def application(
    model: str,
    version: int = 1,
    *,
    name: str | None = None,
    status: str = "RUNNING",
    message: str = "",
    **args: Any,
) -> dict[str, Any]:
    return {
        "name": name or model,
        "route_prefix": f"/v2/models/{model}",
        "status": status,
        "message": message,
        "deployed_app_config": {
            "name": name or model,
            "import_path": MODEL_IMPORT_PATH,
            "args": {"model": model, "version": version, **args},
        },
        "deployments": {},
    }


FRONT = {
    "name": "rayprism",
    "route_prefix": "/",
    "status": "RUNNING",
    "deployed_app_config": {"name": "rayprism", "import_path": "rayprism.serving.front:build"},
}


def details(*applications: dict[str, Any]) -> dict[str, Any]:
    return {"applications": {app["name"]: app for app in (FRONT, *applications)}, "proxies": {}}


class Controller:
    """Serve's controller: answers, or raises, and counts how often it is asked."""

    def __init__(self, *applications: dict[str, Any]) -> None:
        self.answer: Any = details(*applications)
        self.asked = 0
        self.time_s = 0.0
        self.takes_s = 0.0

    def __call__(self) -> Any:
        self.asked += 1
        self.time_s += self.takes_s
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def view(self, max_age_s: float = 1.0) -> FleetView:
        return FleetView(self, max_age_s, clock=lambda: self.time_s)


GONE = RuntimeError("the controller is gone; secret")


@asynccontextmanager
async def front_of(controller: Controller, mount: str = "") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=FrontApp(controller.view()), root_path=mount)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` 1 and 2, and `other` 1."""
    folder = tmp_path_factory.mktemp("front")
    repository = Repository(folder / "models")
    for number, model in enumerate(("tiny", "tiny", "other")):
        path = save_mlp(folder / f"{number}.onnx", seed=number)
        push_model(
            repository, model, path, example=mlp_example(), metadata={"description": "Some MLP"}
        )
    return repository.root


TWO = (application("tiny"), application("tiny", 2, name="tiny-2"))
FAILED = application("other", status="DEPLOY_FAILED", message="no such version")
COMING = application("slow", status="DEPLOYING")


# What Serve says


def test_only_model_applications_are_taken() -> None:
    other = {"import_path": "a:b", "args": {"model": "tiny", "version": 3}}
    said = details(
        *TWO,
        {"name": "imperative", "status": "RUNNING", "deployed_app_config": None},
        {"name": "foreign", "status": "RUNNING", "deployed_app_config": other},
        application("no good", name="faulty"),
        application("tiny", 0, name="faulty too"),
    )
    said["applications"]["no args"] = {
        "deployed_app_config": {"import_path": MODEL_IMPORT_PATH}, "status": "DEPLOY_FAILED",
    }  # fmt: skip
    found = parse_details(said)
    assert [(app.application, app.args.version) for app in found] == [("tiny", 1), ("tiny-2", 2)]
    assert found[0].route_prefix == "/v2/models/tiny"
    assert parse_details({}) == []


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("RUNNING", "READY"),
        ("DEPLOYING", "LOADING"),
        ("NOT_STARTED", "LOADING"),
        ("DELETING", "UNLOADING"),
        ("DEPLOY_FAILED", "UNAVAILABLE"),
        ("UNHEALTHY", "UNAVAILABLE"),
        ("SOMETHING_NEW", "UNAVAILABLE"),
        (Status.RUNNING, "READY"),
        (Status.DEPLOYING, "LOADING"),
    ],
)
def test_states_in_the_words_of_the_protocol(status: Any, state: str) -> None:
    (app,) = parse_details(details(application("tiny", status=status)))
    assert app.state == state


def test_every_status_of_serve_is_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ApplicationStatus
    known = {"NOT_STARTED", "DEPLOYING", "DEPLOY_FAILED", "RUNNING", "UNHEALTHY", "DELETING"}
    assert {status.value for status in ApplicationStatus} == known


# HTTP


@pytest.mark.parametrize("mount", ["", "/v2", "/api", "/api/v2"])
def test_every_path_of_the_server_answers(models: Path, mount: str) -> None:
    @async_test
    async def run() -> None:
        controller = Controller(application("tiny", repository=str(models)))
        base = mount.removesuffix("/v2") + "/v2"
        async with front_of(controller, mount) as client:
            for path in ("", "/"):
                server = await client.get(base + path)
                assert server.json()["name"] == "rayprism", "not the page"
            assert (await client.get(f"{base}/health/live")).json() == {"live": True}
            assert (await client.get(f"{base}/health/ready")).json() == {"ready": True}
            (entry,) = (await client.post(f"{base}/repository/index")).json()
            assert (entry["name"], entry["version"], entry["state"]) == ("tiny", "1", "READY")
            document = (await client.get(f"{base}/openapi.json")).json()
            assert "/v2/models/tiny/infer" in document["paths"]
            page = await client.get(f"{base}/docs")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            (url,) = re.findall(r'data-document="([^"]+)"', page.text)
            assert url == f"{base}/openapi.json"
            assert (await client.get(url)).json() == document

    run()


@async_test
async def test_the_root_is_the_page() -> None:
    async with front_of(Controller()) as client:
        assert "<html" in (await client.get("/")).text
    async with front_of(Controller(), "/api") as client:
        for path in ("/api", "/api/"):
            page = await client.get(path)
            assert "<html" in page.text
            assert 'data-document="/api/v2/openapi.json"' in page.text


@pytest.mark.parametrize(
    ("applications", "waiting"),
    [
        ((), []),
        (TWO, []),
        ((*TWO, COMING), ["slow"]),
        ((*TWO, FAILED), ["other"]),
        ((application("tiny", status="UNHEALTHY"),), ["tiny"]),
        ((application("tiny", status="DELETING"), COMING, FAILED), ["tiny", "slow", "other"]),
    ],
)
def test_ready_means_that_everything_is(applications: Any, waiting: list[str]) -> None:
    @async_test
    async def run() -> None:
        async with front_of(Controller(*applications)) as client:
            answer = await client.get("/v2/health/ready")
            assert answer.status_code == (503 if waiting else 200)
            want: dict[str, Any] = {"ready": not waiting}
            assert answer.json() == (want | {"waiting_for": waiting} if waiting else want)
            assert (await client.head("/v2/health/ready")).status_code == answer.status_code
            assert (await client.get("/v2/health/live")).status_code == 200

    run()


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("timy/infer", 404, "Did you mean 'tiny'? Served: other, slow, tiny"),
        ("TINY/infer", 404, "Did you mean 'tiny'"),
        ("zzz", 404, "'zzz' is not served here. Served: other, slow, tiny"),
        (
            "tiny/versions/9/infer",
            404,
            "version '9' of model 'tiny' is not served here. Served: 1, 2",
        ),
        ("tiny/versions/01", 404, "version '01'"),
        ("tiny/versions/latest/ready", 404, "version 'latest'"),
        ("tiny/infer", 404, "it is served at /v2/models/tiny, /v2/models/tiny"),
        ("tiny/versions/2/infer", 404, "it is served at /v2/models/tiny"),
        ("slow/infer", 503, "model 'slow' version 1 is deploying"),
        ("slow/versions/1/ready", 503, "is deploying"),
        ("other/infer", 503, "model 'other' version 1 is deploy_failed"),
        ("%2e%2e%2fetc/infer", 404, ""),
        ("a%00b/infer", 404, "is not served here"),
    ],
)
@pytest.mark.parametrize("mount", ["", "/v2"])
def test_models_that_are_not_here(path: str, status: int, word: str, mount: str) -> None:
    @async_test
    async def run() -> None:
        async with front_of(Controller(*TWO, COMING, FAILED), mount) as client:
            for method in ("GET", "POST"):
                answer = await client.request(method, f"/v2/models/{path}")
                assert answer.status_code == status, answer.text
                assert word in answer.json()["error"]
                assert answer.headers["content-type"] == "application/json"

    run()


@async_test
async def test_an_empty_fleet_says_so() -> None:
    async with front_of(Controller()) as client:
        answer = await client.post("/v2/models/tiny/infer")
        assert answer.json() == {"error": "model 'tiny' is not served here. Served: none"}
        assert (await client.post("/v2/repository/index")).json() == []


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/v2/nothing", 404, "'/v2/nothing'"),
        ("GET", "/nothing", 404, "/v2/docs"),
        ("GET", "/v2x", 404, "'/v2x'"),
        ("GET", "/v2/models", 404, "'/v2/models'"),
        ("GET", "/v2/models//ready", 404, "/v2/docs"),
        ("POST", "/v2/models/tiny/nonsense", 404, "nonsense"),
        ("POST", "/v2", 405, "GET"),
        ("DELETE", "/v2/health/live", 405, "GET"),
        ("POST", "/", 405, "GET"),
        ("GET", "/v2/repository/index", 405, "POST"),
        ("PUT", "/v2/docs", 405, "GET"),
        ("POST", "/v2/repository/models/tiny/load", 501, "serve deploy"),
        ("POST", "/v2/repository/models/tiny/unload", 501, "serve deploy"),
        ("GET", "/v2/repository/models/tiny/load", 405, "POST"),
        ("GET", "/v2/models/stats", 501, "GET /v2/models/<model>/stats. Served: other, slow, tiny"),
    ],
)
def test_wrong_places(method: str, path: str, status: int, word: str) -> None:
    @async_test
    async def run() -> None:
        async with front_of(Controller(*TWO, COMING, FAILED)) as client:
            answer = await client.request(method, path)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["error"]
            if status == 405:
                assert answer.headers["allow"] == word

    run()


@async_test
async def test_the_index_lists_what_is_deployed() -> None:
    async with front_of(Controller(*TWO, COMING, FAILED)) as client:
        index = (await client.post("/v2/repository/index")).json()
        assert index == [
            {"name": "tiny", "version": "1", "state": "READY", "reason": ""},
            {"name": "tiny", "version": "2", "state": "READY", "reason": ""},
            {"name": "slow", "version": "1", "state": "LOADING", "reason": ""},
            {"name": "other", "version": "1", "state": "UNAVAILABLE", "reason": "no such version"},
        ]


@async_test
async def test_the_document_describes_what_is_deployed(models: Path) -> None:
    where = {"repository": str(models)}
    controller = Controller(
        application("tiny", 1, **where),
        application("tiny", 2, name="tiny-2", **where),
        application("other", 1, **where),
        application("tiny", 9, name="not pushed", **where),
        application("tiny", 1, name="elsewhere", repository=str(models / "nowhere")),
    )
    async with front_of(controller) as client:
        document = (await client.get("/v2/openapi.json")).json()
        shown = [(m["name"], m["version"]) for m in document["x-rayprism-models"]]
        assert shown == [("tiny", "1"), ("tiny", "2"), ("other", "1")]
        for path in ("tiny/infer", "tiny/versions/1/infer", "tiny/versions/2/infer", "other/infer"):
            assert f"/v2/models/{path}" in document["paths"]
        first = document["x-rayprism-models"][0]
        assert first["exampleIsReal"]
        assert first["description"] == "Some MLP"
        controller.answer, controller.time_s = details(application("other", **where)), 9.0
        document = (await client.get("/v2/openapi.json")).json()
        assert [m["name"] for m in document["x-rayprism-models"]] == ["other"], "not remembered"


@async_test
async def test_a_manifest_is_read_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    version = Repository.version

    def counted(self: Repository, model: str, number: int) -> Any:
        read.append((model, number))
        return version(self, model, number)

    monkeypatch.setattr(Repository, "version", counted)
    async with front_of(Controller(application("tiny", repository=str(models)))) as client:
        for _ in range(3):
            assert (await client.get("/v2/openapi.json")).status_code == 200
    assert read == [("tiny", 1)]


@async_test
async def test_the_document_without_any_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYPRISM_REPOSITORY", raising=False)
    async with front_of(Controller(*TWO)) as client:
        document = (await client.get("/v2/openapi.json")).json()
        assert document["x-rayprism-models"] == []
        assert "/v2/health/ready" in document["paths"]


# The controller


@async_test
async def test_a_controller_that_is_not_there_yet() -> None:
    controller = Controller()
    controller.answer = GONE
    async with front_of(controller) as client:
        for method, path in (
            ("GET", "/v2/health/ready"),
            ("POST", "/v2/repository/index"),
            ("GET", "/v2/openapi.json"),
            ("POST", "/v2/models/tiny/infer"),
            ("GET", "/v2/models/stats"),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.json() == {"error": "Serve's controller does not answer yet"}
        for path in ("/v2", "/v2/health/live", "/v2/docs", "/"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/v2/nothing")).status_code == 404
        assert (await client.post("/v2/repository/models/tiny/load")).status_code == 501
        controller.answer, controller.time_s = details(*TWO), 2.0
        assert (await client.get("/v2/health/ready")).status_code == 200


@async_test
async def test_a_controller_that_goes_away_leaves_the_last_view() -> None:
    controller = Controller(*TWO)
    async with front_of(controller) as client:
        assert len((await client.post("/v2/repository/index")).json()) == 2
        controller.answer = GONE
        for controller.time_s in (2.0, 100.0, 10_000.0):
            assert len((await client.post("/v2/repository/index")).json()) == 2
            assert (await client.get("/v2/health/ready")).status_code == 200
        assert controller.asked == 4
        controller.answer = details()
        controller.time_s += 2
        assert (await client.post("/v2/repository/index")).json() == []


@pytest.mark.parametrize("gone", [False, True], ids=["answers", "gone"])
def test_the_controller_is_asked_at_most_once_in_a_while(gone: bool) -> None:
    @async_test
    async def run() -> None:
        controller = Controller(*TWO)
        if gone:
            controller.answer = GONE
        view = controller.view(max_age_s=1.0)

        async def ask() -> None:
            results = await asyncio.gather(
                *(view.applications() for _ in range(20)), return_exceptions=True
            )
            assert {type(result) for result in results} == {NotReady if gone else list}

        await ask()
        assert controller.asked == 1
        controller.time_s = 1.0
        await ask()
        assert controller.asked == 1
        controller.time_s = 1.1
        await ask()
        assert controller.asked == 2

    run()


@pytest.mark.parametrize("known", [False, True])
def test_a_slow_end_is_waited_for_once_only(known: bool) -> None:
    """Giving the controller up takes longer than its answers last."""

    @async_test
    async def run() -> None:
        controller = Controller(*TWO)
        view = controller.view(max_age_s=1.0)
        if known:
            await view.applications()
            controller.time_s = 10.0
        before = controller.asked
        controller.answer, controller.takes_s = GONE, 5.0
        await asyncio.gather(*(view.applications() for _ in range(20)), return_exceptions=True)
        assert controller.asked == before + 1

    run()


@async_test
async def test_a_client_that_leaves_while_the_controller_is_asked() -> None:
    controller = Controller(*TWO)
    view = controller.view()
    task = asyncio.create_task(view.applications())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await view.applications()) == 2, "nobody else is held up"


def test_what_the_controller_raises_is_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller()
    controller.answer = GONE

    @async_test
    async def run() -> None:
        async with front_of(controller) as client:
            assert "secret" not in (await client.get("/v2/health/ready")).text

    run()
    assert "secret" in caplog.text


def test_explanations_prefer_what_can_be_waited_for() -> None:
    found = parse_details(
        details(application("tiny"), application("tiny", 2, name="tiny-2", status="DEPLOYING"))
    )
    error = explain_missing(found, "tiny", "2")
    assert (type(error), str(error)) == (NotReady, "model 'tiny' version 2 is deploying")
    assert "served at /v2/models/tiny" in str(explain_missing(found, "tiny", "1"))


# gRPC


async def call(door: FrontDoor, method: str, request: Any) -> tuple[Any, GrpcContext]:
    context = GrpcContext()
    return await getattr(door, method)(request, context), context


def door_of(controller: Controller) -> FrontDoor:
    door = FrontDoor()
    door._fleet = controller.view()
    return door


@async_test
async def test_rpcs_of_the_server() -> None:
    door = door_of(Controller(*TWO))
    answer, context = await call(door, "ServerLive", codec.ServerLiveRequest())
    assert answer.live
    answer, _ = await call(door, "ServerReady", codec.ServerReadyRequest())
    assert answer.ready
    answer, _ = await call(door, "ServerMetadata", codec.ServerMetadataRequest())
    assert answer.name == "rayprism"
    assert context.code is None
    door = door_of(Controller(*TWO, COMING))
    answer, _ = await call(door, "ServerReady", codec.ServerReadyRequest())
    assert not answer.ready


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("tiny", "", True),
        ("tiny", "2", True),
        ("tiny", "3", False),
        ("slow", "", False),
        ("other", "1", False),
        ("nothing", "", False),
    ],
)
def test_rpc_model_ready(name: str, version: str, ready: bool) -> None:
    @async_test
    async def run() -> None:
        door = door_of(Controller(*TWO, COMING, FAILED))
        request = codec.ModelReadyRequest(name=name, version=version)
        answer, context = await call(door, "ModelReady", request)
        assert answer.ready == ready
        assert context.code is None

    run()


@async_test
async def test_rpc_repository_index() -> None:
    door = door_of(Controller(*TWO, COMING, FAILED))
    for ready, want in ((False, ["tiny", "tiny", "slow", "other"]), (True, ["tiny", "tiny"])):
        answer, _ = await call(door, "RepositoryIndex", codec.RepositoryIndexRequest(ready=ready))
        assert [entry.name for entry in answer.models] == want
    assert answer.models[1].version == "2"


MISROUTED = [
    # model, version, code, a telling word
    ("tiny", "", "NOT_FOUND", "gRPC metadata, application=tiny"),
    ("tiny", "2", "NOT_FOUND", "gRPC metadata, application=tiny-2"),
    ("slow", "", "NOT_FOUND", "application=slow"),
    ("timy", "", "NOT_FOUND", "Did you mean 'tiny'"),
    ("tiny", "7", "NOT_FOUND", "Served: 1, 2"),
    ("", "", "NOT_FOUND", "Served: other, slow, tiny"),
]


@pytest.mark.parametrize(("model", "version", "code", "word"), MISROUTED)
@pytest.mark.parametrize(
    "method", ["ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics"]
)
def test_rpcs_of_models_say_where_the_model_is(
    method: str, model: str, version: str, code: str, word: str
) -> None:
    @async_test
    async def run() -> None:
        door = door_of(Controller(*TWO, COMING, FAILED))
        if method == "ModelInfer":
            request = codec.ModelInferRequest(model_name=model, model_version=version)
        else:
            request = getattr(codec, f"{method}Request")(name=model, version=version)
        answer, context = await call(door, method, request)
        assert context.code == grpc.StatusCode[code]
        assert word in context.details
        assert answer.ByteSize() == 0

    run()


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_rpcs_that_are_not_offered(method: str) -> None:
    @async_test
    async def run() -> None:
        request = getattr(codec, f"{method}Request")(model_name="tiny")
        _, context = await call(door_of(Controller(*TWO)), method, request)
        assert context.code == grpc.StatusCode.UNIMPLEMENTED
        assert "serve deploy" in context.details

    run()


@async_test
async def test_rpcs_without_a_controller() -> None:
    controller = Controller()
    controller.answer = GONE
    door = door_of(controller)
    for method, request in (
        ("ServerReady", codec.ServerReadyRequest()),
        ("ModelReady", codec.ModelReadyRequest(name="tiny")),
        ("RepositoryIndex", codec.RepositoryIndexRequest()),
        ("ModelInfer", codec.ModelInferRequest(model_name="tiny")),
    ):
        _, context = await call(door, method, request)
        assert context.code == grpc.StatusCode.UNAVAILABLE, method
        assert context.details == "Serve's controller does not answer yet"
    answer, context = await call(door, "ServerLive", codec.ServerLiveRequest())
    assert answer.live
    assert context.code is None


def test_rpcs_that_meet_the_unexpected(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def applications(self) -> Any:
            raise KeyError("secret")

    @async_test
    async def run() -> None:
        door = FrontDoor()
        door._fleet = Broken()  # type: ignore[assignment]
        _, context = await call(door, "ServerReady", codec.ServerReadyRequest())
        assert context.code == grpc.StatusCode.INTERNAL
        assert "secret" not in context.details
        assert "KeyError" not in context.details

    run()
    assert "secret" in caplog.text


# Building it


def test_the_page_and_the_rpcs_share_one_view() -> None:
    door = FrontDoor()
    app = door.__serve_build_asgi_app__()
    assert isinstance(app, FrontApp)
    assert app._fleet is door._fleet


@async_test
async def test_without_serve_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "_get_global_client", lambda: None)
    _, context = await call(FrontDoor(), "ServerReady", codec.ServerReadyRequest())
    assert context.code == grpc.StatusCode.UNAVAILABLE


def test_build_takes_no_args() -> None:
    assert build({})._bound_deployment.name == "front"
    with pytest.raises(ConfigInvalid) as caught:
        build({"model": "tiny", "port": 1})
    assert [fault.path for fault in caught.value.faults] == ["model", "port"]
    assert "takes none" in str(caught.value)


def test_models_are_known_by_their_import_path() -> None:
    assert f"{build_model.__module__}:{build_model.__name__}" == MODEL_IMPORT_PATH
