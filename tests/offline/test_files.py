"""What an input is, and what is said of it before any work."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pa_fs

from rayprism.errors import ConfigInvalid, SetupError
from rayprism.offline.files import list_inputs, open_filesystem, partition_values
from rayprism.offline.unify import common_type


def write(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def paths(*uris: object) -> list[str]:
    listing = list_inputs([str(uri) for uri in uris], format="parquet", columns=["x"])
    return [facts.path for facts in listing.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "sub/deep/d.parquet", "s[1].parquet"):
        write(tmp_path / name, x=[1])
    for name in ("_SUCCESS", ".hidden", "_tmp/e.parquet", "sub/.f.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not parquet")
    return tmp_path


def test_folders_globs_and_files(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ["a.parquet", "b.parquet", "s[1].parquet", "sub/c.parquet", "sub/deep/d.parquet"]
    assert paths(tree) == everything
    assert paths(f"file://{tree}/") == everything
    assert paths(f"{tree}/*.parquet") == ["a.parquet", "b.parquet", "s[1].parquet"]
    assert paths(f"{tree}/[!a].parquet") == ["b.parquet"]
    assert paths(f"{tree}/?.parquet") == ["a.parquet", "b.parquet"]
    assert paths(f"{tree}/**/*.parquet") == everything
    assert paths(f"{tree}/*/*.parquet") == ["sub/c.parquet"]
    assert paths(f"{tree}/su*") == ["sub/c.parquet", "sub/deep/d.parquet"]
    assert paths(f"{tree}/*/deep") == ["sub/deep/d.parquet"]
    assert paths(f"{tree}/s[1].parquet") == ["s[1].parquet"]
    monkeypatch.chdir(tree)
    assert paths("sub") == ["c.parquet", "deep/d.parquet"]
    assert paths("*.parquet") == ["a.parquet", "b.parquet", "s[1].parquet"]


def test_a_file_that_is_named_twice_counts_once(tree: Path) -> None:
    found = paths(tree / "sub", tree / "a.parquet", f"{tree}/sub/*.parquet")
    assert found == ["a.parquet", "sub/c.parquet", "sub/deep/d.parquet"]


def test_a_listing_is_plain_data(tree: Path) -> None:
    listing = list_inputs([str(tree)], format=None, columns=["x"])
    again = pickle.loads(pickle.dumps(listing))
    assert again == listing
    assert again.format == "parquet"
    for index, facts in enumerate(again.files):
        info = again.open().get_file_info(again.path(index))
        assert info.size == facts.size_bytes
        assert facts.row_groups == (1,)


def test_nothing_is_there(tree: Path) -> None:
    for uri, said in [
        (tree / "a.parqet", r"a\.parqet does not exist\. Did you mean 'a\.parquet'\?"),
        (tree / "none" / "f.parquet", r"does not exist: there is no folder .*none"),
        (f"{tree}/*.csv", r"\*\.csv matches no file: .* holds .*a\.parquet"),
        (f"{tree}/none/*.csv", r"matches no file: .*none is not a folder"),
        ("what://a/b", r"what://a/ cannot be opened"),
    ]:
        with pytest.raises(SetupError, match=said):
            paths(uri)
    with pytest.raises(SetupError, match="names no file"):
        paths()
    with pytest.raises(SetupError, match="one filesystem"):
        paths(tree, "gs://anonymous@bucket/data")


def test_an_empty_input(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=pa.array([], pa.int64()))
    with pytest.raises(SetupError, match="is empty: 1 files, and no row"):
        paths(tmp_path)
    for name, text in [("a.csv", "x,y\n"), ("b.csv", ""), ("c.jsonl", ""), ("d.jsonl", "\n")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(SetupError, match="is empty"):
            list_inputs([str(tmp_path / name)], format=None, columns=["x"])
    (tmp_path / "z").mkdir()
    with pytest.raises(SetupError, match="matches no file"):
        paths(tmp_path / "z")


def test_an_empty_file_among_others_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=pa.array([], pa.int64()))
    write(tmp_path / "b.parquet", x=[1, 2])
    assert paths(tmp_path) == ["a.parquet", "b.parquet"]
    for name, text in [("a.csv", ""), ("b.csv", "y"), ("c.csv", "x,y\n1,2")]:
        (tmp_path / name).write_text(text)
    assert len(list_inputs([f"{tmp_path}/*.csv"], format=None, columns=["x"]).files) == 3


def test_each_unreadable_file_is_named_up_to_20(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / f"{number:02}.parquet", x=[1])
    (tmp_path / "07.parquet").write_bytes(b"")
    whole = (tmp_path / "08.parquet").read_bytes()
    (tmp_path / "08.parquet").write_bytes(whole[:-20] + b"\xff" * 12 + whole[-8:])
    (tmp_path / "09.parquet").write_text("an article about penguins")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigInvalid) as caught:
        paths(tmp_path)
    assert [fault.path for fault in caught.value.faults] == [f"{tmp_path}/pipe"]
    (tmp_path / "pipe").unlink()
    with pytest.raises(ConfigInvalid) as caught:
        paths(tmp_path)
    assert [fault.path for fault in caught.value.faults] == [
        "07.parquet",
        "08.parquet",
        "09.parquet",
    ]
    for fault in caught.value.faults:
        assert fault.message.startswith("cannot be read as parquet: ")
    for number in range(30):
        (tmp_path / f"{number:02}.parquet").write_text("no")
    with pytest.raises(ConfigInvalid) as caught:
        paths(tmp_path)
    assert len(caught.value.faults) == 21
    assert caught.value.faults[-1].path == "10 more"


def test_missing_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=[1], hour=[1])
    write(tmp_path / "b.parquet", x=[1])
    with pytest.raises(ConfigInvalid) as caught:
        list_inputs([str(tmp_path)], format="parquet", columns=["x", "hour", "our"])
    assert [str(fault) for fault in caught.value.faults] == [
        "our: no file has this column; there are x, hour. Did you mean 'hour'?",
        "b.parquet: lacks column hour",
    ]
    with pytest.raises(ConfigInvalid, match=r"b\.parquet: lacks column hour\. Mend: name the"):
        list_inputs([str(tmp_path)], format="parquet", columns=None)
    assert list_inputs([str(tmp_path)], format=None, columns=["x"]).schema.names == ["x", "hour"]


def test_types_that_do_not_go_together(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.parquet", x=[1.5], y=pa.array([number], pa.int16()))
    write(tmp_path / "4.parquet", x=["1.5"], y=pa.array([1], pa.uint16()))
    with pytest.raises(ConfigInvalid) as caught:
        list_inputs([str(tmp_path)], format=None, columns=["x", "y"])
    assert [str(fault) for fault in caught.value.faults] == [
        "4.parquet: column 'x' is string, and double in 4 other files: no type holds both"
    ]
    listing = list_inputs([str(tmp_path)], format=None, columns=["y"])
    assert listing.schema.field("y").type == pa.int32()


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.int8(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint64(), pa.int64(), None),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.int64(), pa.float64(), None),
        (pa.float16(), pa.float32(), pa.float32()),
        (pa.null(), pa.string(), pa.string()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("ms"), pa.timestamp("ms", "UTC"), None),
        (pa.list_(pa.int8(), 3), pa.list_(pa.float64(), 3), pa.list_(pa.float64(), 3)),
        (pa.list_(pa.int8(), 3), pa.list_(pa.int8(), 4), pa.large_list(pa.int8())),
        (pa.list_(pa.int8()), pa.int8(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.string(), pa.binary(), None),
    ],
)
def test_the_type_of_two_columns(
    one: pa.DataType, other: pa.DataType, both: pa.DataType | None
) -> None:
    assert common_type(one, other) == both
    assert common_type(other, one) == both


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["x", "x", "y"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("x,x,y\n1,2,3\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(ConfigInvalid, match="more than one column x"):
            list_inputs([str(tmp_path / name)], format=None, columns=["x"])
        list_inputs([str(tmp_path / name)], format=None, columns=["y"])


def test_csv_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf\r\n"x, 1";y\r\n1;2\r\n')
    listing = list_inputs([str(path)], format=None, columns=["y"], delimiter=";")
    assert listing.schema == pa.schema([("x, 1", pa.string()), ("y", pa.string())])
    assert listing.files[0].splittable
    quoted = list_inputs(
        [str(path)], format="csv", columns=["y"], delimiter=";", newlines_in_values=True
    )
    assert not quoted.files[0].splittable
    for text, said in [
        (b"x;y\n1;2\n", "Is the delimiter right"),
        (b"x,y\r1,2\r", "carriage returns alone"),
        (b"\xff\xfex\0,\0y\n\0", "not UTF-8"),
        (b'x,"y\n1,2\n', "a quote is opened"),
        (b"x" * 3_000_000, "does not end within"),
    ]:
        path.write_bytes(text)
        with pytest.raises(ConfigInvalid, match=said):
            list_inputs([str(path)], format=None, columns=["y"])
    with pytest.raises(SetupError, match="delimiter"):
        list_inputs([str(path)], format=None, columns=["y"], delimiter="||")


def test_a_corrupt_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x\n1\n"))
    (tmp_path / "b.csv.gz").write_bytes(b"x\n1\n")
    with pytest.raises(ConfigInvalid, match=r"b\.csv\.gz: cannot be read as csv"):
        list_inputs([str(tmp_path)], format=None, columns=["x"])


def test_json_types_come_from_samples_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"i": 1, "n": 1, "m": 1, "s": "2020-01-01", "l": [1], "o": {"k": 1}, "z": null}\n'
    )
    (tmp_path / "b.jsonl").write_text('{"i": 2, "n": 2.5, "m": "a", "l": [0.5, null]}\n{\n')
    columns = list("inmsloz")
    schema = list_inputs([str(tmp_path)], format=None, columns=columns).schema
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "i": pa.int64(),
        "n": pa.float64(),
        "m": pa.string(),
        "s": pa.string(),
        "l": pa.list_(pa.float64()),
        "o": pa.string(),
        "z": pa.string(),
    }
    known = list_inputs(
        [str(tmp_path)], format=None, columns=["i"], types={"i": pa.float32()}
    ).schema
    assert known.field("i").type == pa.float64()
    with pytest.raises(ConfigInvalid, match="q: no file has this column"):
        list_inputs([str(tmp_path)], format=None, columns=["q"])


def test_a_fraction_late_in_a_long_file_is_seen(tmp_path: Path) -> None:
    rows = np.zeros(200_000).astype(int).astype(str).tolist()
    rows[-5] = "0.5"
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {row}}}\n' for row in rows))
    listing = list_inputs([str(tmp_path)], format=None, columns=["n"])
    assert listing.schema.field("n").type == pa.float64()


def test_a_file_that_holds_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"x": 1}, {"x": 2}], indent=1))
    with pytest.raises(ConfigInvalid, match=r"a\.jsonl: is not JSON Lines: "):
        list_inputs([str(tmp_path)], format=None, columns=["x"])


def test_the_format_is_told_by_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"x": 1}\n')
    assert list_inputs([str(tmp_path)], format=None, columns=["x"]).format == "jsonl"
    (tmp_path / "README.txt").write_text("x")
    with pytest.raises(SetupError, match=r"do not tell one format: \.ndjson, \.txt"):
        list_inputs([str(tmp_path)], format=None, columns=["x"])


def test_partition_columns(tmp_path: Path) -> None:
    for folder in ("y=2012/m=01/c=a%20b", "y=2013/m=02/c=c"):
        write(tmp_path / folder / "f.parquet", x=[1], y=["no"])
    listing = list_inputs(
        [f"{tmp_path}/y=2012", f"{tmp_path}/y=2013"],
        format=None,
        columns=["x", "y", "c"],
        partitioning="hive",
    )
    assert listing.partitions == ("y", "m", "c")
    assert listing.schema == pa.schema(
        [("x", pa.int64()), ("y", pa.int64()), ("m", pa.string()), ("c", pa.string())]
    )
    assert partition_values(listing.files[0].path) == {"y": "2012", "m": "01", "c": "a b"}
    one = list_inputs([f"{tmp_path}/y=2012"], format=None, columns=["y"], partitioning="hive")
    assert one.files[0].path == "y=2012/m=01/c=a%20b/f.parquet"
    write(tmp_path / "y=2014" / "f.parquet", x=[1], y=["no"])
    with pytest.raises(ConfigInvalid, match=r"y=2014/f\.parquet: its folders give the columns y;"):
        list_inputs([str(tmp_path)], format=None, columns=["x"], partitioning="hive")
    plain = list_inputs([str(tmp_path)], format=None, columns=["x", "y"])
    assert plain.schema == pa.schema([("x", pa.int64()), ("y", pa.string())])


def test_a_filesystem_and_the_path_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("a b/c", f"{tmp_path}/a b/c", f"file://{tmp_path}/a%20b/c"):
        filesystem, path = open_filesystem(uri)
        assert isinstance(filesystem, pa_fs.LocalFileSystem)
        assert path == f"{tmp_path}/a b/c"


def test_a_uri_of_an_object_store_keeps_its_options() -> None:
    filesystem, path = open_filesystem("gs://anonymous@bucket/a/b?.parquet?endpoint_override=x:1")
    assert filesystem.type_name == "gcs"
    assert path == "bucket/a/b?.parquet"
