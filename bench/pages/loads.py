"""What the page of a run says of each load: a table, notes, and its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.bootstrap import interval
from bench.pages.drawing import Key, Plot
from bench.pages.markup import items, legend, named, row_class, small, table, text
from bench.samples import Samples, main_measure
from bench.tables import SEED, duration, number, per_request, span

__all__ = ["load_section", "plot_grid"]

_FEWEST_ROUNDS = 2


def load_section(samples: Samples, load: str, plots: Sequence[Plot]) -> str:
    kind = samples.kind(load)
    make = {"start": _start_table, "job": _job_table, "search": _search_table}.get(
        kind, _request_table
    )
    notes = _load_notes(samples, load)
    return (
        f'<section id="load-{text(load)}"><h2>{text(load)}</h2>'
        f'<p class="soft">{text(describe(samples, load))}</p>'
        f"{make(samples, load)}{items(notes) if notes else ''}"
        f"{_rounds(samples, load)}{plot_grid(samples, plots)}"
        "</section>\n"
    )


def describe(samples: Samples, load: str) -> str:
    """What a load does, as a sentence."""
    said, kind = samples.load(load), samples.kind(load)
    if kind == "start":
        return "From the command that starts a server to the first right answer."
    if kind == "job":
        return f"A batch job of {said.get('rows', 0):,} rows, from its command to its _SUCCESS."
    count = said.get("connections", 64)
    connections = "1 connection" if count == 1 else f"{count} connections"
    if kind == "closed":
        parts = [f"Closed loop, {connections}"]
    else:
        arrivals = (said.get("arrivals") or {}).get("kind", "poisson")
        parts = [f"Open loop, {arrivals} arrivals", _rate_text(said), f"at most {connections}"]
    rows = said.get("rows", 1)
    parts.append(f"{said.get('body', 'json')} bodies of {'1 row' if rows == 1 else f'{rows} rows'}")
    parts.append(f"{said.get('seconds', 5):g} s after {said.get('warm_up_s', 1):g} s of warm-up")
    if said.get("client", "python") != "python":
        parts.append(f"sent by {said['client']}")
    if said.get("target_s"):
        parts.append(f"goodput: within {duration(said['target_s'])}")
    return "; ".join(parts) + "."


def _rate_text(load: Mapping[str, Any]) -> str:
    if search := load.get("search"):
        return (
            f"search for the highest rate with p{search['percentile']:g} at most "
            f"{duration(search['at_most_s'])}"
        )
    rate = load.get("rate")
    if isinstance(rate, Mapping):
        whose = {"itself": "the server's own", "best-peer": "the best peer's"}
        server = rate.get("server", "itself")
        of = whose.get(server, f"{server}'s")
        return f"{rate['share']:g} times {of} rate under {rate['load']}"
    return number(rate, " requests/s")


def _request_table(samples: Samples, load: str) -> str:
    servers = samples.servers_of(load)
    target = samples.load(load).get("target_s")
    offered = samples.kind(load) == "open"
    refused = any(samples.total(load, server, "refused.count") for server in servers)
    header = ["Server", *(["offered/s"] if offered else []), "answered/s"]
    header += [f"within {duration(target)}"] if target else []
    header += ["p50", "p99", "p99.9", "errors"]
    # There is no room for both.
    header += ["refused/s", "CPU/request"] if refused else ["CPU/request", "memory"]
    rows = []
    for server in servers:
        cells = [named(samples, server)]
        cells += [number(samples.median(load, server, "offered_rate"))] if offered else []
        cells.append(_with_interval(samples, load, server, "rate"))
        cells += [_with_interval(samples, load, server, "goodput")] if target else []
        cells += [
            _with_interval(samples, load, server, f"latency_s.{name}", 1e3, " ms")
            for name in ("p50", "p99", "p999")
        ]
        cells.append(_errors(samples, load, server))
        cells += [_refused(samples, load, server)] if refused else []
        cells.append(_cpu(samples, load, server))
        if not refused:
            cells.append(number(samples.median(load, server, "rss_peak_mib"), " MiB"))
        rows.append((row_class(samples, server), cells))
    return table("Medians of rounds, with 95 % intervals", header, rows)


def _with_interval(
    samples: Samples, load: str, server: str, path: str, factor: float = 1.0, unit: str = ""
) -> str:
    values = [factor * value for value in samples.values(load, server, path).values()]
    middle = samples.median(load, server, path)
    if middle is None:
        return "-"
    ends = span(interval(values, SEED)) if len(values) >= _FEWEST_ROUNDS else ""
    return f"{number(middle * factor, unit)}{small(ends)}"


def _errors(samples: Samples, load: str, server: str) -> str:
    counts: dict[str, int] = {}
    for each in samples.of(load, server):
        for name, count in (each.get("errors") or {}).items():
            counts[name] = counts.get(name, 0) + count
    total = sum(counts.values())
    if not total:
        return "0"
    names = "".join(small(text(f"{name} {count:,}")) for name, count in counts.items() if count)
    return f'<span class="fail">{total:,}</span>{names}'


def _refused(samples: Samples, load: str, server: str) -> str:
    count = samples.total(load, server, "refused.count")
    if not count:
        return "0"
    told = 100 * samples.total(load, server, "refused.with_retry_after") / count
    took = [
        number(_ms(samples.median(load, server, f"refused.latency_s.{name}")))
        for name in ("p99", "max")
    ]
    return (
        number(samples.median(load, server, "refused.rate"))
        + small(f"p99 {took[0]}, most {took[1]} ms")
        + small(f"Retry-After {told:.4g} %")
    )


def _cpu(samples: Samples, load: str, server: str) -> str:
    used = per_request(samples, load, server)
    if not used:
        return "-"
    own = {role: value for role, value in used.items() if role != "load" and value}
    parts = " + ".join(f"{text(role)}&nbsp;{number(value)}" for role, value in own.items())
    return f"{number(sum(own.values()), ' us')}{small(parts if len(own) > 1 else '', 'narrow')}"


def _search_table(samples: Samples, load: str) -> str:
    measure = main_measure("search", samples.load(load))
    rows = [
        (
            row_class(samples, server),
            [
                named(samples, server),
                _with_interval(samples, load, server, "found", unit="/s")
                if samples.values(load, server, "found")
                else "no rate held",
                _per_round(samples, load, server, "found"),
                _cpu(samples, load, server),
            ],
        )
        for server in samples.servers_of(load)
    ]
    header = ["Server", text(measure.title), "by round", "CPU/request"]
    return table("Medians of rounds, with 95 % intervals", header, rows)


def _per_round(samples: Samples, load: str, server: str, path: str) -> str:
    """The figures of the rounds, in their order."""
    rounds = [each["round"] for each in samples.of(load, server)]
    values = samples.values(load, server, path)
    return small(" · ".join(number(values.get(one)) for one in rounds))


def _start_table(samples: Samples, load: str) -> str:
    parts = list(
        dict.fromkeys(
            part
            for server in samples.servers_of(load)
            for each in samples.of(load, server)
            for part in each.get("parts_s") or ()
        )
    )
    rows = [
        (
            row_class(samples, server),
            [
                named(samples, server),
                _with_interval(samples, load, server, "ready_s", unit=" s"),
                *(number(samples.median(load, server, f"parts_s.{part}"), " s") for part in parts),
            ],
        )
        for server in samples.servers_of(load)
    ]
    header = ["Server", "until ready", *map(text, parts)]
    return table("Medians of rounds, with 95 % intervals", header, rows)


def _job_table(samples: Samples, load: str) -> str:
    rows = [
        (
            row_class(samples, server),
            [
                named(samples, server),
                _with_interval(samples, load, server, "rate"),
                _with_interval(samples, load, server, "seconds", unit=" s"),
                _per_round(samples, load, server, "rate"),
            ],
        )
        for server in samples.servers_of(load)
    ]
    header = ["Server", "rows/s", "whole job", "rows/s by round"]
    return table("Medians of rounds, with 95 % intervals", header, rows)


def _rounds(samples: Samples, load: str) -> str:
    """Each round by itself, for who wants to see the noise."""
    kind = samples.kind(load)
    if kind not in ("closed", "open") or len(_round_numbers(samples, load)) < _FEWEST_ROUNDS:
        return ""
    numbers = _round_numbers(samples, load)
    rows = []
    for server in samples.servers_of(load):
        rates = samples.values(load, server, "rate")
        slowest = samples.values(load, server, "latency_s.p99")
        cells = [
            f"{number(rates.get(one))}{small(number(_ms(slowest.get(one)), ' ms'))}"
            for one in numbers
        ]
        rows.append((row_class(samples, server), [named(samples, server), *cells]))
    header = ["Server", *(f"round {place}" for place in range(1, len(numbers) + 1))]
    shown = table("Answered/s, and below it p99", header, rows)
    return f"<details><summary>Round by round</summary>{shown}</details>"


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3


def _round_numbers(samples: Samples, load: str) -> list[int]:
    return sorted(
        {each["round"] for server in samples.servers for each in samples.of(load, server)}
    )


def _load_notes(samples: Samples, load: str) -> list[str]:
    notes = []
    if samples.load(load).get("client") == "wrk":
        notes.append("wrk tells nothing of rates and latencies over time.")
    for server in samples.servers_of(load):
        title = samples.title(server)
        of = samples.of(load, server)
        if limited := samples.limited(load, server):
            notes.append(
                f"{title}: in {len(limited)} of {len(of)} rounds the load generator, and not the "
                f"server, was the limit: {limited[0]}"
            )
        others = dict.fromkeys((each.get("generator") or {}).get("note") for each in of)
        notes += [f"{title}: {note}" for note in others if note][:1]
        examples = dict.fromkeys(each["example_error"] for each in of if each.get("example_error"))
        notes += [f"{title}, an error: {each}" for each in examples][:2]
        for what, took in _events(samples, load, server).items():
            notes.append(f"{title}: {what} {took}")
    busy = [
        each.get("other_cores") for server in samples.servers for each in samples.of(load, server)
    ]
    most = max((value for value in busy if value is not None), default=0.0)
    if most >= 0.05:
        notes.append(f"Something else kept up to {most:.2f} cores busy during a sample.")
    return notes


def _events(samples: Samples, load: str, server: str) -> dict[str, str]:
    """What was done while it was under load, and how long it took in the rounds."""
    took: dict[str, list[str]] = {}
    for each in samples.of(load, server):
        for event in each.get("events") or ():
            told = event.get("error") or duration(event.get("took_s"), unit="s")
            took.setdefault(f"{event['what']} at {event['at_s']:.3g} s", []).append(told)
    merged: dict[str, list[str]] = {}
    for name, found in took.items():
        merged.setdefault(name.partition(" at ")[0], []).extend(found)
    return {name: f"took {', '.join(found)}." for name, found in merged.items()}


def plot_grid(samples: Samples, plots: Sequence[Plot]) -> str:
    """Plots below one legend of servers, which stays in sight while they are scrolled through."""
    if not plots:
        return ""
    shown = {key.colour for plot in plots for key in plot.keys}
    servers = [key for key in every_server(samples) if key.colour in shown]
    keys = f'<div class="keys servers">{legend(servers)}</div>' if len(servers) > 1 else ""
    return f'{keys}<div class="plots">{"".join(map(_plot, plots))}</div>'


def every_server(samples: Samples) -> list[Key]:
    return [Key(f"s{index}", samples.title(server)) for index, server in enumerate(samples.servers)]


def _plot(plot: Plot) -> str:
    parts = legend(key for key in plot.keys if key.colour.startswith("p"))
    return (
        f"<figure{' class=wide' if plot.wide else ''}><h3>{text(plot.title)}</h3>"
        f"{f'<div class=keys>{parts}</div>' if parts else ''}"
        f"{plot.svg}<figcaption>{text(plot.says)}</figcaption></figure>"
    )
