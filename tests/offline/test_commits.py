"""Every row is in the output once, whatever dies on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
import pytest

from rayprism.errors import SetupError
from rayprism.offline import lease as lease_module
from rayprism.offline.commits import JobChanged, OutputFolder, OutputFull, Totals
from rayprism.offline.shard_writer import Commit
from rayprism.offline.sinks import Sink, writes_by_rename
from tests.offline import output_writer as job
from tests.offline.stand_ins import MemoryFolder

KINDS = {"renames": True, "object store": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def memory(request: pytest.FixtureRequest) -> MemoryFolder:
    return MemoryFolder(request.param)


def local(folder: Path, **options: Any) -> OutputFolder:
    return OutputFolder(pa_fs.LocalFileSystem(), str(folder), **options)


def begun(folder: Path, shards: int = 2) -> OutputFolder:
    output = local(folder)
    output.begin(job.IDENTITY, shards)
    return output


def read_all(files: dict[str, bytes]) -> tuple[list[int], list[int]]:
    """Ids of the rows and of the dead letters, as a reader of the folder finds them."""
    rows: list[int] = []
    letters: list[int] = []
    for name in sorted(files):
        if name.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(files[name]))
            assert table["y"].to_pylist() == [float(n) for n in table["id"].to_pylist()]
            rows += table["id"].to_pylist()
        elif name.endswith(".jsonl"):
            letters += [json.loads(line)["row"] for line in files[name].splitlines()]
    return rows, letters


def on_disk(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def expected(shards: int) -> tuple[list[int], list[int]]:
    rows, letters = [], []
    for shard in range(shards):
        table, dead = job.rows_of(shard)
        rows += table["id"].to_pylist()
        letters += [letter["row"] for letter in dead]
    return rows, letters


# --- an undisturbed run


def test_what_a_job_writes(folder: Path) -> None:
    totals = job.run(local(folder), 8)
    rows, letters = expected(8)
    assert totals == Totals(8_000, len(rows), len(letters), 8, 4.0)
    files = on_disk(folder)
    assert read_all(files) == (rows, letters)
    # Shard 3 has dead letters, shard 6 nothing else.
    assert "_dead_letters/part-00000003.jsonl" in files
    assert "part-00000006.parquet" not in files
    assert {name for name in files if "part" not in name and "_shards" not in name} == {
        "_job.json",
        "_SUCCESS",
    }
    assert json.loads(files["_SUCCESS"]) == {
        "rows_in": 8_000,
        "rows_out": len(rows),
        "dead_letters": len(letters),
        "shards": 8,
        "seconds": 4.0,
        "model": "flights",
        "version": 2,
        "digest": "sha256:2",
    }
    entry = json.loads(files["_shards/00000003.json"])
    assert entry.pop("job") == json.loads(files["_job.json"])["id"]
    part = files["part-00000003.parquet"]
    assert entry == {
        "shard": 3,
        "rows_in": 1_000,
        "rows_out": 990,
        "dead_letters": 10,
        "file": "part-00000003.parquet",
        "sha256": hashlib.sha256(part).hexdigest(),
        "bytes": len(part),
        "seconds": 0.5,
    }
    assert local(folder).finished() == local(folder).totals() == totals


def test_the_same_again_does_nothing(folder: Path) -> None:
    totals = job.run(local(folder), 4)
    before = {name: (folder / name).stat().st_mtime_ns for name in on_disk(folder)}
    assert job.run(local(folder), 4) == totals
    after = {name: (folder / name).stat().st_mtime_ns for name in on_disk(folder)}
    assert {name for name in after if after[name] != before[name]} == {"_SUCCESS"}


def test_rows_go_to_the_folder_of_their_partition(folder: Path) -> None:
    output = begun(folder)
    for shard, name in enumerate(["year=2013/month=1", "year=2013/month=2/"]):
        with output.writer(shard, name) as writer:
            writer.write(pa.table({"id": [shard]}))
            assert writer.commit(1, 0).file == f"{name.strip('/')}/part-{shard:08d}.parquet"
    output.finish()
    assert pq.read_table(str(folder), partitioning="hive").to_pylist() == [
        {"id": 0, "year": 2013, "month": 1},
        {"id": 1, "year": 2013, "month": 2},
    ]


def test_batches_are_put_together_to_row_groups(folder: Path) -> None:
    with begun(folder).writer(0) as writer:
        for _ in range(2_000):
            writer.write(pa.table({"id": pa.array(range(100), pa.int64())}))
        writer.commit(200_000, 0)
    metadata = pq.ParquetFile(folder / "part-00000000.parquet").metadata
    assert metadata.num_rows == 200_000
    assert metadata.num_row_groups == 2
    assert metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize(("asked", "written"), [("none", "UNCOMPRESSED"), ("gzip", "GZIP")])
def test_compression(folder: Path, asked: str, written: str) -> None:
    output = local(folder, compression=asked)
    output.begin(job.IDENTITY, 1)
    job.write_shard(output, 0)
    metadata = pq.ParquetFile(folder / "part-00000000.parquet").metadata
    assert metadata.row_group(0).column(0).compression == written


def test_a_folder_can_be_sent_to_other_processes(folder: Path) -> None:
    output = pickle.loads(pickle.dumps(begun(folder, 1)))
    job.write_shard(output, 0)
    assert begun(folder, 1).done() == {0}


def test_names_that_are_not_utf8_are_dead_letters_too(folder: Path) -> None:
    odd = b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    with begun(folder).writer(0) as writer:
        writer.write(None, [{"file": odd, "row": 0, "reason": "naïve", "code": "x"}])
        writer.commit(1, 0)
    line = (folder / "_dead_letters/part-00000000.jsonl").read_text("utf-8")
    assert json.loads(line)["file"] == odd
    assert "naïve" in line


# --- a shard that is not committed


def test_nothing_is_seen_before_the_commit(folder: Path) -> None:
    output = begun(folder)
    writer = output.writer(0)
    table, letters = job.rows_of(0)
    writer.write(table, letters)
    assert read_all({n: d for n, d in on_disk(folder).items() if "_tmp" not in n}) == ([], [])
    assert output.done() == set()
    writer.abort()
    assert set(on_disk(folder)) == {"_job.json"}
    writer.abort()


def test_an_exception_takes_the_attempt_back(folder: Path) -> None:
    output = begun(folder)

    def fail() -> None:
        with output.writer(0) as writer:
            writer.write(*job.rows_of(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(on_disk(folder)) == {"_job.json"}


@pytest.mark.parametrize("rows_in", [999, 1_001, 0])
def test_a_row_that_got_lost_is_not_committed(folder: Path, rows_in: int) -> None:
    output = begun(folder)
    writer = output.writer(0)
    writer.write(*job.rows_of(0))
    with pytest.raises(ValueError, match=f"{rows_in} rows came in, 990 went out and 10 are dead"):
        writer.commit(rows_in, 0)
    assert set(on_disk(folder)) == {"_job.json"}


def test_tables_of_another_schema_are_refused(folder: Path) -> None:
    writer = begun(folder).writer(0)
    writer.write(pa.table({"id": [1]}))
    with pytest.raises(ValueError, match="another schema than before: id: string"):
        writer.write(pa.table({"id": ["a"]}))
    assert set(on_disk(folder)) == {"_job.json"}


def test_the_first_commit_of_a_shard_stays(folder: Path) -> None:
    output = begun(folder)
    slow = output.writer(0)
    slow.write(pa.table({"id": [1, 2, 3]}))
    with output.writer(0) as fast:
        fast.write(pa.table({"id": [1, 2]}), [{"row": 3}])
        first = fast.commit(3, 1.0)
    before = on_disk(folder)
    assert slow.commit(3, 9.0) == first
    after = on_disk(folder)
    assert {n: d for n, d in after.items() if "_tmp" not in n} == {
        n: d for n, d in before.items() if "_tmp" not in n
    }
    assert not [name for name in after if "_tmp" in name]


def test_what_a_dead_attempt_left_is_replaced(folder: Path) -> None:
    output = begun(folder, 1)
    (folder / "part-00000000.parquet").write_bytes(b"of an attempt that died before its entry")
    with output.writer(0) as writer:
        writer.write(None, [{"row": 0}])
        assert writer.commit(1, 0).file is None
    assert not (folder / "part-00000000.parquet").exists()
    output.finish()


def test_a_worker_of_the_job_before_does_not_write_into_the_next(folder: Path) -> None:
    old = begun(folder)
    writer = old.writer(0)
    writer.write(*job.rows_of(0))
    new = local(folder)
    new.begin({**job.IDENTITY, "version": 3}, 2, restart=True)
    with pytest.raises(SetupError, match="was begun anew since this shard was started"):
        writer.commit(1_000, 0)
    assert set(on_disk(folder)) == {"_job.json"}


def test_an_entry_of_the_job_before_does_not_count(folder: Path) -> None:
    """A worker that outlived its driver wrote it after the folder was emptied."""
    old = begun(folder, 1)
    with old.writer(0) as writer:
        writer.write(pa.table({"id": [-1], "y": [-1.0]}))
        writer.commit(1, 0)
    entry = (folder / "_shards/00000000.json").read_bytes()
    part = (folder / "part-00000000.parquet").read_bytes()
    new = local(folder)
    new.begin(job.IDENTITY, 1, restart=True)
    (folder / "_shards").mkdir(exist_ok=True)
    (folder / "_shards/00000000.json").write_bytes(entry)
    (folder / "part-00000000.parquet").write_bytes(part)
    assert new.totals() == Totals()
    with pytest.raises(SetupError, match="1 of 1 shards are not done"):
        new.finish()
    job.run(local(folder), 1)
    assert read_all(on_disk(folder)) == expected(1)


# --- killed


def test_kill_9_at_random_moments(folder: Path) -> None:
    shards, draw = 60, random.Random(20)
    command = [sys.executable, job.__file__, str(folder), str(shards)]
    entries = folder / "_shards"

    def count() -> int:
        return len(list(entries.glob("*.json"))) if entries.exists() else 0

    reached = []
    for _ in range(40):
        until = count() + draw.randrange(8)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None and count() < until:
            time.sleep(0.001)
        # Anywhere in the next shard: the random moment is what this is about.
        time.sleep(draw.uniform(0.0, 0.03))
        process.kill()
        process.stdout.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        reached.append(count())
    else:
        job.run(local(folder), shards)
    assert len(set(reached)) >= 3, f"it was always killed at the same place: {reached}"
    files = on_disk(folder)
    assert read_all(files) == expected(shards)
    assert not [name for name in files if "_tmp" in name or "_driver" in name]
    totals = json.loads(files["_SUCCESS"])
    assert totals["rows_in"] == totals["rows_out"] + totals["dead_letters"] == shards * job.ROWS


def moments(memory: MemoryFolder) -> Iterator[int]:
    """Every change that a run makes to a filesystem, one after the other."""
    counting = MemoryFolder(memory.renames)
    counting.left_steps = 10**6
    job.run(OutputFolder(pa_fs.PyFileSystem(counting), "bucket/out"), 7)
    return iter(range(10**6 - counting.left_steps))


def dead_driver(files: dict[str, bytes]) -> None:
    """The lease of a process that is gone, and not of this one, which only played dead."""
    files.pop("bucket/out/_driver.json", None)


def test_killed_at_every_moment(memory: MemoryFolder) -> None:
    """Before each single change that a run makes; then it is resumed."""
    count = 0
    for moment in moments(memory):
        memory.files.clear()
        memory.left_steps = moment
        # A kill while the lease is given back is nobody's error.
        with contextlib.suppress(SetupError, OSError):
            job.run(OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out"), 7)
        assert memory.dead
        memory.revive()
        dead_driver(memory.files)
        if "bucket/out/_SUCCESS" in memory.files:
            assert read_all(memory.files) == expected(7)
        job.run(OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out"), 7)
        assert read_all(memory.files) == expected(7)
        assert not [name for name in memory.files if "_tmp" in name]
        count += 1
    assert count > 20


def test_killed_at_every_moment_of_a_restart(memory: MemoryFolder) -> None:
    """The next run never takes what the job before wrote for its own."""
    finished = False
    for moment in range(200):
        memory.files.clear()
        old = OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out")
        old.begin({**job.IDENTITY, "version": 1}, 3)
        for shard in range(3):
            with old.writer(shard, "k=old") as writer:
                writer.write(pa.table({"id": [-1], "y": [-1.0]}))
                writer.commit(1, 0)
        old.finish()
        memory.left_steps = moment
        new = OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out")
        try:
            new.begin(job.IDENTITY, 2, restart=True)
            finished = True
        except (SetupError, OSError):
            assert memory.dead
        memory.revive()
        if finished:
            break
        again = OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out")
        try:
            again.begin(job.IDENTITY, 2)
        except JobChanged:
            # Killed before anything was done: the old output is whole.
            assert OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out").totals().rows_in == 3
            assert "bucket/out/_SUCCESS" in memory.files
            again.begin(job.IDENTITY, 2, restart=True)
        for shard in range(2):
            job.write_shard(again, shard)
        again.finish()
        assert read_all(memory.files) == expected(2)
    assert finished
    assert moment > 8


def test_object_stores_are_written_without_renames(memory: MemoryFolder) -> None:
    job.run(OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out"), 3)
    assert (memory.moves > 0) == memory.renames


@pytest.mark.parametrize(
    ("name", "renames"),
    [
        ("local", True),
        ("hdfs", True),
        ("py::fsspec+file", True),
        ("py::fsspec+memory", True),
        ("s3", False),
        ("gcs", False),
        ("abfs", False),
        ("py::gcs", False),
        ("py::fsspec+('s3', 's3a')", False),
        ("py::fsspec+gs", False),
    ],
)
def test_which_filesystems_rename(name: str, renames: bool) -> None:
    class Named:
        type_name = name

    assert writes_by_rename(Named()) is renames


# --- no space


@pytest.mark.parametrize("room", [0, 3, 1_000, 6_000, 9_000, 13_000])
def test_no_space_in_any_place(memory: MemoryFolder, room: int) -> None:
    output = OutputFolder(pa_fs.PyFileSystem(memory), "bucket/out")
    output.begin(job.IDENTITY, 6)
    memory.left_bytes = room
    with pytest.raises(OutputFull, match="Make room and run the same again"):
        deque(map(partial(job.write_shard, output), range(6)))
    memory.left_bytes = None
    done = output.done()
    assert [commit.shard for commit in output.commits()] == sorted(done)
    if memory.renames:
        assert not [name for name in memory.files if "_tmp" in name]
    for shard in set(range(6)) - done:
        job.write_shard(output, shard)
    output.finish()
    assert read_all(memory.files) == expected(6)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", range(8))
def test_no_space_while_parquet_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int, call: int
) -> None:
    """A stream that fails at its first, second, ... write."""
    output = begun(folder, 1)
    calls = 0

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, data: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > call:
                raise OSError(error, "No space left on device")
            self.stream.write(data)

        def close(self) -> None:
            self.stream.close()

    original = Sink.__init__

    def opened(self: Sink, *arguments: Any) -> None:
        original(self, *arguments)
        self._stream = Full(self._stream)

    with monkeypatch.context() as patched:
        patched.setattr(Sink, "__init__", opened)
        with pytest.raises(OutputFull) as caught:
            job.write_shard(output, 0)
    assert str(folder) in str(caught.value)
    assert not [name for name in on_disk(folder) if name.startswith(("_tmp", "_shards"))]
    job.write_shard(output, 0)
    output.finish()
    assert read_all(on_disk(folder)) == expected(1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file/out"):
        local(tmp_path / "file" / "out").begin(job.IDENTITY, 1)


# --- a folder that holds something else


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "name", ["part-00000000.parquet", "notes.txt", "_SUCCESS", "_shards/00000000.json", "a/b"]
)
def test_a_foreign_folder_is_left_alone(folder: Path, name: str, restart: bool) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    with pytest.raises(SetupError, match="holds something that no job wrote: ") as caught:
        local(folder).begin(job.IDENTITY, 1, restart)
    assert name.split("/")[0] in str(caught.value)
    with pytest.raises(SetupError, match="no job wrote"), local(folder).lease():
        pass
    assert on_disk(folder) == {name: b"precious"}


@pytest.mark.parametrize("text", ["{}", "no JSON", "[]", '{"rayprism_job": 99, "id": "x"}'])
def test_a_job_file_of_something_else(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "_job.json").write_text(text)
    with pytest.raises(SetupError, match="was not written by this release of rayprism"):
        local(folder).begin(job.IDENTITY, 1, restart=True)
    assert on_disk(folder) == {"_job.json": text.encode()}


def test_an_empty_folder_will_do(folder: Path) -> None:
    folder.mkdir()
    (folder / ".keep").write_text("")
    assert job.run(local(folder), 1).shards == 1


def test_a_shard_cannot_be_written_where_no_job_was_begun(folder: Path) -> None:
    with pytest.raises(SetupError, match="was not begun by a job"):
        local(folder).writer(0)
    with pytest.raises(SetupError, match="was not begun by a job"):
        local(folder).finish()


# --- another job


def test_another_job_is_refused_with_the_difference(folder: Path) -> None:
    job.run(local(folder), 2)
    before = on_disk(folder)
    other = {
        **job.IDENTITY,
        "spec": {"model": "flights", "output": {"prefix": "p_"}, "device": "cpu"},
        "version": 3,
        "digest": "sha256:3",
    }
    with pytest.raises(JobChanged) as caught:
        local(folder).begin(other, 5)
    message = str(caught.value)
    for line in (
        "shards: was 2, is 5",
        'digest: was "sha256:2", is "sha256:3"',
        'spec.device: was not there, is "cpu"',
        'spec.output.prefix: was "", is "p_"',
        "version: was 2, is 3",
        "--restart",
    ):
        assert line in message
    assert "listing" not in message
    assert on_disk(folder) == before


def test_identities_are_compared_as_json(folder: Path) -> None:
    local(folder).begin({"a": (1, 2), "b": {"c": 1.0}}, 1)
    local(folder).begin({"b": {"c": 1.0}, "a": [1, 2]}, 1)


def test_a_long_difference_is_cut(folder: Path) -> None:
    local(folder).begin({str(n): "x" * 1_000 for n in range(100)}, 1)
    with pytest.raises(JobChanged, match="and 80 more") as caught:
        local(folder).begin({str(n): "y" * 1_000 for n in range(100)}, 1)
    assert len(str(caught.value)) < 20_000


def test_restart_throws_away_what_jobs_wrote_and_nothing_else(folder: Path) -> None:
    old = begun(folder, 4)
    for shard in range(4):
        with old.writer(shard, "year=2013" if shard else "") as writer:
            writer.write(*job.rows_of(shard))
            writer.commit(1_000, 0)
    old.finish()
    for name in ("notes.txt", "year=2013/notes.txt", "_delta_log/part-00000000.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
    new = local(folder)
    new.begin({**job.IDENTITY, "version": 3}, 4, restart=True)
    assert set(on_disk(folder)) == {
        "_job.json",
        "notes.txt",
        "year=2013/notes.txt",
        "_delta_log/part-00000000.parquet",
    }
    assert (new.done(), new.totals(), new.finished()) == (set(), Totals(), None)


def test_leftovers_of_a_killed_run_are_cleared_away(folder: Path) -> None:
    begun(folder)
    (folder / "_tmp").mkdir()
    (folder / "_tmp" / "part-00000000.parquet-0123").write_text("half")
    begun(folder)
    assert set(on_disk(folder)) == {"_job.json"}


# --- the end


def test_an_output_is_not_finished_before_its_last_shard(folder: Path) -> None:
    output = begun(folder, 30)
    job.write_shard(output, 3)
    with pytest.raises(SetupError, match=r"29 of 30 shards are not done: 0, 1, 2, 4, .*, \.\.\."):
        output.finish()
    assert output.finished() is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("part-00000001.parquet", None),
        ("part-00000001.parquet", b"short"),
        ("_dead_letters/part-00000000.jsonl", None),
        ("_shards/00000001.json", b""),
        ("_shards/00000001.json", b'{"shard": 1, "rows'),
        ("_shards/00000001.json", b'{"shard": 0}'),
    ],
)
def test_a_shard_whose_files_are_gone_is_done_again(
    folder: Path, name: str, content: bytes | None
) -> None:
    output = begun(folder, 2)
    for shard in range(2):
        job.write_shard(output, shard)
    output.finish()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SetupError, match=r"1 of them because their files are gone: \d\. Run the"):
        output.finish()
    assert output.finished() is None
    job.run(local(folder), 2)
    assert read_all(on_disk(folder)) == expected(2)


def test_files_that_no_entry_speaks_of_are_not_left_to_readers(folder: Path) -> None:
    output = begun(folder, 2)
    for shard in range(2):
        job.write_shard(output, shard)
    part = (folder / "part-00000001.parquet").read_bytes()
    strays = ["part-00000009.parquet", "k=v/part-00000001.parquet"]
    for name in [*strays, "_dead_letters/part-00000001.jsonl"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(part)
    output.finish()
    assert read_all(on_disk(folder)) == expected(2)


def test_commits_are_read_in_order(folder: Path) -> None:
    output = begun(folder, 12)
    for shard in (11, 2, 0):
        job.write_shard(output, shard)
    assert [commit.shard for commit in output.commits()] == [0, 2, 11]
    assert isinstance(output.commits()[0], Commit)
    assert output.totals().rows_in == 3_000
