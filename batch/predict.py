"""Runs one version of a model over a large data set.

    python batch/predict.py batch/configs/flights.yaml --local

What it is told is in docs/batch.md.
"""

from __future__ import annotations

from pathlib import Path

import click

EXAMPLES = """\b
Examples:
  python batch/predict.py batch/configs/flights.yaml --dry-run
  python batch/predict.py batch/configs/flights.yaml --local
  python batch/predict.py job.yaml --local --set pool.max_actors=4 --set output.uri=/tmp/out
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
      python batch/predict.py batch/configs/flights.yaml
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--local", is_flag=True, help="On this machine alone, with a Ray that it starts and stops."
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be done, and run one batch; write nothing."
)
@click.option("--restart", is_flag=True, help="Throw away what an earlier job wrote to the output.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=YAML",
    help="Instead of what the file says, as in --set limits.batch_rows=64. May be repeated.",
)
def main(config: Path, local: bool, dry_run: bool, restart: bool, changes: tuple[str, ...]) -> None:
    """Runs one version of a model over the data that CONFIG names.

    The output holds every row of the input exactly once, or the row stands among the dead letters
    with its reason, whatever dies on the way: stopped, the same command goes on.
    """
    from rayprism.offline.command import resumable

    with resumable():
        if dry_run:
            _dry_run(config, changes)
        else:
            _run(config, changes, local=local, restart=restart)


def _run(config: Path, changes: tuple[str, ...], *, local: bool, restart: bool) -> None:
    from rayprism.offline.job import describe, run_job
    from rayprism.offline.spec import load_spec

    summary = run_job(load_spec(config, changes), local=local, restart=restart, source=str(config))
    click.echo(describe(summary))


def _dry_run(config: Path, changes: tuple[str, ...]) -> None:
    from rayprism.offline.dry_run import dry_run
    from rayprism.offline.spec import load_spec

    click.echo(dry_run(load_spec(config, changes), source=str(config)))


if __name__ == "__main__":
    main()
