"""docs/metrics.md says of every metric what the catalogue says, and is current."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rayprism.telemetry.catalogue import CATALOGUE, LABELS, Metric, exported_names
from rayprism.telemetry.page import PAGE_FILE, main, render_page

ROOT = Path(__file__).parents[2]
RECORDED = re.compile(r"record: (rayprism:\S+)")


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_every_metric_has_its_row(metric: Metric) -> None:
    (row,) = [line for line in render_page().splitlines() if f"| `{metric.exported}` |" in line]
    assert metric.kind in row
    assert metric.meaning in row
    assert all(f"`{label}`" in row for label in metric.labels)


def test_every_label_is_explained() -> None:
    page = render_page()
    assert all(f"| `{label}` | {meaning} |" in page for label, meaning in LABELS.items())


def test_every_table_has_as_many_cells_in_each_row() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", render_page(), re.MULTILINE):
        rows = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1, rows[0]


def test_its_queries_name_only_what_there_is() -> None:
    queries = re.findall(r"```promql\n(.*?)```", render_page(), re.DOTALL)
    assert len(queries) >= 5
    used = set(re.findall(r"ray_rayprism_[a-z0-9_]+(?=[{\[)])", " ".join(queries)))
    assert used
    assert used <= exported_names()
    rules = (ROOT / "dashboards" / "prometheus" / "rules.yml").read_text()
    assert set(re.findall(r"rayprism:[\w:]+", " ".join(queries))) <= set(RECORDED.findall(rules))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_its_queries_are_promql(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    for query in re.findall(r"```promql\n(.*?)```", render_page(), re.DOTALL):
        rule = {"record": "a:b", "expr": query}
        file.write_text(json.dumps({"groups": [{"name": "page", "rules": [rule]}]}))
        command = ["promtool", "check", "rules", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout


def test_the_page_in_docs_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0


def test_a_stale_page_is_told_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PAGE_FILE.parent.mkdir()
    assert main(["--check"]) == 1
    assert "python -m rayprism.telemetry.page" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0
    PAGE_FILE.write_text("old")
    assert main(["--check"]) == 1
    assert main(["--other"]) == 2
