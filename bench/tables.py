"""The results of a scenario as Markdown, for the README: targets, figures, ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.bootstrap import ratio_interval
from bench.report import table
from bench.samples import FAILED, ROLES, Measure, Samples, main_measure

__all__ = [
    "SEED",
    "Ratio",
    "all_targets",
    "bound_text",
    "duration",
    "is_within_noise",
    "machine_line",
    "number",
    "per_request",
    "ratio_of",
    "render",
    "span",
    "table",
]

SEED = 1
"""Of the intervals in tables: the same results give the same tables."""

_LOADS_IN_A_TABLE = 3
_PACKAGES = ("ray", "onnxruntime")

Ratio = tuple[float, tuple[float, float] | None]
"""A median of the rounds' own ratios, with its interval where there is more than one round."""


def render(results: Mapping[str, Any]) -> str:
    """The report of a run: targets, figures by load, ratios.

    Args:
        results: See `bench.samples`.
    """
    samples = Samples(results)
    parts = [machine_line(results)]
    if bounds := results.get("bounds"):
        parts.append(_bounds(bounds))
    groups = list(_groups(samples))
    parts += [_figures(samples, loads) for loads in groups]
    if ratios := _ratios(samples):
        parts.append(ratios)
    parts += _notes(samples)
    return "\n\n".join(parts) + "\n"


def number(value: float | None, unit: str = "") -> str:
    """A figure with three significant digits, thousands grouped; `-` where there is none."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}{unit}"
    return f"{value:.1f}{unit}" if size >= 9.995 else f"{value:.2f}{unit}"


def duration(value_s: float | None, *, unit: str = "ms") -> str:
    """A time. Units: seconds, shown as `ms` or `s`."""
    if value_s is None:
        return "-"
    return number(value_s * (1e3 if unit == "ms" else 1), f" {unit}")


def span(ends: tuple[float, float] | Sequence[float] | None, unit: str = "") -> str:
    """An interval, with what stands between its ends; nothing where there is none."""
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1], unit)}"


def ratio_of(
    samples: Samples, load: str, path: str, above: str, below: str, *, level: float = 0.95
) -> Ratio | None:
    """How a figure of two servers compares within rounds, whose two sides ran within seconds.

    Returns:
        None where no round has both.
    """
    upper, lower = samples.pairs(load, path, above, below)
    if not upper:
        return None
    ratios = sorted(one / other for one, other in zip(upper, lower, strict=True))
    middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
    if len(ratios) == 1:
        return middle, None
    return middle, ratio_interval(upper, lower, SEED, paired=True, level=level)


def per_request(samples: Samples, load: str, server: str) -> dict[str, float]:
    """CPU time for each request by role, medians over rounds. Units: microseconds."""
    roles = dict.fromkeys(
        role for each in samples.of(load, server) for role in each.get("cpu_us_per_request") or ()
    )
    ordered = [role for role in ROLES if role in roles]
    ordered += sorted(role for role in roles if role not in ROLES)
    found = {role: samples.median(load, server, f"cpu_us_per_request.{role}") for role in ordered}
    return {role: value for role, value in found.items() if value is not None}


def bound_text(bound: Mapping[str, Any]) -> str:
    """The limit of a bound: `at least 1.1`."""
    if bound.get("at_least") is not None:
        return f"at least {bound['at_least']:g}"
    return f"at most {bound['at_most']:g}"


def is_within_noise(bound: Mapping[str, Any]) -> bool:
    """Whether the limit of a bound is inside the interval: more rounds could turn the verdict."""
    limit = bound["at_most"] if bound.get("at_least") is None else bound["at_least"]
    ends = bound.get("interval")
    return ends is not None and bool(ends[0] < limit < ends[1])


def machine_line(results: Mapping[str, Any]) -> str:
    """Where, when and with what it was measured, and the command that does it again."""
    machine, commit = results.get("machine") or {}, results.get("commit") or {}
    versions = results.get("versions") or {}
    scenario = results.get("scenario") or {}
    where = (
        f"{str(results.get('date', ''))[:10]}, {machine.get('cores', '?')} cores "
        f"({machine.get('cpu', 'unknown')}), {machine.get('memory_gib', 0):.0f} GiB"
        + (f", {machine['gpu']}" if machine.get("gpu") else "")
    )
    packages = [f"{name} {versions[name]}" for name in _PACKAGES if versions.get(name)]
    packages.append(f"Python {versions.get('python', '?')}")
    if any(each.get("client") == "wrk" for each in results.get("samples") or ()):
        packages.append(f"wrk {versions.get('wrk', '?')}")
    state = " with changes" if commit.get("changed_since") else ""
    rounds = scenario.get("rounds", 1)
    counted = f"Medians of {rounds} interleaved rounds" if rounds > 1 else "One round"
    short = " A shortened run: its figures are for trying out." if results.get("quick") else ""
    again = f" `{results['command']}`" if results.get("command") else ""
    return (
        f"{where}; {', '.join(packages)}; commit {str(commit.get('hash', '?'))[:12]}{state}. "
        f"{counted}; load generator, proxy and servers share the cores.{short}{again}"
    )


def all_targets(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table of what every scenario has to reach, and whether it does.

    Args:
        results: Of whole runs, by the scenario's name. Those without bounds are left out.
    """
    rows = [
        [f"`{name}`", *_bound_row(bound)]
        for name, each in results.items()
        for bound in each.get("bounds") or ()
    ]
    return table(["scenario", "target", "bound", "measured (95 % interval)", ""], rows)


def _bounds(bounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [_bound_row(bound) for bound in bounds]
    return table(["target", "bound", "measured (95 % interval)", ""], rows)


def _bound_row(bound: Mapping[str, Any]) -> list[str]:
    ends = span(bound.get("interval"))
    measured = number(bound.get("value")) + (f" ({ends})" if ends else "")
    verdict = "pass" if bound.get("met") else "**fail**"
    if bound.get("value") is None:
        verdict = "**not judged**"
    elif is_within_noise(bound):
        verdict += ", within the noise"
    if not bound.get("met") and bound.get("why"):
        verdict += f": {_cell(str(bound['why']).removeprefix('not judged: '))}"
    return [_cell(bound["title"]), bound_text(bound), measured, verdict]


def _groups(samples: Samples) -> Iterator[list[str]]:
    """Loads whose figures stand in one table: of one kind, a few at a time."""
    group: list[str] = []
    for load in samples.loads:
        if group and (
            len(group) == _LOADS_IN_A_TABLE
            or _columns(samples, load)[0] != _columns(samples, group[0])[0]
        ):
            yield group
            group = []
        group.append(load)
    if group:
        yield group


def _columns(samples: Samples, load: str) -> tuple[str, list[str]]:
    """A key that is the same for loads with the same columns, and the columns."""
    kind = samples.kind(load)
    if kind == "start":
        return kind, ["until ready"]
    if kind == "job":
        return kind, ["rows/s", "whole job"]
    if kind == "search":
        title = main_measure(kind, samples.load(load)).title
        return f"{kind} {title}", [title]
    columns = ["requests/s" if kind == "closed" else "answered/s", "p50 / p99"]
    if samples.load(load).get("target_s"):
        columns.append(f"within {duration(samples.load(load)['target_s'])}")
    if any(samples.total(load, server, "refused.count") for server in samples.servers_of(load)):
        columns.append("refused/s")
    return " ".join((kind, *columns)), [*columns, "CPU per request"]


def _figures(samples: Samples, loads: Sequence[str]) -> str:
    header = [_cell(str(samples.results.get("scenario", {}).get("title", "")))]
    for load in loads:
        columns = _columns(samples, load)[1]
        header += [f"{_cell(load)}: {columns[0]}", *columns[1:]]
    rows = []
    for server in samples.servers:
        if not any(samples.of(load, server) for load in loads):
            continue
        cells = [_cell(samples.title(server))]
        for load in loads:
            columns = _columns(samples, load)[1]
            there = bool(samples.of(load, server))
            cells += _server_cells(samples, load, server) if there else ["-"] * len(columns)
        rows.append(cells)
    return table(header, rows)


def _server_cells(samples: Samples, load: str, server: str) -> list[str]:
    kind = samples.kind(load)
    if kind == "start":
        return [duration(samples.median(load, server, "ready_s"), unit="s")]
    if kind == "job":
        seconds = samples.median(load, server, "seconds")
        return [number(samples.median(load, server, "rate")), duration(seconds, unit="s")]
    if kind == "search":
        found = samples.median(load, server, "found")
        return ["none" if found is None else number(found, "/s")]
    marks = (" (errors)" if samples.total(load, server, FAILED) else "") + (
        " \\*" if samples.limited(load, server) else ""
    )
    p50, p99 = (samples.median(load, server, f"latency_s.{name}") for name in ("p50", "p99"))
    cells = [
        number(samples.median(load, server, "rate")) + marks,
        "-" if p50 is None or p99 is None else f"{number(p50 * 1e3)} / {number(p99 * 1e3)} ms",
    ]
    if samples.load(load).get("target_s"):
        cells.append(number(samples.median(load, server, "goodput"), "/s"))
    if "refused/s" in _columns(samples, load)[1]:
        cells.append(number(samples.median(load, server, "refused.rate")))
    used = per_request(samples, load, server)
    own = sum(value for role, value in used.items() if role != "load")
    return [*cells, number(own, " us") if used else "-"]


def _ratios(samples: Samples) -> str | None:
    """One table of ratios: the reference's figure over that of each other server."""
    reference = samples.reference()
    others = [server for server in samples.servers if server != reference]
    if reference is None or not others:
        return None
    loads = [load for load in samples.loads if samples.of(load, reference)]
    measures = {load: main_measure(samples.kind(load), samples.load(load)) for load in loads}
    rows = []
    for server in others:
        ratios = [ratio_of(samples, load, measures[load].path, reference, server) for load in loads]
        if any(ratios):
            rows.append([_cell(samples.title(server)), *map(_ratio_cell, ratios)])
    if not rows:
        return None
    header = [f"{_cell(samples.title(reference))} / ..."]
    header += [f"{_cell(load)}: {_ratio_title(measures[load])}" for load in loads]
    return table(header, rows)


def _ratio_title(measure: Measure) -> str:
    return measure.title + (" (less is better)" if measure.better == "lower" else "")


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    ends = span(ratio[1])
    return number(ratio[0], "x") + (f" ({ends})" if ends else "")


def _notes(samples: Samples) -> list[str]:
    notes = []
    cells = [(load, server) for load in samples.loads for server in samples.servers_of(load)]
    if any(samples.limited(load, server) for load, server in cells):
        notes.append("\\* The load generator, and not the server, was the limit in a round.")
    unavailable = samples.results.get("unavailable") or {}
    notes += [
        f"Left out: {_cell(samples.title(server))}: {_cell(reason.strip().splitlines()[0])}."
        if reason.strip()
        else f"Left out: {_cell(samples.title(server))}."
        for server, reason in unavailable.items()
    ]
    if len(samples.servers) > 1:
        notes.append(
            "Ratios are medians of the rounds' own ratios, with 95 % bootstrap intervals; CPU is "
            "that of server and proxy, without the load generator."
        )
    return notes


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
