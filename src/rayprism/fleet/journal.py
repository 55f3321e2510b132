"""What was changed in a fleet, by whom and why: `<repository>/<model>/journal.jsonl`.

A change is two lines with one id: that it began, and how it ended. So one that was killed on its
way shows as unfinished. Lines are only ever added, under the lock of `rayprism.fleet.lock`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rayprism.errors import ClusterError

__all__ = ["JOURNAL_FILE", "Entry", "Journal", "Outcome", "previous_version"]

JOURNAL_FILE = "journal.jsonl"
_MODE = 0o666
"""Less the umask: whoever may push to the repository may have to write on."""

Outcome = Literal["done", "failed", "unfinished"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One change.

    Args:
        id: Of both its lines.
        time: When it began, ISO 8601 with offset.
        who: `user@host`.
        action: traffic, promote or rollback.
        model: The model.
        before: The stable version and its traffic: `{"version": 3, "traffic": {...} or None}`.
        after: The same, as it was to be.
        why: What the operator said.
        cluster: Address of the dashboard.
        outcome: `unfinished` while it is under way, and for ever where it was killed.
        reason: Why it failed, or what else there is to say of its end.
        ended: When it ended; None where it did not.
        config_before: The model's applications before, without secrets.
    """

    id: str
    time: str
    who: str
    action: str
    model: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    why: str
    cluster: str
    outcome: Outcome
    reason: str = ""
    ended: str | None = None
    config_before: Sequence[Mapping[str, Any]] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As `rayprism history --json` prints it."""
        shown = asdict(self)
        return {
            "from" if key == "before" else "to" if key == "after" else key: value
            for key, value in shown.items()
        }


class Journal:
    """The changes of one model.

    Args:
        root: Of the repository.
        model: The model's name.
        now: The time, with its offset.
    """

    def __init__(
        self,
        root: Path,
        model: str,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.path = root / model / JOURNAL_FILE
        self.model = model
        self._now = now

    def begin(
        self,
        action: str,
        *,
        who: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        why: str,
        cluster: str,
        config_before: Sequence[Mapping[str, Any]],
    ) -> str:
        """Writes that a change begins. The caller holds the lock.

        Args:
            action: traffic, promote or rollback.
            who: `user@host`.
            before: The stable version and its traffic.
            after: The same, as it is to be.
            why: What the operator says.
            cluster: Address of the dashboard.
            config_before: The model's applications, without secrets.

        Returns:
            The id, for `end`.

        Raises:
            ClusterError: The journal cannot be written.
        """
        id = secrets.token_hex(8)
        self._append(
            {
                "id": id,
                "event": "begun",
                "time": self._time(),
                "who": who,
                "action": action,
                "model": self.model,
                "from": dict(before),
                "to": dict(after),
                "why": why,
                "cluster": cluster,
                "config_before": list(config_before),
            }
        )
        return id

    def end(self, id: str, outcome: Literal["done", "failed"], reason: str = "") -> None:
        """Writes how a change ended. The caller holds the lock.

        Raises:
            ClusterError: The journal cannot be written.
        """
        self._append({"id": id, "event": outcome, "time": self._time(), "reason": reason})

    def read(self, warn: Callable[[str], None] = lambda _: None) -> list[Entry]:
        """Every change, oldest first; none where there is no journal.

        Args:
            warn: Is told of each line that cannot be read, which is left out.

        Raises:
            ClusterError: The file cannot be read.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ClusterError(f"{self.path} cannot be read: {error.strerror}") from None
        begun: dict[str, dict[str, Any]] = {}
        ends: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(text.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                (begun if item["event"] == "begun" else ends).setdefault(item["id"], item)
            except (ValueError, TypeError, KeyError):
                warn(f"{self.path}:{number}: not an entry; left out. A machine that broke down?")
        entries = []
        for id, item in begun.items():
            try:
                entries.append(_entry(item, ends.get(id)))
            except (ValueError, TypeError, KeyError, AttributeError):
                warn(f"{self.path}: the entry {id} is not whole; left out")
        return entries

    def _time(self) -> str:
        return self._now().isoformat(timespec="seconds")

    def _append(self, item: Mapping[str, Any]) -> None:
        line = json.dumps(item, ensure_ascii=False).encode() + b"\n"
        try:
            fresh = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, _MODE)
            try:
                if _is_torn(handle):
                    # What a crash left half written stays a line of its own.
                    line = b"\n" + line
                view = memoryview(line)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            if fresh:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise ClusterError(
                f"the journal {self.path} cannot be written: {error.strerror}. Give a repository "
                "that can be written with --repository"
            ) from None


def _is_torn(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(begun: Mapping[str, Any], end: Mapping[str, Any] | None) -> Entry:
    outcome: Outcome = "unfinished"
    if end is not None:
        outcome = "done" if end["event"] == "done" else "failed"
    return Entry(
        id=begun["id"],
        time=begun["time"],
        who=begun["who"],
        action=begun["action"],
        model=begun["model"],
        before=dict(begun["from"]),
        after=dict(begun["to"]),
        why=begun.get("why", ""),
        cluster=begun.get("cluster", ""),
        outcome=outcome,
        reason=end.get("reason", "") if end else "",
        ended=end["time"] if end else None,
        config_before=tuple(begun.get("config_before", ())),
    )


def previous_version(entries: Sequence[Entry], current: int) -> int | None:
    """The version that the current one took over from, when it was last promoted.

    Rollbacks are not looked at: a second rollback goes further back, and not forth again. A
    promotion whose command was killed counts: that its version is the current one shows that Serve
    went through with it.

    Args:
        entries: Oldest first.
        current: The stable version.
    """
    for entry in reversed(entries):
        was, became = entry.before.get("version"), entry.after.get("version")
        if (
            entry.action == "promote"
            and entry.outcome != "failed"
            and became == current
            and was != current
        ):
            return None if was is None else int(was)
    return None
