"""Whether batch jobs and the running fleet give the same answers: `python -m bench.parity`.

Every example model is pushed with its own script, run over real rows with `batch/predict.py`, and
deployed; then `batch/parity.py` sends a sample of the rows to the fleet and compares, once with one
row a request and once with many.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.cluster import BenchCluster, ClusterFailed, clean_environment
from bench.figures import Target
from bench.processes import end_marked, new_marker
from bench.report import table, targets
from bench.sentences import sentences

__all__ = ["JOBS", "Job", "judge", "main", "render"]

_ROOT = Path(__file__).resolve().parent.parent
_EXAMPLES = _ROOT / "examples"
_OUTPUT = _ROOT / "bench" / "results" / "parity.json"
_TRIAL_OUTPUT = _ROOT / ".bench" / "parity.json"
"""For runs that are not whole."""
_FLIGHTS = 336_776
_BAD_FLIGHTS = 5_000
_SENTENCES = 4_000
_BATCH_ROWS = (1, 32)


class RunFailed(Exception):
    """A command of the run did not do its work."""


@dataclass(frozen=True)
class Job:
    """One version of an example, and the rows that it is run over.

    Args:
        model: Its name.
        version: Which one.
        script: Of the example; pushes it.
        data: Name of the data set, which versions share.
        rows: What the rows are, for people.
        input: Of the job's config, but for the URI.
        more: Of the job's config beside that.
    """

    model: str
    version: str
    script: str
    data: str
    rows: str
    input: Mapping[str, Any]
    more: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the application and of files."""
        return f"{self.model}-{self.version}"

    def config(self, folder: Path, repository: Path) -> dict[str, Any]:
        """What `batch/predict.py` is told."""
        return {
            "model": self.model,
            "version": self.version,
            "repository": str(repository),
            "input": {"uri": str(folder / "data" / self.data), **self.input},
            "output": {"uri": str(folder / "output" / self.name)},
            **self.more,
        }

    def application(self, repository: Path) -> dict[str, Any]:
        """At an address of its own, as an operator writes it."""
        return {
            "name": self.name,
            "import_path": "rayprism.serving.app:build",
            "route_prefix": f"/v2/models/{self.model}/versions/{self.version}",
            "args": {
                "model": self.model,
                "version": int(self.version),
                "repository": str(repository),
                "allow_code": bool(self.more.get("allow_code", False)),
            },
            "deployments": [{"name": "model", "ray_actor_options": {"num_cpus": 0.5}}],
        }


_FLIGHT_LIMITS = {"limits": {"shard_rows": 16_384, "max_dead_letters": _BAD_FLIGHTS}}
_PIXELS = {"size": [8, 8], "mode": "L", "layout": "NCHW", "scale": 1.0}
JOBS = (
    *(
        Job(
            "flights",
            version,
            "flights/train.py",
            "flights",
            f"flights of 2013 as Parquet, {_BAD_FLIGHTS:,} of them spoilt",
            {},
            _FLIGHT_LIMITS,
        )
        for version in ("1", "2")
    ),
    Job(
        "digits",
        "1",
        "digits/train.py",
        "digits",
        "handwritten digits as PNG files",
        {"format": "images", "images": _PIXELS},
        {},
    ),
    Job(
        "minilm",
        "1",
        "minilm/push.py",
        "minilm",
        "sentences of 5 to 60 words as JSON Lines",
        {},
        {"allow_code": True, "limits": {"shard_bytes": 65_536}},
    ),
)


class _Run:
    """One run in a folder of its own.

    Args:
        marker: Of its processes.
        folder: For everything that it writes.
        sample: Rows to compare for each job.
    """

    def __init__(self, marker: str, folder: Path, sample: int) -> None:
        self._marker = marker
        self._folder = folder
        self._sample = sample
        self._repository = folder / "repository"

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """All jobs first, on a machine that serves nothing; then the fleet."""
        for script in dict.fromkeys(job.script for job in jobs):
            _say(f"pushing with examples/{script}")
            more = ["--rows", self._folder / "rows.json"] if script == "flights/train.py" else []
            self._python(_EXAMPLES / script, "--repository", self._repository, *more)
        for data in dict.fromkeys(job.data for job in jobs):
            _say(f"writing the rows of {data}")
            _WRITERS[data](self, self._folder / "data" / data)
        totals = {job.name: self._predict(job) for job in jobs}
        samples = []
        with BenchCluster(f"{self._marker}/haproxy", rayprism=True) as cluster:
            _say(f"deploying {', '.join(job.name for job in jobs)}")
            cluster.deploy(*(job.application(self._repository) for job in jobs), timeout_s=300)
            for job in jobs:
                for batch_rows in _BATCH_ROWS:
                    found = self._compare(job, batch_rows, cluster.url(""))
                    samples.append(
                        {
                            "job": job.name,
                            "data": job.rows,
                            "batch_rows": batch_rows,
                            "totals": totals[job.name],
                            "parity": found,
                        }
                    )
        return samples

    def _predict(self, job: Job) -> dict[str, Any]:
        config = self._folder / f"{job.name}.yaml"
        # JSON is YAML.
        config.write_text(json.dumps(job.config(self._folder, self._repository), indent=2))
        _say(f"running the batch job of {job.name}")
        self._python(_ROOT / "batch" / "predict.py", config, "--local", timeout_s=1800)
        success = self._folder / "output" / job.name / "_SUCCESS"
        if not success.is_file():
            raise RunFailed(f"the job of {job.name} ended well and wrote no {success}")
        totals: dict[str, Any] = json.loads(success.read_bytes())
        return totals

    def _compare(self, job: Job, batch_rows: int, url: str) -> dict[str, Any]:
        told = self._folder / f"{job.name}-{batch_rows}.json"
        self._python(
            _ROOT / "batch" / "parity.py",
            self._folder / f"{job.name}.yaml",
            *("--url", url, "--sample", self._sample, "--batch-rows", batch_rows, "--json", told),
            may_end_with=(0, 1),
        )
        if not told.is_file():
            raise RunFailed(f"batch/parity.py could not compare {job.name}: {self._said}")
        found: dict[str, Any] = json.loads(told.read_bytes())
        _say(
            f"{job.name}, up to {batch_rows} rows a request: {found['agree']} of {found['rows']} "
            f"rows agree, {found['letters']['not_sent']} cannot be sent"
        )
        return found

    def _python(
        self,
        script: Path,
        *arguments: object,
        timeout_s: float = 900,
        may_end_with: tuple[int, ...] = (0,),
    ) -> None:
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=_ROOT,
            env=clean_environment(self._marker),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        self._said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        if done.returncode not in may_end_with:
            raise RunFailed(f"{script.name} ended with {done.returncode}: {self._said}")

    def write_flights(self, folder: Path) -> None:
        """The whole year, with rows among them that cannot be predicted."""
        script = _EXAMPLES / "flights" / "batch_data.py"
        sizes = ("--rows", _FLIGHTS, "--files", 4, "--row-group-rows", 8_192)
        self._python(script, *sizes, "--bad-rows", _BAD_FLIGHTS, "--out", folder)

    def write_digits(self, folder: Path) -> None:
        """Each pixel as it is, from 0 to 16: what the model was trained on."""
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        for index, pixels in enumerate(load_digits().images):
            path = folder / f"{index // 500}" / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)

    def write_sentences(self, folder: Path) -> None:
        """Two files; some sentences have no word in them, or letters beyond ASCII."""
        folder.mkdir(parents=True)
        texts = [*sentences(_SENTENCES - 3), "", "日本語 und Ünïcödé", "Snow."]
        for part in range(2):
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts[part::2])
            text = "".join(f"{line}\n" for line in lines)
            (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


_WRITERS: dict[str, Callable[[_Run, Path], None]] = {
    "flights": _Run.write_flights,
    "digits": _Run.write_digits,
    "minilm": _Run.write_sentences,
}


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0 where all rows agree, 1 where some do not, 2 where the run failed, 130 after Ctrl-C.
    """
    given = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    marker = new_marker()
    jobs = [job for job in JOBS if job.model in given.only]
    try:
        with tempfile.TemporaryDirectory(prefix="rayprism-bench-") as folder:
            samples = _Run(marker, Path(folder), given.sample).run(jobs)
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    except (ClusterFailed, RunFailed, subprocess.TimeoutExpired) as error:
        print(f"the run failed: {error}", file=sys.stderr)
        return 2
    finally:
        end_marked(marker)
    results = {
        **machine.describe(),
        "plan": {"sample": given.sample, "only": given.only, "batch_rows": _BATCH_ROWS},
        "verdicts": judge(samples),
        "samples": samples,
    }
    text = render(results)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(results, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten to {given.output} and {given.output.with_suffix('.md').name}")
    return 0 if all(verdict["met"] for verdict in results["verdicts"]) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    models = tuple(dict.fromkeys(job.model for job in JOBS))

    def names(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(models):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: allowed are {', '.join(models)}")
        return tuple(text.split(","))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=1000, help="rows of each job to compare")
    parser.add_argument("--only", type=names, default=models, help=f"of {','.join(models)}")
    parser.add_argument(
        "--output", type=Path, help="default: bench/results/parity.json; .bench/ with --only"
    )
    given = parser.parse_args(arguments)
    if given.output is None:
        given.output = _OUTPUT if set(given.only) == set(models) else _TRIAL_OUTPUT
    return given


def judge(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One target for each comparison: of the rows that can be sent, none disagrees."""
    verdicts = []
    for sample in samples:
        found = sample["parity"]
        sent = found["rows"] - found["letters"]["not_sent"]
        name = f"{sample['job']}, {_together(sample)}: rows that disagree, of {sent:,}"
        differing = sent - found["agree"] if sent else None
        verdict = Target(name, 0, "at most").judge(differing, valid=found["agrees"])
        verdicts.append(verdict.to_json())
    return verdicts


def _together(sample: Mapping[str, Any]) -> str:
    most = sample["parity"]["rows_together"]
    return "one row a request" if most == 1 else f"up to {most} rows a request"


def render(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    rows = []
    for sample in results["samples"]:
        found, letters = sample["parity"], sample["parity"]["letters"]
        for name, output in found["outputs"].items():
            rows.append(
                (
                    f"{sample['job']} `{name}`, {_together(sample)}",
                    f"{found['rows_done']:,}",
                    str(output["compared"]),
                    str(output["agree"]),
                    _gap(output["largest_absolute"]),
                    _gap(output["largest_relative"]),
                    found["tolerance"]["rule"],
                    f"{letters['refused']} + {letters['answered']} + {letters['not_sent']}",
                )
            )
    header = (
        "job against fleet",
        "rows of the job",
        "compared",
        "agree",
        "largest difference",
        "relative",
        "rule",
        "dead letters",
    )
    data = {sample["job"]: sample["data"] for sample in results["samples"]}
    note = (
        "Rows: "
        + "; ".join(f"{job}: {rows}" for job, rows in data.items())
        + ". Dead letters among the sample: refused by the fleet too + answered by it + those of "
        "which no request can be made (a value is missing, or not of the input's type). Agreement "
        "is by the rule in each model's manifest; differences are between single numbers."
    )
    return (
        "\n\n".join([_context(results), targets(results["verdicts"]), table(header, rows), note])
        + "\n"
    )


def _context(results: Mapping[str, Any]) -> str:
    host, versions, commit = results["machine"], results["versions"], results["commit"]
    state = " with changes" if commit["changed_since"] else ""
    return (
        f"{results['date'][:10]}, {host['cores']} cores ({host['cpu']}), "
        f"{host['memory_gib']:.0f} GiB; Ray {versions.get('ray')}, "
        f"onnxruntime {versions.get('onnxruntime')}, Python {versions['python']}; "
        f"commit {commit['hash'][:12]}{state}. {results['plan']['sample']:,} rows drawn for each "
        "comparison; job and fleet on one machine, HTTP with binary tensors."
    )


def _gap(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else "infinite"
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    sys.exit(main())
