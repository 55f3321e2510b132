"""Configuration of Prometheus and Alertmanager for clusters of Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayprism.telemetry.promql import format_duration

__all__ = ["ALERTMANAGER_NOTE", "build_alertmanager_config", "build_prometheus_config"]

ALERTMANAGER_NOTE = """\
Nobody is told anything yet: alerts are only shown at Alertmanager's address. To be told, give the
receiver a channel, for example one of these, with the secrets in files beside this one:

  receivers:
    - name: nobody
      slack_configs:
        - api_url_file: slack_url
          channel: "#alerts"
          send_resolved: true
          title: "{{ .CommonAnnotations.summary }}"
          text: "{{ range .Alerts }}{{ .Annotations.description }} {{ end }}"
      pagerduty_configs:
        - routing_key_file: pagerduty_key

and, so that only pages wake anybody, one receiver for each severity:

  routes:
    - matchers: [severity="page"]
      receiver: on-call
"""


def build_prometheus_config(
    *,
    cluster: str = "local",
    sd_files: Sequence[str] = (),
    sd_urls: Sequence[str] = (),
    haproxy_port: int | None = 9101,
    rule_files: Sequence[str] = ("rules.yml", "alerts.yml"),
    alertmanager: str | None = "127.0.0.1:9093",
    scrape_interval_s: float = 10.0,
    evaluation_interval_s: float | None = None,
    refresh_s: float = 10.0,
    token_file: str | None = None,
) -> dict[str, Any]:
    """The content of `prometheus.yml`.

    Args:
        cluster: Value of the label `cluster` of every series.
        sd_files: Files in which Ray lists its nodes.
        sd_urls: Addresses where it does: `<dashboard>/api/prometheus/sd`. A node that both list is
            scraped once.
        haproxy_port: Where HAProxy gives its metrics, on every node; None where it is not used.
        rule_files: Relative to the file.
        alertmanager: Host and port; None for none.
        scrape_interval_s: Of Ray and HAProxy.
        evaluation_interval_s: Of rules; by default as often as is scraped.
        refresh_s: How often the lists of nodes are read.
        token_file: With Ray's token, where RAY_AUTH_MODE is `token`.

    Raises:
        ValueError: There is no list of nodes.
    """
    if not sd_files and not sd_urls:
        raise ValueError("nothing lists the nodes: give sd_files or sd_urls")
    discovery = _discovery(sd_files, sd_urls, format_duration(refresh_s), token_file)
    jobs = [
        {
            "job_name": "ray",
            **discovery,
            "relabel_configs": [_set_label("cluster", cluster)],
        }
    ]
    if haproxy_port is not None:
        # Ray lists several ports of a node. All of them become HAProxy's, and what is then the
        # same target is scraped once.
        moved = {
            "source_labels": ["__address__"],
            "regex": r"(.+):\d+",
            "target_label": "__address__",
            "replacement": f"${{1}}:{haproxy_port}",
        }
        # Ray's list says `job: ray` of each.
        labels = [_set_label("job", "haproxy"), _set_label("cluster", cluster)]
        jobs.append({"job_name": "haproxy", **discovery, "relabel_configs": [moved, *labels]})
    config: dict[str, Any] = {
        "global": {
            "scrape_interval": format_duration(scrape_interval_s),
            "scrape_timeout": format_duration(min(scrape_interval_s, 10.0)),
            "evaluation_interval": format_duration(evaluation_interval_s or scrape_interval_s),
        },
        "rule_files": list(rule_files),
    }
    if alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return config | {"scrape_configs": jobs}


def _discovery(
    files: Sequence[str], urls: Sequence[str], refresh: str, token_file: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if files:
        found["file_sd_configs"] = [{"files": list(files), "refresh_interval": refresh}]
    if urls:
        # Without a type, Prometheus 2.42 sends the token alone.
        bearer = {"type": "Bearer", "credentials_file": token_file}
        token = {} if token_file is None else {"authorization": bearer}
        found["http_sd_configs"] = [
            {"url": url, "refresh_interval": refresh, **token} for url in urls
        ]
    return found


def _set_label(name: str, value: str) -> dict[str, str]:
    return {"target_label": name, "replacement": value}


def build_alertmanager_config() -> dict[str, Any]:
    """The content of `alertmanager.yml`: alerts are grouped and shown, and nobody is told.

    `ALERTMANAGER_NOTE` says how to have somebody told.
    """
    return {
        "route": {
            "receiver": "nobody",
            "group_by": ["cluster", "alertname", "model"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "4h",
        },
        "inhibit_rules": [
            {
                "source_matchers": ["alertname = RayprismErrorBudgetBurnFast"],
                "target_matchers": ["alertname = RayprismErrorBudgetBurnSlow"],
                "equal": ["cluster", "model"],
            }
        ],
        "receivers": [{"name": "nobody"}],
    }
