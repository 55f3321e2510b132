"""The page and the table that show the report of an evaluation.

The page is one file that loads nothing from elsewhere and runs no script; everything that plots
show stands in tables as well.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayprism.offline.report_plots import SERIES, Plot, plots_of

__all__ = ["render_report", "summarize"]

_LIGHT = ("#475569", "#b45309", "#1d4ed8", "#15803d", "#a21caf", "#0f766e", "#be123c", "#6d28d9")
_DARK = ("#a8b3c4", "#ffb04d", "#8fb0ff", "#6cd69b", "#e79bf2", "#5fd6c9", "#ff94a8", "#c0a6ff")


def _series(colours: Sequence[str]) -> str:
    return " ".join(f"--s{index}: {colours[index]};" for index in range(SERIES))


_STYLE = f"""
:root {{
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --ink: #17202b; --soft: #556274; --line: #d5dbe4;
  --good: #0f6b3c; --bad: #a91e2c; {_series(_LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #10141b; --card: #181e28; --ink: #e7ebf2; --soft: #a2aebf; --line: #38424f;
    --good: #6cd69b; --bad: #ff949d; {_series(_DARK)}
  }}
}}
@media print {{ section {{ break-inside: avoid; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }}
h1 {{ margin: 0; font-size: 1.7rem; }}
h2 {{ margin: 0 0 .6rem; font-size: 1.2rem; }}
p {{ margin: .4rem 0; }}
.soft, caption, figcaption {{ color: var(--soft); }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.1rem 1.4rem 1.3rem; margin: 1.1rem 0; }}
.scroll {{ overflow-x: auto; }}
.scroll:focus-visible, summary:focus-visible {{ outline: 3px solid var(--s2); }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
thead th {{ color: var(--soft); font-weight: 600; font-size: .85rem; }}
tbody th {{ font-weight: 600; }}
.interval {{ display: block; color: var(--soft); font-size: .85em; }}
.better {{ color: var(--good); font-weight: 600; }}
.worse {{ color: var(--bad); font-weight: 600; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.1rem; }}
.plots section {{ margin: 0; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .88rem; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-family: inherit !important; }}
code {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .86rem;
  overflow-wrap: anywhere; }}
details > summary {{ cursor: pointer; font-weight: 600; }}
"""

_SIGNS = {"better": "▲ ", "worse": "▼ "}


def render_report(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: See `rayprism.offline.evaluation`.
    """
    versions = [str(each["version"]) for each in report["versions"]]
    noun = "version" if len(versions) == 1 else "versions"
    title = f"{report['model']}: {noun} {', '.join(versions)}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(_subject(report))}</p>',
        _section("Quality", _metrics_table(report)),
        _section("Rows", _rows_table(report) + _versions_table(report)),
        _figures(plots_of(report)),
        *(
            _section(f"By {each['column']}", _segment_table(report, each))
            for each in report["segments"]
        ),
        *_details(report),
        _section("How to read this", _items(report["notes"])),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _subject(report: Mapping[str, Any]) -> str:
    compared = report["rows"]["compared"]
    said = f"{compared:,} rows, label {report['label']}, prediction {report['prediction']}"
    if report["threshold"] is not None:
        said += f", positive: {report['positive']} from {report['threshold']:g} on"
    return f"{said}. Intervals: {report['confidence']:g}."


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>\n"


def _items(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(each)}</li>" for each in sentences) + "</ul>"


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each row names it."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _number(value: float | None) -> str:
    """As many digits as say something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100_000 else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _span(interval: Sequence[float] | None, show: Any = _number) -> str:
    if interval is None:
        return ""
    return f'<span class="interval">[{show(interval[0])}, {show(interval[1])}]</span>'


def _header(report: Mapping[str, Any], first: str) -> list[str]:
    versions = [each["version"] for each in report["versions"]]
    return [
        first,
        f"version {versions[0]}{' (baseline)' if len(versions) > 1 else ''}",
        *(
            cell
            for version in versions[1:]
            for cell in (f"version {version}", "difference", "verdict")
        ),
    ]


def _cells(metric: Mapping[str, Any]) -> list[str]:
    """Of the versions, each but the baseline with its difference and the verdict."""
    shown = [
        f"{_number(each['value'])} {_span(each['interval'])}".strip() for each in metric["versions"]
    ]
    cells = [shown[0]]
    for value, each in zip(shown[1:], metric["differences"], strict=True):
        verdict = each["verdict"]
        cells += [
            value,
            f"{_signed(each['value'])} {_span(each['interval'], _signed)}".strip(),
            f'<span class="{verdict.split()[0]}">{_SIGNS.get(verdict, "")}{verdict}</span>',
        ]
    return cells


def _metrics_table(report: Mapping[str, Any]) -> str:
    best = {"higher": "higher is better", "lower": "lower is better", "zero": "0 is best"}
    rows = [
        [
            f'{_text(each["title"])}<span class="interval">{best[each["better"]]}</span>',
            *_cells(each),
        ]
        for each in report["metrics"]
    ]
    return _table("Metrics with their intervals", _header(report, "Metric"), rows)


def _rows_table(report: Mapping[str, Any]) -> str:
    titles = {
        "input": "In the input",
        "not_predicted": "Not predicted by every version",
        "label_missing": "Without a label",
        "not_finite": "Predicted as NaN or infinity by a version",
        "compared": "Compared",
    }
    rows = [[title, f"{report['rows'][name]:,}"] for name, title in titles.items()]
    return _table("Which rows are compared", ["Rows", "count"], rows)


def _versions_table(report: Mapping[str, Any]) -> str:
    rows = [
        [
            _text(each["version"]),
            f"{each['dead_letters']:,}",
            f"{each['not_finite']:,}",
            _text(each["created"]),
            f"<code>{_text(each['digest'][:19])}…</code>",
        ]
        for each in report["versions"]
    ]
    header = ["Version", "dead letters", "NaN or infinite", "created", "digest"]
    return _table("Versions", header, rows)


def _figures(plots: Sequence[Plot]) -> str:
    figures = "".join(
        f"<section><figure><h2>{_text(plot.title)}</h2>{plot.svg}"
        f"<figcaption>{_text(plot.says)}</figcaption></figure></section>\n"
        for plot in plots
    )
    return f'<div class="plots">{figures}</div>\n' if figures else ""


def _segment_table(report: Mapping[str, Any], segment: Mapping[str, Any]) -> str:
    values = segment["values"]
    tables = []
    for index, metric in enumerate(values[0]["metrics"] if values else ()):
        rows = []
        for value in values:
            name = "(none)" if value["value"] is None else _text(value["value"])
            rows.append([f"{name} ({value['rows']:,})", *_cells(value["metrics"][index])])
        shown = f", {len(values)} of {segment['distinct']} values"
        caption = f"{metric['title']} by {segment['column']} (rows){shown}"
        table = _table(caption, _header(report, segment["column"]), rows)
        opened = " open" if index == 0 else ""
        tables.append(
            f"<details{opened}><summary>{_text(metric['title'])}</summary>{table}</details>"
        )
    return "".join(tables)


def _details(report: Mapping[str, Any]) -> list[str]:
    """The numbers of the calibration plot."""
    if "calibration" not in report["plots"]:
        return []
    tables = []
    for version, bins in zip(report["versions"], report["plots"]["calibration"], strict=True):
        rows = [
            [
                f"{each['from']:.3f} to {each['to']:.3f}",
                f"{each['rows']:,}",
                _number(each["mean_score"]),
                f"{_number(each['positive_share'])} {_span(each['interval'])}",
            ]
            for each in bins
        ]
        header = ["Scores", "rows", "mean score", "share of positive rows"]
        name = f"version {version['version']}"
        table = _table(f"Calibration of {name}", header, rows)
        tables.append(f"<details><summary>{name}</summary>{table}</details>")
    return [_section("Calibration in numbers", "".join(tables))]


def summarize(report: Mapping[str, Any]) -> str:
    """The table of metrics for a terminal."""
    versions = [each["version"] for each in report["versions"]]
    header = ["", f"version {versions[0]}"]
    for version in versions[1:]:
        header += [f"version {version}", "difference", f"{report['confidence']:.4g} interval", ""]
    lines = [header]
    for metric in report["metrics"]:
        line = [metric["title"], _number(metric["versions"][0]["value"])]
        pairs = zip(metric["versions"][1:], metric["differences"], strict=True)
        for estimate, each in pairs:
            ends = each["interval"]
            shown = "-" if ends is None else f"{_signed(ends[0])} to {_signed(ends[1])}"
            line += [_number(estimate["value"]), _signed(each["value"]), shown, each["verdict"]]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown_lines = [
        "  ".join(
            cell.ljust(width)
            if column == 0 or (column % 4 == 1 and column > 1)
            else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rows = report["rows"]
    left_out = ", ".join(
        f"{rows[name]:,} {words}"
        for name, words in (
            ("not_predicted", "not predicted by every version"),
            ("label_missing", "without a label"),
            ("not_finite", "predicted as NaN or infinity"),
        )
        if rows[name]
    )
    counted = f"{rows['compared']:,} of {rows['input']:,} rows compared"
    return "\n".join([*shown_lines, "", counted + (f"; left out: {left_out}" if left_out else "")])
