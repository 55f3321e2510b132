"""rayprism against the model alone: `python -m bench.yardsticks`.

Everything runs on this machine, in a cluster that the run starts and ends; see `bench.minilm` and
`bench.cold` for what each table compares. Against other servers: `python -m bench run`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import cold, machine, minilm, tiny_model
from bench.cluster import BenchCluster
from bench.figures import median_of
from bench.plan import Plan
from bench.report import render
from bench.shell import run_and_report

__all__ = ["main"]

_PARTS = ("minilm", "cold")
_ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = _ROOT / "bench" / "results" / "yardsticks.json"
_TRIAL_OUTPUT = _ROOT / ".bench" / "yardsticks.json"
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
    parser.add_argument("--only", type=_names, default=_PARTS, help=f"of {','.join(_PARTS)}")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: bench/results/yardsticks.json; .bench/ with --quick or --only",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rough minutes, to see that it works"
    )
    given = parser.parse_args(arguments)
    if given.output is None:
        whole = set(given.only) == set(_PARTS) and not given.quick
        given.output = _OUTPUT if whole else _TRIAL_OUTPUT
    return given


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
        connections=(),
        repeats=5,
        batch_sizes=(1, 2, 4, 8, 16, 32, 64),
    )
    if given.quick:
        plan = replace(plan, seconds=1, rounds=2, repeats=1, batch_sizes=(1, 4, 16))
    return plan


def _run(plan: Plan, parts: tuple[str, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {
        **machine.describe(),
        "plan": {"seconds": plan.seconds, "rounds": plan.rounds, "only": parts},
    }
    verdicts = []
    plan.say("starting a cluster as `rayprism up` does")
    with BenchCluster(f"{plan.marker}/haproxy", rayprism=True) as cluster:
        if "minilm" in parts:
            found = minilm.run(plan, cluster)
            summary = minilm.summarise(found)
            results["minilm"] = {**found, "summary": summary}
            verdicts += minilm.judge(summary)
        if "cold" in parts:
            cold.push(plan)
            applications = {
                tiny_model.MODEL: cold.tiny_application(plan),
                minilm.MODEL: minilm.application(plan, threads=1),
            }
            minilm.push(plan)
            starts = cold.run(plan, cluster, applications)
            summary = cold.summarise(starts)
            results["cold"] = {"summary": summary, "samples": starts}
            verdicts += cold.judge(summary)
    loads = results.get("minilm", {}).get("samples", ())
    results["other_cores"] = median_of(
        [item for item in loads if "other_cores" in item], "other_cores"
    )
    results["verdicts"] = [verdict.to_json() for verdict in verdicts]
    return results


if __name__ == "__main__":
    sys.exit(main())
