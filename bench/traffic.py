"""What splitting traffic costs, in one run: `python -m bench.traffic`.

One stable version, a candidate and a shadow beside it, each with one replica, all of one tiny
model. Only the stable version's `user_config` changes between measurements, in place: the same
processes are measured with and without a split. Throughput is that of wrk in a closed loop with 16
connections; latency that of an open loop at 0.3 of the throughput.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench import machine
from bench.cluster import BenchCluster, ClusterFailed
from bench.figures import Target, clean, median_of, paired_ratio, select
from bench.load import drive
from bench.open_loop import drive_open
from bench.report import context, milliseconds, number, table, targets
from bench.shell import run_and_report
from bench.tiny_model import MODEL, infer_body, infer_path, push, write_onnx

__all__ = ["main"]

_CONNECTIONS = 16
_OPEN_SHARE = 0.3
"""Of the throughput in a closed loop: no overload even while the machine is slow."""
_CASES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "5 %": {"candidates": [{"version": "2", "weight": 5}]},
    "5 % by the client": None,
    "50 %": {"candidates": [{"version": "2", "weight": 50}]},
    "50 % by the client": None,
    "shadow 10 %": {"shadow": [{"version": "3", "sample": 10}]},
    "shadow 10 % by the client": None,
}
"""What the stable version is told. In the controls the client does the splitting or copying, to the
versions' own addresses: what is lost there, two busy processes on this machine cost each other."""
_BY_CLIENT = {"5 % by the client": 5, "50 % by the client": 50}
_CLOSED_CASES = ("none", "5 %", "5 % by the client", "50 %", "50 % by the client")
_OPEN_CASES = ("none", "5 %", "shadow 10 %", "shadow 10 % by the client")
_ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = _ROOT / "bench" / "results" / "traffic.json"


class _Fleet:
    """The three versions, and the split that is in force."""

    def __init__(self, cluster: BenchCluster, repository: Path) -> None:
        self._cluster = cluster
        self._repository = repository
        self.url = cluster.url(infer_path(MODEL))

    def deploy(self) -> None:
        self._cluster.deploy(
            *(self._application(version) for version in (2, 3)), self._application(1)
        )

    def split(self, traffic: dict[str, Any] | None) -> None:
        self._cluster.deploy(self._application(1, traffic))
        wanted = {item["version"]: item["weight"] for item in (traffic or {}).get("candidates", ())}
        deadline = time.monotonic() + 30
        while True:
            weights = self.counts()["weights"]
            if {key: value for key, value in weights.items() if key != "1"} == wanted:
                return
            if time.monotonic() > deadline:
                raise ClusterFailed(f"the weights are {weights}, wanted {wanted}")
            time.sleep(0.05)

    def counts(self) -> dict[str, Any]:
        with urllib.request.urlopen(
            self._cluster.url(f"/v2/models/{MODEL}/traffic"), timeout=10
        ) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _application(self, version: int, traffic: dict[str, Any] | None = None) -> dict[str, Any]:
        beside = "" if version == 1 else f"/versions/{version}"
        return {
            "name": MODEL if version == 1 else f"{MODEL}-{version}",
            "import_path": "rayprism.serving.app:build",
            "route_prefix": f"/v2/models/{MODEL}{beside}",
            "args": {"model": MODEL, "version": version, "repository": str(self._repository)},
            "deployments": [
                {
                    "name": "model",
                    "ray_actor_options": {"num_cpus": 0.5},
                    "user_config": {"traffic": traffic},
                }
            ],
        }


def _path(version: int) -> str:
    return f"/v2/models/{MODEL}/versions/{version}/infer"


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 where every target is met, 1 where one is missed, 2 where the run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    given = parser.parse_args(arguments)
    return run_and_report(
        lambda marker, folder: _run(marker, folder, given.seconds, given.rounds),
        render,
        given.output,
    )


def _run(marker: str, folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    repository = folder / "repository"
    model_file = folder / "tiny.onnx"
    write_onnx(model_file)
    push(model_file, repository, versions=3)
    with BenchCluster(f"{marker}/haproxy", rayprism=True) as cluster:
        fleet = _Fleet(cluster, repository)
        fleet.deploy()
        body = infer_body()
        warm = drive(fleet.url, [body], connections=_CONNECTIONS, seconds=3, marker=marker)
        open_rate = _OPEN_SHARE * warm["rate"]
        samples = []
        names = list(_CASES)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                fleet.split(_CASES[name])
                # What the change left to do (connections, look-ups) is not what is measured.
                drive(fleet.url, [body], connections=_CONNECTIONS, seconds=1, marker=marker)
                if name in _CLOSED_CASES:
                    before = fleet.counts()
                    sample = drive(
                        fleet.url,
                        [body],
                        connections=_CONNECTIONS,
                        seconds=seconds,
                        marker=marker,
                        other=(_path(2), _BY_CLIENT[name]) if name in _BY_CLIENT else None,
                    )
                    samples.append(_sample("closed", name, turn, sample, before, fleet.counts()))
                if name in _OPEN_CASES:
                    before = fleet.counts()
                    opened = drive_open(
                        fleet.url,
                        body,
                        rate=open_rate,
                        seconds=2 * seconds,
                        seed=turn,
                        marker=marker,
                        folder=folder,
                        copies=(_path(3), 0.1) if name == "shadow 10 % by the client" else None,
                    )
                    samples.append(_sample("open", name, turn, opened, before, fleet.counts()))
                print(_progress(turn, rounds, samples, name), flush=True)
    return {
        **machine.describe(),
        "plan": {"seconds": seconds, "rounds": rounds, "open_rate": open_rate},
        "other_cores": median_of(select(samples, loop="closed"), "other_cores"),
        "summary": summarise(samples),
        "verdicts": judge(samples),
        "samples": samples,
    }


def _sample(
    loop: str,
    case: str,
    turn: int,
    sample: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    def grown(*path: str) -> int:
        values = []
        for document in (before, after):
            value: Any = document
            for part in path:
                value = value.get(part, {})
            values.append(sum(value.values()) if isinstance(value, dict) else value)
        return int(values[1] - values[0])

    return {
        "loop": loop,
        "case": case,
        "round": turn,
        **sample,
        "forwarded": grown("candidates", "2", "answered"),
        "fallbacks": grown("candidates", "2", "fallbacks"),
        "shadows_compared": grown("shadows", "3", "compared"),
        "shadows_dropped": grown("shadows", "3", "dropped"),
    }


def _progress(turn: int, rounds: int, samples: list[dict[str, Any]], case: str) -> str:
    latest = [sample for sample in samples if (sample["round"], sample["case"]) == (turn, case)]
    parts = []
    for sample in latest:
        rate = f"{sample['rate']:,.0f}/s, " if "rate" in sample else ""
        parts.append(
            f"{sample['loop']}: {rate}p99 {sample['latency_s']['p99'] * 1e3:.2f} ms, "
            f"forwarded {sample['forwarded']}, fallbacks {sample['fallbacks']}, "
            f"shadows {sample['shadows_compared']}+{sample['shadows_dropped']} dropped"
        )
    return f"round {turn + 1}/{rounds} {case}: " + "; ".join(parts)


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by case, and their ratios to no split, round by round."""
    rows: dict[str, Any] = {}
    for case in _CASES:
        closed = select(samples, loop="closed", case=case)
        opened = select(samples, loop="open", case=case)
        requests = sum(sample["requests"] for sample in closed)
        rows[case] = {
            "rate": median_of(closed),
            "rate_ratio": paired_ratio(closed, select(samples, loop="closed", case="none")),
            "forwarded_share": sum(sample["forwarded"] for sample in closed) / requests
            if requests
            else None,
            "fallbacks": sum(sample["fallbacks"] for sample in [*closed, *opened]),
            "p50_s": median_of(opened, "latency_s.p50"),
            "p99_s": median_of(opened, "latency_s.p99"),
            "p99_ratio": paired_ratio(
                opened, select(samples, loop="open", case="none"), "latency_s.p99"
            ),
            "shadows_compared": sum(sample["shadows_compared"] for sample in opened),
            "shadows_dropped": sum(sample["shadows_dropped"] for sample in opened),
        }
    return rows


def judge(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets: what 5 % and 50 % forwarded, and 10 % shadowed, may cost."""
    summary = summarise(samples)
    wanted = [
        (
            "5 %",
            "rate_ratio",
            Target("5 % forwarded, requests/s: with / without", 0.97, "at least"),
        ),
        (
            "50 %",
            "rate_ratio",
            Target("50 % forwarded, requests/s: with / without", 0.55, "at least"),
        ),
        ("shadow 10 %", "p99_ratio", Target("10 % shadowed, p99: with / without", 1.10, "at most")),
    ]
    return [
        target.judge(summary[case][key], valid=clean(select(samples, case=case))).to_json()
        for case, key, target in wanted
    ]


def render(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    closed, opened = [], []
    for case, row in results["summary"].items():
        if row["rate"] is not None:
            closed.append(
                (
                    case,
                    number(row["rate"]),
                    f"{number(row['rate_ratio'])}x",
                    f"{row['forwarded_share']:.2%}",
                    str(row["fallbacks"]),
                )
            )
        if row["p99_s"] is not None:
            opened.append(
                (
                    case,
                    milliseconds(row["p50_s"]),
                    milliseconds(row["p99_s"]),
                    f"{number(row['p99_ratio'])}x",
                    str(row["shadows_compared"]),
                    str(row["shadows_dropped"]),
                )
            )
    rate = results["plan"]["open_rate"]
    return (
        "\n\n".join(
            [
                context(results),
                targets(results["verdicts"]),
                table(
                    (
                        f"closed loop, {_CONNECTIONS} connections",
                        "requests/s",
                        "to none",
                        "forwarded",
                        "fallbacks",
                    ),
                    closed,
                ),
                table(
                    (
                        f"open loop, {rate:,.0f} requests/s",
                        "p50",
                        "p99",
                        "p99 to none",
                        "shadows compared",
                        "dropped",
                    ),
                    opened,
                ),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
