from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cold, minilm
from bench.readme import insert, main
from bench.report import milliseconds, number, render, table

ERRORS = {"status": 0, "read": 0}


def results() -> dict[str, Any]:
    found: dict[str, Any] = {
        "threads": 1,
        "connections": 32,
        "sentences": 512,
        "batch_size": 8,
        "tuning": [
            {"batch_size": 8, "by_length": False, "rate": 100.0},
            {"batch_size": 8, "by_length": True, "rate": 130.0},
        ],
        "samples": [
            {
                "server": "rayprism",
                "round": 0,
                "rate": 96.0,
                "cpu_ms_per_row": 11.0,
                "errors": ERRORS,
                "latency_s": {"p50": 0.3, "p99": 0.5},
            },
            {
                "server": "model only",
                "round": 0,
                "rate": 100.0,
                "cpu_ms_per_row": 9.0,
                "errors": {},
            },
            {
                "server": "with tokenisation",
                "round": 0,
                "rate": 95.0,
                "cpu_ms_per_row": 9.5,
                "errors": {},
            },
        ],
    }
    found["summary"] = minilm.summarise(found)
    starts = cold.summarise(
        [
            {"what": "empty", "round": 0, "ready_s": 2.0},
            {
                "what": "tiny",
                "round": 0,
                "ready_s": 2.5,
                "bare_s": 0.5,
                "steps_s": {"open": 0.02},
            },
        ]
    )
    verdicts = [*minilm.judge(found["summary"]), *cold.judge(starts)]
    return {
        "date": "2026-11-21T10:00:00+00:00",
        "commit": {"hash": "0123456789abcdef", "changed_since": False},
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 23.4, "system": "Linux"},
        "versions": {"python": "3.11", "ray": "2.60.0", "onnxruntime": "1.31", "wrk": "4.1"},
        "other_cores": 0.03,
        "plan": {"rounds": 1, "seconds": 5},
        "minilm": found,
        "cold": {"summary": starts},
        "verdicts": [verdict.to_json() for verdict in verdicts],
    }


def test_cold_start_counts_what_comes_on_top_of_the_actor() -> None:
    (row,) = results()["cold"]["summary"]
    assert row["ratio"] == pytest.approx(1.0)


def test_sentences_are_judged_by_the_model_alone() -> None:
    summary = results()["minilm"]["summary"]
    (verdict,) = minilm.judge(summary)
    assert verdict.value == pytest.approx(0.96)
    assert verdict.met
    assert summary["by_length"]["rate"] == 130.0


def test_every_row_of_every_table_has_as_many_cells() -> None:
    text = render(results())
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
    assert "**fail**" not in text
    assert "1.00x" in text


def test_table() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (12345.6, "12,346"), (99.94, "99.9"), (1.234, "1.23"), (0.0, "0.00")],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_milliseconds() -> None:
    assert milliseconds(0.00123) == "1.23 ms"
    assert milliseconds(None) == "-"


README = "before\n<!-- bench:overhead -->\nold\n<!-- /bench -->\nafter\n"


def test_insert_replaces_what_is_between_the_marks() -> None:
    once = insert(README, {"overhead": "| new |\n"})
    assert once == "before\n<!-- bench:overhead -->\n| new |\n<!-- /bench -->\nafter\n"
    assert insert(once, {"overhead": "| new |"}) == once


def test_insert_takes_backslashes_as_they_are() -> None:
    assert r"\1 \g<name>" in insert(README, {"overhead": r"\1 \g<name>"})


def test_insert_into_an_empty_block() -> None:
    text = "<!-- bench:overhead -->\n<!-- /bench -->\n"
    assert "new" in insert(text, {"overhead": "new"})


def test_insert_refuses_what_it_cannot_do() -> None:
    with pytest.raises(KeyError):
        insert(README, {})
    with pytest.raises(ValueError, match="no `<!-- bench"):
        insert("plain", {})
    with pytest.raises(ValueError, match="has no"):
        insert("<!-- bench:overhead -->\nold\n", {"overhead": "new"})


def test_check_tells_and_changes_nothing(tmp_path: Path, capsys: Any) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text(README)
    (folder / "overhead.md").write_text("| new |\n")
    arguments = [f"--readme={readme}", f"--results={folder}"]
    assert main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    assert "run `python -m bench.readme`" in capsys.readouterr().out


def test_one_table_has_the_targets_of_all_scenarios(tmp_path: Path) -> None:
    document, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    document.write_text("<!-- bench:targets -->\n<!-- /bench -->\n")
    bound = {"title": "a / b", "at_least": 1.3, "at_most": None, "value": 1.5, "met": True}
    for name, met in (("one", True), ("two", False)):
        results = {"scenario": {"title": name}, "bounds": [bound | {"met": met}]}
        (folder / f"{name}.json").write_text(json.dumps(results))
    (folder / "batch.json").write_text("{}")
    assert main([f"--readme={document}", f"--results={folder}"]) == 0
    rows = document.read_text().splitlines()[3:-1]
    assert rows == [
        "| `one` | a / b | at least 1.3 | 1.50 | pass |",
        "| `two` | a / b | at least 1.3 | 1.50 | **fail** |",
    ]
