"""What metrics, the request log and traces cost, in one run: `python -m bench.telemetry`.

Replicas of one tiny model that differ in what they record, asked one after the other by wrk in a
closed loop with 16 connections. Each case has two replicas, so that one process' luck (where its
memory lies, which core it is on) is not taken for a cost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.cluster import BenchCluster
from bench.figures import Target, clean, median_of, paired_ratio, select
from bench.load import drive
from bench.report import context, number, table, targets
from bench.shell import run_and_report
from bench.tiny_model import MODEL, infer_body, push, write_onnx

__all__ = ["main"]

_CONNECTIONS = 16
_TWINS = ("a", "b")
_CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "nothing": ({"RAYPRISM_METRICS": "0"}, {}),
    "metrics": ({}, {}),
    "metrics, 1 % logged": ({}, {"log_percent": 1}),
    "metrics, all logged": ({}, {"log_percent": 100}),
    "metrics, traces at 0 %": ({"OTEL_EXPORTER_OTLP_ENDPOINT": "COLLECTOR"}, {"trace_percent": 0}),
    "metrics, traces at 1 %": ({"OTEL_EXPORTER_OTLP_ENDPOINT": "COLLECTOR"}, {"trace_percent": 1}),
}
"""Environment and `user_config.telemetry` by what is recorded."""
_ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = _ROOT / "bench" / "results" / "telemetry.json"


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 where the target is met, 1 where it is missed, 2 where the run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=9)
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
    push(model_file, repository)
    body = infer_body()
    samples = []
    with BenchCluster(f"{marker}/haproxy", rayprism=True) as cluster, _Collector() as collector:
        cluster.deploy(
            *(
                _application(repository, case, twin, collector.url)
                for case in range(len(_CASES))
                for twin in _TWINS
            )
        )
        urls = {
            (name, twin): cluster.url(f"{_route(case, twin)}/infer")
            for case, name in enumerate(_CASES)
            for twin in _TWINS
        }
        for url in urls.values():
            drive(url, [body], connections=_CONNECTIONS, seconds=1, marker=marker)
        order = list(urls)
        for turn in range(rounds):
            first = turn * 5 % len(order)
            for name, twin in order[first:] + order[:first]:
                sample = drive(
                    urls[name, twin],
                    [body],
                    connections=_CONNECTIONS,
                    seconds=seconds,
                    marker=marker,
                )
                samples.append({"case": name, "round": f"{turn}{twin}", **sample})
                print(f"round {turn + 1}/{rounds} {name}: {sample['rate']:,.0f}/s", flush=True)
    return {
        **machine.describe(),
        "plan": {"seconds": seconds, "rounds": rounds, "twins": len(_TWINS)},
        "other_cores": median_of(samples, "other_cores"),
        "summary": summarise(samples),
        "verdicts": judge(samples),
        "samples": samples,
    }


def _route(case: int, twin: str) -> str:
    return f"/{twin}{case}/v2/models/{MODEL}"


def _application(repository: Path, case: int, twin: str, collector: str) -> dict[str, Any]:
    environment, telemetry = list(_CASES.values())[case]
    environment = {
        name: value.replace("COLLECTOR", collector) for name, value in environment.items()
    }
    return {
        "name": f"{MODEL}-{twin}{case}",
        "import_path": "rayprism.serving.app:build",
        "route_prefix": _route(case, twin),
        "runtime_env": {"env_vars": environment},
        "args": {"model": MODEL, "version": 1, "repository": str(repository)},
        "deployments": [
            {
                "name": "model",
                "ray_actor_options": {"num_cpus": 0.1},
                "user_config": {"telemetry": telemetry},
            }
        ],
    }


class _Collector:
    """Takes traces and throws them away."""

    def __enter__(self) -> _Collector:
        import threading
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by case, and their ratios to recording nothing, round by round."""
    nothing = select(samples, case="nothing")
    return {
        case: {
            "rate": median_of(select(samples, case=case)),
            "rate_ratio": paired_ratio(select(samples, case=case), nothing),
        }
        for case in _CASES
    }


def judge(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The target: what metrics may cost."""
    ratio = summarise(samples)["metrics"]["rate_ratio"]
    target = Target("requests/s with metrics / without", 0.97, "at least")
    return [target.judge(ratio, valid=clean(select(samples, case="metrics"))).to_json()]


def render(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = [
        (case, number(row["rate"]), f"{number(row['rate_ratio'])}x")
        for case, row in results["summary"].items()
    ]
    header = (f"recorded; tiny MLP, {_CONNECTIONS} connections", "requests/s", "to nothing")
    parts = [context(results), targets(results["verdicts"]), table(header, rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
