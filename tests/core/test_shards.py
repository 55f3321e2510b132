"""How an input is cut: nothing lost, nothing twice, and the same tomorrow; and how far a job is."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.core.shards import (
    FileFacts,
    Progress,
    Shard,
    listing_digest,
    plan_digest,
    plan_shards,
)

# A slow machine is not a broken law.
laws = settings(deadline=None, max_examples=200)

TARGET_ROWS = st.integers(1, 1_000)
TARGET_BYTES = st.integers(1, 5_000)


@st.composite
def listings(draw: st.DrawFn) -> list[FileFacts]:
    """Files of any format, empty ones among them."""
    parquet = st.lists(st.integers(0, 1_500), max_size=12).map(tuple)
    kinds = st.tuples(st.integers(0, 20_000), st.none() | parquet, st.booleans())
    chosen = draw(st.lists(kinds, max_size=8))
    return [
        FileFacts(f"part-{index}", size, row_groups, row_groups is None and splittable)
        for index, (size, row_groups, splittable) in enumerate(chosen)
    ]


def of_file(shards: list[Shard], index: int) -> list[Shard]:
    return [shard for shard in shards if shard.file == index]


def extent(shard: Shard, facts: FileFacts) -> range:
    """The rows of a Parquet file, or the bytes of another, that a shard has."""
    if shard.unit != "row_groups":
        return range(shard.start, shard.stop)
    assert facts.row_groups is not None
    return range(sum(facts.row_groups[: shard.start]), sum(facts.row_groups[: shard.stop]))


# --- the plan


@laws
@given(listings(), TARGET_ROWS, TARGET_BYTES)
def test_everything_is_in_exactly_one_shard(
    files: list[FileFacts], target_rows: int, target_bytes: int
) -> None:
    shards = plan_shards(files, target_rows=target_rows, target_bytes=target_bytes)
    for index, facts in enumerate(files):
        parts = of_file(shards, index)
        extents = [extent(part, facts) for part in parts]
        end = facts.size_bytes if facts.row_groups is None else sum(facts.row_groups)
        # In order, without a gap or an overlap, from the first to the last.
        edges = [0, *(part.stop for part in extents)]
        assert [part.start for part in extents] == edges[:-1]
        assert edges[-1] == end
        assert all(part.start < part.stop for part in parts)
        if facts.row_groups is not None:
            assert [part.rows for part in parts] == [len(part) for part in extents]


@laws
@given(listings(), TARGET_ROWS, TARGET_BYTES)
def test_no_shard_is_larger_than_it_has_to_be(
    files: list[FileFacts], target_rows: int, target_bytes: int
) -> None:
    for shard in plan_shards(files, target_rows=target_rows, target_bytes=target_bytes):
        facts = files[shard.file]
        if facts.row_groups is not None:
            rows = len(extent(shard, facts))
            assert shard.unit in ("row_groups", "rows")
            assert rows <= target_rows or shard.unit == "rows" or shard.stop - shard.start == 1
            assert rows <= 8 * target_rows
        else:
            assert (shard.unit, shard.rows) == ("bytes", None)
            whole = (shard.start, shard.stop) == (0, facts.size_bytes)
            assert shard.stop - shard.start <= target_bytes or (whole and not facts.splittable)


@laws
@given(listings(), TARGET_ROWS, TARGET_BYTES)
def test_neighbours_would_not_fit_together(
    files: list[FileFacts], target_rows: int, target_bytes: int
) -> None:
    """Each shard costs a start and a file: there are no more than the targets ask for."""
    shards = plan_shards(files, target_rows=target_rows, target_bytes=target_bytes)
    for index, facts in enumerate(files):
        parts = of_file(shards, index)
        if facts.row_groups is not None:
            for left, right in pairwise(parts):
                if (left.unit, right.unit) == ("row_groups", "row_groups"):
                    taken = facts.row_groups[left.start : right.start + 1]
                    assert sum(taken) > target_rows
        elif facts.splittable:
            assert len(parts) == -(-facts.size_bytes // target_bytes)
            sizes = [part.stop - part.start for part in parts]
            assert not sizes or max(sizes) - min(sizes) <= 1


@laws
@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_a_row_group_is_cut_only_where_it_is_far_too_large(rows: int, target_rows: int) -> None:
    target_rows = max(target_rows, rows // 10_000)
    facts = FileFacts("one.parquet", 10**9, (rows,))
    shards = plan_shards([facts], target_rows=target_rows, target_bytes=1)
    if rows <= 8 * target_rows:
        assert shards == [Shard(0, 0, 0, 1, "row_groups", rows)]
        return
    assert {shard.unit for shard in shards} == {"rows"}
    # Each further part decodes the group from its start once more.
    assert len(shards) == -(-rows // (8 * target_rows))
    sizes = [shard.stop - shard.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@laws
@given(listings(), TARGET_ROWS, TARGET_BYTES)
def test_the_same_files_give_the_same_shards(
    files: list[FileFacts], target_rows: int, target_bytes: int
) -> None:
    plans = [
        plan_shards(given_files, target_rows=target_rows, target_bytes=target_bytes)
        for given_files in (files, list(files), tuple(files))
    ]
    assert plans[0] == plans[1] == plans[2]
    assert [shard.number for shard in plans[0]] == list(range(len(plans[0])))


@laws
@given(listings(), st.data())
def test_a_file_at_the_end_leaves_the_shards_before_it(
    files: list[FileFacts], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(files)))
    before = plan_shards(files[:cut], target_rows=100, target_bytes=700)
    assert plan_shards(files, target_rows=100, target_bytes=700)[: len(before)] == before


@laws
@given(st.integers(0, 50), st.integers(1, 20))
def test_images_are_put_together(count: int, files_per_shard: int) -> None:
    files = [FileFacts(f"{index}.png", 100) for index in range(count)]
    shards = plan_shards(files, target_rows=1, target_bytes=1, files_per_shard=files_per_shard)
    assert [n for shard in shards for n in range(shard.start, shard.stop)] == list(range(count))
    assert {shard.unit for shard in shards} <= {"files"}
    assert all(shard.file == shard.start for shard in shards)
    assert all(shard.rows == shard.stop - shard.start <= files_per_shard for shard in shards)
    assert [shard.number for shard in shards] == list(range(-(-count // files_per_shard)))


@laws
@given(st.lists(st.sampled_from(["y=1", "y=2", "y=3"]), max_size=30), st.integers(1, 8))
def test_images_of_two_folders_are_not_in_one_shard(
    folders: list[str], files_per_shard: int
) -> None:
    folders = sorted(folders)
    files = [FileFacts(f"{folder}/{index}.png", 1) for index, folder in enumerate(folders)]
    shards = plan_shards(
        files, target_rows=1, target_bytes=1, files_per_shard=files_per_shard, folders=folders
    )
    assert [n for shard in shards for n in range(shard.start, shard.stop)] == list(
        range(len(files))
    )
    parts = [folders[shard.start : shard.stop] for shard in shards]
    assert all(len(set(part)) == 1 and len(part) <= files_per_shard for part in parts)
    needed = sum(-(-folders.count(folder) // files_per_shard) for folder in set(folders))
    assert len(shards) == needed


@pytest.mark.parametrize(
    ("facts", "shards"),
    [
        pytest.param(FileFacts("empty.parquet", 120, ()), [], id="Parquet without a row group"),
        pytest.param(
            FileFacts("none.parquet", 120, (0,)),
            [Shard(0, 0, 0, 1, "row_groups", 0)],
            id="Parquet with a row group of no rows",
        ),
        pytest.param(FileFacts("empty.csv", 0, splittable=True), [], id="an empty text file"),
        pytest.param(
            FileFacts("one.csv.gz", 10_000),
            [Shard(0, 0, 0, 10_000, "bytes")],
            id="a file that cannot be cut",
        ),
        pytest.param(
            FileFacts("one.csv", 10, splittable=True),
            [Shard(0, 0, 0, 5, "bytes"), Shard(1, 0, 5, 10, "bytes")],
            id="even parts, no small rest",
        ),
        pytest.param(
            FileFacts("huge.parquet", 10**9, (80, 4, 5, 2)),
            [
                Shard(0, 0, 0, 1, "row_groups", 80),
                Shard(1, 0, 1, 3, "row_groups", 9),
                Shard(2, 0, 3, 4, "row_groups", 2),
            ],
            id="one row group over the target",
        ),
        pytest.param(
            FileFacts("huge.parquet", 10**9, (3, 161, 5)),
            [
                Shard(0, 0, 0, 1, "row_groups", 3),
                Shard(1, 0, 3, 56, "rows", 53),
                Shard(2, 0, 56, 110, "rows", 54),
                Shard(3, 0, 110, 164, "rows", 54),
                Shard(4, 0, 2, 3, "row_groups", 5),
            ],
            id="one row group over 8 times the target",
        ),
        pytest.param(
            FileFacts("arrow.parquet", 10**9, (81,)),
            [Shard(0, 0, 0, 40, "rows", 40), Shard(1, 0, 40, 81, "rows", 41)],
            id="nothing but a large row group",
        ),
    ],
)
def test_plans_as_a_table(facts: FileFacts, shards: list[Shard]) -> None:
    assert plan_shards([facts], target_rows=10, target_bytes=9) == shards


@pytest.mark.parametrize("name", ["target_rows", "target_bytes", "files_per_shard"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_target_below_one_cuts_nothing(name: str, value: int) -> None:
    targets = {"target_rows": 1, "target_bytes": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}, allowed is 1 or more"):
        plan_shards([FileFacts("a.csv", 10, splittable=True)], **targets)


# --- recognised again

LISTING = [
    FileFacts("a.parquet", 100, (10, 20)),
    FileFacts("b.csv", 200, splittable=True),
    FileFacts("empty.parquet", 300, ()),
]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(LISTING[:2], id="a file less"),
        pytest.param(LISTING[::-1], id="another order"),
        pytest.param([FileFacts("A.parquet", 100, (10, 20)), *LISTING[1:]], id="another name"),
        pytest.param([FileFacts("a.parquet", 101, (10, 20)), *LISTING[1:]], id="another size"),
        pytest.param([FileFacts("a.parquet", 100, (20, 10)), *LISTING[1:]], id="other groups"),
        pytest.param([*LISTING[:2], FileFacts("empty.parquet", 300)], id="another format"),
    ],
)
def test_another_listing_has_another_digest(other: list[FileFacts]) -> None:
    assert listing_digest(other) != listing_digest(LISTING)


def test_digests_stay_what_they_are() -> None:
    # They are written to the output of a job that may be resumed by a later release.
    assert listing_digest(LISTING) == (
        "sha256:e2318f0c536e30a5f7a9bbc359d39b01c7ad20f99dc02818d7c5b6f24a445647"
    )
    assert plan_digest(plan_shards(LISTING, target_rows=10, target_bytes=90)) == (
        "sha256:233737d4353922ad7b31376158677ed1d990e9cf39dc161086d34f7dd8116c04"
    )


def test_names_need_not_be_utf8() -> None:
    odd = Path(b"caf\xe9.csv".decode("utf-8", "surrogateescape")).name
    assert listing_digest([FileFacts(odd, 1)]) != listing_digest([FileFacts("caf.csv", 1)])


@laws
@given(listings(), st.integers(1, 500), st.integers(1, 500))
def test_plans_have_one_digest_only_where_they_are_the_same(
    files: list[FileFacts], one: int, other: int
) -> None:
    plans = [plan_shards(files, target_rows=rows, target_bytes=1_000) for rows in (one, other)]
    assert (plan_digest(plans[0]) == plan_digest(plans[1])) == (plans[0] == plans[1])


# --- progress


@pytest.mark.parametrize(
    ("total", "done", "steps", "now_s", "rate", "left_s"),
    [
        pytest.param(100, 0, [], 5.0, 0.0, None, id="nothing known yet"),
        pytest.param(100, 0, [(10, 1.0)], 1.0, 10.0, 9.0, id="the first observation"),
        pytest.param(100, 0, [(10, 1.0), (30, 2.0)], 2.0, 20.0, 3.0, id="the mean"),
        pytest.param(100, 0, [(10, 1.0)], 2.0, 5.0, 18.0, id="a pause counts"),
        pytest.param(100, 60, [(10, 1.0)], 1.0, 10.0, 3.0, id="what was done before does not"),
        pytest.param(100, 60, [], 0.0, 0.0, None, id="resumed, nothing done yet"),
        pytest.param(100, 100, [], 0.0, 0.0, 0.0, id="done before it began"),
        pytest.param(100, 0, [(100, 4.0)], 4.0, 25.0, 0.0, id="done"),
        pytest.param(100, 0, [(130, 1.0)], 1.0, 130.0, 0.0, id="more than was expected"),
        pytest.param(0, 0, [], 0.0, 0.0, 0.0, id="nothing to do"),
        pytest.param(100, 0, [(10, 0.0)], 0.0, 0.0, None, id="no time has passed"),
        pytest.param(100, 0, [(10, 1.0)], -1.0, 0.0, None, id="a clock that was set back"),
    ],
)
def test_progress_as_a_table(
    total: int,
    done: int,
    steps: list[tuple[int, float]],
    now_s: float,
    rate: float,
    left_s: float | None,
) -> None:
    progress = Progress(total, done)
    progress.start(0.0)
    for amount, at_s in steps:
        progress.add(amount, at_s)
    assert progress.rate(now_s) == pytest.approx(rate)
    assert progress.left_s(now_s) == (None if left_s is None else pytest.approx(left_s))


def test_progress_without_a_start_is_not_known() -> None:
    progress = Progress(100)
    assert (progress.rate(1.0), progress.left_s(1.0)) == (0.0, None)


def test_the_speed_is_that_of_the_last_while() -> None:
    progress = Progress(100_000, window_s=60)
    progress.start(0)
    for second in range(1, 101):
        progress.add(1, second)
    for second in range(101, 201):
        progress.add(100, second)
    assert progress.rate(200) == pytest.approx(100)


def test_a_long_job_keeps_no_long_list() -> None:
    progress = Progress(10**9, window_s=60)
    progress.start(0)
    draw = random.Random(1)
    now_s = 0.0
    for _ in range(5_000):
        now_s += draw.uniform(0.5, 1.5)
        progress.add(100, now_s)
    assert len(progress._seen) < 150
    assert progress.rate(now_s) == pytest.approx(100, rel=0.1)
