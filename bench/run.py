"""Runs a scenario from its first server to its page, and keeps what is there when it is stopped."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.bounds import judge
from bench.processes import end_marked, new_marker
from bench.progress import Progress
from bench.rounds import Rounds, RunFailed, Tools
from bench.scenario import Scenario
from bench.servers import RunContext

__all__ = [
    "MET",
    "MISSED",
    "NOT_RUN",
    "STOPPED",
    "Job",
    "Renderers",
    "document",
    "render",
    "run_scenario",
    "write",
]

MET, MISSED, NOT_RUN, STOPPED = 0, 1, 2, 130
"""Exit codes: all bounds met; one missed or not judged; the run failed; Ctrl-C."""


@dataclass(frozen=True)
class Job:
    """What is to be run, and where its results go.

    Args:
        scenario: As it is run: shortened, or a part of it, where that was asked for.
        output: The JSON file; page and tables have the endings `.html` and `.md`.
        trial_output: The JSON file where the run is not finished.
        command: That does it again.
        quick: Whether it is shortened.
    """

    scenario: Scenario
    output: Path
    trial_output: Path
    command: str
    quick: bool = False


@dataclass(frozen=True)
class Renderers:
    """What makes page and tables of results."""

    page: Callable[[dict[str, Any]], str]
    tables: Callable[[Mapping[str, Any]], str]


def _renderers() -> Renderers:
    from bench import tables
    from bench.pages import page

    return Renderers(page.render, tables.render)


def run_scenario(job: Job, tools: Tools | None = None, renderers: Renderers | None = None) -> int:
    """Runs a scenario.

    After each round everything so far is written to the trial output, and so it is when the run
    fails, or is stopped with Ctrl-C.

    Args:
        job: What, and where to.
        tools: What it is made with, where not the usual.
        renderers: As `tools`.

    Returns:
        An exit code: MET, MISSED, NOT_RUN or STOPPED.
    """
    about, marker, progress = machine.describe(), new_marker(), Progress(job.scenario)
    failure: RunFailed | KeyboardInterrupt | None = None
    # An ended terminal or container must not leave servers behind either.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="rayprism-bench-") as folder:
            context = RunContext(marker, Path(folder), progress.say)
            rounds = Rounds(job.scenario, context, progress, tools or Tools())
            try:
                rounds.start()
                for number in range(job.scenario.rounds):
                    rounds.run(number)
                    _save(document(job, about, rounds), job.trial_output)
            except (RunFailed, KeyboardInterrupt) as error:
                failure = error
            finally:
                rounds.stop()
    finally:
        end_marked(marker)
        signal.signal(signal.SIGTERM, before)
    results = document(job, about, rounds)
    renderers = renderers or _renderers()
    if failure is not None:
        stopped = isinstance(failure, KeyboardInterrupt)
        print("stopped" if stopped else f"the run failed: {failure}", file=sys.stderr)
        print(_keep(results, job, renderers), file=sys.stderr)
        return STOPPED if stopped else NOT_RUN
    text = write(results, job.output, renderers)
    if job.trial_output != job.output:
        job.trial_output.unlink(missing_ok=True)
    print(f"\n{text}\nwritten to {job.output}, .html and .md")
    return MET if all(bound["met"] for bound in results["bounds"]) else MISSED


def document(job: Job, about: Mapping[str, Any], rounds: Rounds) -> dict[str, Any]:
    """The results so far, as `bench.samples` describes them.

    A round that was begun and not finished is in it, too.
    """
    scenario = job.scenario
    return {
        **about,
        "command": job.command,
        "quick": job.quick,
        "scenario": scenario.model_dump(mode="json"),
        "servers": rounds.facts,
        "unavailable": rounds.unavailable,
        "bounds": judge(scenario, rounds.samples, scenario.seed),
        "warnings": rounds.warnings,
        "samples": rounds.samples,
    }


def write(results: Mapping[str, Any], output: Path, renderers: Renderers | None = None) -> str:
    """Writes results beside their page and tables.

    Returns:
        The tables.
    """
    _save(results, output)
    return render(results, output, renderers)


def render(results: Mapping[str, Any], output: Path, renderers: Renderers | None = None) -> str:
    """Writes page and tables of results that are there already; gives the tables."""
    renderers = renderers or _renderers()
    output.with_suffix(".html").write_text(renderers.page(dict(results)))
    text = renderers.tables(results)
    output.with_suffix(".md").write_text(text)
    return text


def _keep(results: Mapping[str, Any], job: Job, renderers: Renderers) -> str:
    """Writes what there is of a run that did not come to its end; says so."""
    if not results["samples"]:
        return "nothing is written, as nothing was measured"
    write(results, job.trial_output, renderers)
    return f"what there is: {job.trial_output}, .html and .md"


def _save(results: Mapping[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Ctrl-C may come at any time: there is always a whole file.
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(output)
