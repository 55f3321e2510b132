"""What a change of traffic, a promotion or a rollback has to do: decided before anything is done.

Everything here is a decision on values: what runs, what is wanted, and what the repository holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rayprism.errors import ClusterError
from rayprism.fleet.edits import ABSENT, Absent, Edit
from rayprism.fleet.model_fleet import TRAFFIC_PATH, ModelFleet, ServedVersion, find_model
from rayprism.fleet.plan_checks import PlanChecks, VersionLookup, snippet
from rayprism.serving.settings import TrafficConfig, parse_user_config

__all__ = [
    "Action",
    "ModelFleet",
    "Plan",
    "ServedVersion",
    "Stage",
    "VersionLookup",
    "find_model",
    "plan_promote",
    "plan_rollback",
    "plan_traffic",
]

Action: TypeAlias = Literal["traffic", "promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a plan: changes that Serve is given at once.

    Args:
        edits: The changes.
        wait_for: Applications that have to be as they should be before the next stage.
        says: One line of progress.
    """

    edits: tuple[Edit, ...]
    wait_for: tuple[str, ...]
    says: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Args:
        action: What was asked for.
        model: Of which model.
        before: The stable version and the traffic as they are: `{"version": 3, "traffic": None}`.
        after: The same as they will be.
        stages: In order; none where everything is so already.
    """

    action: Action
    model: str
    before: dict[str, Any]
    after: dict[str, Any]
    stages: tuple[Stage, ...]

    @property
    def all_edits(self) -> tuple[Edit, ...]:
        """The changes of all stages in order: what the file has to be given."""
        return tuple(edit for stage in self.stages for edit in stage.edits)


def plan_traffic(
    fleet: ModelFleet,
    *,
    weights: Mapping[int, float] | None = None,
    shadows: Mapping[int, float] | None = None,
    sticky: str | Absent | None = None,
    clear: bool = False,
    lookup: VersionLookup,
    allow_signature_change: bool = False,
) -> Plan:
    """Who gets which share of the requests from now on. None leaves a thing as it is.

    Args:
        fleet: What serves the model.
        weights: Percent by version, for candidates. Others that are listed keep theirs; one with
            0 stays listed.
        shadows: Percent by version of the requests that are copied, likewise.
        sticky: The header that keeps a user at one version; `ABSENT`: none.
        clear: Whether everything that is said of traffic is taken out first.
        lookup: Reads manifests.
        allow_signature_change: Whether inputs and outputs may differ from the stable version's.

    Raises:
        ConfigInvalid: Every reason why this cannot be.
    """
    traffic = {} if clear else _normal(fleet.raw_traffic)
    checks = PlanChecks(fleet, lookup, allow_signature_change)
    before = TrafficConfig() if clear or fleet.traffic is None else fleet.traffic
    candidates = {item.version: item.weight for item in before.candidates}
    _share(traffic, "candidates", weights, candidates, checks)
    _share(
        traffic, "shadow", shadows, {item.version: item.sample for item in before.shadow}, checks
    )
    checks.total(traffic.get("candidates", ()))
    if sticky is ABSENT:
        traffic.pop("sticky", None)
    elif sticky is not None:
        traffic["sticky"] = {"header": sticky}
    checks.finish(f"traffic of {fleet.model}")
    parsed = parse_user_config({"traffic": traffic}).traffic
    return _traffic_plan("traffic", fleet, traffic, _say_traffic(fleet, parsed))


def plan_promote(
    fleet: ModelFleet,
    version: int,
    *,
    keep_candidate: bool = False,
    without_candidate: bool = False,
    lookup: VersionLookup,
    allow_signature_change: bool = False,
) -> Plan:
    """Makes a version the stable one.

    What is said of traffic goes: the weights were meant beside the old version. Then the
    application that served the version beside goes as well. Where only that is left to do, the
    plan is that.

    Args:
        fleet: What serves the model.
        version: To be the stable one.
        keep_candidate: Whether the application that serves it beside stays.
        without_candidate: Whether a version may be promoted that nothing serves yet.
        lookup: Reads manifests.
        allow_signature_change: Whether inputs and outputs may differ from the stable version's.

    Raises:
        ClusterError: It is the stable version already, and nothing is left to do.
        ConfigInvalid: Every reason why this cannot be.
    """
    stable = fleet.stable
    beside = fleet.beside(version)
    removal = [] if keep_candidate or beside is None else [_removal(beside)]
    if version == stable.version:
        if not removal or stable.status != "RUNNING":
            raise ClusterError(
                f"version {version} is the stable version of {fleet.model!r} already, in "
                f"application {stable.application!r}, which is {stable.status}"
            )
        unchanged = _as_is(fleet)
        return Plan("promote", fleet.model, unchanged, dict(unchanged), tuple(removal))
    checks = PlanChecks(fleet, lookup, allow_signature_change)
    if beside is not None:
        checks.running(beside)
    elif not without_candidate:
        checks.fault(
            version,
            "is not deployed beside the stable version, so it has not shown that it loads and "
            f"answers on this cluster. Add the application below, or give --without-candidate\n"
            f"{snippet(fleet, version)}",
        )
    checks.signature(version)
    checks.code(version)
    checks.finish(f"promote {fleet.model} {version}")
    return _version_plan("promote", fleet, version, removal)


def plan_rollback(
    fleet: ModelFleet,
    *,
    version: int | None = None,
    previous: int | None = None,
    lookup: VersionLookup,
    allow_signature_change: bool = False,
) -> Plan:
    """Takes traffic back from candidates and shadows, or else goes back to an older version.

    Args:
        fleet: What serves the model.
        version: To go back to; None: whatever undoes the last step.
        previous: The version that was stable before; None where that is not known.
        lookup: Reads manifests.
        allow_signature_change: Whether inputs and outputs may differ from the stable version's.

    Raises:
        ClusterError: There is no traffic to take back, and no version to go back to.
        ConfigInvalid: Every reason why this cannot be.
    """
    stable = fleet.stable
    if version in (None, stable.version) and _is_split(fleet.traffic):
        traffic = _normal(fleet.raw_traffic)
        traffic.pop("shadow", None)
        if "candidates" in traffic:
            traffic["candidates"] = [{**item, "weight": 0} for item in traffic["candidates"]]
        says = f"give all requests to version {stable.version}"
        return _traffic_plan("rollback", fleet, traffic, says)
    target = previous if version is None else version
    if target is None:
        raise ClusterError(
            f"version {stable.version} of {fleet.model!r} gets all requests, and which version was "
            f"stable before it is not known. `rayprism history {fleet.model}` shows what was done; "
            f"`rayprism rollback {fleet.model} --to VERSION` goes back to that version"
        )
    if target == stable.version:
        unchanged = _as_is(fleet)
        return Plan("rollback", fleet.model, unchanged, dict(unchanged), ())
    checks = PlanChecks(fleet, lookup, allow_signature_change)
    checks.signature(target)
    checks.code(target)
    checks.finish(f"rollback {fleet.model} to {target}")
    return _version_plan("rollback", fleet, target, [])


def _share(
    traffic: dict[str, Any],
    key: Literal["candidates", "shadow"],
    wanted: Mapping[int, float] | None,
    before: Mapping[int, float],
    checks: PlanChecks,
) -> None:
    """Gives versions their shares, in the list of candidates or of shadows."""
    if wanted is None:
        return
    unit = "weight" if key == "candidates" else "sample"
    listed = {int(item["version"]): item for item in traffic.get(key) or ()}
    for version, share in wanted.items():
        if not checks.percent(version, share):
            continue
        entry = listed.setdefault(version, {"version": str(version)})
        old = before.get(version, 0)
        entry[unit] = round(share, 2) if share % 1 else int(share)
        # Less must always be possible, whatever became of the version.
        if share > old or version not in before:
            app = checks.deployed(version)
            if app is None:
                continue
            if share > old:
                checks.running(app)
            if not entry.get("allow_signature_change") and checks.signature(version):
                entry["allow_signature_change"] = True
    if listed or key in traffic:
        traffic[key] = list(listed.values())


def _normal(raw: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `traffic` with versions as strings."""
    traffic = deepcopy(dict(raw or {}))
    for key in ("candidates", "shadow"):
        if key in traffic:
            traffic[key] = [{**item, "version": str(int(item["version"]))} for item in traffic[key]]
    return traffic


def _is_split(traffic: TrafficConfig | None) -> bool:
    return traffic is not None and (
        any(candidate.slots for candidate in traffic.candidates)
        or any(shadow.sample for shadow in traffic.shadow)
    )


def _as_is(fleet: ModelFleet) -> dict[str, Any]:
    return _state(fleet.stable.version, fleet.raw_traffic)


def _state(version: int, traffic: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"version": version, "traffic": deepcopy(dict(traffic)) if traffic else None}


def _traffic_plan(action: Action, fleet: ModelFleet, traffic: dict[str, Any], says: str) -> Plan:
    stable = fleet.stable
    before = _as_is(fleet)
    if traffic == _normal(fleet.raw_traffic):
        return Plan(action, fleet.model, before, dict(before), ())
    edit = Edit(stable.application, TRAFFIC_PATH, traffic or ABSENT)
    stage = Stage((edit,), (stable.application,), says)
    return Plan(action, fleet.model, before, _state(stable.version, traffic), (stage,))


def _version_plan(action: Action, fleet: ModelFleet, version: int, then: list[Stage]) -> Plan:
    stable = fleet.stable
    edits = [Edit(stable.application, ("args", "version"), str(version))]
    if fleet.raw_traffic is not None:
        edits.append(Edit(stable.application, TRAFFIC_PATH, ABSENT))
    says = f"start version {version} in the place of version {stable.version}"
    stage = Stage(tuple(edits), (stable.application,), says)
    return Plan(action, fleet.model, _as_is(fleet), _state(version, None), (stage, *then))


def _removal(app: ServedVersion) -> Stage:
    says = f"take out application {app.application!r}, which served version {app.version} beside"
    return Stage((Edit(app.application, (), ABSENT),), (), says)


def _say_traffic(fleet: ModelFleet, traffic: TrafficConfig | None) -> str:
    traffic = traffic or TrafficConfig()
    left = (10_000 - sum(candidate.slots for candidate in traffic.candidates)) / 100
    parts = [f"version {fleet.stable.version} {left:g} %"]
    parts += [f"version {item.version} {item.weight:g} %" for item in traffic.candidates]
    parts += [f"copies to version {item.version} {item.sample:g} %" for item in traffic.shadow]
    return f"share the requests out: {', '.join(parts)}"
