"""Any cut of a file gives the rows of the whole, in order, each position once."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayprism.core.shards import FileFacts, Shard, plan_shards
from rayprism.errors import SetupError
from rayprism.offline import lines as lines_module
from rayprism.offline.files import Format, Listing, list_inputs
from rayprism.offline.readers import RowBatch, read_shard

Rows = list[tuple[int, dict[str, object]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut")


def listing_of(path: Path, format_: Format, schema: pa.Schema, *, quoted: bool = False) -> Listing:
    facts = FileFacts(path.name, path.stat().st_size, splittable=not quoted)
    return Listing(
        "file:///", str(path.parent), (facts,), format_, schema, newlines_in_values=quoted
    )


def shards_at(listing: Listing, cuts: Sequence[int]) -> list[Shard]:
    edges = [0, *sorted(cuts), listing.files[0].size_bytes]
    pairs = pairwise(edges)
    return [Shard(n, 0, start, stop, "bytes") for n, (start, stop) in enumerate(pairs)]


def read(
    listing: Listing, shards: Sequence[Shard], columns: Sequence[str], batch_rows: int
) -> tuple[Rows, dict[int, str]]:
    rows: Rows = []
    bad: dict[int, str] = {}
    for shard in shards:
        for batch in read_shard(listing, shard, columns, batch_rows):
            assert batch.table.column_names == list(columns)
            assert batch.table.schema == pa.schema([listing.schema.field(c) for c in columns])
            assert len(batch.positions) == batch.table.num_rows <= batch_rows
            rows += zip(batch.positions.tolist(), batch.table.to_pylist(), strict=True)
            for row in batch.bad:
                assert row.position not in bad
                bad[row.position] = row.reason
    positions = [position for position, _ in rows]
    assert positions == sorted(set(positions))
    assert not set(positions) & set(bad)
    return rows, bad


CSV_PIECES = [b"a", b"1", b",", b",", b"\n", b"\n", b"\r\n", b"\r", b'"', b'""', b'"x"', b" "]
CSV_PIECES += ["é".encode(), b"\xff", lines_module.BOM, b"\0", b"1,2\n", b'"1","2"\n', b"a,b,c\n"]
CSV_SCHEMA = pa.schema([("x", pa.string()), ("y", pa.string())])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(CSV_PIECES), max_size=40).map(b"".join),
    st.sampled_from([b"x,y\n", b"x,y\r\n", lines_module.BOM + b"x,y\n", b"\n\nx,y\n", b'"x",y\n']),
    st.lists(st.floats(0, 1), max_size=5),
    st.integers(1, 4),
)
@example(b'1,2\n"3\n4",5\n6,7\n', b"x,y\n", [0.5], 2)
@example(b'1,2\n3,"', b"x,y\n", [], 2)
@example(b"1,2\r\n\r\n3,4", b"x,y\r\n", [0.6], 2)
@example(b"\r\r", b"x,y\n", [], 2)
@example(b"1,2\n\r\r\n3,4\r\r\n", b"x,y\n", [], 2)
@example(b'1,2\r3,"', b"x,y\n", [], 2)
@example(b'"a\rb",2\n', b"x,y\n", [], 2)
def test_any_cut_of_a_csv_file(
    folder: Path, body: bytes, header: bytes, cuts: list[float], batch_rows: int
) -> None:
    path = folder / "any.csv"
    path.write_bytes(header + body)
    listing = listing_of(path, "csv", CSV_SCHEMA)
    size = path.stat().st_size
    whole = read(listing, shards_at(listing, []), ["y", "x"], 10_000)
    parts = shards_at(listing, [int(cut * size) for cut in cuts])
    assert read(listing, parts, ["y", "x"], batch_rows) == whole
    # Each line that holds anything is a row or a bad one, at its first byte.
    begin = header.rindex(b"\n") + 1
    told = {position for position, _ in whole[0]} | set(whole[1])
    expected, at = set(), begin
    for line in (header + body)[begin:].split(b"\n"):
        if line.strip(b"\r"):
            expected.add(at)
        at += len(line) + 1
    assert told == expected


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(-2, 2)
    | st.text('aé\n"', max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner),
    max_leaves=3,
)
JSON_LINES = st.one_of(
    st.dictionaries(st.sampled_from(["x", "y", "z"]), JSON_VALUES).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode()
    ),
    st.sampled_from([b"", b" ", b"{", b"[1]", b"{}{}", b'{"x":1', b"}", b"\xff", b"\r", b"NaN"]),
)
JSON_TYPES = st.sampled_from(
    [pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.list_(pa.float64())]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(JSON_LINES, max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.tuples(JSON_TYPES, JSON_TYPES),
    st.lists(st.floats(0, 1), max_size=5),
    st.integers(1, 4),
)
def test_any_cut_of_a_json_lines_file(
    folder: Path,
    texts: list[bytes],
    end: bytes,
    marked: bool,
    types: tuple[pa.DataType, pa.DataType],
    cuts: list[float],
    batch_rows: int,
) -> None:
    path = folder / "any.jsonl"
    path.write_bytes((lines_module.BOM if marked else b"") + end.join(texts))
    listing = listing_of(path, "jsonl", pa.schema(zip("xy", types, strict=True)))
    size = path.stat().st_size
    whole = read(listing, shards_at(listing, []), ["x", "y"], 10_000)
    parts = shards_at(listing, [int(cut * size) for cut in cuts])
    assert read(listing, parts, ["x", "y"], batch_rows) == whole
    assert len(whole[0]) + len(whole[1]) == sum(bool(text.strip()) for text in texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 7))
def test_any_cut_of_a_parquet_file(
    folder: Path, groups: list[int], target_rows: int, batch_rows: int
) -> None:
    path = folder / "any.parquet"
    schema = pa.schema([("x", pa.int64()), ("y", pa.string())])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            values = range(count, count + rows)
            table = pa.table({"x": list(values), "y": [str(v) for v in values]}, schema)
            writer.write_table(table)
            count += rows
    if not count:
        return
    listing = list_inputs([str(path)], format="parquet", columns=["x"])
    shards = plan_shards(listing.files, target_rows=target_rows, target_bytes=1)
    rows, bad = read(listing, shards, ["x"], batch_rows)
    assert rows == [(row, {"x": row}) for row in range(count)]
    assert not bad


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    st.lists(st.floats(0, 1), max_size=5),
    st.integers(1, 7),
)
def test_any_range_of_rows_of_a_parquet_file(
    folder: Path, groups: list[int], cuts: list[float], batch_rows: int
) -> None:
    path = folder / "rows.parquet"
    count = sum(groups)
    with pq.ParquetWriter(path, pa.schema([("x", pa.int32())])) as writer:
        first = 0
        for rows in groups:
            writer.write_table(pa.table({"x": pa.array(range(first, first + rows), pa.int32())}))
            first += rows
    listing = list_inputs([str(path)], format="parquet", columns=["x"])
    edges = [0, *sorted(int(cut * count) for cut in cuts), count]
    for n, (start, stop) in enumerate(pairwise(edges)):
        rows, _ = read(listing, [Shard(n, 0, start, stop, "rows")], ["x"], batch_rows)
        assert rows == [(row, {"x": row}) for row in range(start, stop)]


def csv_rows(path: Path, text: bytes, *, quoted: bool = False, columns: str = "xy") -> RowBatch:
    path.write_bytes(text)
    listing = list_inputs(
        [str(path)], format="csv", columns=list(columns), newlines_in_values=quoted
    )
    batches = list(
        read_shard(listing, Shard(0, 0, 0, path.stat().st_size, "bytes"), list(columns), 1000)
    )
    assert len(batches) == 1
    return batches[0]


def test_csv_values_are_text_and_empty_ones_nulls(tmp_path: Path) -> None:
    batch = csv_rows(tmp_path / "f.csv", b'x,y\n007,\nNA,""\n"a ""b""",1e5\n5" pipe, z\n')
    assert batch.table.to_pydict() == {
        "x": ["007", "NA", 'a "b"', '5" pipe'],
        "y": [None, "", "1e5", " z"],
    }
    assert batch.positions.tolist() == [4, 9, 15, 29]


def test_lines_that_are_no_rows_have_their_byte_offset(tmp_path: Path) -> None:
    text = b'x,y\n1,2\n3\n\n4,5,6\n7,\xff\n"8,9\n10,11\n12,1\r3\n14,15'
    batch = csv_rows(tmp_path / "f.csv", text)
    assert batch.table["x"].to_pylist() == ["1", "10", "14"]
    reasons = {text[row.position :].split(b"\n")[0]: row.reason for row in batch.bad}
    assert reasons == {
        b"3": "the line has 1 columns, the header 2",
        b"4,5,6": "the line has 3 columns, the header 2",
        b"7,\xff": "not UTF-8",
        b'"8,9': "a quote is opened and not closed on its line",
        b"12,1\r3": "a carriage return stands inside the line",
    }


def test_quoted_line_ends_where_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 3)
    text = b'"x\n1",y\r\n1,"a\r\n\nb"\r\n"c""\n",2\n3,"\n",\n5" 6,7\n8,"open\n9,10'
    batch = csv_rows(tmp_path / "f.csv", text, quoted=True, columns="y")
    assert batch.table["y"].to_pylist() == ["a\r\n\nb", "2", "7", "10"]
    assert [text[at : at + 2] for at in batch.positions.tolist()] == [b"1,", b'"c', b'5"', b"9,"]
    assert {text[row.position :][:2]: row.reason for row in batch.bad} == {
        b"3,": "the line has 3 columns, the header 2",
        b"8,": "a quote is opened and not closed on its line",
    }


def test_quoted_line_ends_are_bad_lines_where_they_are_not_allowed(tmp_path: Path) -> None:
    batch = csv_rows(tmp_path / "f.csv", b'x,y\n1,"a\nb"\n3,4\n')
    assert batch.table["x"].to_pylist() == ["3"]
    assert [row.position for row in batch.bad] == [4, 9]


@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_a_line_that_is_too_long_is_one_bad_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, format_: Format
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 40)
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 16)
    path = folder / f"long.{format_}"
    row = b'"%b"\n' if format_ == "csv" else b'{"x":"%b"}\n'
    head = b"x\n" if format_ == "csv" else b""
    texts = [row % (b"a" * count) for count in (1, 500, 2, 29, 40, 3)]
    path.write_bytes(head + b"".join(texts))
    listing = listing_of(path, format_, pa.schema([("x", pa.string())]))
    limit = [text for text in texts if len(text) > 40]
    for cuts in ([], [10, 20, 30], [300], list(range(5, 600, 7))):
        rows, bad = read(listing, shards_at(listing, cuts), ["x"], 2)
        assert len(rows) == len(texts) - len(limit)
        assert sorted(bad.values()) == ["the line is longer than 40 bytes"] * len(limit)


def json_rows(path: Path, text: str, schema: pa.Schema) -> RowBatch:
    path.write_text(text)
    listing = listing_of(path, "jsonl", schema)
    size = path.stat().st_size
    (batch,) = read_shard(listing, Shard(0, 0, 0, size, "bytes"), schema.names, 100)
    return batch


def test_json_values_that_a_type_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    text = (
        '{"n": 1}\n{"n": 2.0}\n{"n": 2.5}\n{"n": true}\n{"n": null}\n{}\n{"n": "7"}\n'
        '{"n": 9223372036854775808}\n{"n": [1]}\n'
    )
    batch = json_rows(tmp_path / "f.jsonl", text, pa.schema([("n", pa.int64())]))
    assert batch.table["n"].to_pylist() == [1, 2, None, None]
    assert [row.reason.removeprefix("column 'n': ") for row in batch.bad] == [
        "a number with a fraction, where the input has int64",
        "a boolean, where the input has int64",
        "text, where the input has int64",
        "a number beyond 64 bits, where the input has int64",
        "a list, where the input has int64",
    ]


def test_json_numbers_and_text(tmp_path: Path) -> None:
    text = '{"n": 1, "s": "a"}\n{"n": 0.5, "s": {"k": [1, null]}}\n{"n": 9007199254740993}\n'
    schema = pa.schema([("n", pa.float64()), ("s", pa.string())])
    batch = json_rows(tmp_path / "f.jsonl", text, schema)
    assert batch.table.to_pydict() == {"n": [1.0, 0.5], "s": ["a", '{"k":[1,null]}']}
    assert len(batch.bad) == 1


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    text = '{"n": 1}\n{"n": \n[1]\n{"n": 1} {"n": 2}\n'
    batch = json_rows(tmp_path / "f.jsonl", text, pa.schema([("n", pa.int64())]))
    assert batch.table["n"].to_pylist() == [1]
    assert [row.position for row in batch.bad] == [9, 16, 20]
    assert batch.bad[0].reason.startswith("not JSON: ")
    assert batch.bad[1].reason == "the line is a list, not an object"


def test_compressed_text_is_one_shard_with_offsets_of_the_text(tmp_path: Path) -> None:
    text = b"x,y\n" + b"".join(b"%d,%d\n" % (row, row) for row in range(1000))
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(text))
    listing = list_inputs([str(tmp_path)], format=None, columns=["x"])
    shards = plan_shards(listing.files, target_rows=1, target_bytes=10)
    assert len(shards) == 1
    rows, _ = read(listing, shards, ["x"], 300)
    assert [row["x"] for _, row in rows] == [str(row) for row in range(1000)]
    assert all(text[at:].startswith(str(row["x"]).encode() + b",") for at, row in rows)


def test_partitions_are_columns(tmp_path: Path) -> None:
    for year, month in ((2012, "01"), (2013, "__HIVE_DEFAULT_PARTITION__")):
        place = tmp_path / f"year={year}" / f"month={month}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"x": [1.5, 2.5], "year": [0, 0]}), place / "f.parquet")
    listing = list_inputs(
        [f"{tmp_path}/year=*/**/*.parquet"],
        format="parquet",
        columns=["x", "year", "month"],
        partitioning="hive",
    )
    listing = pickle.loads(pickle.dumps(listing))
    shards = plan_shards(listing.files, target_rows=10, target_bytes=1)
    rows, _ = zip(*(read(listing, [s], ["month", "x", "year"], 9) for s in shards), strict=True)
    assert [row for _, row in rows[0]] == [
        {"month": "01", "x": 1.5, "year": 2012},
        {"month": "01", "x": 2.5, "year": 2012},
    ]
    assert rows[1][0][1] == {"month": None, "x": 1.5, "year": 2013}
    assert listing.partition_folder(0) == "year=2012/month=01"
    (only,) = read_shard(listing, shards[0], ["year"], 9)
    assert only.table["year"].to_pylist() == [2012, 2012]


def test_columns_come_in_the_types_of_the_listing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([0.5], pa.float32())}), tmp_path / "b.parquet")
    listing = list_inputs([str(tmp_path)], format=None, columns=["x"])
    assert listing.schema.field("x").type == pa.float64()
    for shard in plan_shards(listing.files, target_rows=10, target_bytes=1):
        (batch,) = read_shard(listing, shard, ["x"], 9)
        assert batch.table.schema.field("x").type == pa.float64()
        assert batch.positions.dtype == np.int64


@pytest.mark.parametrize("name", ["f.parquet", "f.csv"])
def test_a_file_that_changed_or_went_since_it_was_listed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(rows: int) -> None:
        if name == "f.csv":
            path.write_text("x\n" + "1\n" * rows)
        else:
            pq.write_table(pa.table({"x": [1] * rows}), path)

    write(2)
    listing = list_inputs([str(path)], format=None, columns=["x"])
    (shard,) = plan_shards(listing.files, target_rows=10, target_bytes=100)
    write(3)
    with pytest.raises(SetupError, match=rf"{name} is not the file that was listed"):
        list(read_shard(listing, shard, ["x"], 9))
    path.unlink()
    with pytest.raises(SetupError, match=rf"{name} cannot be read"):
        list(read_shard(listing, shard, ["x"], 9))


def test_a_damaged_page_is_told_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(5000)}), path)
    listing = list_inputs([str(path)], format=None, columns=["x"])
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    (shard,) = plan_shards(listing.files, target_rows=10_000, target_bytes=1)
    with pytest.raises(SetupError, match=r"f\.parquet cannot be read"):
        list(read_shard(listing, shard, ["x"], 100))


def test_few_texts_come_as_categories_and_many_as_text(tmp_path: Path) -> None:
    rows = 20_000
    table = pa.table(
        {
            "few": pa.array(["b", None, "a", "b"] * (rows // 4)),
            "many": pa.array([f"{row:09}" for row in range(rows)]),
            "number": pa.array(range(rows)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=6_000)
    listing = list_inputs([str(tmp_path)], format=None, columns=table.schema.names)
    (shard,) = plan_shards(listing.files, target_rows=rows, target_bytes=1)
    batches = list(read_shard(listing, shard, table.schema.names, 5_000, as_categories=True))
    found = pa.concat_tables(batch.table for batch in batches)
    assert pa.types.is_dictionary(found.schema.field("few").type)
    assert found.schema.field("many").type == pa.string()
    assert found.cast(table.schema).equals(table)
