from __future__ import annotations

import statistics

import pytest

from bench.samples import Samples, main_measure, value_at
from bench.tables import duration, number, per_request, ratio_of, render
from tests.bench.made_results import made_bound, made_results

OVERLOAD = {
    "peak": {"loop": "closed", "connections": 64},
    "hold": {"loop": "open", "search": {"percentile": 99, "at_most_s": 0.1, "low": 5, "high": 9e3}},
    "at70": {"loop": "open", "rate": {"load": "hold", "share": 0.7, "server": "itself"}},
    "over": {"loop": "open", "target_s": 0.1, "rate": {"load": "peak", "share": 3}},
    "cold": {"loop": "start"},
    "batch": {"loop": "job", "rows": 1_000_000},
}


def tables_in(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, header first."""
    found: list[list[list[str]]] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        if lines:
            cells = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
            found.append([cells[0], *cells[2:]])
    return found


def test_a_table_of_figures_has_the_medians_of_the_rounds() -> None:
    results = made_results(servers=["rayprism", "mosec"], seconds=1)
    (figures, _) = tables_in(render(results))
    rates = [
        each["rate"]
        for each in results["samples"]
        if (each["load"], each["server"]) == ("c16", "mosec")
    ]
    assert figures[0][1:5] == ["c1: requests/s", "p50 / p99", "CPU per request", "c16: requests/s"]
    assert [row[0] for row in figures[1:]] == ["rayprism", "mosec"]
    assert figures[2][4] == number(statistics.median(rates))


def test_ratios_are_within_rounds() -> None:
    results = made_results(servers=["rayprism", "bare"], seconds=1)
    for sample in results["samples"]:
        # Whatever slows a round of both leaves the ratio alone.
        slowed = 0.2 if sample["round"] == 2 else 1.0
        sample["rate"] = slowed * (330.0 if sample["server"] == "rayprism" else 110.0)
    (_, ratios) = tables_in(render(results))
    assert ratios[0][:2] == ["rayprism / ...", "c1: requests/s"]
    assert ratios[1][1] == "3.00x (3.00 to 3.00)"


def test_a_ratio_takes_only_rounds_that_have_both() -> None:
    results = made_results(servers=["rayprism", "bare"], rounds=3, seconds=1)
    results["samples"] = [
        each
        for each in results["samples"]
        if each["load"] == "c1" and not (each["server"] == "bare" and each["round"] > 0)
    ]
    samples = Samples(results)
    first = {each["server"]: each["rate"] for each in results["samples"] if each["round"] == 0}
    found = ratio_of(samples, "c1", "rate", "rayprism", "bare")
    assert found == (pytest.approx(first["rayprism"] / first["bare"]), None)
    assert ratio_of(samples, "c16", "rate", "rayprism", "bare") is None


def test_each_kind_of_load_has_its_own_figures() -> None:
    text = render(made_results(OVERLOAD, servers=["rayprism", "tuned"], seconds=1))
    headers = [found[0] for found in tables_in(text)]
    assert [header[1:] for header in headers] == [
        ["peak: requests/s", "p50 / p99", "CPU per request"],
        ["hold: highest rate that holds p99 of 100 ms"],
        ["at70: answered/s", "p50 / p99", "CPU per request"],
        ["over: answered/s", "p50 / p99", "within 100 ms", "refused/s", "CPU per request"],
        ["cold: until ready"],
        ["batch: rows/s", "whole job"],
        [
            "peak: requests/s",
            "hold: highest rate that holds p99 of 100 ms",
            "at70: p99 (less is better)",
            "over: goodput",
            "cold: time until ready (less is better)",
            "batch: rows/s",
        ],
    ]


def test_a_search_that_found_nothing_says_so() -> None:
    results = made_results({"hold": OVERLOAD["hold"]}, servers=["rayprism"], seconds=1)
    for sample in results["samples"]:
        sample["search"] = [{"rate": 5.0, "p_s": 0.5, "held": False, "why": "p99 was 500 ms"}]
    assert tables_in(render(results))[0][1] == ["rayprism", "none"]


def test_a_server_that_a_load_leaves_out_has_no_figures() -> None:
    loads = {"all": {"loop": "closed", "connections": 4}}
    loads["ours"] = {"loop": "closed", "connections": 8, "servers": ["rayprism"]}
    (figures, ratios) = tables_in(render(made_results(loads, servers=["rayprism", "bare"])))
    assert figures[2][4:] == ["-", "-", "-"]
    assert ratios[1][2] == "-"


def test_errors_and_a_generator_at_its_limit_are_marked() -> None:
    results = made_results(servers=["rayprism", "bare"], rounds=2, seconds=1)
    results["samples"][0]["errors"] = {"timeout": 2}
    results["samples"][1]["generator"]["limited"] = "a worker used 97 % of a core"
    text = render(results)
    rows = tables_in(text)[0]
    assert rows[1][1].endswith(" (errors)")
    assert rows[2][1].endswith(" \\*")
    assert "The load generator, and not the server, was the limit" in text


def test_bounds_say_what_was_measured_and_why_not() -> None:
    results = made_results(servers=["rayprism"], rounds=1, seconds=1)
    results["bounds"] = [
        made_bound(),
        made_bound(title="60 times", value=41.0, interval=[39.0, 61.0], at_least=60, met=False),
        made_bound(value=None, interval=None, met=False, why="not judged: no sample of bare"),
        made_bound(at_least=None, at_most=1.7, why="bare, c16: the generator was late"),
    ]
    rows = tables_in(render(results))[0][1:]
    assert [row[1:] for row in rows] == [
        ["at least 1.1", "1.19 (1.16 to 1.22)", "pass"],
        ["at least 60", "41.0 (39.0 to 61.0)", "**fail**, within the noise"],
        ["at least 1.1", "-", "**not judged**: no sample of bare"],
        ["at most 1.7", "1.19 (1.16 to 1.22)", "pass"],
    ]


def test_what_was_left_out_is_named_with_its_reason() -> None:
    results = made_results(servers=["rayprism"], rounds=1, seconds=1)
    results["scenario"]["servers"]["gone"] = {"kind": "peer", "title": "Gone | away"}
    results["unavailable"] = {"gone": "pip: no wheel for this Python\nand ten lines more"}
    assert "Left out: Gone \\| away: pip: no wheel for this Python." in render(results)


def test_the_line_above_says_where_and_with_what_command() -> None:
    results = made_results(servers=["rayprism"], rounds=1, seconds=1)
    results["commit"]["changed_since"] = True
    results["quick"] = True
    line = render(results).splitlines()[0]
    for said in ("2 cores", "ray 2.60.0", "3f7b1c0d4e5f with changes", "One round", "shortened"):
        assert said in line
    assert line.endswith("`python -m bench run bench/scenarios/overhead.yaml`")


def test_of_a_run_that_was_stopped_at_once_there_is_the_line() -> None:
    results = {**made_results(servers=["rayprism"], rounds=1, seconds=1), "samples": []}
    assert tables_in(render(results)) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.456, "0.46"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_times_have_a_unit() -> None:
    assert [duration(0.0123), duration(12.3, unit="s"), duration(None)] == [
        "12.3 ms",
        "12.3 s",
        "-",
    ]


def test_cpu_is_that_of_roles_in_their_order() -> None:
    samples = Samples(made_results(servers=["rayprism"], seconds=1))
    assert list(per_request(samples, "c1", "rayprism")) == ["replica", "proxy", "ray", "load"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rate", 12.0),
        ("latency_s.p99", 0.5),
        ("found", 30.0),
        ("failed", 5.0),
        ("refused_share", 0.25),
        ("rss_peak_mib", 33.0),
        ("latency_s", None),
        ("latency_s.p50.deep", None),
        ("missing", None),
        ("held", None),
        ("lost", None),
    ],
)
def test_a_figure_is_found_by_its_path(path: str, value: float | None) -> None:
    sample = {
        "rate": 12,
        "requests": 8,
        "held": True,
        "lost": float("nan"),
        "latency_s": {"p99": 0.5, "p50": None},
        "errors": {"timeout": 2, "status_500": 3},
        "refused": {"count": 2},
        "rss_mib": {"step_s": 0.5, "replica": [10, 30, 20], "proxy": [1, 3, 2], "load": [9, 9, 9]},
        "search": [
            {"rate": 10, "held": True},
            {"rate": 40, "held": False},
            {"rate": 30, "held": True},
        ],
    }
    assert value_at(sample, path) == value


def test_the_reference_is_the_first_of_rayprism() -> None:
    assert Samples(made_results(servers=["bare", "rayprism"], seconds=1)).reference() == "rayprism"
    assert Samples(made_results(servers=["mosec", "bare"], seconds=1)).reference() == "mosec"
    assert Samples({}).reference() is None


def test_loads_and_servers_keep_the_scenarios_order() -> None:
    results = made_results(servers=["mosec", "rayprism", "bare"], rounds=2, seconds=1)
    results["samples"].reverse()
    samples = Samples(results)
    assert samples.servers == ["mosec", "rayprism", "bare"]
    assert samples.loads == ["c1", "c16", "c64"]
    assert [each["round"] for each in samples.of("c1", "bare")] == [0, 1]
    assert main_measure(samples.kind("c1"), samples.load("c1")).path == "rate"
