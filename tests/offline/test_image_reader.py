"""Images of a shard: each file is a row, and one that cannot be read is no other's fault."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.fs as pa_fs
import pytest
from PIL import Image

from rayprism.core.shards import Shard, plan_shards
from rayprism.errors import ConfigInvalid, SetupError
from rayprism.offline import files as files_module
from rayprism.offline import images as images_module
from rayprism.offline.files import Listing, list_inputs
from rayprism.offline.images import PixelFormat
from rayprism.offline.readers import RowBatch, read_shard
from rayprism.offline.spec_parts import ImageOptions
from tests.offline.stand_ins import MemoryFolder

COLUMNS = ["image", "path"]
GREY = PixelFormat(ImageOptions(size=(2, 2), mode="L", scale=1.0), (2, 2), "uint8")


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def listed(*uris: object, partitioning: str = "none", columns: list[str] | None = None) -> Listing:
    return list_inputs(
        [str(uri) for uri in uris],
        format="images",
        columns=COLUMNS if columns is None else columns,
        partitioning="hive" if partitioning == "hive" else "none",
        pixels=GREY,
    )


def whole(listing: Listing) -> Shard:
    (shard,) = plan_shards(
        listing.files, target_rows=1, target_bytes=1, files_per_shard=len(listing.files)
    )
    return shard


def read(listing: Listing, columns: list[str] | None = None, threads: int = 1) -> list[RowBatch]:
    shard = whole(listing)
    return list(read_shard(listing, shard, columns or COLUMNS, 1000, image_threads=threads))


def values(batch: RowBatch) -> list[int]:
    """Of images of one colour."""
    return [row[0][0] for row in batch.table["image"].to_pylist()]


def reasons(batch: RowBatch) -> dict[int, str]:
    return {bad.position: bad.reason for bad in batch.bad}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value in range(20):
        write(tmp_path / "images" / f"{value:02}.png", value)
    return tmp_path / "images"


# --- listing


def test_images_are_found_by_their_suffix(folder: Path) -> None:
    write(folder / "sub" / "deep" / "a.JPEG", 1)
    for name in ("labels.csv", "sub/README", "b.png.gz", "_c.png"):
        (folder / name).write_text("no image")
    listing = listed(folder)
    assert [facts.path for facts in listing.files] == [
        *(f"{value:02}.png" for value in range(20)),
        "sub/deep/a.JPEG",
    ]
    assert listing.passed_over == 3
    assert listing.schema.names == ["image", "path"]
    assert pickle.loads(pickle.dumps(listing)) == listing
    assert len(listed(f"{folder}/0*.png").files) == 10
    assert len(listed(folder / "03.png").files) == 1


def test_no_image_is_there(folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels" / "labels.csv").write_text("x")
    with pytest.raises(SetupError, match=r"labels holds no image: 1 files, as labels\.csv, and"):
        listed(folder / "labels")
    with pytest.raises(ConfigInvalid, match=r"label: no file has this column; .* image, path"):
        listed(folder, columns=["image", "label"])


def test_the_format_may_be_told_by_the_suffix_or_the_options(folder: Path) -> None:
    listing = list_inputs([str(folder)], format=None, columns=None, pixels=GREY)
    assert listing.format == "images"
    with pytest.raises(SetupError, match=r"holds images: say what .* in input\.images, as in"):
        list_inputs([str(folder)], format=None, columns=None)
    (folder / "README").write_text("x")
    listing = list_inputs([str(folder)], format=None, columns=None, pixels=GREY)
    assert (len(listing.files), listing.passed_over) == (20, 1)


# --- reading


@pytest.mark.parametrize("threads", [1, 3])
def test_every_image_is_a_row_in_order(folder: Path, threads: int) -> None:
    listing = listed(folder)
    (batch,) = read(listing, threads=threads)
    assert batch.table.schema == listing.schema
    assert values(batch) == list(range(20))
    assert batch.table["path"].to_pylist() == [facts.path for facts in listing.files]
    assert batch.positions.tolist() == list(range(20))
    assert not batch.bad


def test_shards_are_parts_of_the_whole(folder: Path) -> None:
    (folder / "07.png").write_text("no image")
    listing = listed(folder)
    seen: list[int] = []
    for shard in plan_shards(listing.files, target_rows=1, target_bytes=1, files_per_shard=3):
        for batch in read_shard(listing, shard, ["path", "image"], 2):
            assert batch.table.column_names == ["path", "image"]
            assert len(batch.positions) == batch.table.num_rows
            assert len(batch.positions) + len(batch.bad) <= 2
            assert values(batch) == batch.positions.tolist()
            seen += [*batch.positions.tolist(), *reasons(batch)]
    assert sorted(seen) == list(range(20))


def test_a_batch_has_no_more_pixels_than_there_is_room_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_BATCH_BYTES", 6 * 4)
    assert [len(batch.positions) for batch in read(listed(folder))] == [6, 6, 6, 2]
    monkeypatch.setattr(images_module, "_BATCH_BYTES", 1)
    assert [len(batch.positions) for batch in read(listed(folder))] == [1] * 20


@pytest.mark.parametrize("threads", [1, 3])
def test_each_bad_file_is_a_bad_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("rayprism.offline.image_reader._MOST_FILE_BYTES", 10_000)
    data = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(data[:-20])
    (folder / "02.png").write_bytes(b"")
    (folder / "03.png").write_text("a letter")
    (folder / "04.png").write_bytes(data + bytes(10_000))
    listing = listed(folder)
    (folder / "05.png").unlink()
    (folder / "06.png").write_bytes(data + b"more")
    (folder / "07.png").unlink()
    (folder / "07.png").mkdir()
    (batch,) = read(listing, threads=threads)
    assert values(batch) == batch.positions.tolist() == [0, *range(8, 20)]
    said = reasons(batch)
    assert list(said) == [1, 2, 3, 4, 5, 6, 7]
    assert said[1].startswith("the image is damaged: ")
    assert said[2] == "the file is empty"
    assert said[3].startswith("no image of a known kind")
    assert said[4] == f"the file has {len(data) + 10_000:,} bytes, allowed are 10,000"
    assert said[5] == "the file is not there any more"
    assert said[6] == f"the file has {len(data) + 4} bytes, it had {len(data)} when it was listed"
    assert said[7].startswith("the file cannot be read: ")


def test_a_shard_of_nothing_but_bad_files_is_no_error(folder: Path) -> None:
    listing = listed(folder)
    for value in range(18):
        (folder / f"{value:02}.png").unlink()
    shard = Shard(0, 0, 0, 5, "files", 5)
    (batch,) = read_shard(listing, shard, COLUMNS, 1000)
    assert batch.table.num_rows == len(batch.positions) == 0
    assert batch.table.schema == listing.schema
    assert set(reasons(batch).values()) == {"the file is not there any more"}
    assert len(batch.bad) == 5


def test_where_nothing_can_be_read_it_is_an_error(folder: Path) -> None:
    listing = listed(folder)
    folder.rename(folder.with_name("moved"))
    with pytest.raises(SetupError, match=r"00\.png cannot be read, and neither can other files"):
        read(listing)


def test_without_the_pixels_no_file_is_opened(folder: Path) -> None:
    listing = listed(folder)
    for facts in listing.files:
        (folder / facts.path).unlink()
    (batch,) = read(listing, ["path"])
    assert batch.table["path"].to_pylist() == [facts.path for facts in listing.files]


def test_partitions_are_columns_of_each_file(tmp_path: Path) -> None:
    for label in ("cat", "dog", "__HIVE_DEFAULT_PARTITION__"):
        for value in range(2):
            write(tmp_path / f"label={label}" / f"fold={value}" / "a.png", value)
    listing = listed(tmp_path, partitioning="hive", columns=[*COLUMNS, "label", "fold"])
    assert listing.schema.names == ["image", "path", "label", "fold"]
    (batch,) = read(listing, ["fold", "image", "label"])
    assert batch.table["label"].to_pylist() == [None, None, "cat", "cat", "dog", "dog"]
    assert batch.table["fold"].to_pylist() == [0, 1, 0, 1, 0, 1]
    assert values(batch) == [0, 1, 0, 1, 0, 1]
    assert batch.table.schema.field("fold").type == pa.int64()
    folders = [listing.partition_folder(index) for index in range(6)]
    shards = plan_shards(
        listing.files, target_rows=1, target_bytes=1, files_per_shard=4, folders=folders
    )
    assert len(shards) == 6


# --- filesystems that fail


class Remote(MemoryFolder):
    """Stand-in for an object store that answers, or does not."""

    def __init__(self) -> None:
        super().__init__(renames=False)
        self.errors: dict[str, int] = {}
        self.reads: list[str] = []
        self.down_after: int | None = None

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self.reads.append(path)
        if self.down_after is not None and len(self.reads) > self.down_after:
            raise OSError(f"{path}: connection refused")
        if self.errors.get(path, 0) > 0:
            self.errors[path] -= 1
            raise OSError(f"{path}: slow down")
        return super().open_input_stream(path)


@pytest.fixture
def remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Remote, Listing]:
    store = Remote()
    for path in sorted(folder.iterdir()):
        store.files[f"bucket/{path.name}"] = path.read_bytes()
    filesystem = pa_fs.PyFileSystem(store)
    monkeypatch.setattr(files_module, "open_filesystem", lambda uri: (filesystem, uri))
    return store, replace(listed(folder), filesystem="mem", root="bucket")


def test_a_read_that_fails_once_is_tried_again(remote: tuple[Remote, Listing]) -> None:
    store, listing = remote
    store.errors = {f"bucket/{value:02}.png": 1 for value in (0, 5, 19)}
    (batch,) = read(listing)
    assert values(batch) == list(range(20))
    assert len(store.reads) == 23


def test_a_file_that_always_fails_is_a_bad_row(remote: tuple[Remote, Listing]) -> None:
    store, listing = remote
    store.errors = {"bucket/05.png": 10**6}
    del store.files["bucket/06.png"]
    (batch,) = read(listing)
    assert reasons(batch) == {
        5: "the file cannot be read: bucket/05.png: slow down",
        6: "the file is not there any more",
    }


@pytest.mark.parametrize("after", [0, 10])
def test_a_filesystem_that_goes_away_is_an_error(
    remote: tuple[Remote, Listing], after: int
) -> None:
    store, listing = remote
    store.down_after = after
    with pytest.raises(SetupError, match=r"neither can other files of the input: .*refused"):
        read(listing)
    assert len(store.reads) < 45, "it does not ask for ever"


def test_several_files_are_read_at_once_over_a_network(
    remote: tuple[Remote, Listing], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, listing = remote
    together = Barrier(4, timeout=60)
    plain = MemoryFolder.open_input_stream

    def wait_for_others(self: MemoryFolder, path: str) -> pa.NativeFile:
        together.wait()
        return plain(self, path)

    monkeypatch.setattr(MemoryFolder, "open_input_stream", wait_for_others)
    (batch,) = read(listing)
    assert values(batch) == list(range(20))
    np.testing.assert_array_equal(batch.positions, np.arange(20))
