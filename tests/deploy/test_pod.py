"""A pod as the manifests describe it, made of Linux' own parts, with a real Ray in it.

Its command, environment, ports, user, read-only files and empty folders are the manifests';
network, processes and mounts are its own. There is one node, so it is a head that takes replicas.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from tests.deploy.manifests import clusters, container, find, groups
from tests.support.models import example_rows, mlp_example, mlp_reference, save_mlp

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ss", "mount")
DENIED = "unshare --mount --net --pid --fork true"
MODELS = "/tmp/models"
"""In the pod /models: here the root has no such folder, and none may be made."""

# $1: a file with the paths that the pod sees besides the system's, $2: the models.
SET_UP = r"""
set -euo pipefail
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up
ip link add eth0 type veth peer name elsewhere
ip address add 10.244.0.5/24 dev eth0
ip link set eth0 up
ip link set elsewhere up
ip route add default dev eth0
mapfile -t seen < "$1"
models=$2
mount -t tmpfs -o mode=755 tmpfs /mnt
for i in "${!seen[@]}"; do mkdir "/mnt/$i"; mount --bind "${seen[$i]}" "/mnt/$i"; done
mkdir /mnt/models
mount --bind "$models" /mnt/models
mount -t tmpfs -o mode=755 tmpfs /root
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
for i in "${!seen[@]}"; do mkdir -p "${seen[$i]}"; mount --bind "/mnt/$i" "${seen[$i]}"; done
mkdir /tmp/models
mount --bind /mnt/models /tmp/models
chmod 755 /tmp/models
while read -r _ _ _ _ point _; do
  case $point in
    /proc*|/sys*|/dev*|/tmp) ;;
    *) mount -o remount,bind,ro "$point" 2>/dev/null || true ;;
  esac
done < /proc/self/mountinfo
shift 2
exec setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all \
  --inh-caps=-all env -i "$@"
"""


class Pod:
    """The processes in it, seen from outside.

    Args:
        process: The one that made it.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def first(self) -> psutil.Process:
        """Its process 1."""
        children = psutil.Process(self._process.pid).children()
        if not children:
            raise LookupError("the pod has not begun, or has ended")
        return children[0]

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """In its network, with the files outside."""
        enter = ["nsenter", "--target", str(self.first.pid), "--net", "--"]
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, check=False, timeout=240, **options
        )

    def ask(self, url: str, body: Any = None) -> tuple[int, Any]:
        script = (
            "import json, sys, urllib.request, urllib.error\n"
            "data = sys.stdin.buffer.read() or None\n"
            "try: answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], data))\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "except OSError: sys.exit(1)\n"
            "print(json.dumps([answer.status, answer.read().decode()]))\n"
        )
        text = "" if body is None else json.dumps(body)
        done = self.run(sys.executable, "-c", script, url, input=text)
        if done.returncode:
            raise urllib.error.URLError(done.stderr or "nobody answers")
        status, answer = json.loads(done.stdout)
        return status, answer

    def wait_for(self, url: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(urllib.error.URLError, LookupError):
                if self.ask(url)[0] == 200:
                    return
            assert self._process.poll() is None, "the pod has ended"
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(1)

    def listening(self) -> set[int]:
        """Ports that others can reach."""
        done = self.run("ss", "-ltnH")
        assert done.returncode == 0, done.stderr
        addresses = [line.split()[3] for line in done.stdout.splitlines()]
        return {
            int(address.rpartition(":")[2])
            for address in addresses
            if not address.startswith(("127.", "[::1]"))
        }


def start_parameters(group: dict[str, Any]) -> list[str]:
    """What KubeRay makes of them, with what it adds."""
    added = {"port": "6379", "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
    merged = added | group["rayStartParams"] | {"num-cpus": "2"}
    return [f"--{name}={value}" for name, value in merged.items()]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    repository = Repository(tmp_path / "models")
    model = save_mlp(tmp_path / "mlp.onnx")
    for _ in range(2):
        push_model(repository, "flights", model, example=mlp_example())
    return tmp_path / "models"


@pytest.fixture
def environment(overlays) -> dict[str, str]:
    data: dict[str, str] = dict(find(overlays["cpu"], "ConfigMap", "rayprism-environment")["data"])
    own = container(groups(clusters(overlays["cpu"])["rayprism"])["head"])["env"]
    return data | {variable["name"]: variable["value"] for variable in own}


@pytest.fixture
def pod(overlays, environment, models: Path, tmp_path: Path) -> Iterator[Pod]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    if subprocess.run(DENIED.split(), capture_output=True, check=False).returncode:
        pytest.skip("only root may make namespaces, where the machine allows it")
    head = groups(clusters(overlays["cpu"])["rayprism"])["head"]
    paths = tmp_path / "paths"
    seen = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    paths.write_text("".join(f"{path}\n" for path in sorted(seen)))
    start = ["ray", "start", "--head", *start_parameters(head), "--block"]
    variables = environment | {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "src"),
        "RAYPRISM_REPOSITORY": MODELS,
        "KUBERAY_GEN_RAY_START_CMD": " ".join(start),
    }
    log = tmp_path / "pod.log"
    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *unshare,
                *("bash", "-c", SET_UP, "bash", str(paths), str(models)),
                *(f"{name}={value}" for name, value in variables.items()),
                *container(head)["command"],
                *container(head)["args"],
            ],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Pod(process)
    finally:
        # The first process takes all others of the pod with it.
        process.kill()
        process.wait(30)
        print(log.read_text(errors="replace")[-4000:])


def allowed(overlays: dict[str, list[dict[str, Any]]]) -> tuple[set[int], list[range]]:
    """Ports that policies let somebody reach, one by one and in ranges."""
    single, ranges = set(), []
    for manifest in overlays["cpu"]:
        if manifest["kind"] != "NetworkPolicy":
            continue
        for rule in manifest["spec"].get("ingress", []):
            for port in rule["ports"]:
                if "endPort" in port and port["endPort"] - port["port"] > 10:
                    ranges.append(range(port["port"], port["endPort"] + 1))
                else:
                    single |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
    return single, ranges


def test_it_serves_confined_and_ends_when_it_is_told(pod: Pod, overlays, environment, tmp_path):
    pod.wait_for("http://127.0.0.1:8265/api/serve/applications/", 90)
    spec = find(overlays["cpu"], "RayService", "rayprism")["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    for application in serve["applications"]:
        for deployment in application.get("deployments", []):
            deployment["ray_actor_options"]["num_cpus"] = 0.5
            deployment["autoscaling_config"]["min_replicas"] = 1
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(serve))
    scripts = Path(sys.executable).parent
    dashboard = ("--address", "http://127.0.0.1:8265")
    deployed = pod.run(str(scripts / "serve"), "deploy", *dashboard, str(file))
    assert deployed.returncode == 0, deployed.stderr
    outside = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    running = pod.run(
        *(sys.executable, "-m", "rayprism.cli.main", "wait", "--timeout", "180", *dashboard),
        env=outside,
    )
    assert running.returncode == 0, running.stderr

    # What Kubernetes asks, at the address and the ports of the manifests.
    worker = container(groups(spec["rayClusterConfig"])["cpu"])
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = worker[probe]["httpGet"]
        port = ports.get(get["port"], get["port"])
        assert pod.ask(f"http://10.244.0.5:{port}{get['path']}")[0] == 200, probe

    # A client.
    status, answer = pod.ask("http://10.244.0.5:8000/v2/models/flights/infer", mlp_example())
    assert status == 200
    [output] = json.loads(answer)["outputs"]
    expected = mlp_reference(example_rows()).ravel()
    assert output["data"] == pytest.approx(expected.tolist(), abs=1e-5)

    # Prometheus. HAProxy's own is on every node with a proxy.
    for name in ("metrics", "haproxy"):
        status, page = pod.ask(f"http://10.244.0.5:{ports[name]}/metrics")
        assert (status, "# TYPE" in page) == (200, True), name

    # Others reach what policies allow, and all of that is there.
    single, ranges = allowed(overlays)
    listening = pod.listening()
    unforeseen = {port for port in listening - single if not any(port in r for r in ranges)}
    # Of Ray, but used by nobody: statistics of HAProxy, Ray Client.
    assert unforeseen <= {int(environment["RAY_SERVE_HAPROXY_STATS_PORT"]), 10001}
    # KubeRay starts the autoscaler beside the head.
    assert single - listening <= {44217}

    # Nobody is root, and nothing that a process of the pod may write is left outside of /tmp.
    everybody = [pod.first, *pod.first.children(recursive=True)]
    assert {uid for process in everybody for uid in process.uids()} == {1000}
    mounts = Path(f"/proc/{pod.first.pid}/mounts").read_text().splitlines()
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    assert {path for path in writable if not path.startswith(("/proc", "/sys", "/dev"))} == {"/tmp"}

    # Process 1 is Ray, which is told when the pod has to go.
    first = pod.first
    assert {"start", "--block"} <= set(first.cmdline())
    first.send_signal(signal.SIGTERM)
    first.wait(25)
