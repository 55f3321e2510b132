from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.compare import (
    BoundInvalid,
    compare,
    judge,
    main,
    parse_bound,
    render,
)
from bench.comparison import Pair, ServerUnknown
from tests.bench.made_results import made_results

SERVERS = ["rayprism", "bare"]
LOADS = {"c1": {"loop": "closed", "connections": 1}, "c16": {"loop": "closed", "connections": 16}}


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return made_results(LOADS, SERVERS, seconds=1)


@pytest.fixture(scope="module")
def again() -> dict[str, Any]:
    return made_results(LOADS, SERVERS, seconds=1, seed=2)


@pytest.fixture(scope="module")
def faster() -> dict[str, Any]:
    return made_results(LOADS, SERVERS, seconds=1, seed=3, faster=1.4)


def pair_of(results: tuple[dict[str, Any], dict[str, Any]], name: str, **more: Any) -> Pair:
    return {pair.name: pair for pair in compare(*results, **more).pairs}[name]


def with_rates(results: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    """The same, with one rate for each round of one server and load."""
    changed = copy.deepcopy(results)
    changed["samples"] = [
        {**each, "round": number, "rate": rate}
        for number, rate in enumerate(rates)
        for each in changed["samples"][:1]
    ]
    return changed


def written(folder: Path, name: str, results: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(results))
    return str(path)


def test_a_ratio_is_that_of_the_medians(before: dict[str, Any], faster: dict[str, Any]) -> None:
    pair = pair_of((before, faster), "c16/rayprism/rate")
    medians = [
        statistics.median(
            each["rate"]
            for each in results["samples"]
            if (each["load"], each["server"]) == ("c16", "rayprism")
        )
        for results in (before, faster)
    ]
    assert (pair.before, pair.after) == tuple(medians)
    assert pair.ratio == medians[1] / medians[0]
    assert pair.interval is not None
    assert pair.interval[0] <= pair.ratio <= pair.interval[1]
    assert pair.rounds == (5, 5)


def test_only_what_changed_differs(before: dict[str, Any], faster: dict[str, Any]) -> None:
    differing = {
        (pair.server, pair.verdict)
        for pair in compare(before, faster).pairs
        if pair.verdict != "same"
    }
    assert differing == {("rayprism", "better")}
    back = compare(faster, before)
    assert {pair.verdict for pair in back.pairs if pair.measure == "rate"} == {"worse", "same"}


def test_of_the_same_thing_twice_it_says_plainly_that_nothing_differs(
    before: dict[str, Any], again: dict[str, Any]
) -> None:
    compared = compare(before, again)
    assert render(compared).startswith(
        f"No difference larger than the noise, in {len(compared.pairs)}"
    )
    assert "c16" not in render(compared)
    assert "c16   rayprism  latency_s.p99" in render(compared, everything=True)


def test_equal_servers_seldom_seem_to_differ(before: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    verdicts = [
        pair_of(
            tuple(with_rates(before, list(rng.normal(1000, 100, 5))) for _ in range(2)),  # type: ignore[arg-type]
            "c1/rayprism/rate",
        ).verdict
        for _ in range(100)
    ]
    assert verdicts.count("same") >= 95


def test_a_difference_below_the_floor_is_none(before: dict[str, Any]) -> None:
    steady = with_rates(before, [1000, 1001, 1002, 1003, 1004])
    a_little = with_rates(before, [1020, 1021, 1022, 1023, 1024])
    name = "c1/rayprism/rate"
    assert pair_of((steady, a_little), name).verdict == "same"
    assert pair_of((steady, a_little), name, floor=0.01).verdict == "better"


def test_two_rounds_say_nothing(before: dict[str, Any]) -> None:
    few, other = with_rates(before, [1000, 1001]), with_rates(before, [2000, 2001])
    compared = compare(few, other)
    assert {pair.verdict for pair in compared.pairs} == {"unknown"}
    assert "No difference shown: 0 within the noise" in render(compared)
    assert any("2 rounds are too few" in note for note in compared.notes)


def test_a_figure_that_was_0_has_no_ratio(before: dict[str, Any]) -> None:
    pair = pair_of(
        (with_rates(before, [0, 1, 1]), with_rates(before, [1, 1, 1])), "c1/rayprism/rate"
    )
    assert (pair.ratio, pair.interval, pair.verdict) == (None, None, "unknown")


def test_relative_to_a_server_a_slower_machine_is_no_difference(
    before: dict[str, Any], again: dict[str, Any]
) -> None:
    slow = copy.deepcopy(again)
    for sample in slow["samples"]:
        sample["rate"] *= 0.6
        sample["latency_s"] = {name: value / 0.6 for name, value in sample["latency_s"].items()}
    plain = {pair.verdict for pair in compare(before, slow).pairs if pair.measure == "rate"}
    relative = compare(before, slow, relative_to="bare")
    assert plain == {"worse"}
    assert {pair.verdict for pair in relative.pairs} == {"same"}
    assert {pair.server for pair in relative.pairs} == {"rayprism"}
    assert " ms" not in render(relative, everything=True)
    with pytest.raises(ServerUnknown, match="there are: rayprism, bare"):
        compare(before, slow, relative_to="mosec")


def test_each_kind_of_load_has_its_own_measures() -> None:
    loads = {
        "hold": {
            "loop": "open",
            "search": {"percentile": 99, "at_most_s": 0.1, "low": 5, "high": 9e3},
        },
        "over": {"loop": "open", "rate": 4000.0, "target_s": 0.1},
        "cold": {"loop": "start"},
        "batch": {"loop": "job", "rows": 1000},
    }
    results = made_results(loads, ["rayprism"], rounds=3, seconds=1)
    measures: dict[str, list[str]] = {}
    for pair in compare(results, results).pairs:
        if not pair.measure.startswith("cpu_us") and pair.measure != "rss_peak_mib":
            measures.setdefault(pair.load, []).append(pair.measure)
    assert measures == {
        "hold": ["found"],
        "over": ["rate", "goodput", "latency_s.p50", "latency_s.p99"],
        "cold": ["ready_s"],
        "batch": ["rate"],
    }


def test_cpu_is_compared_by_role_without_the_load_generator(before: dict[str, Any]) -> None:
    measures = {pair.measure for pair in compare(before, before).pairs if pair.server == "rayprism"}
    assert {measure for measure in measures if measure.startswith("cpu_us")} == {
        f"cpu_us_per_request.{role}" for role in ("replica", "proxy", "ray")
    }


def test_what_only_one_has_is_said(before: dict[str, Any]) -> None:
    ours = made_results({"c1": LOADS["c1"]}, SERVERS, seconds=1)
    compared = compare(before, ours)
    assert compared.alone["c16/bare/rate"] == "first"
    assert "Only in the first: c16/rayprism/rate" in render(compared)


def test_latencies_at_other_rates_are_noted() -> None:
    runs = [
        made_results({"at": {"loop": "open", "rate": rate}}, ["bare"], seconds=1)
        for rate in (500.0, 800.0)
    ]
    notes = compare(*runs).notes
    assert any("was offered 500/s in the first and 800/s in the second" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run["scenario"].update(name="images"), "different scenarios"),
        (lambda run: run["machine"].update(cores=64), "cores was 2, and is 64"),
        (
            lambda run: run["scenario"]["loads"]["c16"].update(connections=32),
            "loads.c16 is not the same: connections was 16, and is 32",
        ),
        (
            lambda run: run["scenario"]["servers"]["bare"].update(model="minilm"),
            "servers.bare is not the same: model was tiny, and is minilm",
        ),
    ],
)
def test_what_should_not_be_compared_is_not(
    before: dict[str, Any],
    again: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    said: str,
) -> None:
    other = copy.deepcopy(again)
    change(other)
    files = [written(tmp_path, "a.json", before), written(tmp_path, "b.json", other)]
    assert main(files) == 2
    refused = capsys.readouterr()
    assert said in refused.err
    assert not refused.out
    assert main([*files, "--anyway"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1
    assert said in shown


# Bounds


def test_a_bound_is_about_the_ratio(before: dict[str, Any], faster: dict[str, Any]) -> None:
    compared = compare(before, faster)

    def met(*texts: str, sure: bool = False) -> list[bool]:
        return [item.met for item in judge(compared, [parse_bound(t) for t in texts], sure=sure)]

    assert met("c16/rayprism/rate>=1.2", "c16/rayprism/rate>=1.9") == [True, False]
    assert met("c16/rayprism/latency_s.p99<=0.9", "c16/rayprism/latency_s.p99<=0.5") == [
        True,
        False,
    ]
    assert met("overhead/c16/bare/rate >= 0.9") == [True]


def test_a_pattern_has_to_hold_for_all_that_it_fits(
    before: dict[str, Any], faster: dict[str, Any]
) -> None:
    compared = compare(before, faster)
    judged = judge(compared, [parse_bound("rate>=1.2")])
    assert {item.name: item.met for item in judged} == {
        "c1/rayprism/rate": True,
        "c1/bare/rate": False,
        "c16/rayprism/rate": True,
        "c16/bare/rate": False,
    }
    only = judge(compared, [parse_bound("c?/rayprism/cpu_us_per_request.*<=9")])
    assert len(only) == 3


def test_sure_breaks_only_what_is_beyond_the_noise(before: dict[str, Any]) -> None:
    compared = compare(
        with_rates(before, [900, 950, 1000, 1050, 1100]),
        with_rates(before, [850, 900, 950, 1000, 1050]),
    )
    (pair,) = [pair for pair in compared.pairs if pair.measure == "rate"]
    assert pair.ratio == pytest.approx(0.95)
    for limit, plain, sure in ((0.9, True, True), (0.97, False, True), (1.5, False, False)):
        bound = parse_bound(f"rate>={limit}")
        assert judge(compared, [bound])[0].met is plain
        assert judge(compared, [bound], sure=True)[0].met is sure
    assert "within the noise of the bound" in judge(compared, [parse_bound("rate>=0.97")])[0].said
    assert "within" not in judge(compared, [parse_bound("rate>=1.5")])[0].said


def test_what_was_not_measured_again_breaks_its_bound(before: dict[str, Any]) -> None:
    ours = made_results(LOADS, ["rayprism"], seconds=1)
    judged = {item.name: item for item in judge(compare(before, ours), [parse_bound("rate>=0.1")])}
    assert judged["c1/rayprism/rate"].met
    assert not judged["c1/bare/rate"].met
    assert judged["c1/bare/rate"].said == "the second run has no such figure"


def test_errors_that_are_new_break_every_bound_on_the_server(
    before: dict[str, Any], faster: dict[str, Any]
) -> None:
    failing = copy.deepcopy(faster)
    failing["samples"][0]["errors"] = {"timeout": 3}
    judged = {
        item.name: item
        for item in judge(compare(before, failing), [parse_bound("*/rayprism/rate>=0.1")])
    }
    assert judged["c1/rayprism/rate"].said == "3 requests failed, and none did before"
    assert not judged["c1/rayprism/rate"].met
    assert judged["c16/rayprism/rate"].met
    assert judge(compare(failing, failing), [parse_bound("c1/rayprism/rate>=0.1")])[0].met


def test_a_bound_may_name_any_path(before: dict[str, Any], tmp_path: Path) -> None:
    files = [written(tmp_path, "a.json", before)] * 2
    assert main([*files, "--bound", "c1/bare/latency_s.p999<=1.0"]) == 0
    assert main([*files, "--bound", "c1/bare/latency_s.p999<=0.9"]) == 1


@pytest.mark.parametrize("about", ["c2/*/rate>=1", "images/c1/bare/rate>=1", "rates*<=1"])
def test_a_bound_about_nothing_is_a_mistake(before: dict[str, Any], about: str) -> None:
    with pytest.raises(BoundInvalid, match="Loads: c1, c16; servers: rayprism, bare; measures:"):
        judge(compare(before, before), [parse_bound(about)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rate",
        "rate=1",
        "rate>=",
        "rate>=x",
        "rate>=1.2.3",
        "c1/rate>=1",
        "a/b/c/d/e>=1",
        "//rate>=1",
        ">=1",
    ],
)
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(BoundInvalid, match="is no bound: MEASURE>=NUMBER"):
        parse_bound(text)


@pytest.mark.parametrize(("bound", "status"), [("rate>=0.5", 0), ("rate>=1.5", 1), ("rate", 2)])
def test_the_exit_status_says_whether_a_bound_is_broken(
    before: dict[str, Any],
    faster: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bound: str,
    status: int,
) -> None:
    files = [written(tmp_path, "a.json", before), written(tmp_path, "b.json", faster)]
    assert main([*files, "--bound", "c1/rayprism/rate>=0.9", "--bound", bound]) == status
    assert ("BROKEN" in capsys.readouterr().out) == (status == 1)


def test_without_bounds_a_difference_is_no_failure(
    before: dict[str, Any],
    faster: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [written(tmp_path, "a.json", before), written(tmp_path, "b.json", faster)]
    assert main(files) == 0
    out = capsys.readouterr().out
    assert "c16   rayprism  rate" in out
    assert "better" in out
    assert main([*files, "--level", "95"]) == 2
    assert "a share between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON"), ("[]", "no file of results"), (None, "No such file")]
)
def test_files_that_are_no_results(
    before: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    said: str,
) -> None:
    other = tmp_path / "b.json"
    if content is not None:
        other.write_text(content)
    assert main([written(tmp_path, "a.json", before), str(other)]) == 2
    assert said in capsys.readouterr().err


def test_the_help_explains_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for line in text.splitlines():
        if line.strip().startswith("--bound '"):
            parse_bound(line.split("'")[1])
    assert text.count("--bound '") >= 4
