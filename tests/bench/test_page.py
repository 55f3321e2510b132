from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bench.loadgen.histogram import encode
from bench.pages.drawing import PARTS, SERIES
from bench.pages.page import render
from bench.pages.plots import plots_across, plots_by_load
from bench.pages.style import STYLE
from bench.samples import Samples
from bench.tables import number
from tests.bench.made_results import SERVERS, made_bound, made_results, made_sample

SHORT = {"rounds": 2, "seconds": 2}
MIXED = {
    "peak": {"loop": "closed", "connections": 64},
    "hold": {"loop": "open", "search": {"percentile": 99, "at_most_s": 0.1, "low": 5, "high": 9e3}},
    "over": {
        "loop": "open",
        "target_s": 0.1,
        "rate": {"load": "peak", "share": 3},
        "actions": [{"at_s": 1, "do": "promote"}],
    },
    "cold": {"loop": "start"},
    "batch": {"loop": "job", "rows": 1_000_000},
}
_VOID = {"meta", "br", "path", "use"}


class Page(HTMLParser):
    """What a page holds; fails where its elements are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [str(given["id"])] if "id" in given else []
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]
        self.links += re.findall(r"url\((.*?)\)", " ".join(str(value) for _, value in attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.titles.append(data)
        elif {"td", "th"} & set(self._open) and self.rows:
            self.rows[-1][-1] += f" {data}"

    def row(self, *starts: str) -> list[str]:
        """The one row whose first cells begin so."""
        (found,) = [
            [cell.strip() for cell in row]
            for row in self.rows
            if all(cell.strip().startswith(start) for cell, start in zip(row, starts, strict=False))
        ]
        return found


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    results = made_results(MIXED, ["rayprism", "mosec", "documented"], **SHORT)  # type: ignore[arg-type]
    results["bounds"] = [
        made_bound(title="twice mosec", load="over", against="best-peer", against_server="mosec"),
        made_bound(value=None, interval=None, met=False, why="not judged: no sample of bare"),
    ]
    results["unavailable"] = {"gone": "pip: no wheel\nfor <this> Python"}
    results["warnings"] = ["it rained"]
    for sample in results["samples"]:
        if (sample["load"], sample["server"]) == ("over", "mosec"):
            sample["errors"] = {"timeout": 3}
            sample["example_error"] = 'status_500: {"error": "no <room>"}'
            sample["generator"]["limited"] = "a worker used 97 % of a core"
            sample["generator"]["note"] = "all connections were in use for 40 %"
    return results


@pytest.fixture(scope="module")
def html(mixed: dict[str, Any]) -> str:
    return render(mixed)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    assert set(page.links) == {link for link in page.links if link.startswith("#")}
    assert "script" not in page.tags
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_links_lead_somewhere_and_ids_are_used_once(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_every_colour_is_defined(html: str) -> None:
    used = set(re.findall(r"var\((--\w+)\)", html))
    assert used <= set(re.findall(r"(--\w+):", STYLE))
    assert {f"--s{index}" for index in range(SERIES)} <= set(re.findall(r"(--s\d+):", STYLE))
    assert {f"--p{index}" for index in range(PARTS)} <= set(re.findall(r"(--p\d+):", STYLE))
    # A stand-in that is left is a colour nobody chose.
    assert not re.search(r"#0[10a][0b0c0-9]{4}", html)


def test_each_load_has_the_plots_that_it_has_numbers_for(html: str) -> None:
    by_load: dict[str, list[str]] = {}
    for section in html.split('<section id="load-')[1:]:
        plots = section.split("</section>")[0]
        by_load[section.partition('"')[0]] = re.findall("<h3>(.*?)</h3>", plots)
    requests = [
        "Latency distribution",
        "Throughput and latency over time",
        "Batch sizes",
        "Time by stage",
        "CPU over time",
        "Memory over time",
    ]
    assert by_load == {
        "peak": requests,
        "hold": requests,
        "over": requests,
        "cold": ["Time until ready"],
        "batch": [],
    }
    assert "<h3>hold: latency against offered rate</h3>" in html


def test_tables_show_what_was_measured(mixed: dict[str, Any], page: Page) -> None:
    over = Samples(mixed)
    row = page.row("rayprism", f"{over.median('over', 'rayprism', 'offered_rate'):,.0f}")
    assert row[2].startswith(f"{over.median('over', 'rayprism', 'rate'):,.0f} ")
    for cell, name in zip(row[4:7], ("p50", "p99", "p999"), strict=True):
        median_s = over.median("over", "rayprism", f"latency_s.{name}") or 0.0
        assert cell.startswith(f"{number(1e3 * median_s)} ms")
    assert row[7] == "0"
    assert "Retry-After 100 %" in row[8]
    assert "replica" in row[9]
    failing = page.row("mosec", f"{over.median('over', 'mosec', 'offered_rate'):,.0f}")
    assert failing[7] == "6 timeout 6"


def test_bounds_show_value_interval_and_verdict(page: Page) -> None:
    assert page.row("twice mosec")[1:] == ["at least 1.1", "1.19 1.16 to 1.22", "✓ pass"]
    assert "rate of rayprism under over, against mosec" in page.row("twice mosec")[0]
    assert page.row("requests/s at 16")[2:] == ["-", "✗ not judged not judged: no sample of bare"]


@pytest.mark.parametrize(("rounds", "marked"), [(5, True), (4, False)])
def test_a_ratio_is_marked_where_rounds_are_enough(rounds: int, marked: bool) -> None:
    cold = {"cold": {"loop": "start"}}
    results = made_results(cold, ["rayprism", "bare"], rounds=rounds)
    for sample in results["samples"]:
        sample["ready_s"] = (1.0 if sample["server"] == "rayprism" else 2.0) + sample["round"] / 50
    shown = Page(render(results)).row("uvicorn", "▲ 0.5" if marked else "0.5")
    assert " 0.50 to 0.5" in shown[1]


def test_what_went_wrong_is_told(html: str) -> None:
    assert "in 2 of 2 rounds the load generator, and not the server, was the limit" in html
    assert "all connections were in use for 40 %" in html
    assert "no &lt;room&gt;" in html
    assert "for &lt;this&gt; Python" in html
    assert "it rained" in html
    assert "promote took 1.30 s, 1.30 s." in html


def test_the_setup_says_how_to_do_it_again(page: Page) -> None:
    assert page.row("Command")[1] == "python -m bench run bench/scenarios/overhead.yaml"
    assert page.row("Commit")[1] == "3f7b1c0d4e5f60718293a4b5c6d7e8f901234567"
    assert "onnxruntime 1.23.0" in page.row("Versions")[1]
    assert page.row("Seed")[1].startswith("1;")
    assert "A processor of the tests, 2 cores, 7.8 GiB" in page.row("Machine")[1]


def test_the_same_results_give_the_same_page() -> None:
    results = made_results({"c1": {"loop": "closed"}}, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    assert render(copy.deepcopy(results)) == render(results)


def test_a_title_is_text_wherever_it_stands() -> None:
    results = made_results({"c1 & <b>": {"loop": "closed"}}, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    results["scenario"]["servers"]["rayprism"]["title"] = '<i>"ours"</i> & $x$'
    html = render(results)
    assert "<i>" not in html
    assert "<b>" not in html
    assert '<i>"ours"</i> & $x$' in [row[0].strip() for row in Page(html).rows]


def test_a_load_of_ten_servers_takes_less_than_a_third_of_400_kb() -> None:
    results = made_results({"c16": {"loop": "closed", "connections": 16}}, seconds=6)
    assert len(results["scenario"]["servers"]) == 10
    assert 3 * len(render(results).encode()) < 400_000


def test_what_a_client_does_not_give_is_left_out() -> None:
    results = made_results({"c1": {"loop": "closed"}}, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    for sample in results["samples"]:
        for missing in ("series", "cpu", "rss_mib", "replica", "histogram", "events"):
            sample[missing] = None
        for missing in ("generator", "refused", "errors", "example_error", "other_cores"):
            sample[missing] = None
    (plot,) = plots_by_load(Samples(results))["c1"]
    assert plot.title == "Latency distribution"
    assert "Latency distribution" in Page(render(results)).titles


def test_of_a_run_that_was_stopped_at_once_there_is_a_page() -> None:
    results = {**made_results({"c1": {"loop": "closed"}}, ["rayprism"], **SHORT), "samples": []}  # type: ignore[arg-type]
    assert "Setup" in Page(render(results)).titles


def lines_of(svg: str, server: int) -> list[np.ndarray]:
    """The points of a server's lines. Shapes: [points, 2], in points from the top left."""
    root = ElementTree.fromstring(svg)
    named = "{http://www.w3.org/2000/svg}"
    return [
        np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", str(path.get("d"))), dtype=float)
        for group in root.iter(f"{named}g")
        if str(group.get("class", "")).split()[-1:] == [f"s{server}"]
        for path in group.iter(f"{named}path")
    ]


def test_a_distribution_is_drawn_where_it_lies() -> None:
    loads = {"c1": {"loop": "closed", "connections": 1}, "c9": {"loop": "closed", "connections": 9}}
    results = made_results(loads, ["rayprism", "bare"], **SHORT)  # type: ignore[arg-type]
    for sample in results["samples"]:
        # Ten times slower everywhere: on a logarithmic axis the same line, one decade up.
        times = 10.0 if sample["server"] == "bare" else 1.0
        sample["histogram"] = made_histogram(times)
    first, second = (plots[0].svg for plots in plots_by_load(Samples(results)).values())
    fast, slow = lines_of(first, 0)[0], lines_of(first, 1)[0]
    assert np.allclose(fast[:, 0], slow[:, 0], atol=0.11)
    rises = fast[:, 1] - slow[:, 1]
    assert rises.min() > 0
    assert np.ptp(rises) < 0.5
    # Both loads have one axis.
    assert np.allclose(lines_of(second, 0)[0], fast)


def test_a_distribution_lies_at_its_latency() -> None:
    results = made_results({"c1": {"loop": "closed"}}, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    for sample in results["samples"]:
        sample["histogram"] = encode(np.full(1000, 0.010))
    svg = plots_by_load(Samples(results))["c1"][0].svg
    (label,) = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>10</text>', svg)
    heights = lines_of(svg, 0)[0][:, 1]
    # The text stands with its middle at the line.
    assert heights == pytest.approx(float(label) - 3.6, abs=0.5)


def test_a_distribution_turns_at_its_percentile() -> None:
    results = made_results({"c1": {"loop": "closed"}}, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    for sample in results["samples"]:
        # One in fifty is slow: three tenths of a decade before 99 %.
        sample["histogram"] = encode(np.repeat([0.001, 0.1], [4900, 100]))
    svg = plots_by_load(Samples(results))["c1"][0].svg
    at = {
        share: float(place)
        for place, share in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>([\d.]+) %</text>', svg)
    }
    points = lines_of(svg, 0)[0]
    slow = points[points[:, 1] < points[:, 1].mean()][:, 0].min()
    turn = at["99"] - math.log10(2) * (at["99"] - at["90"])
    assert turn - 0.2 <= slow <= turn + 0.07 * (at["99"] - at["90"])


def made_histogram(times: float) -> str:
    return encode(times * np.linspace(0.01, 0.1, 2000))


def test_throughput_over_time_is_the_median_of_rounds() -> None:
    loads = {"c1": {"loop": "closed", "connections": 1}}
    results = made_results(loads, ["rayprism", "bare", "mosec", "tuned"], rounds=3, seconds=4)
    rates = {"rayprism": [10.0, 20.0, 90.0], "bare": [40.0] * 3, "mosec": [30.0] * 3}
    for sample in results["samples"]:
        steps = len(sample["series"]["ok_rate"])
        level = rates.get(sample["server"], [60.0] * 3)[sample["round"]]
        sample["series"]["ok_rate"] = [level] * steps
    plot = plots_by_load(Samples(results))["c1"][1]
    heights = [lines_of(plot.svg, index)[0][:, 1] for index in range(4)]
    assert all(np.ptp(height) < 0.11 for height in heights)
    rayprism, bare, mosec, tuned = (float(height[0]) for height in heights)
    # 20, 40, 30 and 60 on an axis from 0.
    per_unit = (bare - tuned) / 20
    assert rayprism == pytest.approx(bare + 20 * per_unit, abs=0.3)
    assert mosec == pytest.approx(bare + 10 * per_unit, abs=0.3)


def test_a_server_looks_the_same_in_every_load_and_plot(html: str) -> None:
    for index in range(3):
        strokes = set(re.findall(rf'class="l s{index}"><path[^>]*stroke: var\((--\w+)\)', html))
        assert strokes == {f"--s{index}"}


def test_latency_against_rate_is_drawn_of_loads_that_ask_for_more_and_more() -> None:
    loads: dict[str, Any] = {
        **{f"c{count}": {"loop": "closed", "connections": count} for count in (1, 4)},
        **{f"r{rate}": {"loop": "open", "rate": rate} for rate in (100.0, 200.0, 400.0)},
        "wide": {"loop": "closed", "connections": 4, "rows": 32},
        "live": {"loop": "open", "rate": 300.0, "actions": [{"at_s": 1, "do": "promote"}]},
    }
    results = made_results(loads, ["rayprism"], **SHORT)  # type: ignore[arg-type]
    plots = plots_across(Samples(results))
    assert [plot.title for plot in plots] == [
        "Latency against throughput",
        "Latency against offered rate",
    ]
    assert "c1, c4, medians" in plots[0].says
    assert "r100.0, r200.0, r400.0, medians" in plots[1].says
    p50, p99 = lines_of(plots[1].svg, 0)[0], lines_of(plots[1].svg, 0)[-1]
    # 100 to 200 is half of the way from 200 to 400.
    steps = np.diff(p50[:3, 0])
    assert steps[1] == pytest.approx(2 * steps[0], abs=0.3)
    assert (p99[:3, 1] < p50[:3, 1]).all()


def test_more_servers_than_colours_still_have_their_lines() -> None:
    names = [f"n{index}" for index in range(12)]
    results = made_results({"c1": {"loop": "closed", "connections": 2}}, ["bare"], **SHORT)  # type: ignore[arg-type]
    results["scenario"]["servers"] = {name: {"kind": "peer"} for name in names}
    results["samples"] = [
        {
            **made_sample("c1", {"loop": "closed", "connections": 2}, known, number, 2),
            "server": name,
        }
        for number in range(2)
        for name, known in zip(names, [*SERVERS, *SERVERS], strict=False)
    ]
    plot = plots_by_load(Samples(results))["c1"][0]
    assert all(lines_of(plot.svg, index) for index in range(12))
    assert [key.label for key in plot.keys] == names
