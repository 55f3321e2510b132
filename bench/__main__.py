"""Load benchmarks: `python -m bench run bench/scenarios/NAME.yaml`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import compare, run
from bench.parts import aimed_at, only, quick
from bench.peers.environments import (
    PEERS,
    PeerUnavailable,
    environment_of,
    is_ready,
    versions_of,
)
from bench.run import Job
from bench.scenario import Scenario, ScenarioInvalid, load_scenario

__all__ = ["job_of", "main"]

_ROOT = Path(__file__).resolve().parent.parent
_SCENARIOS = _ROOT / "bench" / "scenarios"
_RESULTS = _ROOT / "bench" / "results"
_TRIALS = _ROOT / ".bench"
"""For runs that are not whole: README.md shows what is in `_RESULTS`."""
_FAILED = 2
_EPILOG = """\
commands:
  run SCENARIO.yaml      measure; writes JSON, a page and tables
  compare A.json B.json  what differs by more than the noise
  list                   the scenarios there are
  peers                  the servers to compare with, and whether they are installed
  page RESULT.json       write page and tables anew

`python -m bench COMMAND --help` says more.

exit status of run: 0 all bounds met, 1 one missed, 2 the run failed, 130 Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says.

    Returns:
        The exit status; see `python -m bench --help`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "run": _run,
        "compare": _compare,
        "list": _list,
        "peers": _peers,
        "page": _page,
    }
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND")
    command = parser.parse_args(given[:1]).command
    return commands[command](given[1:])


def _run(arguments: Sequence[str]) -> int:
    parser = _run_parser()
    given = parser.parse_args(arguments)
    if given.url is None and (given.grpc_url or given.model):
        parser.error("--grpc-url and --model belong to --url")
    try:
        job = job_of(given, arguments)
    except ScenarioInvalid as error:
        print(error, file=sys.stderr)
        return _FAILED
    return run.run_scenario(job)


def job_of(given: argparse.Namespace, arguments: Sequence[str]) -> Job:
    """What the options of `run` ask for.

    Raises:
        ScenarioInvalid: The scenario has faults, or has not what the options name.
    """
    whole = load_scenario(_find(given.scenario))
    scenario = whole
    if given.url is not None:
        scenario = aimed_at(scenario, given.url, given.grpc_url, given.model)
    scenario = only(scenario, given.only_servers, given.only_loads)
    if given.quick:
        scenario = quick(scenario)
    if given.rounds is not None:
        scenario = scenario.model_copy(update={"rounds": given.rounds})
    if given.seed is not None:
        scenario = scenario.model_copy(update={"seed": given.seed})
    trial = _TRIALS / f"{whole.name}.json"
    is_whole = scenario == whole
    output = given.output or (_RESULTS / f"{whole.name}.json" if is_whole else trial)
    return Job(
        scenario=scenario,
        output=output,
        trial_output=trial,
        command=shlex.join(["python", "-m", "bench", "run", *arguments]),
        quick=given.quick,
    )


def _find(path: Path) -> Path:
    """A scenario's file; its name alone will do."""
    beside = _SCENARIOS / f"{path}.yaml"
    return beside if not path.exists() and beside.exists() else path


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench run",
        description="Starts the servers of a scenario, loads them in turn, and judges the bounds.",
        epilog="Whole runs go to bench/results/, all others to .bench/.",
    )
    parser.add_argument("scenario", type=Path, help="a file, or the name of one of `list`")
    parser.add_argument(
        "--quick", action="store_true", help="short and rough, to see that it works"
    )
    parser.add_argument("--rounds", type=_at_least_one, help="instead of the scenario's")
    parser.add_argument("--seed", type=int, help="instead of the scenario's")
    parser.add_argument("--only-servers", type=_names, metavar="A,B", help="leave out the others")
    parser.add_argument("--only-loads", type=_names, metavar="A,B", help="leave out the others")
    parser.add_argument("--output", type=Path, help="the JSON file; .html and .md go beside it")
    at = parser.add_argument_group("a server that runs already, instead of the scenario's")
    at.add_argument("--url", help="without a path: http://127.0.0.1:8000")
    at.add_argument("--grpc-url", metavar="HOST:PORT", help="for loads with `body: grpc`")
    at.add_argument("--model", help="what it calls the model; by default as the scenario does")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("names with commas between are wanted")
    return names


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: 1 or more")
    return int(text)


def _compare(arguments: Sequence[str]) -> int:
    return compare.main(arguments)


def _list(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="python -m bench list", description="Says which scenarios there are."
    ).parse_args(arguments)
    for path in sorted(_SCENARIOS.glob("*.yaml")):
        print(_describe(load_scenario(path)))
    return 0


def _describe(scenario: Scenario) -> str:
    return (
        f"{scenario.name:<12} {scenario.title}\n"
        f"{'':<12} servers: {', '.join(scenario.servers)}\n"
        f"{'':<12} loads: {', '.join(scenario.loads)}; "
        f"{_count(scenario.rounds, 'round')}, {_count(len(scenario.bounds), 'bound')}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _peers(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench peers",
        description="Says which servers there are to compare with, and whether they are installed.",
    )
    parser.add_argument("--install", action="store_true", help="install those that are not")
    given = parser.parse_args(arguments)
    status = 0
    for name, peer in PEERS.items():
        state = "installed" if is_ready(name) else "not installed yet: the first run does it"
        if given.install and not is_ready(name):
            try:
                state = f"installed now: {environment_of(name)}"
            except PeerUnavailable as error:
                state, status = str(error), 1
        version = versions_of(name).get(peer.package, "")
        print(f"{name:<10} {peer.title} {version}: {state}")
    return status


def _page(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench page", description="Writes page and tables of results anew."
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that `run` wrote")
    for path in parser.parse_args(arguments).results:
        try:
            run.render(json.loads(path.read_text()), path)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return _FAILED
        print(f"written to {path.with_suffix('.html')} and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
