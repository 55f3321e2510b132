"""What Ray itself assigns, on a node that counts GPUs which nobody has: device and share follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROGRAM = """
import json
import os

import ray

from rayprism.models.gpu import choose_device

ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)


@ray.remote(num_cpus=0.1)
class Process:
    def place(self):
        context = ray.get_runtime_context()
        assigned = context.get_accelerator_ids().get("GPU", [])
        gpus = context.get_assigned_resources().get("GPU", 0)
        device, gpu = choose_device("auto", assigned, gpus)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [device, gpu.index, gpu.share, assigned, visible]


def placed(*gpus):
    actors = [Process.options(num_gpus=number).remote() for number in gpus]
    return ray.get([actor.place.remote() for actor in actors])


print(json.dumps({"parts": placed(0.5, 0.25, 0.25), "none": placed(0), "whole": placed(1)}))
"""


@pytest.mark.parametrize("sets_visible", [True, False])
def test_parts_whole_gpus_and_none(sets_visible: bool) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "CUDA_VISIBLE_DEVICES": "4,5",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if not sets_visible:
        environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for kind, shares in (("parts", [0.5, 0.25, 0.25]), ("whole", [1.0])):
        assert [place[:1] + place[2:3] for place in told[kind]] == [["cuda", s] for s in shares]
        for _, index, _, assigned, visible in told[kind]:
            (own,) = assigned
            assert visible == (own if sets_visible else "4,5")
            assert visible.split(",")[index] == own, "the number by which CUDA knows it"
    # Such a process sees both of them, and must not take one.
    assert told["none"] == [["cpu", 0, 1.0, [], "4,5"]]
