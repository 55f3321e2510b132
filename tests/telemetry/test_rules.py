"""Recording rules and alerts: current, understood by Prometheus, and about metrics that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.telemetry.alerts import RUNBOOK_URL
from rayprism.telemetry.catalogue import STAGES, exported_names
from rayprism.telemetry.promql import Durations, format_duration, rose
from rayprism.telemetry.rules import (
    ALERTMANAGER_NOTE,
    RECORDING_RULES,
    build_alertmanager_config,
    build_prometheus_config,
    build_rules,
    main,
    to_yaml,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dashboards" / "prometheus"
OTHERS = {
    "ray_serve_application_status",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_replica_healthy",
    "up",
}
"""Names of Ray's and of Prometheus' own that rules may use."""


def tool(name: str, *arguments: str | Path) -> None:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [path, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def rules(scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        rule
        for content in build_rules(scale).values()
        for group in content["groups"]
        for rule in group["rules"]
    ]


ALERTS = [rule for rule in rules() if "alert" in rule]


def test_the_checked_in_files_are_current(capsys):
    assert main(["--check", "--out", str(FOLDER)]) == 0, capsys.readouterr().err


def test_stale_files_are_named_and_mended(tmp_path, capsys):
    out = ["--out", str(tmp_path / "new")]
    assert main(["--check", *out]) == 1
    assert main(out) == 0
    assert main(["--check", *out]) == 0
    (tmp_path / "new" / "alerts.yml").write_text("groups: []\n")
    capsys.readouterr()
    assert main(["--check", *out]) == 1
    assert capsys.readouterr().err == (
        f"{tmp_path}/new/alerts.yml is stale: run python -m rayprism.telemetry.rules "
        f"--out {tmp_path}/new\n"
    )
    assert main(out) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/new/alerts.yml\n"


def test_prometheus_takes_the_checked_in_files():
    tool("promtool", "check", "rules", FOLDER / "rules.yml", FOLDER / "alerts.yml")
    for name in ("prometheus.yml", "prometheus.containers.yml"):
        tool("promtool", "check", "config", FOLDER / name)
    tool("amtool", "check-config", FOLDER / "alertmanager.yml")


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "tests").glob("*.yml")), ids=lambda path: path.stem
)
def test_rules_do_what_their_tests_say(path):
    tool("promtool", "test", "rules", path)


def test_every_alert_fires_in_a_test_and_stays_calm_in_one():
    fired, calm = set(), set()
    for path in (FOLDER / "tests").glob("*.yml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case.get("alert_rule_test", ()):
                (fired if check["exp_alerts"] else calm).add(check["alertname"])
    names = {alert["alert"] for alert in ALERTS}
    assert fired == names
    # These have something calm beside what fires.
    beside = {
        "RayprismApplicationNotRunning",
        "RayprismCandidateFailing",
        "RayprismShadowDisagrees",
        "RayprismMetricsOverflow",
    }
    assert calm | beside >= names


@pytest.mark.parametrize("scale", [0.5, 0.01, 0.0001])
def test_scaled_rules_are_rules(tmp_path, scale):
    scaled = build_rules(scale)
    for name, content in scaled.items():
        (tmp_path / name).write_text(to_yaml(content))
    tool("promtool", "check", "rules", *(tmp_path / name for name in scaled))


def test_a_scale_shrinks_windows_and_waits_and_nothing_else():
    def names(scale: float) -> list[str]:
        return [rule.get("record") or rule["alert"] for rule in rules(scale)]

    assert names(0.01) == names(1.0)
    assert windows(0.01) == {"15s", "18s", "36s", "3m36s"}
    assert waits(0.01) == {"1s", "3s", "6s"}
    assert waits(1.0) == {"1m", "2m", "5m", "10m"}
    without = re.compile(r"(?<=[\[ ])([0-9]+(h|m|s))+(?=[\]) ]|$)")
    for whole, scaled in zip(rules(1.0), rules(0.01), strict=True):
        assert without.sub("", whole["expr"]) == without.sub("", scaled["expr"])


def windows(scale: float) -> set[str]:
    return {found for rule in rules(scale) for found in re.findall(r"\[(\w+)\]", rule["expr"])}


def waits(scale: float) -> set[str]:
    return {rule["for"] for rule in rules(scale) if "for" in rule}


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5])
def test_a_scale_is_a_share(scale):
    with pytest.raises(ValueError, match="over 0 and at most 1"):
        build_rules(scale)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10, "10s"), (90, "1m30s"), (21600, "6h"), (0.5, "500ms"), (5400, "1h30m")],
)
def test_durations_are_written_as_prometheus_does(seconds, text):
    assert format_duration(seconds) == text
    assert Durations().window(seconds) == text


def test_a_duration_is_above_zero():
    with pytest.raises(ValueError, match="not above 0"):
        format_duration(0)


def test_a_counter_rises_also_where_it_is_new():
    assert rose("x", "a", "5m") == (
        "sum by (a) (increase(x[5m])) > 0\nor\nsum by (a) (x unless x offset 5m) > 0"
    )


def test_rules_use_metrics_that_there_are():
    recorded = {rule["record"] for rule in RECORDING_RULES}
    used = set()
    for rule in rules():
        # Without what is in quotes: `"ray_rayprism_.+"` is a pattern.
        expression = re.sub(r'"[^"]*"', "", rule["expr"])
        used |= set(re.findall(r"\b(?:ray_\w+|rayprism:[\w:]+|up)\b", expression))
    assert used <= exported_names() | OTHERS | recorded
    assert used >= OTHERS


def test_what_is_recorded():
    counted: dict[str, list[str]] = {}
    for rule in RECORDING_RULES:
        stage = rule.get("labels", {}).get("stage")
        counted.setdefault(rule["record"], []).extend([stage] if stage else [])
    stages = list(STAGES)
    assert counted == {
        "rayprism:requests:rate1m": [],
        **{f"rayprism:error_ratio:rate{window}": [] for window in ("5m", "30m", "1h", "6h")},
        **{f"rayprism:request_seconds:{part}": [] for part in ("p50", "p90", "p99")},
        **{f"rayprism:stage_seconds:{part}": stages for part in ("p50", "p99", "mean")},
        "rayprism:fallback_ratio:rate5m": [],
        "rayprism:stable:info": [],
    }


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_how_bad_and_where_to_read(alert):
    notes = alert["annotations"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert notes.keys() == {"summary", "description", "runbook", "dashboard"}
    assert notes["runbook"] == f"{RUNBOOK_URL}#{alert['alert'].lower()}"
    dashboard = re.fullmatch(
        r"/d/rayprism-(\w+)\?var-cluster=\{\{ \$labels\.cluster \}\}.*", notes["dashboard"]
    )
    assert dashboard is not None
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert sections.count(alert["alert"]) == 1


def test_docs_know_no_other_alerts():
    text = (ROOT / "docs" / "alerts.md").read_text()
    assert set(re.findall(r"\bRayprism[A-Z]\w+", text)) == {alert["alert"] for alert in ALERTS}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= {alert["alert"].lower() for alert in ALERTS}


def scrape_jobs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {job["job_name"]: job for job in config["scrape_configs"]}


def test_a_config_for_a_cluster(tmp_path):
    config = build_prometheus_config(
        cluster="east",
        sd_urls=["http://head:8265/api/prometheus/sd"],
        haproxy_port=9201,
        rule_files=[],
        alertmanager=None,
        scrape_interval_s=1.5,
        token_file="token",
    )
    (tmp_path / "token").write_text("x")
    (tmp_path / "p.yml").write_text(to_yaml(config))
    tool("promtool", "check", "config", tmp_path / "p.yml")
    assert config["global"] == {
        "scrape_interval": "1s500ms",
        "scrape_timeout": "1s500ms",
        "evaluation_interval": "1s500ms",
    }
    assert "alerting" not in config
    jobs = scrape_jobs(config)
    assert jobs.keys() == {"ray", "haproxy"}
    for job in jobs.values():
        assert {"target_label": "cluster", "replacement": "east"} in job["relabel_configs"]
        assert job["http_sd_configs"][0]["authorization"]["type"] == "Bearer"
        assert "file_sd_configs" not in job
    assert jobs["haproxy"]["relabel_configs"][0]["replacement"] == "${1}:9201"


def test_a_config_without_haproxy_and_one_without_nodes():
    config = build_prometheus_config(sd_files=["a.json"], haproxy_port=None)
    assert scrape_jobs(config).keys() == {"ray"}
    with pytest.raises(ValueError, match="give sd_files or sd_urls"):
        build_prometheus_config()


def test_receivers_that_the_note_shows_can_be_added(tmp_path):
    blocks = re.findall(r"(?:^  .*\n)+", ALERTMANAGER_NOTE, re.MULTILINE)
    shown: dict[str, Any] = {}
    for block in blocks:
        shown |= yaml.safe_load(block)
    config = build_alertmanager_config()
    config["receivers"] = [*shown["receivers"], {"name": "on-call"}]
    config["route"]["routes"] = shown["routes"]
    (tmp_path / "a.yml").write_text(to_yaml(config))
    tool("amtool", "check-config", tmp_path / "a.yml")
