"""Predicts labelled rows with several versions, and says which is better by how much.

The predictions are batch jobs like any other, and go on where they were stopped. `report.json` is
what was found, and `report.html` shows it. The schema of `report.json`, format 1:

    rayprism_evaluation   1
    model, task, label, prediction, positive, threshold, classes, confidence, resamples, seed
                          what was told, or found out; null where it has no meaning
    versions[]            the baseline first: version, digest, created, dead_letters, not_finite
    rows                  input, not_predicted, label_missing, not_finite, compared: the input is
                          the sum of the others
    bytes_per_row         memory of the statistics: held, working
    metrics[]             name, title, better (higher | lower | zero),
                          method (bootstrap | bootstrap of a sample | t),
                          versions[]: value, interval [low, high]
                          differences[], of each version but the baseline: value, interval,
                          verdict (better | worse | no difference shown | not known)
    segments[]            column, distinct, values[]: value (null: no value), rows,
                          metrics[] as above, of metrics that are means
    plots                 roc[], precision_recall[], calibration[], histogram, residuals: where the
                          task has them, one for each version
    notes[]               sentences on what has to be known to read the numbers

A value or an interval is null where it is not defined.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from rayprism.core.shards import plan_digest
from rayprism.errors import ConfigInvalid, Fault, RepositoryError, SetupError
from rayprism.offline.evaluation_output import (
    Prediction,
    bytes_per_row,
    find_prediction,
    refuse_too_many,
)
from rayprism.offline.evaluation_rows import Evaluated, read_rows
from rayprism.offline.evaluation_spec import EvaluationSpec
from rayprism.offline.filesystems import open_filesystem
from rayprism.offline.job import run_job
from rayprism.offline.labels import ClassTable, read_numbers
from rayprism.offline.plan import Plan, plan_job, prepares
from rayprism.offline.quality import (
    FEW_ROWS,
    MOST_RESAMPLED_ROWS,
    Comparison,
    compare,
    compare_segments,
)
from rayprism.offline.readers import read_shard
from rayprism.offline.report import render_report
from rayprism.offline.sinks import Store
from rayprism.offline.spec import JobSpec

__all__ = ["HTML_FILE", "JSON_FILE", "Evaluation", "evaluate"]

JSON_FILE, HTML_FILE = "report.json", "report.html"

_FORMAT = 1
_SAMPLE_ROWS = 16_384
_LIBRARIES = ("matplotlib", "scipy", "sklearn")


class RunJob(Protocol):
    """`rayprism.offline.job.run_job`."""

    def __call__(
        self,
        spec: JobSpec,
        *,
        local: bool,
        restart: bool,
        say: Callable[[str], None] | None,
        source: str,
    ) -> object:
        """Does what is missing of a job."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it.

    Args:
        report: As in `report.json`.
        json_path: Where that is.
        html_path: Where the page is.
    """

    report: dict[str, Any]
    json_path: str
    html_path: str


def evaluate(
    spec: EvaluationSpec,
    *,
    local: bool = False,
    restart: bool = False,
    say: Callable[[str], None] | None = None,
    source: str = "evaluation",
    run: RunJob = run_job,
) -> Evaluation:
    """Predicts with every version what is not predicted yet, compares, and writes the report.

    Args:
        spec: The evaluation.
        local: As of a job.
        restart: Whether to throw away the predictions that are there.
        say: Tells the person; by default as a job does.
        source: What it was read from, for messages.
        run: Runs a job.

    Raises:
        ConfigInvalid: It cannot be done as it is written; before any work where it can be known.
        SetupError: A library is missing, the output holds something else, or no row can be
            compared.
        JobFailed: A job ended before it was done; the same again goes on.
    """
    _require_libraries()
    try:
        spec, plans, prediction = _plan(spec)
        output = posixpath.dirname(plans[0].spec.output.uri)
        store = Store(*open_filesystem(output))
        _refuse_others(store, spec)
        for plan in plans:
            if say:
                say(f"version {plan.spec.version}")
            run(plan.spec, local=local, restart=restart, say=say, source=source)
        evaluated = read_rows(spec, prediction, [plan.spec.output.uri for plan in plans])
    except ConfigInvalid as error:
        raise ConfigInvalid(source, error.faults) from None
    if say:
        say(f"comparing {evaluated.counts.compared:,} rows")
    text = json.dumps(
        _describe(spec, plans, prediction, evaluated),
        indent=1,
        allow_nan=False,
        ensure_ascii=False,
    )
    # What is given back, and what the page shows, is what a reader of the file gets.
    report = json.loads(text)
    page = render_report(report)
    store.write(JSON_FILE, text.encode("utf-8", "backslashreplace") + b"\n")
    store.write(HTML_FILE, page.encode("utf-8", "backslashreplace"))
    return Evaluation(report, store.at(JSON_FILE), store.at(HTML_FILE))


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{' and '.join(missing)} not installed. Mend: pip install 'rayprism[evaluate]'"
        )


# --- before any work


def _plan(spec: EvaluationSpec) -> tuple[EvaluationSpec, list[Plan], Prediction]:
    plans = _plan_versions(spec)
    if len({plan_digest(plan.shards) for plan in plans}) > 1:
        # A version with pre-processing is cut finer than one without; rows meet shard by shard.
        rows = min(plan.spec.shard_rows(prepares=prepares(plan.version.manifest)) for plan in plans)
        limits = spec.limits.model_copy(update={"shard_rows": rows})
        spec = spec.model_copy(update={"limits": limits})
        plans = _plan_versions(spec)
    predictions = [find_prediction(spec, plan.version.manifest) for plan in plans]
    faults = [
        Fault(
            f"versions[{index}]",
            f"the output of version {spec.versions[index]} is {_told(other)}, that of the "
            f"baseline {spec.versions[0]} is {_told(predictions[0])}: they cannot be compared",
        )
        for index, other in enumerate(predictions)
        if other != predictions[0]
    ]
    if faults:
        raise ConfigInvalid("evaluation", faults)
    if plans[0].rows is not None:
        refuse_too_many(spec, predictions[0], plans[0].rows)
    _check_labels(spec, plans[0], predictions[0])
    return spec, plans, predictions[0]


def _told(prediction: Prediction) -> str:
    kind = {"score": "a score", "class": "a class", "scores": "scores", "number": "a number"}
    width = f" of {prediction.width} classes" if prediction.width else ""
    return f"{prediction.name!r}, {kind[prediction.kind]}{width} a row"


def _plan_versions(spec: EvaluationSpec) -> list[Plan]:
    """The job of each version; every fault of all of them at once."""
    plans: list[Plan] = []
    faults: list[Fault] = []
    for index, version in enumerate(spec.versions):
        try:
            plans.append(plan_job(spec.job(version)))
        except RepositoryError as error:
            faults.append(Fault(f"versions[{index}]", str(error)))
        except ConfigInvalid as error:
            faults += [_in_evaluation(spec, fault) for fault in error.faults]
    if faults:
        different = {(fault.path, fault.message): fault for fault in faults}
        raise ConfigInvalid("evaluation", list(different.values()))
    return plans


def _in_evaluation(spec: EvaluationSpec, fault: Fault) -> Fault:
    """Where a fault of a job is in what an evaluation is told."""
    columns = {spec.label: "label"}
    for index, name in enumerate(spec.segments):
        columns.setdefault(name, f"segments[{index}]")
    if fault.path in columns:
        return Fault(columns[fault.path], fault.message)
    if fault.path.startswith("output"):
        named = [path for name, path in columns.items() if f"column {name!r}" in fault.message]
        return Fault(named[0] if named else "output", fault.message)
    return fault


def _check_labels(spec: EvaluationSpec, plan: Plan, prediction: Prediction) -> None:
    """Looks at the first labels: most that are wrong are wrong from the start."""
    with closing(read_shard(plan.listing, plan.shards[0], [spec.label], _SAMPLE_ROWS)) as batches:  # type: ignore[type-var]
        batch = next(batches, None)
    if batch is None or not len(batch.positions):
        return
    column = batch.table[spec.label]
    if spec.task == "regression":
        read_numbers(column, spec.label)
        return
    ClassTable.of(spec, prediction.kind, prediction.width).codes(column)


def _refuse_others(store: Store, spec: EvaluationSpec) -> None:
    """Raises SetupError where the output folder holds what no evaluation wrote."""
    others = sorted(
        name
        for name in store.listing()
        if name not in (JSON_FILE, HTML_FILE)
        and not name.startswith((".", "_"))
        and not (name.startswith("version-") and name.removeprefix("version-").isdigit())
    )
    if others:
        named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise SetupError(
            f"{store.path} holds something that no evaluation wrote: {named}. Give a folder that "
            "is new or empty; nothing was changed"
        )


# --- the report


def _describe(
    spec: EvaluationSpec, plans: Sequence[Plan], prediction: Prediction, evaluated: Evaluated
) -> dict[str, Any]:
    scored, counts = evaluated.scored, evaluated.counts
    random = np.random.default_rng(spec.seed)
    compared = compare(scored, confidence=spec.confidence, resamples=spec.resamples, random=random)
    held, working = bytes_per_row(spec, prediction)
    binary = spec.task == "binary"
    return {
        "rayprism_evaluation": _FORMAT,
        "model": spec.model,
        "task": spec.task,
        "label": spec.label,
        "prediction": prediction.name,
        "positive": evaluated.classes[1] if binary else None,
        "threshold": spec.threshold if binary and prediction.kind != "class" else None,
        "classes": list(evaluated.classes) or None,
        "confidence": spec.confidence,
        "resamples": spec.resamples,
        "seed": spec.seed,
        "versions": [
            {
                "version": plan.version.manifest.version,
                "digest": plan.version.manifest.digest,
                "created": plan.version.manifest.created,
                "dead_letters": counts.dead_letters[index],
                "not_finite": counts.not_finite_of[index],
            }
            for index, plan in enumerate(plans)
        ],
        "rows": {
            "input": counts.rows_in,
            "not_predicted": counts.not_predicted,
            "label_missing": counts.label_missing,
            "not_finite": counts.not_finite,
            "compared": counts.compared,
        },
        "bytes_per_row": {"held": held, "working": working},
        "metrics": [_metric(comparison) for comparison in compared],
        "segments": _segments(spec, evaluated),
        "plots": scored.plots(),
        "notes": _notes(spec, prediction, evaluated),
    }


def _metric(comparison: Comparison) -> dict[str, Any]:
    metric = comparison.metric
    return {
        "name": metric.name,
        "title": metric.title,
        "better": metric.better,
        "method": comparison.method,
        "versions": [asdict(estimate) for estimate in comparison.versions],
        "differences": [asdict(difference) for difference in comparison.differences],
    }


def _segments(spec: EvaluationSpec, evaluated: Evaluated) -> list[dict[str, Any]]:
    found = []
    for column, codes, values in zip(
        spec.segments, evaluated.segments, evaluated.segment_values, strict=True
    ):
        segments = compare_segments(evaluated.scored, codes, confidence=spec.confidence)
        found.append(
            {
                "column": column,
                "distinct": int(np.count_nonzero(np.bincount(codes))),
                "values": [
                    {
                        "value": values[segment.code],
                        "rows": segment.rows,
                        "metrics": [_metric(each) for each in segment.comparisons],
                    }
                    for segment in segments
                ],
            }
        )
    return found


def _notes(spec: EvaluationSpec, prediction: Prediction, evaluated: Evaluated) -> list[str]:
    counts = evaluated.counts
    names = {metric.name for metric in evaluated.scored.metrics}
    share = f"{spec.confidence:g}"
    notes = [
        f"Each interval holds the true value in a share of {share} of such evaluations, if the "
        "rows are independent. Where they come in groups, as days or users, it is too narrow.",
        f"Every difference is judged alone: of many that are none, a share of "
        f"{1 - spec.confidence:.2g} is shown all the same.",
    ]
    if counts.compared > MOST_RESAMPLED_ROWS:
        notes.append(
            f"Of {counts.compared:,} rows the bootstrap took {MOST_RESAMPLED_ROWS:,}, drawn by lot "
            f"(seed {spec.seed}); its intervals are scaled to all rows. Values, and the intervals "
            "of metrics that are means, are of all rows."
        )
    if counts.compared < FEW_ROWS:
        notes.append(f"No verdict is given for fewer than {FEW_ROWS} rows.")
    if counts.not_finite:
        of_each = ", ".join(
            f"version {version}: {count:,}"
            for version, count in zip(spec.versions, counts.not_finite_of, strict=True)
        )
        notes.append(
            f"{counts.not_finite:,} labelled rows are left out for all versions, because one "
            f"predicted NaN or infinity ({of_each}). A version that does so on hard rows looks "
            "better than it is."
        )
    if counts.not_predicted:
        notes.append(
            f"{counts.not_predicted:,} rows are left out for all versions, because one has no "
            "prediction for them; its dead letters say why."
        )
    if counts.label_missing:
        notes.append(f"{counts.label_missing:,} rows are left out, because they have no label.")
    if prediction.kind in ("score", "scores") and "log_loss" not in names:
        notes.append(
            "Scores of at least one version are no probabilities (from 0 to 1, and of all classes "
            "1 together), so nothing is said of log loss and calibration."
        )
    if spec.task == "binary" and prediction.kind == "class":
        notes.append("The versions predict classes and no scores, so nothing is said of ranking.")
    if "ece" in names:
        notes.append(
            "The calibration error is too large by chance, the more so the fewer rows; its "
            "intervals are centred on the value."
        )
    if "macro_f1" in names:
        notes.append("Macro F1 is the mean over the classes that are among the labels.")
    return notes
