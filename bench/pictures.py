"""Draws the dashboards from a fleet that lives: `python -m bench.pictures`, some ten minutes.

A fleet with a canary, a shadow, some errors and rejections, and two batch jobs; a real Prometheus
beside it; the panels in Chromium by dashboards/render. The pictures are docs/pictures/*.png.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support import scene
from tests.support.fleet import Fleet, running_fleet
from tests.support.prometheus import running_prometheus

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent
_RENDER = _ROOT / "dashboards" / "render"
_PICTURES = _ROOT / "docs" / "pictures"
_MINUTE_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Plays the scene, and draws.

    Returns:
        0 where every panel could be drawn.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=8, help="of load before the drawing")
    parser.add_argument("--out", type=Path, default=_PICTURES)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayprism-pictures-")))
        models = scene.push_models(folder / "repository")
        fleet = stack.enter_context(running_fleet(models, folder / "state", haproxy=True))
        fleet.deploy(scene.applications(weight=10, p99_target_s=0.3))
        prometheus = stack.enter_context(
            running_prometheus(
                folder / "prometheus",
                scale=1.0,
                cluster="demo",
                sd_urls=[f"{fleet.state.dashboard_address}/api/prometheus/sd"],
                haproxy_port=fleet.state.ports["haproxy_metrics"],
                scrape_interval_s=5,
                refresh_s=5,
            )
        )
        _play(fleet, models, folder, given.minutes * _MINUTE_S)
        return max(_draw(name, prometheus.url, given) for name in _DASHBOARDS)


_DASHBOARDS: dict[str, tuple[str, ...]] = {
    "fleet": (),
    "model": ("--var", "model=shown"),
    "batch": (),
    "cluster": (),
}


def _play(fleet: Fleet, models: Path, folder: Path, seconds: float) -> None:
    draw = random.Random(1)
    rare = [scene.FAIL_CANDIDATE, scene.FAIL_CANDIDATE, scene.DIFFER, scene.FAIL]

    def make() -> dict[str, Any]:
        asked = draw.choice(rare) if draw.random() < 0.02 else 0.0
        return scene.request(asked, draw.uniform(0.005, 0.03), draw.uniform(0, 0.01))

    grpc = f"127.0.0.1:{fleet.grpc_port}"
    stop = threading.Event()
    jobs = threading.Thread(target=_run_jobs, args=(fleet, models, folder, stop))
    with scene.Client(fleet.url, grpc, make, connections=5, rpcs=2, pause_s=0.05):
        jobs.start()
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            time.sleep(min(40.0, max(0.0, until_s - time.monotonic())))
            # Now and then more than the queue holds.
            with scene.Client(fleet.url, grpc, make, connections=60, pause_s=0.3):
                time.sleep(3)
            print(f"{max(0.0, until_s - time.monotonic()):.0f} s to go", flush=True)
        stop.set()
    jobs.join()


def _run_jobs(fleet: Fleet, models: Path, folder: Path, stop: threading.Event) -> None:
    for number in range(1000):
        if stop.wait(20):
            return
        name = ("nightly", "backfill")[number % 2]
        job = scene.write_job(
            folder / f"job-{number}", models, name=name, rows=4096, bad_rows=number % 3, batch_s=0.3
        )
        subprocess.run(
            [sys.executable, str(_ROOT / "batch/predict.py"), str(job)],
            cwd=_ROOT,
            env=os.environ | {"RAY_ADDRESS": fleet.state.ray_address},
            check=True,
            capture_output=True,
        )


def _draw(name: str, url: str, given: argparse.Namespace) -> int:
    return subprocess.run(
        [
            *("node", "draw.mjs", "--prometheus", url, "--dashboard", f"../{name}.json"),
            *("--out", str((given.out / f"{name}.png").resolve())),
            *("--from", f"-{given.minutes:g}m", "--scrape-interval", "5s", *_DASHBOARDS[name]),
        ],
        cwd=_RENDER,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
