"""Says what differs between two runs of a scenario by more than their rounds differ."""

from __future__ import annotations

import argparse
import json
import operator
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from bench.bootstrap import ratio_interval
from bench.samples import FAILED, Sample, Samples, value_at
from bench.tables import number

__all__ = [
    "BoundInvalid",
    "Comparison",
    "Judged",
    "Pair",
    "RatioBound",
    "Verdict",
    "compare",
    "judge",
    "main",
    "parse_bound",
    "render",
]

FEWEST_ROUNDS = 3
"""Of fewer nothing is said: two rounds of each differ in order by luck one time in three."""
ENOUGH_ROUNDS = 5

_SEED = 1
_LEVEL = 0.99
_FLOOR = 0.03
_MEASURES: Mapping[str, Literal["higher", "lower"]] = {
    "rate": "higher",
    "goodput": "higher",
    "found": "higher",
    "latency_s.p50": "lower",
    "latency_s.p99": "lower",
    "ready_s": "lower",
}
_CPU = "cpu_us_per_request"
_MACHINE = ("cpu", "cores", "memory_gib")
_SIGNS = {">=": operator.ge, "<=": operator.le}
_BOUND = re.compile(r"(?P<path>[^<>=]+?)\s*(?P<sign>>=|<=)\s*(?P<limit>[0-9.]+)")

Verdict = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure that both runs have.

    Args:
        load: Under which load.
        server: Of which server.
        measure: Where it stands in a sample.
        before: Median over the rounds of the first run.
        after: Median over the rounds of the second run.
        rounds: How many each of them has.
        ratio: `after / before`; None where `before` is 0.
        interval: Of the ratio.
        verdict: Whether they differ by more than the noise, and which way; `unknown` where rounds
            are too few, or there is no ratio.
    """

    load: str
    server: str
    measure: str
    before: float
    after: float
    rounds: tuple[int, int]
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: Verdict

    @property
    def name(self) -> str:
        """LOAD/SERVER/MEASURE."""
        return f"{self.load}/{self.server}/{self.measure}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, beside each other.

    Args:
        scenario: The name of what was run.
        pairs: By load, server and measure.
        alone: Figures that only one of them has: LOAD/SERVER/MEASURE, and `first` or `second`.
        objections: Why they should not be compared at all: another scenario, another machine.
        notes: What is to be known to read it.
    """

    scenario: str
    pairs: tuple[Pair, ...]
    alone: Mapping[str, Literal["first", "second"]]
    objections: tuple[str, ...]
    notes: tuple[str, ...]


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


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    relative_to: str | None = None,
    floor: float = _FLOOR,
    level: float = _LEVEL,
    seed: int = _SEED,
) -> Comparison:
    """Every figure of both runs, with the ratio second / first and its interval.

    A pair differs where the interval leaves out 1 and the ratio is more than `floor` away from it.

    Args:
        first: Results, see `bench.samples`.
        second: Those that are held against them.
        relative_to: A server by whose figures all others are divided, round by round, before they
            are compared: what made one whole run slower is then in no ratio.
        floor: The smallest difference that counts, as a share.
        level: Of the intervals. By default 99 %: there are many pairs, and of twenty that are equal
            one would seem to differ at 95 %.
        seed: Of the resampling.
    """
    sides = Samples(first), Samples(second)
    figures = [_figures(side, relative_to) for side in sides]
    pairs = [
        _pair(name, figures[0][name], figures[1][name], floor, level, seed)
        for name in figures[0]
        if name in figures[1]
    ]
    alone: dict[str, Literal["first", "second"]] = {
        "/".join(name): "first" if name in figures[0] else "second"
        for name in (*figures[0], *figures[1])
        if (name in figures[0]) != (name in figures[1])
    }
    return Comparison(
        scenario=str(_scenario(first).get("name", "")),
        pairs=tuple(pairs),
        alone=alone,
        objections=tuple(_objections(first, second)),
        notes=tuple(_notes(sides, pairs)),
    )


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
    measured is not kept.

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
    differing = [pair for pair in comparison.pairs if pair.verdict in ("better", "worse")]
    unknown = [pair for pair in comparison.pairs if pair.verdict == "unknown"]
    lines = [f"warning: {objection}" for objection in comparison.objections]
    shown = comparison.pairs if everything else differing
    if shown:
        lines += _table(shown)
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
    except (BoundInvalid, OSError, ValueError) as error:
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
  --bound 'overhead/c16/rayprism/rate>=0.95'  the same; an error if the files are of another scenario
  --bound '*/rayprism/latency_s.p99<=1.2'     p99 under each load at most a fifth higher
  --bound 'c64/rayprism/cpu_us_per_request.*<=1.05'
  --bound 'rate>=0.9'                         under every load, of every server

measures: rate, goodput (where a target_s makes it another than the rate), found (of a search),
  latency_s.p50, latency_s.p99, cpu_us_per_request.ROLE, ready_s (of a start)

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
        help="a bound is broken only where the whole interval is beyond it, and not the ratio alone",
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
        default=_FLOOR,
        help="the smallest difference that counts, as a share (default %(default)s)",
    )
    parser.add_argument(
        "--level",
        type=float,
        default=_LEVEL,
        help="of the bootstrap intervals (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=_SEED, help="of the bootstrap")
    return parser


Name = tuple[str, str, str]
"""Load, server, measure."""


def _figures(samples: Samples, relative_to: str | None) -> dict[Name, list[float]]:
    """Every measured figure, one value for each round that has it."""
    if relative_to is not None and relative_to not in samples.servers:
        raise BoundInvalid(
            f"no server {relative_to!r} to compare with in each file; there are: "
            f"{_listed(samples.servers)}"
        )
    found: dict[Name, list[float]] = {}
    for load in samples.loads:
        for server in samples.servers_of(load):
            if server == relative_to:
                continue
            for measure in _measures(samples.of(load, server), samples.load(load)):
                values = list(samples.values(load, server, measure).values())
                if relative_to is not None:
                    above, below = samples.pairs(load, measure, server, relative_to)
                    values = [one / other for one, other in zip(above, below, strict=True)]
                if values:
                    found[load, server, measure] = values
    return found


def _measures(of: Sequence[Sample], load: Mapping[str, Any]) -> list[str]:
    measures = [
        path
        for path in _MEASURES
        if any(value_at(each, path) is not None for each in of)
        and (path != "goodput" or load.get("target_s"))
    ]
    roles = sorted({role for each in of for role in each.get(_CPU) or ()})
    return measures + [f"{_CPU}.{role}" for role in roles]


def _pair(
    name: Name,
    before: Sequence[float],
    after: Sequence[float],
    floor: float,
    level: float,
    seed: int,
) -> Pair:
    middles = statistics.median(before), statistics.median(after)
    ratio, ends = None, None
    verdict: Verdict = "unknown"
    if min(before) > 0:
        ratio = middles[1] / middles[0]
        ends = ratio_interval(after, before, seed, paired=False, level=level)
        if min(len(before), len(after)) >= FEWEST_ROUNDS:
            verdict = _verdict(name[2], ratio, ends, floor)
    return Pair(*name, *middles, (len(before), len(after)), ratio, ends, verdict)


def _verdict(measure: str, ratio: float, ends: tuple[float, float], floor: float) -> Verdict:
    if ends[0] <= 1 <= ends[1] or abs(ratio - 1) <= floor:
        return "same"
    better = _MEASURES.get(measure, "lower")
    return "better" if (ratio > 1) == (better == "higher") else "worse"


def _objections(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterable[str]:
    one, other = _scenario(first), _scenario(second)
    if one.get("name") != other.get("name"):
        yield f"They are of different scenarios: {one.get('name')!r} and {other.get('name')!r}."
    machines = (first.get("machine") or {}, second.get("machine") or {})
    for key in _MACHINE:
        values = [machine.get(key) for machine in machines]
        if values[0] != values[1]:
            yield f"They ran on different machines: {key} was {values[0]}, and is {values[1]}."
    for part in ("loads", "servers"):
        specs = (one.get(part) or {}, other.get(part) or {})
        for name in specs[0]:
            if name in specs[1] and specs[0][name] != specs[1][name]:
                yield f"{part}.{name} is not the same: {_changed(specs[0][name], specs[1][name])}."


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} was {one.get(key)}, and is {other.get(key)}"
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    )


def _notes(sides: Sequence[Samples], pairs: Sequence[Pair]) -> Iterable[str]:
    rounds = min((min(pair.rounds) for pair in pairs), default=ENOUGH_ROUNDS)
    if rounds < FEWEST_ROUNDS:
        yield f"{rounds} rounds are too few to know the noise: {FEWEST_ROUNDS} are needed."
    elif rounds < ENOUGH_ROUNDS:
        yield (
            f"Of {rounds} rounds, up to one in ten figures that are equal seem to differ; "
            f"{ENOUGH_ROUNDS} tell more."
        )
    for word, samples in zip(("first", "second"), sides, strict=True):
        if samples.results.get("quick"):
            yield f"The {word} is a shortened run."
        for load in samples.loads:
            for server in samples.servers_of(load):
                if failed := samples.total(load, server, FAILED):
                    yield f"{load}/{server} had {failed:,.0f} errors in the {word}."
                if limited := samples.limited(load, server):
                    yield (
                        f"{load}/{server}: the load generator was the limit in {len(limited)} "
                        f"rounds of the {word}."
                    )


def _judge(comparison: Comparison, bound: RatioBound, sure: bool) -> list[Judged]:
    if not fnmatchcase(comparison.scenario, bound.scenario):
        return []
    judged = [_judge_pair(bound, pair, sure) for pair in comparison.pairs if bound.fits(pair.name)]
    return judged + [
        Judged(bound, name, False, "the second run has no such figure")
        for name, where in comparison.alone.items()
        if where == "first" and bound.fits(name)
    ]


def _judge_pair(bound: RatioBound, pair: Pair, sure: bool) -> Judged:
    if pair.ratio is None or pair.interval is None:
        return Judged(bound, pair.name, False, "was 0 in the first run: there is no ratio")
    within = [bound.holds(end) for end in pair.interval]
    met = any(within) if sure else bound.holds(pair.ratio)
    doubt = "" if all(within) or not any(within) else "; within the noise of the bound"
    return Judged(bound, pair.name, met, f"{_ratio(pair)}{doubt}")


def _table(pairs: Sequence[Pair]) -> list[str]:
    header = ["load", "server", "measure", "first", "second", "ratio", "interval", ""]
    lines = [header] + [
        [
            pair.load,
            pair.server,
            pair.measure,
            _figure(pair.before, pair.measure),
            _figure(pair.after, pair.measure),
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
    return number(value, " us") if measure.startswith(_CPU) else number(value)


def _ratio(pair: Pair) -> str:
    assert pair.ratio is not None
    assert pair.interval is not None
    low, high = pair.interval
    return f"{pair.ratio:.3f} ({low:.3f} to {high:.3f})"


def _whence(results: Mapping[str, Any]) -> str:
    commit = results.get("commit") or {}
    state = " with changes" if commit.get("changed_since") else ""
    return f"{str(results.get('date', ''))[:16]}  commit {str(commit.get('hash', '?'))[:12]}{state}"


def _scenario(results: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = results.get("scenario") or {}
    return found


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
