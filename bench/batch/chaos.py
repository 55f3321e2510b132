"""Kills actors, the driver and the whole Ray node of a batch job at random, until the job is done.

    python -m bench.batch.chaos --rows 2000000

Then the output has to be that of a run that nobody disturbed, row for row, and so have its dead
letters. `make chaos-batch` runs it; the result is bench/results/batch-chaos.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from bench import machine
from rayprism.fleet.cluster import find_cluster
from rayprism.fleet.processes import find_members, find_port

__all__ = ["Chaos", "Disturbed", "differences"]

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "bench/results/batch-chaos.json"
_EVENTS = ("actor", "actor", "driver", "node")
"""What is killed; a name that stands here more often comes more often."""
_ENDS_WITHIN_S = 120.0
"""A driver whose node is gone has to end by itself."""


@dataclass(slots=True)
class Disturbed:
    """What was done to a job.

    Args:
        kills: By what was killed.
        runs: How often the same command was started.
        exits: Exit codes of those runs, in order.
        seconds: From the first start to the last end.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    exits: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Chaos:
    """One job on a cluster of its own, and what disturbs it.

    Args:
        config: Of the job.
        folder: For the cluster's state and logs.
        repository: Of models.
        seed: Of what is killed, and when.
        mean_s: Between two kills, on average.
        environment: What the driver gets besides.
        say: Tells progress.
    """

    def __init__(
        self,
        config: Path,
        folder: Path,
        repository: Path,
        *,
        seed: int,
        mean_s: float,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._config = config
        self._folder = folder
        self._repository = repository
        self._random = random.Random(seed)
        self._mean_s = mean_s
        self._more = dict(environment or {})
        self._say = say
        self._dashboard_port = find_port()
        self.done = Disturbed()

    def run(self, events: list[str] | None = None, most_runs: int = 100) -> Disturbed:
        """Runs the job to its end.

        Args:
            events: What is killed, in this order, and then nothing more; by default at random until
                the job is done.
            most_runs: After which it is given up.

        Raises:
            AssertionError: It is not done by then, or ends in another way than by a kill.
        """
        began_s = time.monotonic()
        waiting = None if events is None else list(events)
        self._up()
        try:
            while True:
                assert self.done.runs < most_runs, self.done
                killed, code, told = self._one_run(waiting)
                self.done.exits.append(code)
                if code == 0:
                    break
                assert killed, f"the job ended with {code}, and nobody had killed it:\n{told}"
                if "node" in killed:
                    self._down()
                    self._up()
        finally:
            self._down()
        self.done.seconds = round(time.monotonic() - began_s, 1)
        return self.done

    def _one_run(self, waiting: list[str] | None) -> tuple[list[str], int, str]:
        self.done.runs += 1
        log = self._folder / f"run-{self.done.runs}.log"
        killed: list[str] = []
        with log.open("wb") as out:
            driver = subprocess.Popen(
                [sys.executable, str(_ROOT / "batch/predict.py"), str(self._config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=_ROOT,
            )
            try:
                self._disturb(driver, waiting, killed)
                code = driver.wait(_ENDS_WITHIN_S if killed else None)
            finally:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()
        return killed, code, log.read_text(errors="replace")[-3000:]

    def _disturb(
        self, driver: subprocess.Popen[bytes], waiting: list[str] | None, killed: list[str]
    ) -> None:
        while waiting is None or waiting:
            pause_s = self._random.expovariate(1 / self._mean_s)
            # Not before there is work to disturb: a job that is killed while it starts, each time,
            # never gets anywhere, and shows nothing.
            if not self._wait(driver, lambda: bool(self._actors())):
                return
            if not self._wait(driver, until_s=time.monotonic() + pause_s):
                return
            event = self._random.choice(_EVENTS) if waiting is None else waiting.pop(0)
            if not self._kill(event, driver):
                if waiting is not None:
                    waiting.insert(0, event)
                continue
            killed.append(event)
            self.done.kills[event] += 1
            self._say(f"run {self.done.runs}: killed the {event}; {self._shards()} shards are done")
            if event != "actor":
                return

    def _wait(
        self,
        driver: subprocess.Popen[bytes],
        condition: Callable[[], bool] | None = None,
        until_s: float | None = None,
    ) -> bool:
        """Whether the driver is still there when a condition holds, or a time has come."""
        while driver.poll() is None:
            if condition is not None and condition():
                return True
            if until_s is not None and time.monotonic() >= until_s:
                return True
            time.sleep(0.05)
        return False

    def _kill(self, event: str, driver: subprocess.Popen[bytes]) -> bool:
        if event == "driver":
            driver.kill()
            return True
        if event == "actor":
            targets = self._actors()
            targets = targets and [self._random.choice(targets)]
        else:
            # All at once, as when its power fails; the driver has to see for itself.
            targets = [process for process in self._members() if process.pid != driver.pid]
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return bool(targets)

    def _members(self) -> list[psutil.Process]:
        state = find_cluster(self._folder / "state")
        return [] if state is None else list(find_members(state.id, Path(state.temp_dir)))

    def _actors(self) -> list[psutil.Process]:
        found = []
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                if "ray::MapWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _shards(self) -> int:
        import yaml

        output = Path(yaml.safe_load(self._config.read_text())["output"]["uri"])
        return len(list((output / "_shards").glob("*.json")))

    def _environment(self) -> dict[str, str]:
        state = find_cluster(self._folder / "state")
        assert state is not None
        return {
            **os.environ,
            "RAY_ADDRESS": state.ray_address,
            "RAYPRISM_REPOSITORY": str(self._repository),
            **self._more,
        }

    def _up(self) -> None:
        self._rayprism(
            "up",
            "--no-haproxy",
            *("--repository", str(self._repository)),
            *("--dashboard-port", str(self._dashboard_port)),
        )

    def _down(self) -> None:
        self._rayprism("down")

    def _rayprism(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("rayprism")), *arguments]
        command += ["--state", str(self._folder / "state")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr


def differences(one: Path, other: Path) -> Iterator[str]:
    """In what two outputs differ: rows of each shard, in their order, and dead letters.

    Args:
        one: An output folder.
        other: Another.
    """
    names = sorted(
        {
            str(path.relative_to(folder))
            for folder in (one, other)
            for pattern in ("**/part-*.parquet", "_dead_letters/*.jsonl")
            for path in folder.glob(pattern)
        }
    )
    for name in names:
        paths = one / name, other / name
        absent = [str(path) for path in paths if not path.exists()]
        if absent:
            yield f"{name} is not in {absent[0]}"
        elif name.endswith(".parquet"):
            if not pq.read_table(paths[0]).equals(pq.read_table(paths[1])):
                yield f"{name}: other rows"
        elif paths[0].read_text() != paths[1].read_text():
            yield f"{name}: other dead letters"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Example: python -m bench.batch.chaos --rows 200000 --output /tmp/chaos.json",
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--bad-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean-s", type=float, default=2.5, help="between two kills, on average")
    parser.add_argument("--folder", type=Path, help="scratch; removed afterwards")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rayprism-chaos-", dir=arguments.folder))
    try:
        result = _measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["disturbed"], indent=2))
    sys.exit(0 if result["equal"] else 1)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    repository = folder / "models"
    _python("examples/flights/train.py", "--repository", str(repository))
    _python(
        "examples/flights/batch_data.py",
        *("--rows", str(arguments.rows), "--out", str(folder / "data")),
        *("--row-group-rows", "10000", "--bad-rows", str(arguments.bad_rows)),
    )
    config = {name: folder / f"{name}.yaml" for name in ("calm", "disturbed")}
    for name, path in config.items():
        path.write_text(_CONFIG.format(data=folder / "data", out=folder / name))
    began_s = time.monotonic()
    _python(
        "batch/predict.py",
        str(config["calm"]),
        "--local",
        environment={"RAYPRISM_REPOSITORY": str(repository)},
    )
    calm_s = time.monotonic() - began_s
    print(f"undisturbed: {calm_s:.0f} s", flush=True)
    chaos = Chaos(
        config["disturbed"],
        folder,
        repository,
        seed=arguments.seed,
        mean_s=arguments.mean_s,
        say=lambda text: print(text, flush=True),
    )
    done = chaos.run()
    found = list(differences(folder / "calm", folder / "disturbed"))
    totals = {
        name: json.loads((folder / name / "_SUCCESS").read_text()) for name in ("calm", "disturbed")
    }
    counts = ("rows_in", "rows_out", "dead_letters", "shards")
    same = all(totals["calm"][name] == totals["disturbed"][name] for name in counts)
    print(f"{len(found)} differences{''.join(f'{chr(10)}  {line}' for line in found[:20])}")
    return {
        **machine.describe(),
        "command": f"python -m bench.batch.chaos --rows {arguments.rows} --seed {arguments.seed}",
        "totals": {name: totals["calm"][name] for name in counts},
        "undisturbed_s": round(calm_s, 1),
        "disturbed": {
            "kills": dict(done.kills),
            "runs": done.runs,
            "exits": done.exits,
            "seconds": done.seconds,
        },
        "differences": found[:20],
        "equal": same and not found,
    }


_CONFIG = """\
model: flights
version: "2"
input: {{uri: {data}}}
output: {{uri: {out}, passthrough: [row_id, carrier]}}
pool: {{min_actors: 1, max_actors: 2, cpus: 0.5}}
# Small shards and small batches, so that there is time to kill something.
limits: {{shard_rows: 10000, batch_rows: 16, max_dead_letters: 100000}}
"""


def _python(script: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    subprocess.run(
        [sys.executable, str(_ROOT / script), *arguments],
        check=True,
        cwd=_ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
