"""Rules of Prometheus, and the files in dashboards/prometheus/ that are made from code.

    python -m rayprism.telemetry.rules            writes them
    python -m rayprism.telemetry.rules --check    exits with 1 where one is stale

Windows are meant for a scrape every 10 s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayprism.telemetry.alerts import alert_groups
from rayprism.telemetry.catalogue import STAGES
from rayprism.telemetry.prometheus import (
    ALERTMANAGER_NOTE,
    build_alertmanager_config,
    build_prometheus_config,
)
from rayprism.telemetry.promql import Durations, sum_by

__all__ = [
    "ALERTMANAGER_NOTE",
    "RECORDING_RULES",
    "build_alertmanager_config",
    "build_prometheus_config",
    "build_prometheus_rule",
    "build_rules",
    "main",
    "render_files",
    "to_yaml",
]

_OUT = Path("dashboards/prometheus")
_COMMAND = "python -m rayprism.telemetry.rules"
_MADE = f"Made by `{_COMMAND}` from src/rayprism/telemetry/; change it there."
_SD_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
_SD_URL = "http://127.0.0.1:8265/api/prometheus/sd"

_CONTAINERS_NOTE = "For the containers of docker/compose.yaml, by the names that they have there."

_PROMETHEUS_NOTE = f"""\
To copy it, change the label `cluster`, and who lists the nodes of the cluster. On its head node Ray
writes {_SD_FILE}, or into the folder of
`ray start --temp-dir`. (It is a link: a container needs the whole folder, at the same path.) The
dashboard says the same over HTTP, also to other machines, and is what `rayprism up` has. What
both list is scraped once; one of them missing does no harm.

HAProxy's metrics are on the port that RAY_SERVE_HAPROXY_METRICS_PORT says, on every node that has a
proxy. Without HAProxy take that job out. `rayprism monitoring up` finds all of this by itself.
"""

_MODEL = "cluster, model"
_VERSION = "cluster, model, version"
_REQUESTS = "ray_rayprism_requests_total"


def build_rules(scale: float = 1.0) -> dict[str, dict[str, Any]]:
    """The content of the rule files, by their names: `rules.yml` and `alerts.yml`.

    Args:
        scale: Less than 1 shrinks every window, to `promql.MIN_WINDOW_S` at least, and every
            `for:`, to a second. For tests; names stay as they are, so `rate5m` is then shorter.
            It wants a scrape every 5 s or less.

    Raises:
        ValueError: The scale is not in (0, 1].
    """
    durations = Durations(scale)
    return {
        "rules.yml": {"groups": _recording_groups(durations)},
        "alerts.yml": {"groups": alert_groups(durations)},
    }


def build_prometheus_rule() -> dict[str, Any]:
    """All rules as one resource of Prometheus' operator in Kubernetes."""
    groups = [group for content in build_rules().values() for group in content["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rayprism"},
        "spec": {"groups": groups},
    }


def _recording_groups(durations: Durations) -> list[dict[str, Any]]:
    versions = [_requests(durations), *_latency(durations), _fallbacks(durations)]
    versions.append(
        _record(
            "rayprism:stable:info",
            f'max by ({_VERSION}) (ray_rayprism_replica_info{{role="stable"}})',
        )
    )
    windows = {"5m": 300, "30m": 1800, "1h": 3600, "6h": 21600}
    errors = [_error_ratio(name, durations.window(s)) for name, s in windows.items()]
    stages = [rule for stage in STAGES for rule in _stage(stage, durations.window(120))]
    return [
        {"name": "rayprism-records-versions", "rules": versions},
        {"name": "rayprism-records-errors", "rules": errors},
        {"name": "rayprism-records-stages", "rules": stages},
    ]


def _record(name: str, expr: str, **labels: str) -> dict[str, Any]:
    return {"record": name, "expr": expr, **({"labels": labels} if labels else {})}


def _requests(durations: Durations) -> dict[str, Any]:
    window = durations.window(60)
    expr = sum_by(f"{_VERSION}, outcome", f'rate({_REQUESTS}{{source="client"}}[{window}])')
    return _record("rayprism:requests:rate1m", expr)


def _error_ratio(name: str, window: str) -> dict[str, Any]:
    every = sum_by(_MODEL, f'rate({_REQUESTS}{{source="client"}}[{window}])')
    failed = sum_by(
        _MODEL, f'rate({_REQUESTS}{{source="client", outcome="server_error"}}[{window}])'
    )
    # Nothing that failed is a share of 0; no requests have no share.
    return _record(
        f"rayprism:error_ratio:rate{name}", f"(\n  {failed}\n  or {every} * 0\n)\n/\n({every} > 0)"
    )


def _latency(durations: Durations) -> list[dict[str, Any]]:
    return [
        _record(
            f"rayprism:request_seconds:p{percent}",
            _quantile("request", percent, durations.window(120)),
        )
        for percent in (50, 90, 99)
    ]


def _quantile(stage: str, percent: int, window: str) -> str:
    buckets = sum_by(f"{_VERSION}, le", f"rate(ray_rayprism_{stage}_seconds_bucket[{window}])")
    # Without requests it is NaN, which the comparison leaves out.
    return f"histogram_quantile({percent / 100:g}, {buckets}) >= 0"


def _stage(stage: str, window: str) -> list[dict[str, Any]]:
    parts = [
        sum_by(_VERSION, f"rate(ray_rayprism_{stage}_seconds_{part}[{window}])")
        for part in ("sum", "count")
    ]
    return [
        _record("rayprism:stage_seconds:p50", _quantile(stage, 50, window), stage=stage),
        _record("rayprism:stage_seconds:p99", _quantile(stage, 99, window), stage=stage),
        _record("rayprism:stage_seconds:mean", f"{parts[0]}\n/\n({parts[1]} > 0)", stage=stage),
    ]


def _fallbacks(durations: Durations) -> dict[str, Any]:
    window = durations.window(300)
    fallbacks = sum_by(_VERSION, f"rate(ray_rayprism_fallbacks_total[{window}])")
    answered = sum_by(_VERSION, f'rate({_REQUESTS}{{source="client", outcome="ok"}}[{window}])')
    # Of both, one may have no series yet.
    back = f"(\n  {fallbacks}\n  or {answered} * 0\n)"
    kept = f"(\n  {answered}\n  or {fallbacks} * 0\n)"
    return _record("rayprism:fallback_ratio:rate5m", f"{back}\n/\n({back}\n+ {kept} > 0)")


RECORDING_RULES: tuple[dict[str, Any], ...] = tuple(
    rule for group in _recording_groups(Durations()) for rule in group["rules"]
)
"""Each with `record`, `expr` and, for stages, `labels`."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        # Items of a list one step in, as people write them.
        super().increase_indent(flow, False)


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)
# The same list twice is written twice, not as an alias.
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def to_yaml(content: Mapping[str, Any], note: str = "") -> str:
    """A file, with a note above as comments."""
    lines = [f"# {line}".rstrip() + "\n" for line in note.splitlines()]
    text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=1000)
    return "".join(lines) + ("\n" if lines else "") + text


def render_files() -> dict[str, str]:
    """The files of dashboards/prometheus/, by their names."""
    rules = {name: to_yaml(content, _MADE) for name, content in build_rules().items()}
    prometheus = build_prometheus_config(sd_files=[_SD_FILE], sd_urls=[_SD_URL])
    containers = build_prometheus_config(
        cluster="containers",
        sd_urls=["http://head:8265/api/prometheus/sd"],
        alertmanager="alertmanager:9093",
    )
    return {
        **rules,
        "prometheusrule.yml": to_yaml(build_prometheus_rule(), _MADE),
        "prometheus.yml": to_yaml(prometheus, f"{_MADE}\n\n{_PROMETHEUS_NOTE}"),
        "prometheus.containers.yml": to_yaml(containers, f"{_MADE}\n\n{_CONTAINERS_NOTE}"),
        "alertmanager.yml": to_yaml(build_alertmanager_config(), f"{_MADE}\n\n{ALERTMANAGER_NOTE}"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module.

    Returns:
        The exit status: 0 where the files were written, or are current.
    """
    parser = argparse.ArgumentParser(prog=_COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if not current")
    parser.add_argument("--out", type=Path, default=_OUT, help=f"folder, by default {_OUT}")
    given = parser.parse_args(arguments)
    out: Path = given.out
    files = {out / name: text for name, text in render_files().items()}
    stale = [path for path, text in files.items() if _read(path) != text]
    if given.check:
        for path in stale:
            again = "" if out == _OUT else f" --out {out}"
            print(f"{path} is stale: run {_COMMAND}{again}", file=sys.stderr)
        return 1 if stale else 0
    out.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
