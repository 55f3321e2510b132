"""The tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["context", "milliseconds", "number", "render", "table", "targets"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are figures, and stand right."""
    marks = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))


def number(value: float | None, unit: str = "") -> str:
    """A figure with three significant digits, thousands grouped; `-` where there is none."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}{unit}"
    return f"{value:.2f}{unit}" if abs(value) < 10 else f"{value:.1f}{unit}"


def milliseconds(value_s: float | None) -> str:
    """A time."""
    return "-" if value_s is None else number(value_s * 1e3, " ms")


def render(results: Mapping[str, Any]) -> str:
    """The whole report: targets, then every table that the run has."""
    parts = [context(results), targets(results["verdicts"])]
    if "minilm" in results:
        parts.append(_minilm(results["minilm"]))
    if "cold" in results:
        parts.append(_cold(results["cold"]["summary"]))
    return "\n\n".join(parts) + "\n"


def context(results: Mapping[str, Any]) -> str:
    machine, versions, commit = results["machine"], results["versions"], results["commit"]
    plan = results["plan"]
    noise = results["other_cores"]
    quiet = f", of which something else kept {noise:.2f} busy" if noise is not None else ""
    state = " with changes" if commit["changed_since"] else ""
    return (
        f"{results['date'][:10]}, {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_gib']:.0f} GiB; Ray {versions.get('ray')}, "
        f"onnxruntime {versions.get('onnxruntime')}, Python {versions['python']}, "
        f"wrk {versions['wrk']}; commit {commit['hash'][:12]}{state}. Client, proxy and servers "
        f"share the cores{quiet}. Medians of {plan['rounds']} interleaved rounds of "
        f"{plan['seconds']:g} s; ratios are medians of the rounds' own ratios."
    )


def targets(verdicts: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            verdict["name"],
            f"{verdict['sense']} {verdict['bound']:g}",
            number(verdict["value"]),
            "pass" if verdict["met"] else "**fail**",
        ]
        for verdict in verdicts
    ]
    return table(["target", "bound", "measured", ""], rows)


def _minilm(result: Mapping[str, Any]) -> str:
    summary = result["summary"]
    rows = summary["rows"]
    names = {
        "rayprism": f"rayprism, {result['connections']} connections, one sentence a request",
        "model only": f"onnxruntime alone, batches of {summary['batch_size']}, tokens ready",
        "with tokenisation": (
            f"onnxruntime alone, batches of {summary['batch_size']}, tokenised in the loop"
        ),
    }
    lines = [
        [
            names[name],
            number(figures["rate"]),
            number(figures["cpu_ms_per_row"], " ms"),
            "" if name == "rayprism" else number(summary["ratios"][name], "x"),
        ]
        for name, figures in rows.items()
    ]
    best = summary["by_length"]
    extra = (
        f" With all sentences sorted by length beforehand it reaches "
        f"{number(best['rate'])} rows/s with batches of {best['batch_size']}."
        if best
        else ""
    )
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    sizes = sorted({item["batch_size"] for item in result["tuning"]})
    note = (
        f"{result['sentences']} sentences of 5 to 60 words, in the same order everywhere; "
        f"{threads} for the model in each. The loop takes them in order of arrival, pads each "
        f"batch to its longest, and has the best of the batch sizes "
        f"{', '.join(map(str, sizes))}.{extra} Latency of rayprism: p50 "
        f"{milliseconds(summary['p50_s'])}, p99 {milliseconds(summary['p99_s'])}."
    )
    header = ["MiniLM sentence embeddings (int8)", "rows/s", "CPU per row", "rayprism's ratio"]
    return f"{table(header, lines)}\n\n{note}"


def _cold(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["model"],
            number(row["ready_s"], " s"),
            number(row["actor_s"], " s"),
            number(row["bare_s"], " s"),
            number(row["ratio"], "x"),
            ", ".join(f"{step} {value:.3f} s" for step, value in row["steps_s"].items()) or "-",
        ]
        for row in rows
    ]
    header = [
        "cold start",
        "deploy to ready",
        "an empty deployment",
        "bare process",
        "(ready - empty) / bare",
        "what the replica does to load",
    ]
    return table(header, lines)
