"""What the batch benchmark shares out, checks, and makes of its samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.batch.__main__ import main
from bench.batch.memory import MemoryWatch, Peaks, role_of
from bench.batch.plain import RowGroup, cut_batches, share_out
from bench.batch.report import (
    judge,
    render,
    summarise_memory,
    summarise_minilm,
    summarise_ways,
)
from bench.batch.runs import BatchBench, OutputWrong, RunFailed, predictions

MIB = 2**20


def test_row_groups_are_shared_out_once_and_evenly() -> None:
    groups = [RowGroup(f"{number // 4}", number % 4, 100 + number % 7) for number in range(30)]
    shares = share_out(groups, 2)
    assert [group for share in shares for group in share] == groups
    first, second = (sum(group.rows for group in share) for share in shares)
    assert abs(first - second) <= 107


def test_more_processes_than_row_groups() -> None:
    shares = share_out([RowGroup("f", 0, 10)], 3)
    assert sorted(map(len, shares)) == [0, 0, 1]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(8, 0), (64, 256), (1, 0)])
def test_batches_hold_every_row_once_within_bounds(rows: int, tokens: int, by_length: bool) -> None:
    lengths = np.random.default_rng(1).integers(3, 300, 1000)
    batches = list(cut_batches(lengths, rows, tokens, by_length=by_length))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    for batch in batches:
        assert len(batch) <= rows
        assert not tokens or len(batch) == 1 or len(batch) * lengths[batch].max() <= tokens


def test_sorting_leaves_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(3, 300, 1000)

    def computed(by_length: bool) -> int:
        batches = cut_batches(lengths, 16, 0, by_length=by_length)
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    assert computed(True) < 1.05 * lengths.sum() < computed(False)


def write(path: Path, row_ids: list[int], values: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row_id": row_ids, "p": values}), path)


def test_predictions_are_put_in_the_order_of_row_id(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [3, 1], [0.3, 0.1])
    write(tmp_path / "key=1" / "b.parquet", [0, 2], [0.0, 0.2])
    write(tmp_path / "_dead_letters" / "c.parquet", [0], [9.0])
    np.testing.assert_allclose(predictions(tmp_path, 4, "p"), [0.0, 0.1, 0.2, 0.3])


def test_predictions_may_be_lists(tmp_path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0, 3.0, 4.0]), 2)
    pq.write_table(pa.table({"row_id": [1, 0], "p": column}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(predictions(tmp_path, 2, "p"), [[3.0, 4.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("row_ids", "values", "told"),
    [
        ([0, 1], [0.5, 0.5], "1 of 3 rows are missing"),
        ([0, 1, 2, 2], [0.5] * 4, "1 come again"),
        ([0, 1, 3], [0.5] * 3, "row_id from 0 to 3"),
        ([0, 1, 2], [0.5, None, 0.5], "1 rows without p"),
    ],
)
def test_wrong_outputs_are_refused(
    tmp_path: Path, row_ids: list[int], values: list[Any], told: str
) -> None:
    write(tmp_path / "a.parquet", row_ids, values)
    with pytest.raises(OutputWrong, match=told):
        predictions(tmp_path, 3, "p")


def test_an_empty_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputWrong, match="3 of 3 rows are missing"):
        predictions(tmp_path, 3, "p")


@pytest.mark.parametrize(
    ("title", "is_root", "role"),
    [
        ("python batch/predict.py x.yaml --local", True, "driver"),
        ("ray::MapWorker(MapBatches(_Actor)).submit", False, "actor"),
        ("ray::MapWorker(MapBatches(_Actor))", False, "actor"),
        ("ray::IDLE", False, "ray"),
        ("ray::_StatsActor", False, "ray"),
        ("/opt/ray/raylet --MapWorker", False, "ray"),
    ],
)
def test_role_of_a_process(title: str, is_root: bool, role: str) -> None:
    assert role_of(title, is_root=is_root) == role


def test_peaks_of_processes_and_of_one_moment() -> None:
    peaks = Peaks()
    peaks.add({1: ("driver", 100), 2: ("ray", 500)})
    peaks.add({1: ("driver", 120), 2: ("actor", 300), 3: ("actor", 400)})
    # Between two calls an actor has the title of an idle process.
    peaks.add({1: ("driver", 110), 2: ("ray", 90)})
    found = peaks.to_json()
    assert found["actors_bytes"] == [500, 400]
    assert found["driver_bytes"] == 120
    assert found["all_bytes"] == 820, "the most at one time, not the sum of the peaks"


def test_a_watch_sees_descendants() -> None:
    child = "import sys; held = bytearray(60 << 20); print('x', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watch = MemoryWatch(process.pid)
        process.stdout.readline()
        # The first of them may have begun before.
        assert watch.wait_for_samples(2, timeout_s=20)
        process.stdin.close()
        process.wait(10)
        peaks = watch.stop().to_json()
    assert peaks["processes"] == 2
    assert 5 * MIB < peaks["driver_bytes"] < 60 * MIB < peaks["all_bytes"]


def ways_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "way": way,
            "round": number,
            "seconds": value,
            "rate": 1000 / value,
            "cpu_s": 2 * value,
            "output_bytes": 5,
            "other_cores": 0.0,
        }
        for way, values in seconds.items()
        for number, value in enumerate(values)
    ]


def test_ratios_are_those_of_the_rounds() -> None:
    # The machine is half as fast in the second round, for all.
    found = summarise_ways(
        ways_of(
            {"plain": [8.0, 16.0, 8.0], "rayprism": [10.0, 20.0, 10.0], "obvious": [30, 60, 30]}
        )
    )
    assert found["plain"]["ratio"] == pytest.approx(0.8)
    assert found["obvious"]["ratio"] == pytest.approx(3.0)
    assert found["rayprism"]["ratio"] is None
    assert found["plain"]["seconds"] == 8.0


def results(**seconds: list[float]) -> dict[str, Any]:
    flights = ways_of({"plain": [8.0], "rayprism": seconds["flights"], "obvious": [30.0]})
    minilm = ways_of(
        {"by length": [9.0], "rayprism": seconds["minilm"], "in order": [12.0]},
    )
    memory = [
        {
            "round": 0,
            "rows": rows,
            "seconds": 1.0,
            "processes": 9,
            "actor_bytes": 300 * MIB + extra,
            "driver_bytes": 200 * MIB,
            "all_bytes": 1500 * MIB,
        }
        for rows, extra in ((2000, 0), (20_000, 60 * MIB))
    ]
    how = {"batch_rows": 8, "batch_tokens": 0}
    found: dict[str, Any] = {
        "date": "2026-11-21T10:00:00+00:00",
        "commit": {"hash": "0123456789abcdef", "changed_since": False},
        "machine": {"cpu": "A CPU", "cores": 4, "memory_gib": 23.4, "system": "Linux"},
        "versions": {"python": "3.11", "ray": "2.60.0", "onnxruntime": "1.31", "pyarrow": "26"},
        "command": "python -m bench.batch",
        "other_cores": 0.03,
        "plan": {"rounds": 1, "cores": 2},
        "flights": {
            "rows": 10_000_000,
            "batch_rows": 4096,
            "obvious": {"batch_format": "numpy", "actor_cpus": 0.5, "ray_cpus": 2},
            "tuning": {"plain": [{"batch_rows": 4096}], "obvious": [{}, {}]},
            "summary": summarise_ways(flights),
        },
        "minilm": {
            "rows": 20_000,
            "best": {"by length": {"batch_rows": 64, "batch_tokens": 256}, "in order": how},
            "summary": summarise_minilm(minilm),
        },
        "rss": {"summary": summarise_memory(memory)},
    }
    found["verdicts"] = [verdict.to_json() for verdict in judge(found)]
    return found


def test_verdicts() -> None:
    found = results(flights=[10.0], minilm=[11.0])
    verdicts = {item["name"]: (item["value"], item["met"]) for item in found["verdicts"]}
    assert verdicts == {
        "flights, rows/s: rayprism / plain loop": (pytest.approx(0.8), True),
        "flights, rows/s: rayprism / obvious Ray Data": (pytest.approx(3.0), True),
        # To the better loop, though it is faster than the other one.
        "MiniLM, rows/s: rayprism / the better plain loop": (pytest.approx(9 / 11), False),
        "peak RSS of the largest actor, most rows / fewest": (pytest.approx(1.2), False),
        "peak RSS of the driver, most rows / fewest": (1.0, True),
        "peak RSS of all processes together, most rows / fewest": (1.0, True),
    }


def test_report_has_every_table() -> None:
    text = render(results(flights=[10.0], minilm=[9.0]))
    assert "2 of 4 cores (A CPU)" in text
    assert "| plain loop, batches of 4,096 | 8.00 s | 125 | 16.0 s | 0.80x |" in text
    assert "| plain loop, sorted by length, batches of 64 and 256 tokens | 9.00 s |" in text
    assert "| the largest actor | 300 MiB | 360 MiB | 1.20x |" in text
    assert text.count("**fail**") == 1


def test_a_command_that_fails_tells_what_it_printed(tmp_path: Path) -> None:
    bench = BatchBench("test-batch-marker", tmp_path, tmp_path / "models", cores=1, rounds=1)
    script = "import sys; print('no such column'); sys.exit(3)"
    with pytest.raises(RunFailed, match=r"(?s)ended with 3.*no such column"):
        bench.run([sys.executable, "-c", script])


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    bench = BatchBench("test-batch-marker", tmp_path, tmp_path / "models", cores=1, rounds=1)
    with pytest.raises(RunFailed, match=r"did not end within 0\.2 s"):
        bench.run([sys.executable, "-c", "import sys, time; time.sleep(60)"], limit_s=0.2)


def test_too_little_space_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--rows", str(10**15), "--only", "flights", "--folder", str(tmp_path)])
    assert code == 2
    assert "GiB free, needed are" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
