"""The journal: what comes back from it, whatever happened to the file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.journal import Entry, Journal, previous_version

NOW = datetime(2026, 11, 22, 2, 6, 0, tzinfo=UTC)


def journal_of(root: Path) -> Journal:
    return Journal(root, "flights", lambda: NOW)


def begin(journal: Journal, action: str = "promote", was: int = 3, becomes: int = 4) -> str:
    return journal.begin(
        action,
        who="ana@desk",
        before={"version": was, "traffic": {"candidates": [{"version": "4", "weight": 5}]}},
        after={"version": becomes, "traffic": None},
        why="it is better: ✓",
        cluster="http://127.0.0.1:8265",
        config_before=[{"name": "flights", "args": {"version": was}}],
    )


def test_a_change_comes_back_whole(tmp_path):
    journal = journal_of(tmp_path)
    assert journal.read() == []
    id = begin(journal)
    (entry,) = journal.read()
    assert (entry.outcome, entry.ended) == ("unfinished", None)
    journal.end(id, "done")
    assert journal.read() == [
        Entry(
            id=id,
            time="2026-11-22T02:06:00+00:00",
            who="ana@desk",
            action="promote",
            model="flights",
            before={"version": 3, "traffic": {"candidates": [{"version": "4", "weight": 5}]}},
            after={"version": 4, "traffic": None},
            why="it is better: ✓",
            cluster="http://127.0.0.1:8265",
            outcome="done",
            ended="2026-11-22T02:06:00+00:00",
            config_before=({"name": "flights", "args": {"version": 3}},),
        )
    ]
    shown = journal.read()[0].to_json()
    assert (shown["from"]["version"], shown["to"]["version"]) == (3, 4)
    assert json.loads(json.dumps(shown))["config_before"] == [
        {"name": "flights", "args": {"version": 3}}
    ]


def test_a_failure_keeps_its_reason(tmp_path):
    journal = journal_of(tmp_path)
    first, second = begin(journal), begin(journal)
    journal.end(second, "failed", "the golden example\nwas not reproduced")
    journal.end(first, "done")
    assert [(entry.outcome, entry.reason) for entry in journal.read()] == [
        ("done", ""),
        ("failed", "the golden example\nwas not reproduced"),
    ]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_line_costs_only_itself(tmp_path, cut):
    journal = journal_of(tmp_path)
    journal.end(begin(journal), "done")
    torn = begin(journal)
    journal.path.write_bytes(journal.path.read_bytes()[:-cut])
    third = begin(journal)
    journal.end(third, "done")
    warnings: list[str] = []
    entries = journal.read(warnings.append)
    # All but the end of a line being missing, it can be read still.
    assert [entry.id for entry in entries][-1] == third
    assert [entry.outcome for entry in entries if entry.id != torn] == ["done", "done"]
    assert len(warnings) == (0 if cut == 1 else 1)
    assert all(f"{journal.path}:3" in warning for warning in warnings)


@pytest.mark.parametrize(
    "line", ["null", "[]", "{}", '{"event": "begun"}', '{"id": "a", "event": "begun"}', "\x00\x00"]
)
def test_a_line_that_is_no_entry_is_left_out(tmp_path, line):
    journal = journal_of(tmp_path)
    journal.path.parent.mkdir()
    journal.path.write_text(f"{line}\n")
    journal.end(begin(journal), "done")
    warnings: list[str] = []
    assert [entry.outcome for entry in journal.read(warnings.append)] == ["done"]
    assert len(warnings) == 1


def test_lines_are_only_added(tmp_path):
    journal = journal_of(tmp_path)
    id = begin(journal)
    before = journal.path.read_bytes()
    journal.end(id, "done")
    assert journal.path.read_bytes().startswith(before)
    assert journal.path.read_bytes().endswith(b"\n")


def test_a_journal_that_cannot_be_written(tmp_path):
    (tmp_path / "flights").write_text("a file")
    with pytest.raises(ClusterError, match=r"cannot be written: .*--repository"):
        begin(journal_of(tmp_path))
    with pytest.raises(ClusterError, match="cannot be read"):
        journal_of(tmp_path).read()


def entries(*changes: tuple[Any, ...]) -> list[Entry]:
    return [
        Entry(str(index), "", "", action, "flights", {"version": was}, {"version": becomes}, "", "",
              outcome)
        for index, (action, was, becomes, outcome) in enumerate(changes)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "current", "previous"),
    [
        ([], 3, None),
        ([("promote", 3, 4, "done")], 4, 3),
        ([("promote", 3, 4, "done")], 3, None),
        ([("promote", 3, 4, "failed")], 4, None),
        # Its command was killed, but Serve went through with it.
        ([("promote", 3, 4, "unfinished")], 4, 3),
        ([("traffic", 4, 4, "done")], 4, None),
        # The newest time that 4 was promoted counts.
        ([("promote", 2, 4, "done"), ("rollback", 4, 3, "done"), ("promote", 3, 4, "done")], 4, 3),
        # Promoted again only to clear away what was left.
        ([("promote", 3, 4, "done"), ("promote", 4, 4, "done")], 4, 3),
        # A second rollback goes further back, and not forth to 4.
        ([("promote", 2, 3, "done"), ("promote", 3, 4, "done"), ("rollback", 4, 3, "done")], 3, 2),
    ],
)
def test_previous_version(changes, current, previous):
    assert previous_version(entries(*changes), current) == previous
