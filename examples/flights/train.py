"""Trains the two versions of the model `flights`, checks them, and pushes them.

Will a flight arrive 15 minutes late or more? Answered with what is known when the flight is put
on the schedule. Run from the root of the repository:

    python examples/flights/train.py --repository models
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flights_data as data
import pandas as pd
import quality
from estimators import CANDIDATES, Candidate, export_onnx
from threadpoolctl import threadpool_limits

from rayprism.core.compare import Tolerance
from rayprism.models.manifest import Batching, TensorValue
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository

MODEL = "flights"
ROWS_FILE = Path(__file__).with_name("rows.json")
MAX_ROWS = 256
"""Of one batch: about half a millisecond for version 2. More rows hardly cost less each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path(os.environ.get("RAYPRISM_REPOSITORY", "models")),
        help="folder of the model repository (default: $RAYPRISM_REPOSITORY, else ./models)",
    )
    parser.add_argument(
        "--force", action="store_true", help="train and push again what is already there"
    )
    parser.add_argument(
        "--rows", type=Path, default=ROWS_FILE, help="where to write a request that curl can send"
    )
    arguments = parser.parse_args()

    repository = Repository(arguments.repository)
    flights = data.load_flights()
    flown = data.was_flown(flights)
    print(
        f"{len(flights):,} flights of 2013. {int((~flown).sum()):,} have no arrival delay "
        "(cancelled or diverted): predicted, but used neither for training nor for evaluation."
    )
    arguments.rows.write_text(example_request(flights), encoding="utf-8")
    digest = data.data_digest()

    versions = []
    for candidate in CANDIDATES:
        recipe = describe_recipe(candidate, digest)
        version = None if arguments.force else find_version(repository, recipe)
        if version is None:
            version = train_version(candidate, recipe, flights, repository)
        else:
            print(
                f"{candidate.title}: version {version.manifest.version} came out of the same data, "
                "parameters and packages. --force trains it again."
            )
        versions.append(version)
    print(f"\n{describe_quality(versions)}\n\nRepository: {repository.root}")


def describe_recipe(candidate: Candidate, digest: str) -> dict[str, Any]:
    """All that decides what a training run gives: two versions of one recipe are the same."""
    packages = ("numpy", "scikit-learn", "skl2onnx")
    return {
        "estimator": candidate.title,
        "parameters": dict(candidate.parameters),
        "inputs": list(data.COLUMNS),
        "data": digest,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def find_version(repository: Repository, recipe: Mapping[str, Any]) -> ModelVersion | None:
    """The newest version that was made by this recipe."""
    if MODEL not in repository.models():
        return None
    for number in reversed(repository.versions(MODEL)):
        version = repository.version(MODEL, number)
        if version.manifest.metadata.get("recipe") == recipe:
            return version
    return None


# On one thread: the data are small, and on a busy machine threads that wait for each other cost
# more than they bring.
@threadpool_limits.wrap(limits=1)
def train_version(
    candidate: Candidate, recipe: dict[str, Any], flights: pd.DataFrame, repository: Repository
) -> ModelVersion:
    """Fits, exports, checks and pushes one version."""
    flown, held_out = data.was_flown(flights), data.is_held_out(flights)
    training = flights[flown & ~held_out]
    print(f"\n{candidate.title}: training on {len(training):,} flights", flush=True)
    began = time.perf_counter()
    pipeline = quality.fit(candidate, training)
    print(f"  fitted in {time.perf_counter() - began:.1f} s")

    model = export_onnx(pipeline)
    began = time.perf_counter()
    served = quality.predict_onnx(model, flights)
    took = time.perf_counter() - began
    print(f"  all {len(served):,} flights predicted by ONNX Runtime in {took:.1f} s")
    difference = quality.check_agreement(pipeline, flights, served)
    print(f"  largest difference between ONNX and scikit-learn: {difference:.1e}")
    for rows in (1, 64):
        latency = quality.measure_latency_s(model, flights[:rows])
        print(f"  {rows} row{'s'[: rows - 1]} in {latency * 1e6:.0f} µs (median, one thread)")

    tested = flown & held_out
    metadata = {
        "task": f"probability of arriving {data.DELAYED_MINUTES} minutes late or more",
        "recipe": recipe,
        "source": {"package": data.PACKAGE, "licence": "CC0-1.0", "rows": len(flights)},
        "training": quality.describe_part(training, "all weeks but every fifth"),
        "held_out": {
            **quality.describe_part(flights[tested], "every fifth week, whole"),
            **quality.measure(data.was_delayed(flights[tested]), served[tested]),
        },
        "look_ahead": quality.look_ahead(candidate, flights[flown]),
        "onnx_largest_difference": difference,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        file.write_bytes(model)
        result = push_model(
            repository,
            MODEL,
            file,
            example=data.model_inputs(data.example_flights(flights)),
            batching=Batching(max_rows=MAX_ROWS),
            tolerance=Tolerance(rule="close", absolute=quality.AGREEMENT, relative=1e-4),
            metadata=metadata,
        )
    for warning in result.warnings:
        print(f"  warning: {warning}")
    print(f"  pushed as version {result.version.manifest.version}", flush=True)
    return result.version


def example_request(flights: pd.DataFrame) -> str:
    """A request of the Open Inference Protocol that curl can send; one line an input."""
    inputs = data.model_inputs(data.example_flights(flights))
    lines = [
        json.dumps(TensorValue.from_array(name, array).model_dump(mode="json"))
        for name, array in inputs.items()
    ]
    return (
        '{\n  "id": "flights-of-2013",\n  "inputs": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"
    )


def describe_quality(versions: Sequence[ModelVersion]) -> str:
    """The table of all versions, from what their manifests say."""
    head = (
        f"{'version':<10}{'estimator':<22}{'tested on':<26}{'AUC':>7}{'log loss':>10}{'Brier':>8}"
    )
    lines = [head, "-" * len(head)]
    for part, what in (("held_out", "held-out weeks"), ("look_ahead", "Nov-Dec, from Jan-Oct")):
        for version in versions:
            found = version.manifest.metadata[part]
            lines.append(
                f"{version.manifest.version:<10}"
                f"{version.manifest.metadata['recipe']['estimator']:<22}{what:<26}"
                f"{found['auc']:>7.4f}{found['log_loss']:>10.4f}{found['brier']:>8.4f}"
            )
        lines.append(
            f"{'-':<10}{'always the base rate':<22}{what:<26}{0.5:>7.4f}"
            f"{found['base_rate_log_loss']:>10.4f}{found['base_rate_brier']:>8.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
