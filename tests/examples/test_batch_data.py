"""Flights by the million, or a few of them here, as a batch job reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprism.core.shards import plan_shards
from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.offline.columns import ColumnMap
from rayprism.offline.files import list_inputs
from rayprism.offline.readers import read_shard
from tests.examples.scripts import import_script, run_script
from tests.offline.manifests import manifest

FLIGHTS = 336_776
NUMBERS = ("month", "hour", "minute", "distance")
TEXTS = ("carrier", "origin", "dest")


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    return import_script("flights/flights_data.py").load_flights()


def as_the_model_takes_them(folder: Path, columns: list[str]) -> tuple[pa.Table, list[int], Any]:
    """What a batch job makes of the files: the rows, those at fault, and the listing."""
    specs = [
        *(TensorSpec(name, Datatype.INT64, (-1,)) for name in NUMBERS),
        *(TensorSpec(name, Datatype.BYTES, (-1,)) for name in TEXTS),
    ]
    listing = list_inputs([str(folder)], format=None, columns=columns)
    flights = manifest(specs, [TensorSpec("p", Datatype.FP32, (-1,))])
    mapped = ColumnMap.plan(listing.schema, flights)
    tables, bad = [], []
    for shard in plan_shards(listing.files, target_rows=1_000, target_bytes=50_000):
        for batch in read_shard(listing, shard, columns, 500):
            assert not batch.bad
            ok = mapped.tensors(batch.table).ok
            ids = [int(value) for value in batch.table["row_id"].to_pylist()]
            bad += [ids[index] for index in np.flatnonzero(~ok)]
            tables.append(batch.table)
    return pa.concat_tables(tables), bad, listing


def test_rows_are_the_real_ones_repeated(tmp_path: Path, real: pd.DataFrame) -> None:
    rows = FLIGHTS + 1_000
    out = tmp_path / "flights"
    printed = run_script("flights/batch_data.py", "--rows", rows, "--out", out, "--files", 3)
    assert f"{rows:,} of {rows:,} rows" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flights"]
    files = sorted(out.iterdir())
    assert [file.name for file in files] == [f"flights-0000{n}.parquet" for n in range(3)]
    got = pq.read_table(out)
    assert got["row_id"].to_pylist() == list(range(rows))
    frame = got.to_pandas()
    for name in (*NUMBERS, *TEXTS, "year", "day", "flight"):
        assert frame[name][:FLIGHTS].tolist() == real[name].tolist(), name
        assert frame[name][FLIGHTS:].tolist() == real[name][:1_000].tolist(), name


def test_a_label_is_null_where_nobody_knows(tmp_path: Path, real: pd.DataFrame) -> None:
    run_script("flights/batch_data.py", "--rows", 5_000, "--out", tmp_path / "o", "--files", 1)
    labels = pq.read_table(tmp_path / "o")["delayed"].to_pylist()
    delays = real["arr_delay"][:5_000]
    assert labels == [None if pd.isna(delay) else delay >= 15 for delay in delays]
    assert None in labels


def test_row_groups_are_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "o"
    run_script(
        *("flights/batch_data.py", "--rows", 1_000, "--out", out),
        *("--files", 2, "--row-group-rows", 200),
    )
    for file in out.iterdir():
        metadata = pq.read_metadata(file)
        assert [metadata.row_group(n).num_rows for n in range(3)] == [200, 200, 100]


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_bad_rows_and_no_others_cannot_be_predicted(tmp_path: Path, format: str) -> None:
    out = tmp_path / "o"
    printed = run_script(
        *("flights/batch_data.py", "--rows", 3_000, "--out", out, "--files", 2),
        *("--format", format, "--bad-rows", 21, "--row-group-rows", 700, "--seed", 5),
    )
    assert "21 bad rows" in printed
    places = import_script("flights/batch_data.py").bad_places(3_000, 21, 5)
    assert len(set(places.tolist())) == 21
    table, bad, _ = as_the_model_takes_them(out, ["row_id", *NUMBERS, *TEXTS])
    assert bad == places.tolist()
    assert [int(value) for value in table["row_id"].to_pylist()] == list(range(3_000))


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_without_them_every_row_can(tmp_path: Path, format: str) -> None:
    out = tmp_path / "o"
    run_script("flights/batch_data.py", "--rows", 2_000, "--out", out, "--format", format)
    _, bad, listing = as_the_model_takes_them(out, ["row_id", *NUMBERS, *TEXTS])
    assert bad == []
    if format == "parquet":
        assert listing.schema.field("distance").type == pa.int64()


def test_the_place_of_a_bad_row_is_a_matter_of_the_seed() -> None:
    module = import_script("flights/batch_data.py")
    first, again = (module.bad_places(10**9, 100, 1) for _ in range(2))
    assert first.tolist() == again.tolist() != module.bad_places(10**9, 100, 2).tolist()
    assert module.bad_places(5, 5, 0).tolist() == [0, 1, 2, 3, 4]
    assert module.bad_places(5, 0, 0).tolist() == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    said = run_script("flights/batch_data.py", "--rows", 10, "--out", tmp_path, ok=False)
    assert "not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_where_it_fails(tmp_path: Path) -> None:
    module = import_script("flights/batch_data.py")

    def fail(_: str) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        module.write_flights(
            tmp_path / "o",
            rows=100,
            files=2,
            row_group_rows=10,
            format="parquet",
            bad=module.bad_places(100, 0, 0),
            say=fail,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--rows", 0), "allowed is 1 or more"),
        (("--rows", 3, "--files", 4), "--files 4"),
        (("--rows", 3, "--files", 1, "--bad-rows", 4), "--bad-rows 4"),
        (("--rows", 3, "--format", "xml"), "invalid choice"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, more: tuple[object, ...], told: str) -> None:
    said = run_script("flights/batch_data.py", "--out", tmp_path / "o", *more, ok=False)
    assert told in said
    assert list(tmp_path.iterdir()) == []
