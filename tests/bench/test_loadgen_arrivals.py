from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadgen.arrivals import TraceInvalid, read_trace, schedule, times
from bench.scenario import Arrivals

POISSON = Arrivals(kind="poisson")
CONSTANT = Arrivals(kind="constant")
BURSTS = Arrivals(kind="bursts", burst_factor=5.0, burst_s=0.5, every_s=5.0)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def trace_of(folder: Path, *lines: object) -> Arrivals:
    file = folder / "trace"
    file.write_text("\n".join(map(str, lines)) + "\n")
    return Arrivals(kind="trace", file=file)


def test_constant_arrivals_have_equal_gaps_from_zero() -> None:
    assert times(CONSTANT, 4.0, 1.0, rng()).tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("rate", [10.0, 30.0, 3.3, 1000.0])
def test_constant_arrivals_are_as_many_as_the_rate_says(rate: float) -> None:
    assert len(times(CONSTANT, rate, 10.0, rng())) == round(rate * 10)


@given(
    st.sampled_from([CONSTANT, POISSON, BURSTS]),
    st.floats(0.1, 2000),
    st.floats(0.0, 12),
    st.integers(0, 2**32),
)
def test_times_are_in_order_and_within(
    arrivals: Arrivals, rate: float, seconds: float, seed: int
) -> None:
    drawn = times(arrivals, rate, seconds, rng(seed))
    assert (np.diff(drawn) >= 0).all()
    assert ((drawn >= 0) & (drawn < seconds)).all()


def test_equal_seeds_give_equal_times_and_others_do_not() -> None:
    for arrivals in (POISSON, BURSTS):
        first = times(arrivals, 100.0, 5.0, rng(7))
        assert first.tolist() == times(arrivals, 100.0, 5.0, rng(7)).tolist()
        assert first.tolist() != times(arrivals, 100.0, 5.0, rng(8)).tolist()


def test_poisson_gaps_are_exponential() -> None:
    drawn = times(POISSON, 1000.0, 100.0, rng())
    gaps = np.diff(drawn)
    assert len(drawn) == pytest.approx(100_000, rel=0.02)
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    # Of exponential gaps: deviation equals mean, and a share of 1/e is longer than it.
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    assert (gaps > 1e-3).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_bursts_keep_the_mean_rate() -> None:
    drawn = times(BURSTS, 1000.0, 50.0, rng())
    assert len(drawn) == pytest.approx(50_000, rel=0.03)
    in_burst = (drawn % 5.0) < 0.5
    assert in_burst.sum() / (10 * 0.5) == pytest.approx(5000, rel=0.03)
    assert (~in_burst).sum() / (10 * 4.5) == pytest.approx(2500 / 4.5, rel=0.03)


def test_a_burst_is_cut_off_by_the_end() -> None:
    drawn = times(BURSTS, 1000.0, 5.25, rng())
    assert (drawn >= 5.0).sum() == pytest.approx(1250, rel=0.15)


def test_a_trace_is_stretched_to_the_rate_and_keeps_its_shape(tmp_path: Path) -> None:
    arrivals = trace_of(tmp_path, "# seconds", 0, 1, "", "1.5  # a burst", 6)
    # 4 requests, with a gap of mean length (2 s) behind the last: 8 s become 4 / 2 = 2 s.
    assert times(arrivals, 2.0, 2.0, rng()).tolist() == [0.0, 0.25, 0.375, 1.5]
    assert times(arrivals, 2.0, 3.0, rng()).tolist() == [0.0, 0.25, 0.375, 1.5, 2.0, 2.25, 2.375]
    assert times(arrivals, 2.0, 0.3, rng()).tolist() == [0.0, 0.25]


def test_a_trace_of_any_shape_has_the_mean_rate(tmp_path: Path) -> None:
    arrivals = trace_of(tmp_path, *np.sort(rng().random(200) ** 3 * 60))
    assert len(times(arrivals, 50.0, 40.0, rng())) == 2000


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["0", "one"], "line 2: 'one', allowed are seconds"),
        (["0", "-1"], "line 2: '-1'"),
        (["0", "nan"], "line 2: 'nan'"),
        (["0", "inf"], "line 2: 'inf'"),
        (["1"], "two different times"),
        (["1", "1.0"], "two different times"),
        ([], "two different times"),
        (["1700000000", "1700000060"], "seconds from the start"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, lines: list[str], fault: str) -> None:
    file = trace_of(tmp_path, *lines).file
    assert file is not None
    with pytest.raises(TraceInvalid, match=fault):
        read_trace(file)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="No such file"):
        read_trace(tmp_path / "none")


def test_the_warm_up_comes_before_and_changes_nothing() -> None:
    alone = schedule(POISSON, 100.0, 5.0, 0.0, seed=3)
    after = schedule(POISSON, 100.0, 5.0, 2.0, seed=3)
    assert after[after >= 0].tolist() == alone.tolist()
    warm_up = after[after < 0]
    assert warm_up.min() >= -2.0
    assert len(warm_up) == pytest.approx(200, rel=0.3)
    assert (np.diff(after) >= 0).all()
