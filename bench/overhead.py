"""What rayprism costs, against its peers, in one run: `python -m bench.overhead`.

Everything runs on this machine, in clusters that the run starts and ends; see `bench.tiny`,
`bench.minilm` and `bench.cold` for what each table compares.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import cold, machine, minilm, tiny, tiny_model
from bench.cluster import BenchCluster
from bench.figures import median_of
from bench.plan import Plan, Server
from bench.report import render
from bench.shell import run_and_report

__all__ = ["main"]

_PARTS = ("tiny", "documented", "minilm", "cold")
_ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = _ROOT / "bench" / "results" / "overhead.json"
_TRIAL_OUTPUT = _ROOT / ".bench" / "overhead.json"
"""For runs that are not whole: README.md shows what is in `_OUTPUT`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 where every target is met, 1 where one is missed, 2 where the run failed, 130 after
        Ctrl-C.
    """
    given = _parse(arguments)

    def run(marker: str, folder: Path) -> dict[str, Any]:
        return _run(_plan(given, marker, folder), given.only)

    return run_and_report(run, render, given.output)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of every comparison")
    parser.add_argument(
        "--connections", type=_numbers, default=(1, 16, 64), help="for the tiny model: 1,16,64"
    )
    parser.add_argument("--only", type=_names, default=_PARTS, help=f"of {','.join(_PARTS)}")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: bench/results/overhead.json; .bench/ with --quick or --only",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rough minutes, to see that it works"
    )
    given = parser.parse_args(arguments)
    if given.output is None:
        whole = set(given.only) == set(_PARTS) and not given.quick
        given.output = _OUTPUT if whole else _TRIAL_OUTPUT
    return given


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(_PARTS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)}: allowed are {', '.join(_PARTS)}")
    return names


def _plan(given: argparse.Namespace, marker: str, folder: Path) -> Plan:
    plan = Plan(
        marker=marker,
        folder=folder,
        seconds=given.seconds,
        rounds=given.rounds,
        connections=given.connections,
        repeats=5,
        batch_sizes=(1, 2, 4, 8, 16, 32, 64),
    )
    if given.quick:
        plan = replace(plan, seconds=1, rounds=2, repeats=1, batch_sizes=(1, 4, 16))
    return plan


def _run(plan: Plan, parts: tuple[str, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {
        **machine.describe(),
        "plan": {
            "seconds": plan.seconds,
            "rounds": plan.rounds,
            "connections": plan.connections,
            "only": parts,
        },
        "verdicts": [],
    }
    with tiny.bare_server(plan) as bare:
        samples: list[dict[str, Any]] = []
        if {"tiny", "minilm", "cold"} & set(parts):
            _run_rayprism(plan, parts, bare, samples, results)
        if "documented" in parts:
            plan.say("starting a cluster with Ray's default settings")
            with BenchCluster(f"{plan.marker}/default", rayprism=False) as cluster:
                samples += tiny.run_default(plan, cluster, bare)
    verdicts = []
    if samples:
        summary = tiny.summarise(samples)
        results["tiny"] = {"summary": summary, "samples": samples}
        verdicts += tiny.judge(summary)
    if "minilm" in results:
        verdicts += minilm.judge(results["minilm"]["summary"])
    if "cold" in results:
        verdicts += cold.judge(results["cold"]["summary"])
    loads = [*samples, *results.get("minilm", {}).get("samples", ())]
    results["other_cores"] = median_of(
        [item for item in loads if "other_cores" in item], "other_cores"
    )
    results["verdicts"] = [verdict.to_json() for verdict in verdicts]
    return results


def _run_rayprism(
    plan: Plan,
    parts: tuple[str, ...],
    bare: Server,
    samples: list[dict[str, Any]],
    results: dict[str, Any],
) -> None:
    plan.say("starting a cluster as `rayprism up` does")
    with BenchCluster(f"{plan.marker}/haproxy", rayprism=True) as cluster:
        if "tiny" in parts:
            samples += tiny.run_haproxy(plan, cluster, bare)
        if "minilm" in parts:
            found = minilm.run(plan, cluster)
            results["minilm"] = {**found, "summary": minilm.summarise(found)}
        if "cold" in parts:
            applications = {
                tiny_model.MODEL: tiny.application(plan),
                minilm.MODEL: minilm.application(plan, threads=1),
            }
            tiny.push(plan)
            minilm.push(plan)
            starts = cold.run(plan, cluster, applications)
            results["cold"] = {"summary": cold.summarise(starts), "samples": starts}


if __name__ == "__main__":
    sys.exit(main())
