from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import promql_parser as promql
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from rayprism.errors import SetupError
from rayprism.telemetry.catalogue import CATALOGUE, exported_names
from rayprism.telemetry.dashboards import (
    PanelQuery,
    build_dashboards,
    default_variables,
    panel_queries,
    substitute,
)
from rayprism.telemetry.dashboards.build import main
from rayprism.telemetry.dashboards.expressions import events, ours, ratio
from rayprism.telemetry.rules import RECORDING_RULES
from tests.telemetry.promql_tree import (
    by_labels,
    matchers,
    mismatches,
    name_pattern,
    result_labels,
    selectors,
    summed_selectors,
    walk,
)

ROOT = Path(__file__).parents[2]
CHOSEN = {"model": "flights"}
SCRAPED = {"cluster", "job", "instance"}
NODE = {"ip", "IsHeadNode", "RayNodeType"}
GPU = {*NODE, "GpuIndex", "GpuDeviceName", "GpuUuid"}

FOREIGN = {
    "up": set(),
    "ALERTS": {"alertname", "alertstate", "severity", "model", "version"},
    "ray_actors": {"State", "Source", "Name"},
    "ray_component_rss_bytes": {*NODE, "Component", "pid"},
    "ray_object_store_memory": {"Location", "ObjectState"},
    "ray_object_store_used_memory": set(),
    "ray_object_store_available_memory": set(),
    **{
        f"ray_node_{name}": NODE
        for name in (
            *("cpu_count", "cpu_utilization", "mem_used", "mem_total", "disk_usage", "disk_free"),
            *("network_receive_speed", "network_send_speed"),
        )
    },
    **{f"ray_node_{name}": GPU for name in ("gpus_utilization", "gram_used", "gram_available")},
    "ray_serve_application_status": {"application"},
    "ray_serve_deployment_status": {"application", "deployment"},
    "ray_serve_autoscaling_target_replicas": {"application", "deployment"},
    "ray_serve_deployment_replica_healthy": {"application", "deployment", "replica"},
    "ray_serve_replica_processing_queries": {"application", "deployment", "replica"},
    "haproxy_frontend_http_requests_total": {"proxy"},
    "haproxy_backend_http_responses_total": {"proxy", "code"},
    "haproxy_backend_current_sessions": {"proxy"},
    "haproxy_backend_current_queue": {"proxy"},
    "haproxy_backend_active_servers": {"proxy"},
    "haproxy_backend_connection_errors_total": {"proxy"},
    "haproxy_backend_response_errors_total": {"proxy"},
    "haproxy_backend_retry_warnings_total": {"proxy"},
    "haproxy_backend_total_time_average_seconds": {"proxy"},
}
"""What Ray, HAProxy and Prometheus have, with the labels that are of use."""


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    return build_dashboards()


def all_queries() -> list[PanelQuery]:
    return [query for made in dashboards().values() for query in panel_queries(made)]


def sent(query: PanelQuery) -> str:
    """The expression as Prometheus gets it, everything chosen."""
    made = dashboards()[query.dashboard.removeprefix("rayprism-")]
    return substitute(query.expr, {**default_variables(made), **CHOSEN})


@cache
def parsed() -> list[tuple[PanelQuery, Any]]:
    return [(query, promql.parse(sent(query))) for query in all_queries()]


@cache
def labels_of_rules() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rule in RECORDING_RULES:
        labels = result_labels(promql.parse(rule["expr"]))
        assert labels is not None
        found[rule["record"]] = {*labels, *rule.get("labels", {})}
    return found


@cache
def known_labels() -> dict[str, set[str]]:
    ours_have = {
        name: {*metric.labels, *SCRAPED, "otel_metric_overflow", "le"}
        for metric in CATALOGUE
        for name in exported_names()
        if re.fullmatch(f"{metric.exported}(_bucket|_sum|_count)?", name)
    }
    others = {name: {*labels, *SCRAPED} for name, labels in FOREIGN.items()}
    return {**ours_have, **labels_of_rules(), **others}


def panels_of(made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in made["panels"] if panel["type"] != "row")


def all_panels() -> list[tuple[str, dict[str, Any]]]:
    return [(name, panel) for name, made in dashboards().items() for panel in panels_of(made)]


class TestFiles:
    def test_what_is_checked_in_is_current(self, capsys: pytest.CaptureFixture[str]) -> None:
        status = main(["--check", "--out", str(ROOT / "dashboards")])
        assert (status, capsys.readouterr().err) == (0, "")

    def test_check_names_every_stale_file_and_the_mend(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "made"
        assert main(["--out", str(folder)]) == 0
        assert sorted(path.name for path in folder.iterdir()) == [
            *("batch.json", "cluster.json", "fleet.json", "model.json")
        ]
        (folder / "fleet.json").write_text("{}")
        (folder / "batch.json").unlink()
        capsys.readouterr()
        assert main(["--check", "--out", str(folder)]) == 1
        said = capsys.readouterr().err
        command = f"python -m rayprism.telemetry.dashboards.build --out {folder}"
        assert said.splitlines() == [
            f"{folder / 'fleet.json'} is not current",
            f"{folder / 'batch.json'} is not current",
            f"Mend: {command}",
        ]
        assert not (folder / "batch.json").exists()
        assert main(["--out", str(folder)]) == 0
        assert main(["--check", "--out", str(folder)]) == 0

    def test_a_folder_that_cannot_be_written_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert main(["--out", str(tmp_path / "file")]) == 1
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file' / 'fleet.json'} ")

    def test_they_are_the_same_each_time(self) -> None:
        again = build_dashboards()
        assert again == dashboards()
        assert json.loads(json.dumps(again)) == again

    def test_the_sdk_reads_them_back(self) -> None:
        register_default_plugins()
        for made in dashboards().values():
            read = Dashboard.from_json(made)
            assert json.loads(json.dumps(read, cls=JSONEncoder)) == made


class TestWithoutTheSdk:
    def test_building_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delitem(sys.modules, "rayprism.telemetry.dashboards.render", raising=False)
        for module in [name for name in sys.modules if name.startswith("grafana_foundation_sdk")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "grafana_foundation_sdk", None)
        with pytest.raises(SetupError, match=r"pip install 'rayprism\[grafana\]'"):
            build_dashboards()
        assert main(["--check"]) == 1
        assert capsys.readouterr().err.startswith("error: dashboards are built with")

    def test_importing_does_not_need_it(self) -> None:
        code = (
            "import sys, rayprism.telemetry.dashboards\n"
            "print([name for name in sys.modules if name.startswith('grafana')])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr


class TestPages:
    def test_every_page_is_set_up_alike(self) -> None:
        assert list(dashboards()) == ["fleet", "model", "batch", "cluster"]
        for name, made in dashboards().items():
            assert made["uid"] == f"rayprism-{name}"
            assert made["tags"] == ["rayprism"]
            assert (made["refresh"], made["timezone"]) == ("10s", "browser")
            assert made["time"] == {"from": "now-30m", "to": "now"}
            assert made["title"].startswith("rayprism: ")
            assert len(made["description"]) > 40
            to_others = made["links"][0]
            assert (to_others["type"], to_others["tags"]) == ("dashboards", ["rayprism"])
            assert to_others["includeVars"] is True
            assert to_others["keepTime"] is True

    def test_variables(self) -> None:
        names = {
            name: [variable["name"] for variable in made["templating"]["list"]]
            for name, made in dashboards().items()
        }
        assert names == {
            "fleet": ["datasource", "cluster", "models"],
            "model": ["datasource", "cluster", "model", "version"],
            "batch": ["datasource", "cluster", "batch_job"],
            "cluster": ["datasource", "cluster"],
        }
        for made in dashboards().values():
            for variable in made["templating"]["list"]:
                many = variable["name"] not in ("datasource", "model")
                assert variable["includeAll"] is variable["multi"] is many
                assert variable.get("allValue") == (".+" if many else None)

    def test_every_panel_says_what_it_is(self) -> None:
        for name, panel in all_panels():
            where = f"{name}: {panel['title']}"
            assert panel["title"].strip()
            assert 30 <= len(panel["description"]) <= 300, where
            assert panel["description"].endswith("."), where
            assert panel["links"], where
            assert panel["fieldConfig"]["defaults"]["unit"], where
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"], where
            for target in panel["targets"]:
                assert target["legendFormat"], where
                assert target["datasource"] == panel["datasource"], where

    def test_thresholds_rise(self) -> None:
        for name, panel in all_panels():
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            values = [step["value"] for step in steps]
            assert values[0] is None, (name, panel["title"])
            assert values[1:] == sorted(set(values[1:])), (name, panel["title"])

    def test_ids_titles_and_ref_ids_are_unique(self) -> None:
        for name, made in dashboards().items():
            ids = Counter(panel["id"] for panel in made["panels"])
            titles = Counter(panel["title"] for panel in made["panels"])
            assert max(ids.values()) == max(titles.values()) == 1, name
        for name, panel in all_panels():
            refs = [target["refId"] for target in panel["targets"]]
            assert len(refs) == len(set(refs)), (name, panel["title"])

    def test_panels_do_not_overlap_and_lines_are_full(self) -> None:
        for name, made in dashboards().items():
            places = [(panel["title"], panel["gridPos"]) for panel in made["panels"]]
            for (one, a), (other, b) in combinations(places, 2):
                beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
                below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
                assert beside or below, f"{name}: {one} lies over {other}"
            lines = Counter[int]()
            for _, place in places:
                assert place["x"] + place["w"] <= 24
                lines[place["y"]] += place["w"]
            assert set(lines.values()) == {24}, name

    def test_links_lead_somewhere(self) -> None:
        uids = {made["uid"] for made in dashboards().values()}
        headings = {
            re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in (ROOT / "docs" / "metrics.md").read_text().splitlines()
            if line.startswith("#")
        }
        for name, panel in all_panels():
            links = [*panel["links"], *panel["fieldConfig"]["defaults"].get("links", [])]
            for link in links:
                url = urlsplit(link["url"])
                if url.path.endswith("/docs/metrics.md"):
                    assert url.fragment in headings, (name, panel["title"])
                elif url.scheme:
                    assert url.path.endswith("/docs/alerts.md"), link["url"]
                else:
                    assert url.path.removeprefix("/d/") in uids, link["url"]
                    assert "${__url_time_range}" in url.query

    def test_rows_of_models_open_the_models_page(self) -> None:
        tables = {panel["title"]: panel for _, panel in all_panels() if panel["type"] == "table"}
        (link,) = tables["Models and versions"]["fieldConfig"]["defaults"]["links"]
        assert link["url"].startswith(
            "/d/rayprism-model?var-cluster=${__data.fields.cluster}"
            "&var-model=${__data.fields.model}&"
        )

    def test_columns_of_tables_are_in_the_results(self) -> None:
        for name, panel in all_panels():
            if panel["type"] != "table":
                continue
            refs = [target["refId"] for target in panel["targets"]]
            fields = {f"Value #{ref}" for ref in refs} if len(refs) > 1 else {"Value"}
            for target in panel["targets"]:
                tree = promql.parse(substitute(target["expr"], {"cluster": "c", "models": "m"}))
                fields |= result_labels(tree) or set()
            organize = panel["transformations"][1]["options"]
            assert set(organize["renameByName"]) == fields, (name, panel["title"])
            assert set(organize["indexByName"]) == fields, (name, panel["title"])
            shown = set(organize["renameByName"].values())
            looked = {one["matcher"]["options"] for one in panel["fieldConfig"]["overrides"]}
            assert looked == shown, (name, panel["title"])


class TestExpressions:
    def test_all_of_them_parse_with_no_variable_left(self) -> None:
        found = [(query.panel, tree) for query, tree in parsed()]
        assert len(found) > 100
        for query in all_queries():
            assert not re.search(r"\$|\[\[", sent(query)), query

    def test_every_series_is_known(self) -> None:
        for query, tree in parsed():
            for selector in selectors(tree):
                pattern = name_pattern(selector)
                assert any(pattern.fullmatch(name) for name in known_labels()), (
                    f"{query.dashboard}, {query.panel}: nobody exports {pattern.pattern}"
                )

    def test_every_matcher_is_of_a_label_that_is_there(self) -> None:
        for query, tree in parsed():
            for selector in selectors(tree):
                for name in series_of(selector):
                    unknown = matchers(selector).keys() - known_labels()[name] - {"__name__"}
                    assert not unknown, (query.dashboard, query.panel, name)

    def test_every_aggregation_is_by_labels_that_are_there(self) -> None:
        for query, tree in parsed():
            for part in walk(tree):
                for selector in summed_selectors(part) if by_labels(part) else ():
                    for name in series_of(selector):
                        unknown = (by_labels(part) or set()) - known_labels()[name] - {"__name__"}
                        assert not unknown, (query.dashboard, query.panel, name)

    def test_every_series_is_of_the_chosen_clusters_and_models(self) -> None:
        for query in all_queries():
            if query.format == "variable":
                continue
            # Values that nothing else in an expression could be.
            tree = promql.parse(
                substitute(
                    query.expr,
                    dict.fromkeys(("cluster", "model", "models", "version", "batch_job"), "chosen"),
                )
            )
            for selector in selectors(tree):
                found = matchers(selector)
                where = f"{query.dashboard}, {query.panel}: {selector.name}"
                expected = "chosen|" if selector.name == "ALERTS" else "chosen"
                assert found.get("cluster") == ("=~", expected), where
                for name in series_of(selector):
                    for label in narrowed(query.dashboard) & known_labels()[name]:
                        if name not in FOREIGN:
                            assert found.get(label, ("", ""))[1] == "chosen", f"{where} {label}"

    def test_legends_take_only_labels_of_the_result(self) -> None:
        for query, tree in parsed():
            labels = result_labels(tree)
            if query.format == "variable":
                (selector,) = selectors(tree)
                labels = frozenset.intersection(
                    *(frozenset(known_labels()[name]) for name in series_of(selector))
                )
            assert labels is not None, f"{query.dashboard}, {query.panel}: labels of nobody's list"
            assert query.labels <= labels, (query.dashboard, query.panel, query.legend)

    def test_series_of_a_chart_have_different_names(self) -> None:
        for query, tree in parsed():
            if query.format == "time_series":
                assert query.labels == result_labels(tree), (query.dashboard, query.panel)
        for name, panel in all_panels():
            legends = [target["legendFormat"] for target in panel["targets"]]
            assert len(legends) == len(set(legends)), (name, panel["title"])

    def test_both_sides_of_an_operation_meet(self) -> None:
        for query, tree in parsed():
            assert not mismatches(tree), (query.dashboard, query.panel)

    def test_windows_follow_the_zoom(self) -> None:
        for query in all_queries():
            windows = set(re.findall(r"(?:\[|offset )([^\])]+)[\])]", query.expr))
            allowed = {"$__rate_interval", "$__interval"}
            if query.dashboard == "rayprism-batch":
                allowed |= {"$__range", "10m"}
            assert windows <= allowed, (query.dashboard, query.panel)

    def test_bars_count_everything_once(self) -> None:
        for name, panel in all_panels():
            drawn = panel["fieldConfig"]["defaults"].get("custom", {}).get("drawStyle")
            for target in panel["targets"]:
                counted = "increase(" in target["expr"] and panel["type"] == "timeseries"
                assert (drawn == "bars") is counted, (name, panel["title"])
                # From one bar to the next, and never so short that no scrape is within.
                assert ("$__interval" in target["expr"]) is counted, (name, panel["title"])
                assert panel.get("interval") == ("1m" if counted else None)

    def test_every_metric_is_on_some_page(self) -> None:
        through_rules = {
            selector.name
            for rule in RECORDING_RULES
            if rule["record"] in used_names()
            for selector in selectors(promql.parse(rule["expr"]))
        }
        shown = used_names() | through_rules
        missing = [
            metric.name
            for metric in CATALOGUE
            if not any(name.startswith(metric.exported) for name in shown)
        ]
        assert missing == []


def series_of(selector: Any) -> list[str]:
    pattern = name_pattern(selector)
    return [name for name in known_labels() if pattern.fullmatch(name)]


def used_names() -> set[str]:
    return {selector.name for _, tree in parsed() for selector in selectors(tree) if selector.name}


def narrowed(uid: str) -> set[str]:
    """Labels by which everything on a page is chosen."""
    return {
        "rayprism-fleet": {"model"},
        "rayprism-model": {"model"},
        "rayprism-batch": {"batch_job"},
        "rayprism-cluster": set(),
    }[uid]


class TestPieces:
    def test_a_metric_has_to_be_in_the_catalogue(self) -> None:
        with pytest.raises(KeyError):
            ours("rayprism_guesses_total", ())

    def test_parts_are_of_histograms_only(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            ours("rayprism_rows_total", (), part="sum")
        with pytest.raises(ValueError, match="do not fit"):
            ours("rayprism_request_seconds", ())
        found = ours("rayprism_request_seconds", ('a="b"',), 'c="d"', part="sum")
        assert found == 'ray_rayprism_request_seconds_sum{c="d",a="b"}'

    def test_events_count_series_that_are_new(self) -> None:
        assert events("a", "x", "5m") == "sum by (a) ((x unless x offset 5m) or increase(x[5m]))"

    def test_a_ratio_without_a_part_is_zero(self) -> None:
        assert ratio("a", "b") == "(a or b * 0) / (b > 0)"


class TestQueries:
    def test_panels_in_rows_and_variables_are_found(self) -> None:
        panel = {
            "title": "P",
            "type": "stat",
            "fieldConfig": {"defaults": {"noValue": "None"}},
            "targets": [
                {"expr": "x", "refId": "A", "legendFormat": "{{ a }} {{b}}", "format": "heatmap"}
            ],
        }
        made = {
            "uid": "u",
            "templating": {
                "list": [
                    {"type": "query", "name": "v", "query": 'label_values(x{a="b,c"}, a)'},
                    {"type": "datasource", "name": "d", "query": "prometheus"},
                ]
            },
            "panels": [{"type": "row", "title": "R", "panels": [panel]}],
        }
        variable, query = panel_queries(made)
        assert variable == PanelQuery("u", "variable v", 'x{a="b,c"}', "{{a}}", "variable")
        assert query == PanelQuery("u", "P", "x", "{{ a }} {{b}}", "heatmap", "A", optional=True)
        assert query.labels == {"a", "b"}

    def test_a_variable_that_asks_otherwise_is_refused(self) -> None:
        variable = {"type": "query", "name": "v", "query": "label_names()"}
        with pytest.raises(SetupError, match=r"label_values\(series, label\)"):
            panel_queries({"uid": "u", "templating": {"list": [variable]}, "panels": []})

    @pytest.mark.parametrize(
        ("expr", "expected"),
        [
            ("rate(x[$__rate_interval])", "rate(x[1m])"),
            ("x[${__range}:$__interval]", "x[30m:1m]"),
            ('x{a=~"$a"}', 'x{a=~"one"}'),
            ('x{a=~"${a}",b="${a:regex}",c="[[a]]"}', 'x{a=~"one",b="one",c="one"}'),
            ('x{a=~"$b"}', 'x{a=~"(two|th\\\\.ree)"}'),
            ('x{a=~"$c"}', 'x{a=~"four"}'),
        ],
    )
    def test_variables_are_replaced(self, expr: str, expected: str) -> None:
        values = {"a": "one", "b": ["two", "th.ree"], "c": ["four"]}
        assert substitute(expr, values) == expected

    def test_intervals_can_be_given(self) -> None:
        assert substitute("x[$__rate_interval]", {"__rate_interval": "15s"}) == "x[15s]"

    def test_a_variable_without_a_value_is_named(self) -> None:
        with pytest.raises(SetupError, match=r"the variable model has no value in: x\{a=\"\$model"):
            substitute('x{a="$model"}', {"cluster": "c"})
