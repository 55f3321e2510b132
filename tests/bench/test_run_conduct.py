"""What goes on beside a load."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from bench.conduct import Conductor
from bench.scenario import Action


class FakeMeter:
    def __init__(self) -> None:
        self.started_s: float | None = None
        self.stopped = threading.Event()

    def start(self, at_s: float | None = None) -> None:
        self.started_s = at_s

    def stop(self) -> dict[str, Any]:
        self.stopped.set()
        return {"cpu_s": {"load": 1.0}}


def test_actions_happen_in_the_order_of_their_times_and_are_told() -> None:
    done: list[str] = []

    def act(action: Action) -> str:
        done.append(action.do)
        return f"{action.do} is done"

    actions = [
        Action(at_s=0.02, do="rollback"),
        Action(at_s=0.01, do="scale", value=2),
    ]
    meter = FakeMeter()
    conductor = Conductor(meter, act, actions, seconds=0.05)
    began_s = time.monotonic()
    conductor.begin(began_s)
    used, events = conductor.finish()
    assert time.monotonic() - began_s >= 0.05, "it watches to the end"
    assert meter.started_s == began_s
    assert used == {"cpu_s": {"load": 1.0}}
    assert done == ["scale", "rollback"]
    assert [event["what"] for event in events] == ["scale 2", "rollback"]
    assert [event["did"] for event in events] == ["scale is done", "rollback is done"]
    assert all(event["error"] is None for event in events)
    assert events[0]["at_s"] >= 0.01
    assert events[1]["at_s"] >= 0.02


def test_an_action_that_takes_long_does_not_keep_the_meter_from_its_end() -> None:
    meter = FakeMeter()

    def act(action: Action) -> str:
        assert meter.stopped.wait(5), "the meter went on"
        return "done"

    conductor = Conductor(meter, act, [Action(at_s=0, do="promote")], seconds=0.01)
    conductor.begin(time.monotonic())
    _, events = conductor.finish()
    assert events[0]["error"] is None, "and it is waited for"


def test_an_action_that_fails_is_told_and_the_next_one_comes() -> None:
    def act(action: Action) -> str:
        if action.do == "promote":
            raise RuntimeError("no version 2")
        return "done"

    actions = [Action(at_s=0, do="promote"), Action(at_s=0.001, do="rollback")]
    conductor = Conductor(FakeMeter(), act, actions, seconds=0.01)
    conductor.begin(time.monotonic())
    _, events = conductor.finish()
    assert [event["error"] for event in events] == ["RuntimeError: no version 2", None]


def test_giving_up_waits_for_nothing() -> None:
    done: list[Action] = []
    meter = FakeMeter()
    conductor = Conductor(
        meter, lambda action: str(done.append(action)), [Action(at_s=60, do="promote")], seconds=60
    )
    conductor.begin(time.monotonic())
    began_s = time.monotonic()
    conductor.give_up()
    assert time.monotonic() - began_s < 30
    assert meter.stopped.is_set()
    assert not done


def test_a_load_that_never_began_used_nothing() -> None:
    assert Conductor(FakeMeter(), lambda action: "", [], seconds=60).finish() == ({}, [])


def test_a_meter_that_fails_is_no_secret() -> None:
    class Broken(FakeMeter):
        def stop(self) -> dict[str, Any]:
            raise RuntimeError("no processes")

    conductor = Conductor(Broken(), lambda action: "", [], seconds=0)
    conductor.begin(time.monotonic())
    with pytest.raises(RuntimeError, match="no processes"):
        conductor.finish()
