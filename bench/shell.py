"""What the benchmarks of a fleet share: a run that leaves nothing behind, and its report."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.cluster import ClusterFailed
from bench.load import LoadFailed
from bench.plan import AnswerWrong
from bench.processes import end_marked, new_marker

__all__ = ["run_and_report"]


def run_and_report(
    run: Callable[[str, Path], dict[str, Any]],
    render: Callable[[Mapping[str, Any]], str],
    output: Path,
) -> int:
    """Runs a benchmark, and writes its results beside their report.

    Args:
        run: With the marker of its processes and a folder that goes; gives the results.
        render: Of the results: Markdown.
        output: The JSON file; the report has the ending `.md`.

    Returns:
        0 where every target is met, 1 where one is missed, 2 where the run failed, 130 after
        Ctrl-C.
    """
    # An ended terminal or container must not leave clusters behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    marker = new_marker()
    try:
        with tempfile.TemporaryDirectory(prefix="rayprism-bench-") as folder:
            results = run(marker, Path(folder))
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    except (AnswerWrong, ClusterFailed, LoadFailed) as error:
        print(f"the run failed: {error}", file=sys.stderr)
        return 2
    finally:
        end_marked(marker)
    text = render(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten to {output} and {output.with_suffix('.md').name}")
    return 0 if all(verdict["met"] for verdict in results["verdicts"]) else 1
