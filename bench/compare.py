"""Says what differs between two runs of a scenario by more than their rounds differ."""

from __future__ import annotations

import argparse
import json
import operator
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.comparison import CPU, FLOOR, LEVEL, SEED, Comparison, Pair, ServerUnknown, compare
from bench.tables import number

__all__ = [
    "BoundInvalid",
    "Judged",
    "RatioBound",
    "compare",
    "judge",
    "main",
    "parse_bound",
    "render",
]

_SIGNS = {">=": operator.ge, "<=": operator.le}
_BOUND = re.compile(r"(?P<path>[^<>=]+?)\s*(?P<sign>>=|<=)\s*(?P<limit>[0-9.]+)")


class BoundInvalid(Exception):
    """What was given as a bound cannot be read, or is about nothing that was measured."""


@dataclass(frozen=True, slots=True)
class RatioBound:
    """A limit for the ratio second / first of every figure that a pattern fits.

    Args:
        text: As it was given.
        patterns: For load, server and measure, as file names are matched.
        sign: `>=` or `<=`.
        limit: What the ratio is held against.
        scenario: The pattern for its name.
    """

    text: str
    patterns: tuple[str, str, str]
    sign: str
    limit: float
    scenario: str = "*"

    def fits(self, name: str) -> bool:
        """Whether it is about LOAD/SERVER/MEASURE."""
        parts = name.split("/")
        return all(map(fnmatchcase, parts, self.patterns))

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is within it."""
        return bool(_SIGNS[self.sign](ratio, self.limit))


@dataclass(frozen=True, slots=True)
class Judged:
    """A bound and a figure that it is about.

    Args:
        bound: The bound.
        name: LOAD/SERVER/MEASURE.
        met: Whether it is kept.
        said: The ratio, and how sure it is; or why there is none.
    """

    bound: RatioBound
    name: str
    met: bool
    said: str


def parse_bound(text: str) -> RatioBound:
    """Reads a bound: `[[SCENARIO/]LOAD/SERVER/]MEASURE>=LIMIT`, or `<=`.

    Raises:
        BoundInvalid: It is none.
    """
    match = _BOUND.fullmatch(text.strip())
    parts = match["path"].strip().split("/") if match else []
    try:
        limit = float(match["limit"]) if match else 0.0
    except ValueError:
        parts = []
    if len(parts) not in (1, 3, 4) or not all(parts):
        raise BoundInvalid(
            f"{text!r} is no bound: MEASURE>=NUMBER, LOAD/SERVER/MEASURE>=NUMBER or "
            "SCENARIO/LOAD/SERVER/MEASURE>=NUMBER is wanted, or the same with <=, as in "
            "'c16/rayprism/rate>=0.95'"
        )
    assert match is not None
    scenario = parts[0] if len(parts) == 4 else "*"
    load, server = (parts[-3], parts[-2]) if len(parts) > 1 else ("*", "*")
    return RatioBound(text, (load, server, parts[-1]), match["sign"], limit, scenario)


def judge(
    comparison: Comparison, bounds: Sequence[RatioBound], *, sure: bool = False
) -> list[Judged]:
    """Holds the ratios against bounds.

    A figure that the first run has and the second lacks breaks a bound about it: what was not
    measured is not kept. So does a server that now fails requests where it failed none: errors are
    quick to give.

    Args:
        comparison: The two runs.
        bounds: What is asked for.
        sure: Count a bound as broken only where the whole interval is beyond it; otherwise the
            ratio itself decides.

    Raises:
        BoundInvalid: A bound is about no figure that the first run has.
    """
    judged = []
    for bound in bounds:
        about = _judge(comparison, bound, sure)
        if not about:
            names = sorted({pair.measure for pair in comparison.pairs})
            raise BoundInvalid(
                f"{bound.text!r} fits no figure of both runs of {comparison.scenario!r}. Loads: "
                f"{_listed(pair.load for pair in comparison.pairs)}; servers: "
                f"{_listed(pair.server for pair in comparison.pairs)}; measures: {_listed(names)}"
            )
        judged += about
    return judged


def render(
    comparison: Comparison, judged: Sequence[Judged] = (), *, everything: bool = False
) -> str:
    """What came of it, for a terminal.

    Args:
        comparison: The two runs.
        judged: The bounds.
        everything: Show the pairs that do not differ as well.
    """
    differing = [pair for pair in comparison.pairs if pair.verdict not in ("same", "unknown")]
    unknown = [pair for pair in comparison.pairs if pair.verdict == "unknown"]
    lines = [f"warning: {objection}" for objection in comparison.objections]
    shown = comparison.pairs if everything else differing
    if shown:
        lines += _table(shown, plain=comparison.relative_to is not None)
    equal = len(comparison.pairs) - len(differing) - len(unknown)
    if not comparison.pairs:
        lines.append("The two runs have no figure in common.")
    elif not differing and not unknown:
        lines.append(f"No difference larger than the noise, in {equal} figures.")
    elif not differing:
        lines.append(f"No difference shown: {equal} within the noise, {len(unknown)} not known.")
    else:
        lines.append(
            f"{len(differing)} of {len(comparison.pairs)} figures differ by more than the noise; "
            f"in {equal} there is no difference larger than the noise"
            + (f"; {len(unknown)} are not known." if unknown else ".")
        )
    for side in ("first", "second"):
        if only := [name for name, where in comparison.alone.items() if where == side]:
            lines.append(f"Only in the {side}: {_shortened(only)}")
    lines += [f"note: {note}" for note in comparison.notes]
    if judged:
        lines.append("")
        lines += [
            f"{'met   ' if item.met else 'BROKEN'}  {item.name} {item.bound.sign} "
            f"{item.bound.limit:g}: {item.said}"
            for item in judged
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m bench compare`.

    Returns:
        0; 1 where a bound is broken; 2 where the two cannot be compared, or a bound is about
        nothing.
    """
    given = _parser().parse_args(arguments)
    try:
        first, second = (_read(path) for path in (given.first, given.second))
        bounds = [parse_bound(text) for text in given.bound]
        compared = compare(
            first,
            second,
            more=[bound.patterns[2] for bound in bounds if not set("*?[") & set(bound.text)],
            relative_to=given.relative_to,
            floor=given.floor,
            level=given.level,
            seed=given.seed,
        )
        if compared.objections and not given.anyway:
            print(
                "\n".join(compared.objections)
                + "\nWhat differs would not be what was changed. --anyway compares all the same.",
                file=sys.stderr,
            )
            return 2
        judged = judge(compared, bounds, sure=given.sure)
    except (BoundInvalid, ServerUnknown, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"first   {given.first}  {_whence(first)}\nsecond  {given.second}  {_whence(second)}\n")
    print(render(compared, judged, everything=given.all))
    return 0 if all(item.met for item in judged) else 1


_ABOUT_BOUNDS = """\
bounds:
  [[SCENARIO/]LOAD/SERVER/]MEASURE>=RATIO or ...<=RATIO. The ratio is second / first, so a rate may
  not fall with >= and a latency may not grow with <=. Each part may have * and ?. A bound about
  several figures has to be kept by each; a figure that the second file lacks breaks it.

  --bound 'c16/rayprism/rate>=0.95'           at least 95 % of the rate that it had
  --bound 'overhead/c16/rayprism/rate>=0.95'  the same, if it is that scenario's
  --bound '*/rayprism/latency_s.p99<=1.2'     p99 under each load at most a fifth higher
  --bound 'c64/rayprism/cpu_us_per_request.*<=1.05'
  --bound 'rate>=0.9'                         under every load, of every server

measures: rate, goodput (where there is a target_s), found (the highest rate of a search),
  latency_s.p50, latency_s.p99, cpu_us_per_request.ROLE, rss_peak_mib, ready_s (of a start);
  a bound without * may name any other path into a sample: refused.latency_s.max

exit status: 0; 1 a bound is broken; 2 the files cannot be compared, or a bound is about nothing
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__,
        epilog=_ABOUT_BOUNDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, help="results of a run: what was")
    parser.add_argument("second", type=Path, help="results of another run: what is now")
    parser.add_argument(
        "--bound", action="append", default=[], metavar="BOUND", help="see below; may be repeated"
    )
    parser.add_argument(
        "--sure",
        action="store_true",
        help="a bound is broken only where the whole interval is beyond it",
    )
    parser.add_argument(
        "--relative-to",
        metavar="SERVER",
        help="divide all figures by those of this server in the same round first: takes out what "
        "made one whole run slower",
    )
    parser.add_argument("--all", action="store_true", help="show what does not differ as well")
    parser.add_argument(
        "--anyway", action="store_true", help="compare different scenarios, loads or machines"
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=FLOOR,
        help="the smallest difference that counts, as a share (default %(default)s)",
    )
    parser.add_argument(
        "--level",
        type=float,
        default=LEVEL,
        help="of the bootstrap intervals (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the bootstrap")
    return parser


def _judge(comparison: Comparison, bound: RatioBound, sure: bool) -> list[Judged]:
    if not fnmatchcase(comparison.scenario, bound.scenario):
        return []
    judged = [
        _judge_pair(comparison, bound, pair, sure)
        for pair in comparison.pairs
        if bound.fits(pair.name)
    ]
    return judged + [
        Judged(bound, name, False, "the second run has no such figure")
        for name, where in comparison.alone.items()
        if where == "first" and bound.fits(name)
    ]


def _judge_pair(comparison: Comparison, bound: RatioBound, pair: Pair, sure: bool) -> Judged:
    if failed := comparison.new_errors.get(f"{pair.load}/{pair.server}"):
        return Judged(bound, pair.name, False, f"{failed:,} requests failed, and none did before")
    if pair.ratio is None or pair.interval is None:
        return Judged(bound, pair.name, False, "was 0 in the first run: there is no ratio")
    within = [bound.holds(end) for end in pair.interval]
    met = any(within) if sure else bound.holds(pair.ratio)
    doubt = "" if all(within) or not any(within) else "; within the noise of the bound"
    return Judged(bound, pair.name, met, f"{_ratio(pair)}{doubt}")


def _table(pairs: Sequence[Pair], *, plain: bool) -> list[str]:
    """Lines of a table; `plain` figures are ratios, and have no unit."""
    header = ["load", "server", "measure", "first", "second", "ratio", "interval", ""]
    lines = [header] + [
        [
            pair.load,
            pair.server,
            pair.measure,
            number(pair.before) if plain else _figure(pair.before, pair.measure),
            number(pair.after) if plain else _figure(pair.after, pair.measure),
            "-" if pair.ratio is None else f"{pair.ratio:.3f}",
            "-" if pair.interval is None else f"{pair.interval[0]:.3f} to {pair.interval[1]:.3f}",
            {"same": "", "unknown": "?"}.get(pair.verdict, pair.verdict),
        ]
        for pair in pairs
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = {0, 1, 2, 7}
    shown = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [*shown, ""]


def _figure(value: float, measure: str) -> str:
    if measure.endswith("_s") or "_s." in measure:
        return number(value * 1e3, " ms")
    unit = " us" if measure.startswith(CPU) else " MiB" if measure.endswith("_mib") else ""
    return number(value, unit)


def _ratio(pair: Pair) -> str:
    assert pair.ratio is not None
    assert pair.interval is not None
    low, high = pair.interval
    return f"{pair.ratio:.3f} ({low:.3f} to {high:.3f})"


def _whence(results: Mapping[str, Any]) -> str:
    commit = results.get("commit") or {}
    state = " with changes" if commit.get("changed_since") else ""
    return f"{str(results.get('date', ''))[:16]}  commit {str(commit.get('hash', '?'))[:12]}{state}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or "samples" not in found:
        raise ValueError(
            f"{path} is no file of results: it has no samples. `python -m bench run` writes them"
        )
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


def _shortened(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


if __name__ == "__main__":
    sys.exit(main())
