"""Carries out a planned change of a fleet: puts it, waits for it, takes it back where it fails."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from rayprism.errors import ClusterError, RayprismError
from rayprism.fleet.edits import Edit, apply_edits, inverse_edits, live_config, masked
from rayprism.fleet.journal import Journal
from rayprism.fleet.lock import whoami
from rayprism.fleet.plans import Plan, Stage, find_model
from rayprism.fleet.rest import ServeClient, parse_state
from rayprism.fleet.rollout import (
    Mark,
    describe_progress,
    has_failed,
    is_ready,
    only_drains,
    user_config_error,
)

__all__ = ["carry_out"]

_POLL_S = 0.5
_TAKE_BACK_S = 60.0
_SETTLE_S = 10.0
_ASK_AGAIN = 5
"""Times that a replica is asked whether it took its user_config: a proxy that is just being told of
new replicas may answer 503."""

Say = Callable[[str], None]


def carry_out(
    client: ServeClient,
    plan: Plan,
    *,
    details: Mapping[str, Any],
    journal: Journal,
    why: str,
    say: Say,
    timeout_s: float,
    take_back_s: float = _TAKE_BACK_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Makes a change, or leaves everything as it was. The caller holds the fleet's lock.

    Args:
        client: Of the cluster.
        plan: What is to be done.
        details: What Serve said of itself when it was planned.
        journal: Of the model; is told of the beginning and of the end.
        why: What the operator says, for the journal.
        say: Is told of each change, a line at a time.
        timeout_s: How long each stage may take.
        take_back_s: How long is waited for what was taken back.
        sleep: Waits between two questions.
        clock: Seconds, monotonic.

    Returns:
        What did not work out although the change is in force; empty where nothing did not.

    Raises:
        ClusterError: It did not work out; says why, and what became of the change. Also where the
            operator interrupted it, and where the fleet is not as it was when it was planned.
    """
    if not plan.stages:
        return ""
    fresh = client.details()
    _check_unchanged(details, fresh)
    entry = journal.begin(
        plan.action,
        who=whoami(),
        before=plan.before,
        after=plan.after,
        why=why,
        cluster=client.address,
        config_before=_config_of_model(fresh, plan.model),
    )
    run = _Run(client, plan.model, say, sleep, clock)
    with _termination_interrupts():
        try:
            leftover = run.stages(plan.stages, fresh, timeout_s)
        except (RayprismError, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted"
            text = f"{_failure(plan, reason)}\n{run.take_back(plan, take_back_s)}"
            journal.end(entry, "failed", text)
            raise ClusterError(text) from None
        except BaseException as error:
            journal.end(entry, "failed", f"{error!r}. {run.take_back(plan, take_back_s)}")
            raise
    try:
        journal.end(entry, "done", leftover)
    except ClusterError as error:
        return f"the change is in force, but {error}"
    return leftover


def _check_unchanged(planned: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    before, now = live_config(planned), live_config(fresh)
    if before == now:
        return
    old = {app["name"]: app for app in before["applications"]}
    new = {app["name"]: app for app in now["applications"]}
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    raise ClusterError(
        f"{', '.join(names) or 'Serve'} changed in between: somebody deployed something else. "
        "Nothing was changed by this command; run it again"
    )


def _config_of_model(details: Mapping[str, Any], model: str) -> list[Any]:
    fleet = find_model(details, model)
    names = {fleet.stable.application, *(other.application for other in fleet.others)}
    applications = live_config(details)["applications"]
    return [masked(application) for application in applications if application["name"] in names]


def _failure(plan: Plan, reason: str) -> str:
    if plan.before.get("version") != plan.after.get("version"):
        return f"version {plan.after.get('version')} did not become ready: {reason}"
    if plan.before.get("traffic") != plan.after.get("traffic"):
        return f"the traffic of {plan.model} was not changed: {reason}"
    return f"{plan.stages[0].says}: {reason}"


class _Run:
    """One change on its way."""

    def __init__(
        self,
        client: ServeClient,
        model: str,
        say: Say,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._model = model
        self._say = say
        self._sleep = sleep
        self._clock = clock
        self._put: list[tuple[Sequence[Edit], Sequence[Edit]]] = []
        """What was put, and what takes it back, stage by stage."""

    def stages(self, stages: Sequence[Stage], details: Mapping[str, Any], timeout_s: float) -> str:
        """Carries out one stage after the other.

        Returns:
            What is left to do although the change is in force; empty where nothing is.
        """
        for index, stage in enumerate(stages):
            self._say(stage.says)
            try:
                self._stage(stage, details if index == 0 else self._client.details(), timeout_s)
            except (RayprismError, KeyboardInterrupt) as error:
                if index == 0 or stage.wait_for:
                    raise
                # Replicas that were waited for and are ready are not given up because something
                # could not be cleared away.
                reason = str(error) or "interrupted"
                return (
                    f"the change is in force, but its last step ({stage.says}) failed: {reason}. "
                    "Run it again to finish"
                )
        return ""

    def _stage(self, stage: Stage, details: Mapping[str, Any], timeout_s: float) -> None:
        config = live_config(details)
        for edits, _ in self._put:
            _check_ours(config, edits)
        marks = {name: Mark.of(details, name, stage.edits) for name in stage.wait_for}
        inverse = inverse_edits(config, stage.edits)
        apply_edits(config, stage.edits)
        # Before it is put: an interruption may come while Serve has it already.
        self._put.append((stage.edits, inverse))
        self._client.put(config)
        if not marks:
            self._settle(details)
            return
        details = self._wait(marks, timeout_s, stage.edits)
        for name in sorted(
            {edit.application for edit in stage.edits if "user_config" in edit.path}
        ):
            self._check_user_config(details, name)

    def _wait(
        self, marks: Mapping[str, Mark], timeout_s: float, edits: Sequence[Edit]
    ) -> Mapping[str, Any]:
        """Waits until all applications are as they should be.

        Raises:
            ClusterError: One has failed, was changed by somebody else, or the time is over.
        """
        deadline = self._clock() + timeout_s
        told: dict[str, str] = {}
        while True:
            trouble = ""
            details: Mapping[str, Any] = {}
            try:
                details = _started(self._client.details())
            except ClusterError as error:
                # The head node may be busy with the very replicas that are waited for.
                trouble = str(error)
                self._tell(told, "", f"waiting on: {trouble}")
            else:
                _check_ours(live_config(details), edits)
                for name, mark in marks.items():
                    self._tell(told, name, describe_progress(details, name, mark))
                    failed = has_failed(details, name, mark)
                    if failed is not None:
                        raise ClusterError(failed)
                if all(is_ready(details, name, mark) for name, mark in marks.items()):
                    return details
            if self._clock() >= deadline:
                if all(
                    is_ready(details, name, mark) or only_drains(details, name, mark)
                    for name, mark in marks.items()
                ):
                    self._say("  the replicas of before still finish what they took")
                    return details
                shown = trouble or "; ".join(
                    describe_progress(details, name, mark, reason=True)
                    for name, mark in marks.items()
                    if not is_ready(details, name, mark)
                )
                raise ClusterError(f"not ready after {timeout_s:g} s: {shown}")
            self._sleep(_POLL_S)

    def _settle(self, before: Mapping[str, Any]) -> None:
        """Waits until Serve has looked at what it was put.

        Until then all applications are DEPLOYING, also those that stay as they are, and whoever
        looks meanwhile takes them for something that is not ready.
        """
        running = {app.name for app in parse_state(before).applications if app.status == "RUNNING"}
        deadline = self._clock() + _SETTLE_S
        # It was put: whether Serve can be asked just now decides nothing.
        with contextlib.suppress(ClusterError):
            while self._clock() < deadline:
                now = self._client.state().applications
                if not any(app.name in running and app.status == "DEPLOYING" for app in now):
                    return
                self._sleep(_POLL_S)

    def _tell(self, told: dict[str, str], name: str, line: str) -> None:
        if line and told.get(name) != line:
            told[name] = line
            self._say(f"  {line}")

    def _check_user_config(self, details: Mapping[str, Any], name: str) -> None:
        """Asks a replica: one refuses a faulty user_config and keeps the one before, healthy."""
        trouble = ""
        for attempt in range(_ASK_AGAIN):
            if attempt:
                self._sleep(_POLL_S)
            try:
                error = user_config_error(details, name)
            except ClusterError as failed:
                trouble = str(failed)
                continue
            if error:
                raise ClusterError(
                    f"the replicas of {name} refuse their user_config and keep the one before: "
                    f"{error}"
                )
            return
        self._say(f"  whether {name} took its user_config is not known: {trouble}")

    def take_back(self, plan: Plan, timeout_s: float) -> str:
        """Brings back what was before, as far as nobody else has changed it since.

        Returns:
            What became of it, for people.
        """
        if not self._put:
            return "Nothing was changed."
        self._say("taking the change back (please do not interrupt)")
        try:
            details = _started(self._client.details())
            config = live_config(details)
            before = deepcopy(config)
            for edits, inverse in reversed(self._put):
                if _holds(config, edits):
                    apply_edits(config, inverse)
                elif not _holds(config, inverse):
                    changed = ", ".join(sorted(_applications(edits)))
                    return (
                        f"Somebody else changed {changed} in the meantime, so it was left as it "
                        "is: see `rayprism status`."
                    )
            if config == before:
                return "Nothing was changed."
            names = sorted({name for edits, _ in self._put for name in _applications(edits)})
            # Replicas of before are what is wanted now: none has to leave.
            marks = {name: Mark.of(details, name, ()) for name in names}
            self._client.put(config)
        except (RayprismError, KeyboardInterrupt) as error:
            return (
                f"It could not be taken back: {str(error) or 'interrupted'}. The fleet may be on "
                f"its way to version {plan.after.get('version')} still: see `rayprism status`."
            )
        inverse_of_all = [edit for _, inverse in self._put for edit in inverse]
        try:
            self._wait(marks, timeout_s, inverse_of_all)
        except (ClusterError, KeyboardInterrupt) as error:
            return (
                f"The change was taken back, but {', '.join(names)} "
                f"{'is' if len(names) == 1 else 'are'} not healthy yet: "
                f"{str(error) or 'interrupted'}. See `rayprism status`."
            )
        return f"Version {plan.before.get('version')} answers as before; the change was taken back."


def _started(details: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Serve says, unless its controller is away: then it has no applications."""
    if not parse_state(details).started:
        raise ClusterError("Serve's controller does not answer")
    return details


def _applications(edits: Sequence[Edit]) -> set[str]:
    return {edit.application for edit in edits}


def _holds(config: Mapping[str, Any], edits: Sequence[Edit]) -> bool:
    """Whether these changes have been made already."""
    made = deepcopy(dict(config))
    try:
        apply_edits(made, edits)
    except RayprismError:
        return False  # an application that is gone
    return made == config


def _check_ours(config: Mapping[str, Any], edits: Sequence[Edit]) -> None:
    if not _holds(config, edits):
        names = ", ".join(sorted(_applications(edits)))
        raise ClusterError(f"somebody else changed {names} in the meantime")


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Lets SIGTERM, as a CI job is cancelled with, act like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
