"""The output of a batch job: every shard of the input is in it once, whatever dies on the way.

    _job.json                        what the job is; another one is refused
    part-00000042.parquet            the rows of shard 42
    _dead_letters/part-00000042.jsonl   its rows that could not be predicted, with reasons
    _shards/00000042.json            written last: from now on shard 42 is done
    _driver.json                     who is working on it
    _restart.json                    while `--restart` empties the folder
    _tmp/                            what is being written
    _SUCCESS                         the totals, when every shard is done

A process that dies before it wrote the entry in `_shards` leaves at most files that the next
attempt writes again under the same names. Whoever commits a shard first has done it; a later
attempt, as that of a worker that outlived its driver, leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from rayprism.errors import SetupError
from rayprism.offline.lease import (
    LEASE_FILE,
    REFRESH_S,
    Lease,
    OutputBusy,
    hold_lease,
    refuse_other_driver,
)
from rayprism.offline.shard_writer import Commit, ShardWriter, part_name
from rayprism.offline.sinks import TMP_FOLDER, OutputFull, Store

__all__ = [
    "Commit",
    "JobChanged",
    "OutputBusy",
    "OutputFolder",
    "OutputFull",
    "ShardWriter",
    "Totals",
]

JOB_FILE = "_job.json"
RESTART_FILE = "_restart.json"
SHARDS_FOLDER = "_shards"
DEAD_LETTERS_FOLDER = "_dead_letters"
SUCCESS_FILE = "_SUCCESS"
_FORMAT = 1

_ENTRY = re.compile(r"(\d{8,})\.json")
_PART = re.compile(r"(?:[^/_][^/]*/)*part-\d{8,}\.parquet")
_LETTERS = re.compile(rf"{DEAD_LETTERS_FOLDER}/part-\d{{8,}}\.jsonl")
_MOST_NAMED = 20


class JobChanged(SetupError):
    """The output was begun by a job that differs; carries in what."""

    code = "job_changed"


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all shards that are done.

    Args:
        rows_in: Rows of the input.
        rows_out: Rows with a prediction.
        dead_letters: Rows without one.
        shards: How many.
        seconds: Of work, added up over the shards and not by the clock.
    """

    rows_in: int = 0
    rows_out: int = 0
    dead_letters: int = 0
    shards: int = 0
    seconds: float = 0.0


class OutputFolder:
    """The folder that a batch job writes to.

    Args:
        fs: A pyarrow filesystem.
        path: Of the folder, on that filesystem.
        compression: Of Parquet files; `none` for none.
        renames: Whether files are renamed into place, or uploaded when they are done, as object
            stores need it; by default what suits the filesystem.
        clock: Unix time.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        *,
        compression: str = "zstd",
        renames: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = Store(fs, path, renames)
        self._compression = compression
        self._clock = clock
        self._job_id: str | None = None
        self._lease_id: str | None = None

    # --- the job

    @contextlib.contextmanager
    def lease(self, *, refresh_s: float = REFRESH_S) -> Iterator[Lease]:
        """Keeps other drivers out. Take it before `begin`.

        Raises:
            OutputBusy: Another driver is at work (says which).
            SetupError: The folder holds something else.
        """
        self._job()
        with hold_lease(self._store, refresh_s=refresh_s, clock=self._clock) as lease:
            self._lease_id = lease.id
            try:
                yield lease
            finally:
                self._lease_id = None

    def begin(self, identity: Mapping[str, Any], shard_count: int, restart: bool = False) -> None:
        """Begins the output, or goes on with it where the same job began it.

        Args:
            identity: What has to be the same in every run that adds to the output, as JSON:
                the job, the listing, the plan of shards, the model's digest.
            shard_count: How many shards there are.
            restart: Whether to throw away what an earlier job wrote here.

        Raises:
            JobChanged: Another job began it (says in what it differs).
            OutputBusy: Another driver is at work.
            SetupError: The folder holds something else, or cannot be written.
        """
        refuse_other_driver(self._store, self._clock(), self._lease_id)
        said = _said(identity, shard_count)
        old = self._job()
        emptying = self._store.exists(RESTART_FILE)
        if old is not None and not restart and not emptying:
            self._refuse_changes(old, said)
            self._job_id = old["id"]
            self._store.delete_folder(TMP_FOLDER)
            return
        note = {
            "rayprism_job": _FORMAT,
            "id": secrets.token_hex(8),
            "begun": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds"),
            "rayprism": metadata.version("rayprism"),
            **said,
        }
        if old is not None or emptying:
            # Killed on the way, the folder would hold a part of an output; this says so.
            self._write_json(RESTART_FILE, note)
            self._empty()
        self._write_json(JOB_FILE, note)
        self._store.delete(RESTART_FILE)
        self._job_id = note["id"]
        self._store.delete_folder(TMP_FOLDER)

    def check(self, identity: Mapping[str, Any], shard_count: int) -> None:
        """Raises what `begin` would raise; changes nothing."""
        old = self._job()
        if old is not None and not self._store.exists(RESTART_FILE):
            self._refuse_changes(old, _said(identity, shard_count))

    def _refuse_changes(self, old: dict[str, Any], said: dict[str, Any]) -> None:
        differences = list(_differences(old["shards"], said["shards"], "shards"))
        differences += _differences(old["identity"], said["identity"])
        if differences:
            raise JobChanged(_changed(self._store.path, old, differences))

    def done(self) -> set[int]:
        """Numbers of the shards that are committed."""
        names = self._store.listing(SHARDS_FOLDER)
        return {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name))}

    def commits(self) -> list[Commit]:
        """What is committed, in the order of the shards; an entry that is damaged is not."""
        return [commit for commit in self._entries().values() if commit is not None]

    def totals(self) -> Totals:
        """Of what is committed. Reads every entry: for the start and the end of a run."""
        return _add_up(self.commits())

    def letters(self, most: int) -> list[dict[str, Any]]:
        """A few dead letters, of the first shards that have any.

        Args:
            most: How many.
        """
        found: list[dict[str, Any]] = []
        for name in sorted(self._store.listing(DEAD_LETTERS_FOLDER)):
            lines = (self._store.read(f"{DEAD_LETTERS_FOLDER}/{name}") or b"").splitlines()
            found += [json.loads(line) for line in lines[: most - len(found)]]
            if len(found) >= most:
                break
        return found

    def attempt(self, shard: int, token: str, most: int) -> bool:
        """Notes that a shard is begun, so that one that kills its process is not begun for ever.

        Args:
            shard: Its number.
            token: Of a round: each begins to count anew.
            most: How often it may be begun.

        Returns:
            Whether it may be begun now.
        """
        for count in range(most):
            name = f"{TMP_FOLDER}/{token}-{shard:08d}-{count}"
            if not self._store.exists(name):
                self._store.write(name, b"\n")
                return True
        return False

    def writer(self, shard: int, folder: str = "") -> ShardWriter:
        """For one attempt at a shard.

        Args:
            shard: Its number.
            folder: Where its rows go, as `year=2013/month=1`; by default to the top.

        Raises:
            SetupError: The output was not begun.
        """
        if self._job_id is None:
            job = self._job()
            if job is None:
                raise SetupError(f"{self._store.path} was not begun by a job")
            self._job_id = job["id"]
        return ShardWriter(
            self._store,
            shard,
            job=self._job_id,
            file=f"{folder.strip('/')}/{part_name(shard)}".lstrip("/"),
            letters=f"{DEAD_LETTERS_FOLDER}/part-{shard:08d}.jsonl",
            entry=_entry_name(shard),
            compression=self._compression,
            check=self._refuse_new_job,
        )

    def verify(self) -> list[int]:
        """Takes back the commits whose files are missing, or are not as long as they were.

        Returns:
            Their shards, which have to be done again.
        """
        listing = self._store.listing(recursive=True)
        damaged = [
            shard
            for shard, commit in self._entries().items()
            if commit is None or not _is_there(commit, listing)
        ]
        if damaged:
            self._store.delete(SUCCESS_FILE)
        for shard in damaged:
            self._store.delete(_entry_name(shard))
        return damaged

    def finish(self, about: Mapping[str, Any] | None = None) -> Totals:
        """Writes `_SUCCESS`, once every shard is done and its files are there.

        Args:
            about: What else it says, as the model's digest.

        Raises:
            SetupError: Shards are missing.
        """
        job = self._job()
        if job is None:
            raise SetupError(f"{self._store.path} was not begun by a job")
        damaged = self.verify()
        missing = sorted(set(range(job["shards"])) - self.done())
        if missing:
            named = ", ".join(map(str, missing[:_MOST_NAMED]))
            lost = f", {len(damaged)} of them because their files are gone" if damaged else ""
            raise SetupError(
                f"{len(missing)} of {job['shards']} shards are not done{lost}: "
                f"{named}{', ...' if len(missing) > _MOST_NAMED else ''}. Run the same again"
            )
        commits = self.commits()
        self._delete_strays(commits)
        self._store.delete_folder(TMP_FOLDER)
        totals = _add_up(commits)
        known = {key: job["identity"].get(key) for key in ("model", "version", "digest")}
        self._write_json(SUCCESS_FILE, {**asdict(totals), **known, **(about or {})})
        return totals

    def finished(self) -> Totals | None:
        """The totals, where the output is complete."""
        data = self._store.read(SUCCESS_FILE)
        if data is None:
            return None
        said = json.loads(data)
        return Totals(**{name: said[name] for name in Totals.__dataclass_fields__})

    # --- within

    def _job(self) -> dict[str, Any] | None:
        """What began the output, None where nothing did.

        Raises:
            SetupError: The folder holds something else.
        """
        where = self._store.path
        data = self._store.read(JOB_FILE)
        if data is None and self._store.exists(RESTART_FILE):
            return None
        if data is None:
            ours = (LEASE_FILE, TMP_FOLDER)
            others = sorted(
                name
                for name in self._store.listing()
                if name and name not in ours and not name.startswith(".")
            )
            if others:
                named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
                raise SetupError(
                    f"{where} holds something that no job wrote: {named}. Give a folder that is "
                    "new or empty; nothing was changed"
                )
            return None
        try:
            job: dict[str, Any] = json.loads(data)
            known = job["rayprism_job"] == _FORMAT
            job["id"], job["shards"], job["identity"]
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise SetupError(
                f"{where}/{JOB_FILE} was not written by this release of rayprism. Give a folder "
                "that is new or empty; nothing was changed"
            )
        return job

    def _refuse_new_job(self) -> None:
        job = self._job()
        if job is None or job["id"] != self._job_id:
            raise SetupError(f"{self._store.path} was begun anew since this shard was started")

    def _entries(self) -> dict[int, Commit | None]:
        job = self._job()
        if job is None:
            return {}
        shards = sorted(self.done())

        def read(shard: int) -> Commit | None:
            return Commit.from_json(self._store.read(_entry_name(shard)), shard, job["id"])

        with ThreadPoolExecutor(8) as pool:
            return dict(zip(shards, pool.map(read, shards), strict=True))

    def _empty(self) -> None:
        self._store.delete(SUCCESS_FILE)
        # First what a worker of the job before, that is still at work, needs to commit.
        self._store.delete(JOB_FILE)
        self._store.delete_folder(TMP_FOLDER)
        self._store.delete_folder(SHARDS_FOLDER)
        for name in self._store.listing(recursive=True):
            if _PART.fullmatch(name) or _LETTERS.fullmatch(name):
                self._store.delete(name)

    def _delete_strays(self, commits: list[Commit]) -> None:
        """Files of attempts that no entry speaks of: readers would take their rows twice."""
        kept = {commit.file for commit in commits}
        kept |= {
            f"{DEAD_LETTERS_FOLDER}/part-{commit.shard:08d}.jsonl"
            for commit in commits
            if commit.dead_letters
        }
        for name in self._store.listing(recursive=True):
            if name not in kept and (_PART.fullmatch(name) or _LETTERS.fullmatch(name)):
                self._store.delete(name)

    def _write_json(self, name: str, said: Mapping[str, Any]) -> None:
        self._store.write(name, json.dumps(said, indent=2).encode() + b"\n")


def _said(identity: Mapping[str, Any], shard_count: int) -> dict[str, Any]:
    """The same as it will be read again."""
    said: dict[str, Any] = json.loads(
        json.dumps({"shards": shard_count, "identity": dict(identity)})
    )
    return said


def _entry_name(shard: int) -> str:
    return f"{SHARDS_FOLDER}/{shard:08d}.json"


def _is_there(commit: Commit, listing: Mapping[str, int | None]) -> bool:
    if commit.file is not None and listing.get(commit.file) != commit.bytes:
        return False
    return not commit.dead_letters or (
        f"{DEAD_LETTERS_FOLDER}/part-{commit.shard:08d}.jsonl" in listing
    )


def _add_up(commits: list[Commit]) -> Totals:
    return Totals(
        rows_in=sum(commit.rows_in for commit in commits),
        rows_out=sum(commit.rows_out for commit in commits),
        dead_letters=sum(commit.dead_letters for commit in commits),
        shards=len(commits),
        seconds=round(sum(commit.seconds for commit in commits), 3),
    )


_ABSENT = object()


def _differences(was: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each value that differs, with its path."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            here = f"{path}.{key}" if path else key
            yield from _differences(was.get(key, _ABSENT), now.get(key, _ABSENT), here)
    elif was != now:
        yield f"{path}: was {_shown(was)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    return "not there" if value is _ABSENT else f"{json.dumps(value):.120}"


def _changed(path: str, old: Mapping[str, Any], differences: list[str]) -> str:
    lines = "".join(f"\n  {line}" for line in differences[:_MOST_NAMED])
    more = len(differences) - _MOST_NAMED
    return (
        f"{path} was begun by another job, at {old.get('begun')}:{lines}"
        + (f"\n  and {more} more" if more > 0 else "")
        + "\nChange it back, write to another folder, or throw away what is there with --restart"
    )
