"""What the Serve REST API says, and waiting for it to say something else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.rest import ServeClient, parse_state
from rayprism.fleet.waiting import wait_until_running

# As Ray 2.60 gives it, abridged.
FAILED_MESSAGE = (
    "The deployment failed to start 3 times in a row. See controller logs for details. Error:\n"
    "\x1b[36mray::ServeReplica:one:model.initialize_and_get_metadata()\x1b[39m (pid=1, ip=::1)\n"
    '  File "replica.py", line 3521, in initialize_and_get_metadata\n'
    "    await self._replica_impl.initialize(deployment_config, rank, gang_context)\n"
    "RuntimeError: Traceback (most recent call last):\n"
    '  File "app.py", line 11, in __init__\n'
    '    raise RuntimeError("weights are missing")\n'
    "          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n"
    "RuntimeError: weights are missing\n"
    "Push the model again."
)


def details(status: str = "RUNNING", deployment: str = "HEALTHY", message: str = "") -> Any:
    replica = {"state": "RUNNING" if status == "RUNNING" else "STARTING", "log_file_path": "/a.log"}
    return {
        "controller_info": {"node_id": "1"},
        "http_options": {"host": "0.0.0.0", "port": 8100},
        "grpc_options": {"port": 9100, "grpc_servicer_functions": ["m:f"]},
        "applications": {
            "one": {
                "status": status,
                "message": "",
                "route_prefix": "/one",
                "deployments": {
                    "model": {
                        "status": deployment,
                        "message": message,
                        "target_num_replicas": 2,
                        "replicas": [replica, replica],
                    }
                },
            }
        },
    }


EMPTY = {"controller_info": {}, "proxies": {}, "applications": {}, "target_capacity": None}


def test_state_of_a_running_serve():
    state = parse_state(details())
    assert state.started
    assert state.is_running
    assert state.http_address == "http://127.0.0.1:8100"
    assert state.grpc_address == "127.0.0.1:9100"
    assert state.applications[0].deployments[0].running == 2


def test_state_before_the_first_deploy():
    state = parse_state(EMPTY)
    assert not state.started
    assert not state.is_running
    assert state.http_address is None


@pytest.mark.parametrize(
    ("status", "deployment", "running", "failed"),
    [
        ("RUNNING", "HEALTHY", True, False),
        ("RUNNING", "UPSCALING", True, False),
        ("RUNNING", "UNHEALTHY", False, True),
        ("DEPLOYING", "UPDATING", False, False),
        ("DEPLOYING", "HEALTHY", False, False),
        ("DELETING", "HEALTHY", False, False),
        ("DEPLOY_FAILED", "DEPLOY_FAILED", False, True),
        ("UNHEALTHY", "HEALTHY", False, True),
    ],
)
def test_when_an_application_is_running_or_failed(status, deployment, running, failed):
    app = parse_state(details(status, deployment)).applications[0]
    assert (app.is_running, app.has_failed) == (running, failed)


def test_cause_is_the_exception_and_not_its_traceback():
    app = parse_state(details("DEPLOY_FAILED", "DEPLOY_FAILED", FAILED_MESSAGE)).applications[0]
    assert app.cause == "RuntimeError: weights are missing\nPush the model again."


def test_cause_without_a_traceback_is_the_message():
    app = parse_state(details("DEPLOYING", "UPDATING", "no CPUs left")).applications[0]
    assert app.cause == "no CPUs left"


class FakeClient:
    """Answers with one item after the other, then with the last."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def state(self):
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return parse_state(answer)


def wait(*answers: Any, timeout_s: float = 10.0) -> tuple[Any, list[str]]:
    now = [0.0]
    said: list[str] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    state = wait_until_running(
        FakeClient(*answers),
        timeout_s=timeout_s,
        say=said.append,
        sleep=sleep,
        clock=lambda: now[0],
    )
    return state, said


def test_waiting_tells_each_change_once():
    deploying = details("DEPLOYING", "UPDATING")
    state, said = wait(EMPTY, deploying, deploying, deploying, details())
    assert state.is_running
    assert said == ["one DEPLOYING (model 0/2 UPDATING)", "one RUNNING (model 2/2)"]


def test_waiting_ends_with_the_reason_of_a_failure():
    failed = details("DEPLOY_FAILED", "DEPLOY_FAILED", FAILED_MESSAGE)
    with pytest.raises(ClusterError, match=r"(?s)'one' is DEPLOY_FAILED.*missing.*/a\.log"):
        wait(details("DEPLOYING", "UPDATING"), failed)


def test_waiting_for_the_others_when_one_has_failed():
    failed = details("DEPLOY_FAILED", "DEPLOY_FAILED", FAILED_MESSAGE)
    both = details("DEPLOYING", "UPDATING")
    both["applications"]["two"] = failed["applications"]["one"]
    later = details()
    later["applications"]["two"] = failed["applications"]["one"]
    with pytest.raises(ClusterError, match="'two' is DEPLOY_FAILED"):
        wait(both, both, later)


def test_waiting_ends_in_time():
    stuck = details("DEPLOYING", "UPDATING", "no CPUs left")
    with pytest.raises(ClusterError, match=r"(?s)not running after 10 s.*no CPUs left"):
        wait(stuck)
    with pytest.raises(ClusterError, match="nothing was deployed"):
        wait(EMPTY)


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server that answers with `server.reply`, and remembers the last headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = self.server.reply  # type: ignore[attr-defined]
            self.server.headers = self.headers  # type: ignore[attr-defined]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.config = json.loads(body)  # type: ignore[attr-defined]
            self.do_GET()

        def log_message(self, *args: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def client_of(server: Any) -> ServeClient:
    return ServeClient(f"http://127.0.0.1:{server.server_port}/")


def test_client_reads_the_api(server):
    server.reply = (200, json.dumps(details()).encode())
    assert client_of(server).state().is_running
    assert "Authorization" not in server.headers


def test_client_sends_the_token(server, monkeypatch, tmp_path):
    server.reply = (200, json.dumps(EMPTY).encode())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    client_of(server).state()
    assert server.headers["Authorization"] == "Bearer secret"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="get-auth-token"):
        client_of(server).state()


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ((401, b"Missing authentication token"), "RAY_AUTH_MODE=token"),
        ((503, b"the controller is busy"), "the controller is busy"),
        ((200, b"<html>"), "no Serve API"),
        ((200, b"[]"), "not Serve's API"),
    ],
)
def test_client_says_what_went_wrong(server, reply, word):
    server.reply = reply
    with pytest.raises(ClusterError, match=word):
        client_of(server).state()


def test_client_says_when_nobody_is_there():
    with pytest.raises(ClusterError, match="rayprism up"):
        ServeClient("http://127.0.0.1:9").state()
    with pytest.raises(ClusterError, match="not an HTTP URL"):
        ServeClient("127.0.0.1:8265")


def test_client_puts_a_config(server, monkeypatch):
    server.reply = (200, b"")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    client_of(server).put({"applications": [{"name": "ä"}]})
    assert server.config == {"applications": [{"name": "ä"}]}
    assert server.headers["Content-Type"] == "application/json"
    assert server.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ((400, b"1 validation error for ServeDeploySchema"), "refused the config: 1 validation"),
        ((400, FAILED_MESSAGE.encode()), r"refused the config: RuntimeError: weights are missing"),
        ((401, b""), "RAY_AUTH_MODE=token"),
        ((503, b"the controller is busy"), "503: the controller is busy"),
    ],
)
def test_client_says_why_a_config_was_not_taken(server, reply, word):
    server.reply = reply
    with pytest.raises(ClusterError, match=word):
        client_of(server).put({"applications": []})


def test_client_says_when_it_is_not_known_whether_a_config_was_taken():
    with pytest.raises(ClusterError, match="Whether Serve took it is not known"):
        ServeClient("http://127.0.0.1:9").put({"applications": []})
