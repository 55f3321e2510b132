"""What is made of the samples of `bench.batch`: medians, ratios, verdicts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import Target, Verdict, median_of, paired_ratio, select, spread
from bench.report import number, table, targets

__all__ = ["judge", "render", "summarise_memory", "summarise_minilm", "summarise_ways"]

FLIGHTS_TARGET = Target("flights, rows/s: rayprism / plain loop", 0.8, "at least")
OBVIOUS_TARGET = Target("flights, rows/s: rayprism / obvious Ray Data", 2.0, "at least")
MINILM_TARGET = Target("MiniLM, rows/s: rayprism / the better plain loop", 0.9, "at least")
MEMORY_SENSE = "peak RSS of {}, most rows / fewest"
MEMORY_BOUND = 1.10
MEMORY_PARTS = {
    "actor_bytes": "the largest actor",
    "driver_bytes": "the driver",
    "all_bytes": "all processes together",
}
_MIB = 2**20


def summarise_ways(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians by way, and the ratio of rayprism's speed to each of the others, round by round."""
    ours = select(samples, way="rayprism")
    found = {}
    for way in dict.fromkeys(sample["way"] for sample in samples):
        mine = select(samples, way=way)
        found[way] = {
            "seconds": median_of(mine, "seconds"),
            "seconds_spread": spread(mine, "seconds"),
            "rate": median_of(mine),
            "cpu_s": median_of(mine, "cpu_s"),
            "output_bytes": median_of(mine, "output_bytes"),
            "ratio": None if way == "rayprism" else paired_ratio(ours, mine),
        }
    return found


def summarise_minilm(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same, and which of the plain loops is the better one."""
    ways = summarise_ways(samples)
    others = [way for way in ways if way != "rayprism"]
    return {"ways": ways, "better": max(others, key=lambda way: float(ways[way]["rate"]))}


def summarise_memory(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of the peaks by rows, and the ratio of most rows to fewest.

    Returns:
        `ratios` are of the medians: the rounds of different rows do not stand side by side.
    """
    all_rows = sorted({sample["rows"] for sample in samples})
    by_rows = {
        rows: {
            part: median_of(select(samples, rows=rows), part)
            for part in (*MEMORY_PARTS, "seconds", "processes")
        }
        for rows in all_rows
    }
    fewest, most = by_rows[all_rows[0]], by_rows[all_rows[-1]]
    return {
        "rows": {str(rows): figures for rows, figures in by_rows.items()},
        "ratios": {part: most[part] / fewest[part] for part in MEMORY_PARTS}
        if len(all_rows) > 1
        else {},
    }


def judge(results: Mapping[str, Any]) -> list[Verdict]:
    """The targets of the parts that the run has."""
    verdicts = []
    if "flights" in results:
        ways = results["flights"]["summary"]
        verdicts.append(FLIGHTS_TARGET.judge(ways["plain"]["ratio"]))
        verdicts.append(OBVIOUS_TARGET.judge(ways["obvious"]["ratio"]))
    if "minilm" in results:
        summary = results["minilm"]["summary"]
        verdicts.append(MINILM_TARGET.judge(summary["ways"][summary["better"]]["ratio"]))
    if "rss" in results:
        ratios = results["rss"]["summary"]["ratios"]
        for part, title in MEMORY_PARTS.items():
            target = Target(MEMORY_SENSE.format(title), MEMORY_BOUND, "at most")
            verdicts.append(target.judge(ratios.get(part)))
    return verdicts


def render(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown: targets, then every table that the run has."""
    parts = [_context(results), targets(results["verdicts"])]
    if "flights" in results:
        parts.append(_flights(results["flights"]))
    if "minilm" in results:
        parts.append(_minilm(results["minilm"]))
    if "rss" in results:
        parts.append(_memory(results["rss"]))
    return "\n\n".join(parts) + "\n"


def _context(results: Mapping[str, Any]) -> str:
    machine, versions, commit = results["machine"], results["versions"], results["commit"]
    plan = results["plan"]
    noise = results["other_cores"]
    quiet = (
        f" Before each run something else kept {noise:.2f} cores busy." if noise is not None else ""
    )
    state = " with changes" if commit["changed_since"] else ""
    rounds = "one round" if plan["rounds"] == 1 else f"{plan['rounds']} interleaved rounds"
    return (
        f"{results['date'][:10]}, {plan['cores']} of {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_gib']:.0f} GiB; Ray {versions.get('ray')}, "
        f"pyarrow {versions.get('pyarrow')}, onnxruntime {versions.get('onnxruntime')}, "
        f"Python {versions['python']}; commit {commit['hash'][:12]}{state}; "
        f"`{results['command']}`. Each run is a fresh process, timed by the wall clock from its "
        f"start to its end. Medians of {rounds}; ratios are medians of the rounds' own "
        f"ratios.{quiet}"
    )


def _flights(result: Mapping[str, Any]) -> str:
    setting = result["obvious"]
    titles = {
        "plain": f"plain loop, batches of {result['batch_rows']:,}",
        "rayprism": "rayprism, `batch/predict.py ... --local`",
        "obvious": "obvious Ray Data",
    }
    tried = sorted({item["batch_rows"] for item in result["tuning"]["plain"]})
    note = (
        "The plain loop: a process for each core with an equal part of the row groups, "
        "`ParquetFile.iter_batches` -> NumPy -> ONNX Runtime with one thread -> `ParquetWriter`, "
        f"the same columns and compression, the best of batches of "
        f"{', '.join(f'{size:,}' for size in tried)}. Text columns are read as dictionaries. "
        "Obvious Ray Data: `read_parquet -> map_batches(class) -> write_parquet`, batches of "
        "4,096, an actor with a session of one thread for each core, without the columns that "
        f"name the model; the best of {len(result['tuning']['obvious'])} settings: batches as "
        f"`{setting['batch_format']}`, {setting['actor_cpus']:g} CPU for an actor, "
        f"`ray.init(num_cpus={setting['ray_cpus']})`. All outputs hold the same predictions, "
        "compared row by row."
    )
    title = f"{result['rows']:,} flights"
    return f"{_ways(title, titles, result['summary'])}\n\n{note}"


def _minilm(result: Mapping[str, Any]) -> str:
    best = result["best"]
    titles = {
        "by length": f"plain loop, sorted by length, {_batches(best['by length'])}",
        "in order": f"plain loop, as they come, {_batches(best['in order'])}",
        "rayprism": "rayprism, `batch/predict.py ... --local`",
    }
    note = (
        "Sentences of 5 to 60 words. The plain loops: a process for each core with half of the "
        "row groups, tokenizers -> padding to the longest of the batch -> ONNX Runtime with one "
        "thread -> mean over the tokens; each has the best batches of several sizes. One sorts "
        "all that a process has by length, up to 16,384 at a time. All outputs hold the same "
        "embeddings: the smallest cosine of any row is above 0.9999."
    )
    title = f"{result['rows']:,} sentences, MiniLM (int8)"
    return f"{_ways(title, titles, result['summary']['ways'])}\n\n{note}"


def _batches(how: Mapping[str, Any]) -> str:
    bound = f" and {how['batch_tokens']} tokens" if how["batch_tokens"] else ""
    return f"batches of {how['batch_rows']}{bound}"


def _ways(title: str, titles: Mapping[str, str], ways: Mapping[str, Any]) -> str:
    lines = [
        [
            titles[way],
            number(ways[way]["seconds"], " s"),
            number(ways[way]["rate"]),
            number(ways[way]["cpu_s"], " s"),
            "" if way == "rayprism" else number(ways[way]["ratio"], "x"),
        ]
        for way in titles
    ]
    return table([title, "start to end", "rows/s", "CPU time", "rayprism's speed to it"], lines)


def _memory(result: Mapping[str, Any]) -> str:
    summary = result["summary"]
    by_rows = {int(rows): figures for rows, figures in summary["rows"].items()}
    header = ["peak resident memory, flights", *(f"{rows:,} rows" for rows in by_rows), "ratio"]
    lines = [
        [
            title,
            *(number(figures[part] / _MIB, " MiB") for figures in by_rows.values()),
            number(summary["ratios"].get(part), "x"),
        ]
        for part, title in MEMORY_PARTS.items()
    ]
    note = (
        "Sampled ten times a second from outside. All together: the driver, its actors and Ray's "
        "own processes at one time; memory that processes share is counted for each of them."
    )
    return f"{table(header, lines)}\n\n{note}"
