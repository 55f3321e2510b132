"""The Ray side of a replica, without Ray: which user_config is in force, and building."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import (
    CodeNotAllowed,
    ConfigInvalid,
    DigestMismatch,
    LoadFailed,
    RepositoryError,
    SetupError,
)
from rayprism.models.gpu import Gpu
from rayprism.models.loader import load_model
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository
from rayprism.serving.http import ModelApp
from rayprism.serving.service import ModelService
from rayprism.serving.settings import DEPLOYMENT_NAME, REPOSITORY_VARIABLE, UserConfig
from tests.serving.conftest import write_code
from tests.support.asyncs import async_test, until
from tests.support.versions import application as fleet_application

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 uses what pydantic has deprecated
    from rayprism.serving import controller as controller_module
    from rayprism.serving import replica as replica_module
    from rayprism.serving import reporting as reporting_module
    from rayprism.serving.app import MAX_ONGOING_REQUESTS, build
    from rayprism.serving.replica import ModelReplica
    from rayprism.serving.reporting import Reporting

GOOD, BETTER = {"max_queue_rows": 5}, {"max_queue_rows": 6}
FAULTY = {"max_queue_row": 5}
KEY = b"user_config/app/tiny"


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No agent is there; what of a load that failed would have been sent to it."""
    failed: list[str] = []

    def send(points: Any, find_address: Any) -> bool:
        failed.extend(dict(point.labels)["outcome"] for point in points)
        return True

    monkeypatch.setattr(reporting_module, "get_serve_logs_dir", lambda: str(tmp_path))
    monkeypatch.setattr(reporting_module, "find_agent", lambda: None)
    monkeypatch.setattr(reporting_module, "send_once", send)
    return failed


class Store:
    """The key-value store of Ray's head, and how it may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[bytes, bytes], bytes] = {}
        self.error: Exception | None = None
        monkeypatch.setattr(replica_module.internal_kv, "_internal_kv_put", self._put)
        monkeypatch.setattr(replica_module.internal_kv, "_internal_kv_get", self._get)

    def _put(self, key: bytes, value: bytes, overwrite: bool, *, namespace: bytes) -> bool:
        if self.error:
            raise self.error
        assert overwrite, "a newer one takes the place of an older one"
        self.values[namespace, key] = value
        return True

    def _get(self, key: bytes, *, namespace: bytes) -> bytes | None:
        if self.error:
            raise self.error
        return self.values.get((namespace, key))

    @property
    def kept(self) -> Any:
        value = self.values.get((b"rayprism", KEY))
        return None if value is None else json.loads(value)

    def keep(self, value: bytes) -> None:
        self.values[b"rayprism", KEY] = value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


class Replica(ModelReplica):
    """Python, too, calls `__del__`, and does not await it as Serve does."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


async def stop(replica: Replica) -> None:
    """What Serve does after draining."""
    await ModelReplica.__del__(replica)


async def replica_of(version: ModelVersion) -> Replica:
    """A replica as it is after its construction, without Ray."""
    replica = Replica.__new__(Replica)
    replica.service = ModelService(await asyncio.to_thread(load_model, version), UserConfig())
    replica._reporting = Reporting("tiny", 1, "a-replica", "app", lambda: {"applications": {}})
    replica._config_key = KEY
    replica._configured = False
    return replica


def queue_rows(replica: Replica) -> int:
    assert replica.service.scheduler._queue.limits.max_queue_rows == (
        replica.service.config.max_queue_rows
    )
    return replica.service.config.max_queue_rows


# user_config


@pytest.mark.parametrize("config", [GOOD, {}, None])
def test_a_good_user_config_is_in_force_and_kept(
    tiny: ModelVersion, store: Store, config: dict[str, Any] | None
) -> None:
    @async_test
    async def run() -> None:
        replica = await replica_of(tiny)
        await replica.reconfigure(config, rank=None)
        assert queue_rows(replica) == (5 if config else 2048)
        assert replica.service.config_error is None
        await until(lambda: store.kept is not None)
        assert store.kept == (config or {})
        await stop(replica)

    run()


@async_test
async def test_taking_the_user_config_out_means_the_defaults(
    tiny: ModelVersion, store: Store
) -> None:
    replica = await replica_of(tiny)
    await replica.reconfigure(GOOD, rank=0)
    await until(lambda: store.kept == GOOD)
    await replica.reconfigure(None, rank=0)
    assert queue_rows(replica) == 2048
    await until(lambda: store.kept == {})
    await stop(replica)


@async_test
async def test_a_later_faulty_one_is_refused(tiny: ModelVersion, store: Store) -> None:
    replica = await replica_of(tiny)
    await replica.reconfigure(GOOD, rank=None)
    await until(lambda: store.kept == GOOD)
    for _ in range(2):
        await replica.reconfigure(FAULTY, rank=None)  # no exception: the replica goes on
        assert queue_rows(replica) == 5
        assert "Did you mean 'max_queue_rows'" in str(replica.service.config_error)
    assert store.kept == GOOD
    await replica.reconfigure(BETTER, rank=None)
    assert queue_rows(replica) == 6
    assert replica.service.config_error is None
    await until(lambda: store.kept == BETTER)
    await stop(replica)


@async_test
async def test_a_later_faulty_one_does_not_look_at_what_others_kept(
    tiny: ModelVersion, store: Store
) -> None:
    replica = await replica_of(tiny)
    await replica.reconfigure(GOOD, rank=None)
    await until(lambda: store.kept == GOOD)
    store.keep(json.dumps(BETTER).encode())
    await replica.reconfigure(FAULTY, rank=None)
    assert queue_rows(replica) == 5
    await stop(replica)


@pytest.mark.parametrize("faulty", [FAULTY, [], "max_queue_rows: 5"])
def test_a_first_faulty_one_with_nothing_to_fall_back_on(
    tiny: ModelVersion, store: Store, faulty: Any
) -> None:
    @async_test
    async def run() -> None:
        replica = await replica_of(tiny)
        with pytest.raises(ConfigInvalid) as caught:
            await replica.reconfigure(faulty, rank=None)
        assert caught.value.source == "user_config", "the operator sees it in Serve's status"
        assert store.kept is None
        await stop(replica)

    run()


@pytest.mark.parametrize(("kept", "rows"), [(GOOD, 5), ({}, 2048)])
def test_a_replica_that_starts_with_a_faulty_one_takes_the_last_good_one(
    tiny: ModelVersion, store: Store, kept: dict[str, Any], rows: int
) -> None:
    @async_test
    async def run() -> None:
        store.keep(json.dumps(kept).encode())
        replica = await replica_of(tiny)
        await replica.reconfigure(FAULTY, rank=None)
        assert queue_rows(replica) == rows
        assert "max_queue_row: unknown key" in str(replica.service.config_error), "still told"
        assert store.kept == kept
        await replica.reconfigure(BETTER, rank=None)
        assert queue_rows(replica) == 6
        assert replica.service.config_error is None
        await stop(replica)

    run()


@pytest.mark.parametrize(
    "kept",
    [b"", b"{", b"[]", b"null", b'{"an_older_key": 1}', b"\xff", b'{"max_queue_rows": "5"}'],
)
def test_what_was_kept_and_cannot_be_used_is_nothing(
    tiny: ModelVersion, store: Store, kept: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        store.keep(kept)
        replica = await replica_of(tiny)
        with pytest.raises(ConfigInvalid, match="max_queue_row: unknown key"):
            await replica.reconfigure(FAULTY, rank=None)
        await stop(replica)

    run()
    unreadable = kept in (b"", b"{", b"\xff")
    assert ("could not be read" in caplog.text) == unreadable, "an older key is no alarm"


def test_a_store_that_fails_costs_no_good_user_config(
    tiny: ModelVersion, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        store.error = RuntimeError("the head is gone")
        replica = await replica_of(tiny)
        await replica.reconfigure(GOOD, rank=None)
        assert queue_rows(replica) == 5
        await until(lambda: "could not be kept" in caplog.text)
        await replica.reconfigure(FAULTY, rank=None)
        assert queue_rows(replica) == 5
        await stop(replica)

    with caplog.at_level(logging.WARNING):
        run()


def test_a_store_that_fails_leaves_nothing_to_fall_back_on(
    tiny: ModelVersion, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    @async_test
    async def run() -> None:
        store.keep(json.dumps(GOOD).encode())
        store.error = RuntimeError("the head is gone")
        replica = await replica_of(tiny)
        with pytest.raises(ConfigInvalid, match="max_queue_row"):
            await replica.reconfigure(FAULTY, rank=None)
        await stop(replica)

    run()
    assert "could not be read" in caplog.text


def test_serve_calls_it_also_without_a_user_config() -> None:
    """Serve looks at the parameters: only where `rank` is among them it calls in any case."""
    code = ModelReplica.reconfigure.__code__
    assert code.co_varnames[: code.co_argcount] == ("self", "user_config", "rank")


# Starting and stopping


@pytest.fixture
def in_serve(monkeypatch: pytest.MonkeyPatch, store: Store) -> dict[str, float]:
    """What Ray tells a replica: the name of its application, and the resources it has.

    A GPU of these, or a part of one, is the one that Ray calls 0.
    """
    resources = {"CPU": 3.0}

    def ids() -> dict[str, list[str]]:
        return {"GPU": ["0"] if resources.get("GPU") else []}

    context = SimpleNamespace(app_name="app", replica_id=SimpleNamespace(unique_id="a-replica"))
    runtime = SimpleNamespace(
        get_assigned_resources=lambda: resources,
        get_accelerator_ids=ids,
        get_node_id=lambda: "node",
    )
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module.ray, "get_runtime_context", lambda: runtime)
    monkeypatch.setattr(replica_module, "ask_controller", lambda: {"applications": {}})
    return resources


async def start(args: dict[str, Any]) -> Replica:
    replica = Replica.__new__(Replica)
    await replica.__init__(args)  # type: ignore[misc]
    return replica


@pytest.mark.parametrize(
    ("resources", "threads"),
    [({"CPU": 3.0}, 3), ({"CPU": 0.1}, 1), ({}, 1), ({"CPU": 2.9, "GPU": 1}, 2)],
)
def test_a_replica_loads_its_version_with_the_cpus_that_it_has(
    repository: Repository,
    tiny: ModelVersion,
    in_serve: dict[str, float],
    resources: dict[str, float],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_serve.clear()
    in_serve.update(resources)
    asked: dict[str, Any] = {}

    def load(version: ModelVersion, **options: Any) -> Any:
        asked.update(options)
        return load_model(version, **options)

    monkeypatch.setattr(replica_module, "load_model", load)

    @async_test
    async def run() -> None:
        args = {"model": "tiny", "version": 1, "repository": str(repository.root), "device": "cpu"}
        replica = await start(args)
        assert asked == {
            "allow_code": False,
            "threads": threads,
            "device": "cpu",
            "gpu": Gpu(),
            "options": {},
        }
        assert replica.service.model_name == "tiny"
        assert replica._config_key == KEY, "by application: two of them may serve one model"
        assert isinstance(replica.__serve_build_asgi_app__(), ModelApp)
        await replica.check_health()
        with pytest.raises(ConfigInvalid):
            await replica.reconfigure(FAULTY, rank=None)
        await stop(replica)

    run()


@pytest.mark.parametrize(
    ("resources", "device", "expected"),
    [
        ({"GPU": 0.25}, "auto", ("cuda", Gpu(0, 0.25))),
        ({"GPU": 1.0}, "cuda", ("cuda", Gpu(0, 1.0))),
        ({"GPU": 1.0}, "cpu", ("cpu", Gpu())),
        ({}, "auto", ("cpu", Gpu())),
    ],
)
def test_a_replica_takes_the_part_of_a_gpu_that_it_has(
    repository: Repository,
    tiny: ModelVersion,
    in_serve: dict[str, float],
    resources: dict[str, float],
    device: str,
    expected: tuple[str, Gpu],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_serve.update(resources)
    # A node that shows all of its GPUs to a process that asked for none.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if resources else "0,1")
    asked: dict[str, Any] = {}

    def load(version: ModelVersion, **options: Any) -> Any:
        asked.update(options)
        return load_model(version, device="cpu")

    monkeypatch.setattr(replica_module, "load_model", load)
    options = {"onnx": {"provider": "tensorrt"}}
    args = {"model": "tiny", "version": 1, "repository": str(repository.root)}

    @async_test
    async def run() -> None:
        await stop(await start({**args, "device": device, "options": options}))

    run()
    assert (asked["device"], asked["gpu"]) == expected
    assert asked["options"] == options


@async_test
async def test_a_replica_that_should_have_a_gpu_and_has_none_does_not_start(
    repository: Repository, tiny: ModelVersion, in_serve: dict[str, float], sent: list[str]
) -> None:
    args = {"model": "tiny", "version": 1, "repository": str(repository.root), "device": "cuda"}
    with pytest.raises(LoadFailed, match=r"Ray assigned no GPU to this process.*num_gpus: 1"):
        await start(args)
    assert sent == ["load_failed"]


@async_test
async def test_a_replica_does_not_start_with_files_that_were_changed(
    repository: Repository,
    tiny: ModelVersion,
    in_serve: dict[str, float],
    tmp_path: Path,
    sent: list[str],
) -> None:
    copied = tmp_path / "models"
    shutil.copytree(repository.root / "tiny", copied / "tiny")
    args = {"model": "tiny", "version": 1, "repository": str(copied)}
    await stop(await start(args))
    file = copied / "tiny/1/tiny.onnx"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DigestMismatch, match=r"tiny\.onnx"):
        await start(args)
    assert sent == ["digest_mismatch"]


@async_test
async def test_a_replica_finds_other_versions_through_the_controller(
    repository: Repository,
    tiny: ModelVersion,
    in_serve: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {
        "proxies": {"node": {"node_ip": "10.0.0.1", "status": "HEALTHY"}},
        "applications": {"tiny-2": fleet_application("tiny", 2, "/v2/models/tiny/versions/2")},
    }
    monkeypatch.setattr(replica_module, "ask_controller", lambda: said)
    replica = await start({"model": "tiny", "version": 1, "repository": str(repository.root)})
    links = replica.service.traffic.links
    assert links is not None
    found = await links.find(2)
    assert found is not None
    assert found.route == b"/v2/models/tiny/versions/2"
    assert links._addresses.host == "127.0.0.1", "the proxy of its own node"
    await stop(replica)


def test_the_controller_is_asked_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def get(reference: Any, *, timeout: float) -> Any:
        asked.append((reference, timeout))
        return {"applications": {}}

    method = SimpleNamespace(remote=lambda: "reference")
    client = SimpleNamespace(_controller=SimpleNamespace(get_serve_instance_details=method))
    monkeypatch.setattr(controller_module, "_get_global_client", lambda: client)
    monkeypatch.setattr(controller_module.ray, "get", get)
    assert controller_module.ask_controller() == {"applications": {}}
    ((reference, timeout_s),) = asked
    assert (reference, 0 < timeout_s <= 10) == ("reference", True)
    monkeypatch.setattr(controller_module, "_get_global_client", lambda: None)
    with pytest.raises(RuntimeError, match="not connected"):
        controller_module.ask_controller()


@async_test
async def test_a_replica_that_never_started_stops_quietly() -> None:
    await stop(Replica.__new__(Replica))


@async_test
async def test_health_is_the_service_s(tiny: ModelVersion, store: Store) -> None:
    replica = await replica_of(tiny)
    await replica.check_health()

    def hang() -> None:
        raise SetupError("the model hangs")

    replica.service.check_health = hang  # type: ignore[method-assign]
    with pytest.raises(SetupError, match="hangs"):
        await replica.check_health()
    await stop(replica)


# Building


def args_of(application: Any) -> dict[str, Any]:
    (args,) = application._bound_deployment.init_args
    return dict(args)


@pytest.fixture(scope="module")
def coded(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    text = """
class Model:
    def __init__(self, folder, options):
        pass
    def predict(self, inputs):
        return {"y": inputs["x"]}
"""
    return push_model(
        repository,
        "coded",
        write_code(tmp_path_factory.mktemp("coded"), text),
        example={"x": [1.0, 2.0]},
        code="model.py:Model",
        inputs=[TensorSpec("x", Datatype.FP32, (-1,))],
        outputs=[TensorSpec("y", Datatype.FP32, (-1,))],
        allow_code=True,
    ).version


def test_build_makes_the_one_deployment(repository: Repository, tiny: ModelVersion) -> None:
    application = build({"model": "tiny", "version": "1", "repository": str(repository.root)})
    deployment = application._bound_deployment
    assert deployment.name == DEPLOYMENT_NAME
    assert deployment.max_ongoing_requests == MAX_ONGOING_REQUESTS
    assert deployment._deployment_config.max_surge_percent == 100
    assert args_of(application) == {
        "model": "tiny",
        "version": 1,
        "repository": str(repository.root.resolve()),
        "allow_code": False,
        "device": "auto",
        "options": {},
    }
    json.dumps(args_of(application))


def test_build_takes_the_repository_of_the_cluster(
    repository: Repository, tiny: ModelVersion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = tmp_path / "models"
    link.symlink_to(repository.root)
    monkeypatch.setenv(REPOSITORY_VARIABLE, str(link))
    application = build({"model": "tiny", "version": 1})
    # Written out: a replica does not depend on the environment, nor on where the link points later.
    assert args_of(application)["repository"] == str(repository.root.resolve())


def test_build_without_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPOSITORY_VARIABLE, raising=False)
    with pytest.raises(ConfigInvalid, match=REPOSITORY_VARIABLE):
        build({"model": "tiny", "version": 1})


@pytest.mark.parametrize(
    ("args", "kind", "word"),
    [
        ({"version": 9}, RepositoryError, "no version 9"),
        ({"model": "timy"}, RepositoryError, "Did you mean 'tiny'"),
        ({"repository": "/no/such/place"}, RepositoryError, "/no/such/place"),
        ({"repository": "models"}, ConfigInvalid, "absolute path"),
        ({"version": "latest", "devise": "cpu"}, ConfigInvalid, "2 faults"),
        ({"model": "coded"}, CodeNotAllowed, "allow_code: true"),
    ],
)
def test_build_says_what_is_wrong(
    repository: Repository,
    tiny: ModelVersion,
    coded: ModelVersion,
    args: dict[str, Any],
    kind: type[Exception],
    word: str,
) -> None:
    fine = {"model": "tiny", "version": 1, "repository": str(repository.root)}
    with pytest.raises(kind) as caught:
        build({**fine, **args})
    assert word in str(caught.value)


def test_build_without_any_args() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        build({})
    assert [fault.path for fault in caught.value.faults] == ["model", "version"]


def test_build_takes_code_that_is_allowed(repository: Repository, coded: ModelVersion) -> None:
    root = str(repository.root)
    args = {"model": "coded", "version": 1, "repository": root, "allow_code": True}
    assert args_of(build(args))["allow_code"] is True
