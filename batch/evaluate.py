"""Judges versions of a model on labelled data: a report as JSON, and a page with plots.

    python batch/evaluate.py batch/configs/evaluate_flights.yaml --local

What it is told is in docs/batch.md; what report.json says, in rayprism.offline.evaluation.
"""

from __future__ import annotations

from pathlib import Path

import click

EXAMPLES = """\b
Examples:
  python batch/evaluate.py batch/configs/evaluate_flights.yaml --local
  python batch/evaluate.py job.yaml --local --set versions=[2,3] --set output=out/second
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
      python batch/evaluate.py batch/configs/evaluate_flights.yaml
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--local", is_flag=True, help="On this machine alone, with a Ray that it starts and stops."
)
@click.option("--restart", is_flag=True, help="Throw away the predictions that are there.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=YAML",
    help="Instead of what the file says, as in --set limits.batch_rows=64. May be repeated.",
)
def main(config: Path, local: bool, restart: bool, changes: tuple[str, ...]) -> None:
    """Judges versions of a model on the labelled data that CONFIG names.

    Predicts the rows with each version, then says which is better by how much, with intervals.
    Stopped, the same command goes on.
    """
    from rayprism.offline.command import resumable

    with resumable():
        _run(config, changes, local=local, restart=restart)


def _run(config: Path, changes: tuple[str, ...], *, local: bool, restart: bool) -> None:
    from rayprism.offline.evaluation import evaluate
    from rayprism.offline.evaluation_spec import load_evaluation
    from rayprism.offline.report import summarize

    spec = load_evaluation(config, changes)
    found = evaluate(spec, local=local, restart=restart, source=str(config))
    click.echo(f"{summarize(found.report)}\n\n{found.html_path}\n{found.json_path}")


if __name__ == "__main__":
    main()
