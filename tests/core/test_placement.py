"""Where batches run, and when a model has to leave the event loop."""

from __future__ import annotations

import pytest

from rayprism.core.placement import Place, Placement


@pytest.mark.parametrize(
    ("execution", "measured_run_s", "place"),
    [
        ("auto", 0.0005, Place.INLINE),
        ("auto", 0.0015, Place.THREAD),
        ("inline", 1.0, Place.INLINE),
        ("thread", 0.00002, Place.THREAD),
    ],
)
def test_the_measurement_decides_unless_the_operator_did(
    execution: str, measured_run_s: float, place: Place
) -> None:
    assert Placement(execution, measured_run_s).place is place


def batches_until_it_leaves(placement: Placement, *runs_s: float, most: int = 1000) -> int | None:
    for number in range(most):
        if placement.observe(runs_s[number % len(runs_s)]):
            assert placement.place is Place.THREAD
            return number + 1
    return None


def test_a_slow_model_leaves_after_a_few_batches() -> None:
    assert batches_until_it_leaves(Placement("auto", 0.0005), 0.02) == 5
    assert batches_until_it_leaves(Placement("auto", 0.0005), 0.006) == 17


def test_slow_batches_between_fast_ones_are_not_forgiven() -> None:
    placement = Placement("auto", 0.0005)
    assert batches_until_it_leaves(placement, 0.0005, 0.1) is not None


def test_a_stall_of_the_machine_is_forgiven() -> None:
    stall = [3.0] + [0.0001] * 60
    assert batches_until_it_leaves(Placement("auto", 0.0005), *stall) is None


def test_an_operator_s_word_stands() -> None:
    assert batches_until_it_leaves(Placement("inline", 0.0005), 1.0) is None
