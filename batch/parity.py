"""Compares the output of a batch job with what the running endpoint answers to the same rows.

python batch/parity.py batch/configs/flights.yaml --url http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rayprism.offline.parity import Parity

EXAMPLES = """\b
Examples:
  python batch/parity.py batch/configs/flights.yaml
  python batch/parity.py job.yaml --url http://127.0.0.1:8000 --sample 2000 --batch-rows 16
  python batch/parity.py job.yaml --grpc 127.0.0.1:9000 --json parity.json

\b
Exit codes: 0 all rows agree, 1 some do not, or they could not be compared, 2 wrong usage.
"""


def _check_url(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from rayprism.offline.endpoint import parse_url

    try:
        parse_url(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--url",
    default="http://127.0.0.1:8000",
    show_default=True,
    callback=_check_url,
    help="HTTP address of the fleet.",
)
@click.option("--grpc", metavar="HOST:PORT", help="Ask over gRPC at this address instead.")
@click.option(
    "--application", metavar="NAME", help="Serve's, for --grpc.  [default: the model's name]"
)
@click.option(
    "--sample", type=click.IntRange(1), default=256, show_default=True, help="Rows to compare."
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="The same seed draws the same rows.",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Rows of one request, where their shapes are equal.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the result there too.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=YAML",
    help="Instead of what the file says, as for the job itself. May be repeated.",
)
def main(
    config: Path,
    url: str,
    grpc: str | None,
    application: str | None,
    sample: int,
    seed: int,
    batch_rows: int,
    json_file: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Compares a job's output with the running endpoint, on a sample of its rows.

    CONFIG is what the job was run with. The rows are read again as the job reads them, sent to the
    endpoint with the stock client, and its answers compared with the output under the rule of the
    model's manifest. A job that is still at work is compared as far as it is committed.
    """
    if application is not None and grpc is None:
        raise click.UsageError("--application is for --grpc: over HTTP the path names the model")
    from rayprism.errors import RayprismError

    try:
        result = _run(config, changes, url, grpc, application, sample, seed, batch_rows)
    except RayprismError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(render(result))
    if json_file is not None:
        text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        try:
            json_file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            click.echo(f"error: {json_file} cannot be written: {error.strerror}", err=True)
            sys.exit(1)
    sys.exit(0 if result.agrees else 1)


def _run(
    config: Path,
    changes: tuple[str, ...],
    url: str,
    grpc: str | None,
    application: str | None,
    sample: int,
    seed: int,
    batch_rows: int,
) -> Parity:
    from rayprism.offline.endpoint import Endpoint
    from rayprism.offline.parity import run_parity
    from rayprism.offline.plan import plan_job
    from rayprism.offline.spec import load_spec

    plan = plan_job(load_spec(config, changes), str(config))
    with Endpoint(plan.version.manifest, url, grpc=grpc, application=application) as endpoint:
        return run_parity(plan, endpoint, sample=sample, seed=seed, batch_rows=batch_rows)


def render(result: Parity) -> str:
    """What a person reads of a result."""
    parts = [_head(result), _table(result)]
    letters = result.letters
    if letters.refused or letters.answered or letters.not_sent:
        parts.append(
            f"dead letters among them: {letters.refused} refused by the endpoint too, "
            f"{letters.answered} answered by it, {letters.not_sent} of which no request can be made"
        )
    if result.disagreements:
        count = result.disagreement_count
        shown = len(result.disagreements)
        first = f", the first {shown}" if count > shown else ""
        lines = [f"{count} disagreement{'s' if count > 1 else ''}{first}:"]
        for item in result.disagreements:
            output = f" output {item.output!r}" if item.output else ""
            lines.append(
                f"  {item.file} at {item.row} (shard {item.shard}){output}: {item.message}"
            )
            lines.append(f"    online   {item.online}")
            lines.append(f"    offline  {item.offline}")
        parts.append("\n".join(lines))
    parts.append(_verdict(result))
    return "\n\n".join(parts)


def _head(result: Parity) -> str:
    lines = [f"{result.model} version {result.version}, {result.digest}, at {result.endpoint}"]
    if result.endpoint_digest is None:
        lines.append(
            "The endpoint does not tell its digest; name, version, inputs and outputs are the same."
        )
    lines.append(
        f"{result.rows:,} of {result.rows_done:,} rows, out of {result.shards_read} of "
        f"{result.shards} shards, seed {result.seed}, {_together(result.rows_together)}"
    )
    if result.shards_done < result.shards:
        lines.append(
            f"The job is not finished: {result.shards_done} of {result.shards} shards are done, "
            "and only their rows were drawn from."
        )
    return "\n".join(lines)


def _together(rows: int) -> str:
    return "one row a request" if rows == 1 else f"up to {rows} rows a request"


def _table(result: Parity) -> str:
    rule = result.tolerance
    header = ("output", "rows", "agree", "disagree", "largest absolute", "largest relative")
    rows = [
        (
            name,
            str(output.compared),
            str(output.agree),
            str(output.disagree),
            _number(output.largest_absolute),
            _number(output.largest_relative),
        )
        for name, output in result.outputs.items()
    ]
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in (header, *rows)
    ]
    said = {
        "close": f"within {rule.absolute:g} + {rule.relative:g} * |online|",
        "cosine": f"cosine similarity of at least {rule.cosine:g}",
        "top1": "the same largest value",
        "exact": "equal",
    }
    return "\n".join([*lines, f"rule of the manifest: {rule.rule} ({said[rule.rule]})"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value else "0"


def _verdict(result: Parity) -> str:
    if result.disagreement_count:
        return f"DIFFERENT: {result.rows - result.letters.not_sent - result.agree} rows disagree"
    if not result.agree:
        return "NOTHING COMPARED: no request could be made of any row that was drawn"
    return f"SAME: all {result.agree:,} rows agree"


if __name__ == "__main__":
    main()
