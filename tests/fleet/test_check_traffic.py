"""Traffic in a Serve file: everyone who is to get requests is there, and can stand in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprism.errors import Fault
from rayprism.fleet.check import CheckReport, check_file
from rayprism.models.repository import Repository
from tests.fleet.conftest import push_fake

Check = Callable[..., CheckReport]
TRAFFIC = "applications[0].deployments[0].user_config.traffic"
CANDIDATE = f"{TRAFFIC}.candidates[0].version"
SHADOW = f"{TRAFFIC}.shadow[0].version"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flights` 1 to 4, of which 3 has another output and 4 a broken manifest; `delays` 1 to 7."""
    root = tmp_path_factory.mktemp("repository")
    folders = [push_fake(root, "flights").folder for _ in range(4)]
    for folder, old, new in (
        (folders[2], '"name": "y"', '"name": "score"'),
        (folders[3], '"manifest_version": 1', '"manifest_version": 99'),
    ):
        manifest = folder / "manifest.json"
        text = manifest.read_text()
        assert old in text
        manifest.chmod(0o644)
        manifest.write_text(text.replace(old, new))
    for _ in range(7):
        push_fake(root, "delays")
    return root


@pytest.fixture
def check(tmp_path: Path, repository: Path) -> Check:
    def run(*applications: dict[str, Any], **options: Any) -> CheckReport:
        path = tmp_path / "serve.yaml"
        data = {
            "http_options": {"host": "127.0.0.1", "keep_alive_timeout_s": 20},
            "applications": list(applications),
        }
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return check_file(path, **{"repository": repository, **options})

    return run


def app(
    version: Any,
    traffic: dict[str, Any] | None = None,
    *,
    route: str | None = "",
    name: str = "",
    model: str = "flights",
    **args: Any,
) -> dict[str, Any]:
    """An application, by default where its version belongs; with traffic, where its model does."""
    own = f"/v2/models/{model}" if traffic is not None else f"/v2/models/{model}/versions/{version}"
    config = {} if traffic is None else {"user_config": {"traffic": traffic}}
    return {
        "name": name or (model if traffic is not None else f"{model}-{version}"),
        "route_prefix": own if route == "" else route,
        "import_path": "rayprism.serving.app:build",
        "args": {"model": model, "version": version, **args},
        "deployments": [{"name": "model", **config}],
    }


def to(*versions: Any, **extra: Any) -> dict[str, Any]:
    """Candidates with 5 % each."""
    return {"candidates": [{"version": version, "weight": 5, **extra} for version in versions]}


def copies(*versions: Any, **extra: Any) -> dict[str, Any]:
    """Shadows with 10 % each."""
    return {"shadow": [{"version": version, "sample": 10, **extra} for version in versions]}


def only(faults: tuple[Fault, ...]) -> Fault:
    assert len(faults) == 1, [str(fault) for fault in faults]
    return faults[0]


def clean(report: CheckReport) -> bool:
    return (report.faults, report.warnings) == ((), ())


# --- what is right


def test_a_canary_and_a_shadow_that_are_there(check: Check) -> None:
    delays = app(1, to("7"), model="delays")
    shadowed = app("1", {**to("2"), "sticky": {"header": "x-user-id"}})
    assert clean(check(shadowed, app(2), delays, app(7, model="delays")))
    assert clean(check(app(1, copies(2)), app("2")))


def test_loaded_does_not_mean_used(check: Check) -> None:
    assert clean(check(app(1, {}), app(2), app(3)))
    assert clean(check(app(1, to(2)), app(2), app(3)))


def test_a_candidate_that_gets_nothing_yet_is_one(check: Check) -> None:
    waiting = {"candidates": [{"version": 9, "weight": 0}]}
    assert only(check(app(1, waiting)).faults).path == CANDIDATE


def test_a_candidate_may_be_served_at_an_unusual_route(check: Check) -> None:
    report = check(app(1, to(2)), app(2, route="/two"))
    assert report.ok
    assert only(report.warnings).path == "applications[1].route_prefix"


# --- versions that are not there


@pytest.mark.parametrize(("traffic", "path"), [(to(2), CANDIDATE), (copies(2), SHADOW)])
def test_nobody_serves_it(check: Check, traffic: dict[str, Any], path: str) -> None:
    fault = only(check(app(1, traffic), app(3)).faults)
    assert fault.path == path
    assert "no application of this file serves version 2 of 'flights'" in fault.message
    assert "it serves 1 ('flights'), 3 ('flights-3')" in fault.message
    assert (
        "Add one: name: flights-2, route_prefix: /v2/models/flights/versions/2, import_path: "
        "rayprism.serving.app:build, args: {model: flights, version: 2}"
    ) in fault.message


def test_what_a_fault_says_to_add_mends_it(check: Check) -> None:
    message = only(check(app(1, to(2))).faults).message
    advice = yaml.safe_load(f"{{{message.partition('Add one: ')[2]}}}")
    assert clean(check(app(1, to(2)), {**advice, "deployments": [{"name": "model"}]}))


def test_the_line_is_that_of_the_version(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        """\
http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}
applications:
- {name: front, route_prefix: /, import_path: "rayprism.serving.front:build"}
- name: flights
  route_prefix: /v2/models/flights
  import_path: rayprism.serving.app:build
  args: {model: flights, version: 1}
  deployments:
  - name: model
    user_config:
      traffic:
        candidates:
        - weight: 5
          version: "2"
        shadow:
        - sample: 10
          version: 3
"""
    )
    found = [(fault.line, fault.path) for fault in check_file(path, repository=repository).faults]
    where = "applications[1].deployments[0].user_config.traffic"
    # Version 3 has another signature, too.
    assert found == [
        (14, f"{where}.candidates[0].version"),
        (17, f"{where}.shadow[0].version"),
        (17, f"{where}.shadow[0].version"),
    ]


def test_each_of_several_is_told(check: Check) -> None:
    faults = check(app(1, {**to(2, 8, 9), **copies(2, 7)}), app(2)).faults
    assert [fault.path for fault in faults] == [
        f"{TRAFFIC}.candidates[1].version",
        f"{TRAFFIC}.candidates[2].version",
        f"{TRAFFIC}.shadow[1].version",
    ]


def test_only_another_model_has_that_version(check: Check) -> None:
    fault = only(check(app(1, to(2)), app(2, model="delays")).faults)
    assert fault.path == CANDIDATE
    assert "application 'delays-2' serves version 2 of another model, 'delays'" in fault.message
    assert "Add one: name: flights-2" in fault.message


def test_not_even_the_repository_has_it(check: Check) -> None:
    message = only(check(app(1, to(9)), app(2)).faults).message
    assert "no application of this file serves version 9 of 'flights'" in message
    assert "model 'flights' has no version 9" in message
    assert "It has: 1, 2, 3, 4" in message
    assert "Add one" not in message


def test_served_but_not_in_the_repository_is_told_once(check: Check) -> None:
    fault = only(check(app(1, to(9)), app(9)).faults)
    assert fault.path == "applications[1].args.version"


def test_served_but_broken_is_told_once(check: Check) -> None:
    assert only(check(app(1, to(4)), app(4)).faults).path == "applications[1].args.version"


def test_without_a_repository_the_file_is_still_compared(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYPRISM_REPOSITORY", raising=False)
    assert only(check(app(1, to(9)), repository=None).faults).path == CANDIDATE
    assert check(app(1, to(3)), app(3), repository=None).ok


def test_the_application_at_its_route_serves_another_version(check: Check) -> None:
    report = check(app(1, to(2)), app(3, route="/v2/models/flights/versions/2", name="two"))
    message = only(report.faults).message
    assert "Application 'two' has the route for it, but serves version 3 of 'flights'" in message
    assert "Add one" not in message


def test_a_version_without_a_route_gets_no_requests(check: Check) -> None:
    fault = only(check(app(1, to(2)), app(2, route=None)).faults)
    assert fault.path == CANDIDATE
    assert "application 'flights-2' serves version 2" in fault.message
    assert "Give it /v2/models/flights/versions/2" in fault.message


@pytest.mark.parametrize("version", [1, "1", "01"])
@pytest.mark.parametrize(("traffic", "role"), [(to, "candidate"), (copies, "shadow")])
def test_the_stable_version_is_not_its_own_candidate(
    check: Check, traffic: Callable[..., dict[str, Any]], role: str, version: Any
) -> None:
    fault = only(check(app(1, traffic(version))).faults)
    assert fault.path == (CANDIDATE if role == "candidate" else SHADOW)
    assert fault.message.startswith("got 1, which is what this application serves itself")
    assert f"a {role} is another version" in fault.message
    assert only(check(app(1, traffic(version), route=None)).faults) == fault


# --- mistakes elsewhere are not told a second time here


def test_an_application_that_is_faulty_elsewhere_still_serves_its_version(check: Check) -> None:
    fault = only(check(app(1, to(2)), app(2, alow_code=True)).faults)
    assert fault.path == "applications[1].args.alow_code"
    fault = only(check(app(1, to(2)), app(2, repository="models")).faults)
    assert fault.path == "applications[1].args.repository"


def test_an_application_of_which_nobody_knows_the_version_may_be_the_one(check: Check) -> None:
    assert only(check(app(1, to(2)), app("latest")).faults).path == "applications[1].args.version"
    misspelt = {**app(2), "import_path": "rayprism.serving.ap:build"}
    assert only(check(app(1, to(2)), misspelt).faults).path == "applications[1].import_path"
    without = {key: value for key, value in app(2).items() if key != "args"}
    assert only(check(app(1, to(2)), without).faults).path == "applications[1].args"


def test_faulty_traffic_is_told_by_its_own_faults_only(check: Check) -> None:
    fault = only(check(app(1, to(9, wieght=1))).faults)
    assert fault.path == f"{TRAFFIC}.candidates[0].wieght"


def test_stable_arguments_that_are_faulty(check: Check) -> None:
    faults = check(app(1, to(9), alow_code=True)).faults
    assert [fault.path for fault in faults] == ["applications[0].args.alow_code", CANDIDATE]
    assert only(check(app("latest", to(9))).faults).path == "applications[0].args.version"


@pytest.mark.parametrize("junk", [[], [1], "x", None, {"candidates": 5}, {"candidates": [[]]}, 7])
def test_junk_is_a_fault_and_no_crash(check: Check, junk: Any) -> None:
    report = check(app(1, junk, route="/v2/models/flights"), app(2))
    assert report.ok is (junk is None)
    assert all(fault.path.startswith(TRAFFIC) for fault in report.faults)


# --- signatures


@pytest.mark.parametrize(("traffic", "path"), [(to, CANDIDATE), (copies, SHADOW)])
def test_another_signature(check: Check, traffic: Callable[..., dict[str, Any]], path: str) -> None:
    fault = only(check(app(1, traffic(3)), app(3)).faults)
    assert fault.path == path
    assert "the signature of version 3 is not that of version 1" in fault.message
    assert "output 'y' is gone; output 'score' is new" in fault.message
    assert "`allow_signature_change: true`" in fault.message
    assert clean(check(app(1, traffic(3, allow_signature_change=True)), app(3)))


def test_another_signature_allowed_for_one_is_not_for_another(check: Check) -> None:
    traffic = {**to(3, allow_signature_change=True), **copies(3)}
    assert only(check(app(1, traffic), app(3)).faults).path == SHADOW


def test_another_signature_of_a_version_that_nobody_serves(check: Check) -> None:
    """Both at once: who adds the application would only meet the other next."""
    messages = [fault.message for fault in check(app(1, to(3))).faults]
    assert ["Add one" in message for message in messages] == [True, False]
    assert "output 'score' is new" in messages[1]


def test_signatures_are_those_of_the_repositories_that_are_served(
    check: Check, tmp_path: Path
) -> None:
    """Version 3 of another repository has the usual signature."""
    other = tmp_path / "other"
    for _ in range(3):
        push_fake(other, "flights")
    assert clean(check(app(1, to(3)), app(3, repository=str(other))))


def test_a_manifest_is_read_once(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[str, int]] = Counter()
    version = Repository.version

    def counted(self: Repository, model: str, number: int) -> Any:
        reads[model, number] += 1
        return version(self, model, number)

    monkeypatch.setattr(Repository, "version", counted)
    check(app(1, {**to(2, 3, 9), **copies(2, 4, 9)}), app(2), app(2, name="again"), app(4))
    assert reads == {("flights", number): 1 for number in (1, 2, 3, 4, 9)}


# --- who is the stable application


def test_two_stable_applications_cannot_both_share_out(check: Check) -> None:
    report = check(app(1, to(3, allow_signature_change=True)), app(3),
                   app(2, to(1), route="/flights", name="flights-b"))  # fmt: skip
    fault = only(report.faults)
    assert fault.path == "applications[2].deployments[0].user_config.traffic"
    assert "application 'flights' shares out the requests for 'flights' already" in fault.message


def test_two_stable_applications_of_which_one_shares_out(check: Check) -> None:
    report = check(app(1, to(2)), app(2), app(3, {}, route="/flights", name="b"))
    assert report.ok
    report = check(app(1, to(2)), app(2), app(1, to(2), model="delays"), app(2, model="delays"))
    assert clean(report)


def test_traffic_where_it_has_no_effect(check: Check) -> None:
    report = check(app(1, {}), app(2, to(9), route="/v2/models/flights/versions/2", name="two"))
    assert report.ok, "what has no effect breaks nothing"
    warning = only(report.warnings)
    assert warning.path == "applications[1].deployments[0].user_config.traffic"
    assert "has no effect here" in warning.message
    assert "Write it in the application at /v2/models/flights" in warning.message
    assert check(app(1, to(2)), app(2, to(1), route="/v2/models/flights/versions/2", name="two")).ok
    idle = app(2, {}, route="/v2/models/flights/versions/2", name="two")
    assert clean(check(app(1, to(2)), idle))


# --- what is odd


def test_candidate_and_shadow_at_once(check: Check) -> None:
    report = check(app(1, {**to(2), **copies(3, 2, allow_signature_change=True)}), app(2), app(3))
    assert report.ok
    warning = only(report.warnings)
    assert warning.path == f"{TRAFFIC}.shadow[1].version"
    assert "version 2 is a candidate too" in warning.message


def test_one_version_twice(check: Check) -> None:
    report = check(
        app(1, to(2)), app(2, route="/v2/models/flights-2", name="a"), app("2", name="b")
    )
    assert report.ok
    warning = next(found for found in report.warnings if found.path.endswith("version"))
    assert warning.path == "applications[2].args.version"
    assert "application 'a' serves version 2 of 'flights' too" in warning.message
    assert "'b' is meant" in warning.message, "the version's own route goes first"


def test_one_version_twice_and_the_first_counts(check: Check) -> None:
    report = check(app(1, to(2)), app(2), app(2, route="/two", name="b"))
    (warning,) = [found for found in report.warnings if found.path.endswith("version")]
    assert warning.path == "applications[2].args.version"
    assert "'flights-2' is meant" in warning.message


def test_the_same_number_of_two_models_is_no_matter(check: Check) -> None:
    assert clean(check(app(1, to(2)), app(2), app(1, {}, model="delays"), app(2, model="delays")))
