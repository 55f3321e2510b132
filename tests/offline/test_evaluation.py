"""From labelled files and real models to the report: which rows count, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv
from sklearn import metrics

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.errors import ConfigInvalid, SetupError
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.offline.commits import OutputFolder
from rayprism.offline.evaluation import Evaluation, evaluate
from rayprism.offline.evaluation_spec import load_evaluation, parse_evaluation
from rayprism.offline.files import open_filesystem
from rayprism.offline.plan import plan_job
from rayprism.offline.report import summarize
from rayprism.offline.spec import JobSpec
from rayprism.offline.worker import ShardWorker
from tests.support.models import mlp_example, mlp_reference, save_mlp, save_onnx

ROOT = Path(__file__).parents[2]
ROWS = 3_000

# Above 3 it fails, below -3 it has no answer: what a version may do that the other one does not.
FUSSY = """
import numpy as np

class Model:
    def __init__(self, folder, options):
        pass

    def predict(self, inputs):
        x = inputs["x"]
        if (x > 3).any():
            raise ValueError("more than 3")
        p = 1 / (1 + np.exp(-2 * x))
        return {"p": np.where(x < -3, np.nan, p).astype(np.float32)}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one input.

    `risk` 1 and 2: `x` [-1] FP32 to its logistic function `p`, with a slope of -0.5 and 2; 3: the
    same as 2, in Python, and fussy. `tiny` 1 and 2: the MLP of `tests.support.models`.
    """
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("evaluation-models")
    models = Repository(folder / "models")
    for version, slope in enumerate((-0.5, 2.0), start=1):
        path = save_onnx(
            folder / f"risk-{version}.onnx",
            [
                helper.make_node("Mul", ["x", "slope"], ["z"]),
                helper.make_node("Sigmoid", ["z"], ["p"]),
            ],
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
            [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["batch"])],
            [numpy_helper.from_array(np.float32(slope), "slope")],
        )
        push_model(models, "risk", path, example={"x": [0.5, -0.5]})
        push_model(
            models,
            "tiny",
            save_mlp(folder / f"tiny-{version}.onnx", seed=version - 1),
            example=mlp_example(),
        )
    (folder / "fussy").mkdir()
    (folder / "fussy" / "model.py").write_text(FUSSY)
    push_model(
        models,
        "risk",
        folder / "fussy",
        example={"x": [0.5, -0.5]},
        code="model.py:Model",
        inputs=[TensorSpec("x", Datatype.FP32, (-1,))],
        outputs=[TensorSpec("p", Datatype.FP32, (-1,))],
        allow_code=True,
    )
    return folder / "models"


def rows() -> tuple[Any, Any]:
    """What the model gets, and what came true."""
    random = np.random.default_rng(2)
    x = random.standard_normal(ROWS).astype(np.float32)
    return x, random.random(ROWS) < 1 / (1 + np.exp(-2 * x))


def table() -> pa.Table:
    x, late = rows()
    groups = np.array(["<b>", "$x$", "c"])[np.arange(ROWS) % 3]
    others = {name: np.zeros(ROWS, np.float32) for name in "abc"}
    return pa.table({"x": x, "late": late, "group": groups, **others})


def told(repository: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": "risk",
        "versions": ["1", "2"],
        "repository": str(repository),
        "input": {"uri": str(folder / "in.parquet")},
        "label": "late",
        "task": "binary",
        "output": str(folder / "out"),
        "limits": {"shard_rows": 1_000},
        "resamples": 100,
        **changes,
    }


class Runs:
    """Runs jobs here and now, with real workers, and counts the shards that they did."""

    def __init__(self) -> None:
        self.shards = 0

    def __call__(
        self,
        spec: JobSpec,
        *,
        local: bool,
        restart: bool,
        say: Callable[[str], None] | None,
        source: str,
    ) -> None:
        plan = plan_job(spec, source)
        output = OutputFolder(*open_filesystem(plan.spec.output.uri))
        output.begin(plan.identity(), len(plan.shards), restart)
        worker = ShardWorker(plan.spec, plan.listing, output)
        for shard in plan.shards:
            if shard.number not in output.done():
                outcome = worker.run(shard)
                assert outcome.error is None
                self.shards += 1
        worker.close()
        output.finish()


def run(said: dict[str, Any], runs: Runs | None = None) -> Evaluation:
    return evaluate(parse_evaluation(said), run=runs or Runs())


def write(folder: Path, rows: pa.Table) -> None:
    pq.write_table(rows, folder / "in.parquet", row_group_size=500)


def faults(said: dict[str, Any]) -> dict[str, str]:
    """What is refused before any work: path to message."""
    runs = Runs()
    with pytest.raises(ConfigInvalid) as caught:
        run(said, runs)
    assert runs.shards == 0
    assert not Path(said["output"]).exists()
    return {fault.path: fault.message for fault in caught.value.faults}


def values(report: dict[str, Any], name: str) -> list[float]:
    (metric,) = [each for each in report["metrics"] if each["name"] == name]
    return [each["value"] for each in metric["versions"]]


# --- what is found


def test_two_versions_on_the_same_rows(repository: Path, tmp_path: Path) -> None:
    write(tmp_path, table())
    found = run(told(repository, tmp_path, segments=["group"]))
    x, late = rows()
    scores = [1 / (1 + np.exp(-slope * x.astype(np.float64))) for slope in (-0.5, 2.0)]
    expected = [metrics.log_loss(late, each) for each in scores]
    assert values(found.report, "log_loss") == pytest.approx(expected, rel=1e-5)
    expected = [metrics.roc_auc_score(late, each) for each in scores]
    assert values(found.report, "roc_auc") == pytest.approx(expected, abs=1e-6)
    assert all(each["differences"][0]["verdict"] == "better" for each in found.report["metrics"])
    assert found.report["rows"] == {
        "input": ROWS,
        "not_predicted": 0,
        "label_missing": 0,
        "not_finite": 0,
        "compared": ROWS,
    }
    assert [each["version"] for each in found.report["versions"]] == [1, 2]
    (groups,) = found.report["segments"]
    assert {each["value"]: each["rows"] for each in groups["values"]} == {
        "<b>": 1000,
        "$x$": 1000,
        "c": 1000,
    }
    assert json.loads(Path(found.json_path).read_text()) == found.report
    assert "ROC AUC" in summarize(found.report)


def test_a_row_counts_where_every_version_predicted_it_and_the_rest_is_told(
    repository: Path, tmp_path: Path
) -> None:
    x, late = rows()
    x = x.copy()
    x[0:7] = 4.0  # refused by version 3
    x[500:505] = -4.0  # NaN from version 3
    missing = np.zeros(ROWS, np.bool_)
    missing[5:20] = True  # labels; 2 of them were not predicted either
    nulls = np.zeros(ROWS, np.bool_)
    nulls[2_000:2_004] = True  # NaN from both
    write(tmp_path, pa.table({"x": pa.array(x, mask=nulls), "late": pa.array(late, mask=missing)}))
    report = run(told(repository, tmp_path, versions=[2, 3], allow_code=True)).report
    refused = int(((x > 3) & ~nulls).sum())
    unanswered = int((((x < -3) | nulls) & ~missing).sum())
    assert report["rows"] == {
        "input": ROWS,
        "not_predicted": refused,
        "label_missing": 13,
        "not_finite": unanswered,
        "compared": ROWS - refused - 13 - unanswered,
    }
    assert [each["dead_letters"] for each in report["versions"]] == [0, refused]
    assert [each["not_finite"] for each in report["versions"]] == [4, unanswered]
    # Joined by position: what is left is predicted alike, so every difference is nothing.
    assert values(report, "brier")[0] == pytest.approx(values(report, "brier")[1], rel=1e-6)
    kept = (x <= 3) & (x >= -3) & ~missing & ~nulls
    expected = metrics.roc_auc_score(late[kept], x[kept])
    assert values(report, "roc_auc") == pytest.approx([expected, expected], abs=1e-6)
    assert any("NaN" in note for note in report["notes"])


def test_what_is_predicted_is_kept_and_the_same_again_gives_the_same_report(
    repository: Path, tmp_path: Path
) -> None:
    write(tmp_path, table())
    runs = Runs()
    found = run(told(repository, tmp_path), runs)
    first = Path(found.json_path).read_bytes(), Path(found.html_path).read_bytes()
    assert runs.shards == 6
    run(told(repository, tmp_path), runs)
    assert runs.shards == 6
    assert (Path(found.json_path).read_bytes(), Path(found.html_path).read_bytes()) == first
    # What only the statistics need may change: nothing is predicted again.
    run(told(repository, tmp_path, positive=False, threshold=0.9, seed=1), runs)
    assert runs.shards == 6


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (pa.array([1, 0] * 15), None),
        (pa.array([1.0, 0.0] * 15), 1),
        (pa.array(["late", "on time"] * 15), "late"),
        (pa.array(["TRUE", "False"] * 15).dictionary_encode(), True),
        (pa.array([7, 9] * 15), 7),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_labels_are_known_in_every_form(
    repository: Path, tmp_path: Path, labels: pa.Array, positive: Any, text: bool
) -> None:
    x = np.array([1.0, -1.0] * 15, np.float32)
    data = pa.table({"x": x, "late": labels})
    source = tmp_path / ("in.csv" if text else "in.parquet")
    if text:
        late = data["late"].cast(pa.string()) if labels.type != pa.float64() else data["late"]
        csv.write_csv(data.set_column(1, "late", late), source)
    else:
        pq.write_table(data, source)
    said = told(repository, tmp_path, positive=positive, input={"uri": str(source)})
    assert values(run(said).report, "roc_auc") == [0.0, 1.0]


def test_scores_of_classes_are_judged_by_their_names(repository: Path, tmp_path: Path) -> None:
    features = np.random.default_rng(4).standard_normal((ROWS, 4)).astype(np.float32)
    scores = [mlp_reference(features, seed) for seed in (0, 1)]
    names = np.array(["red", "green", "blue"])
    labels = names[scores[1].argmax(axis=1)]
    labels[::5] = "red"
    columns = {name: features[:, index] for index, name in enumerate("abcd")}
    write(tmp_path, pa.table({**columns, "colour": labels}))
    said = told(
        repository,
        tmp_path,
        model="tiny",
        task="multiclass",
        label="colour",
        classes=["red", "green", "blue"],
        segments=["colour"],
        top_k=2,
        input={"uri": str(tmp_path / "in.parquet"), "columns": {"x": list("abcd")}},
    )
    report = run(said).report
    codes = np.searchsorted(["blue", "green", "red"], labels)
    codes = np.array([2, 1, 0])[codes]
    expected = [metrics.accuracy_score(codes, each.argmax(axis=1)) for each in scores]
    assert values(report, "accuracy") == pytest.approx(expected)
    expected = [metrics.top_k_accuracy_score(codes, each, k=2) for each in scores]
    assert values(report, "top_k_accuracy") == pytest.approx(expected)
    assert "log_loss" not in {each["name"] for each in report["metrics"]}, "they are no shares"
    assert any("no probabilities" in note for note in report["notes"])
    assert report["classes"] == ["red", "green", "blue"]


def test_numbers(repository: Path, tmp_path: Path) -> None:
    x, _ = rows()
    true = 1 / (1 + np.exp(-2 * x.astype(np.float64)))
    labels = true + 0.1 * np.random.default_rng(0).standard_normal(ROWS)
    labels[:3] = [np.nan, np.inf, -np.inf]
    write(tmp_path, pa.table({"x": x, "y": labels}))
    report = run(told(repository, tmp_path, task="regression", label="y")).report
    assert report["rows"]["label_missing"] == 3
    expected = metrics.mean_absolute_error(labels[3:], true[3:])
    assert values(report, "mae")[1] == pytest.approx(expected, rel=1e-5)
    assert {each["differences"][0]["verdict"] for each in report["metrics"]} == {
        "better",
        "no difference shown",
    }
    assert report["plots"]["residuals"]["by_prediction"]


# --- the page


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.names: set[str] = set()
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        said = dict(attrs)
        if "id" in said:
            self.ids.append(said["id"] or "")
        self.uses += [value or "" for name, value in attrs if name.endswith(("href", "src"))]
        if said.get("role") == "img":
            self.images.append(said["aria-label"] or "")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_nothing_in_the_data_becomes_markup(
    repository: Path, tmp_path: Path
) -> None:
    data = table()
    evil = pa.array(["<script>alert(1)</script>", "$\\frac{$", '"onload="x'] * (ROWS // 3))
    write(tmp_path, data.set_column(2, "group", evil))
    text = Path(run(told(repository, tmp_path, segments=["group"])).html_path).read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not page.names & {"script", "link", "img", "iframe", "b"}
    assert len(page.ids) == len(set(page.ids))
    assert page.uses
    assert all(use.startswith("#") and use[1:] in page.ids for use in page.uses)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in text
    titles = [label.partition(".")[0] for label in page.images]
    assert titles == [
        "Differences",
        "ROC curve",
        "Precision and recall",
        "Calibration",
        "Scores",
        "Log loss by group",
    ]
    assert "#0a0b0" not in text, "a colour that the page cannot change"
    assert "#010101" not in text


# --- what is refused


def test_faults_of_all_versions_are_told_before_any_work(repository: Path, tmp_path: Path) -> None:
    write(tmp_path, table())
    said = told(repository, tmp_path, versions=[1, 8, 9])
    found = faults(said)
    assert set(found) == {"versions[1]", "versions[2]"}
    assert "has no version 8" in found["versions[1]"]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"label": "lat"}, "label", "lat"),
        ({"segments": ["late", "grup"]}, "segments[1]", "'group'"),
        ({"label": "group"}, "label", "'<b>'"),
        ({"positive": "yes"}, "label", "allowed: yes"),
        ({"task": "regression", "label": "group"}, "label", "needed are numbers"),
        ({"prediction": "q"}, "prediction", "Its outputs: p"),
        ({"task": "multiclass"}, "prediction", "a class a row"),
        ({"model": "tiny", "input": {"columns": {"x": list("xabc")}}}, "prediction", "3 scores"),
        ({"versions": [1, 3]}, "allow_code", "Python"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(
    repository: Path, tmp_path: Path, changes: dict[str, Any], path: str, message: str
) -> None:
    write(tmp_path, table())
    said = told(repository, tmp_path)
    changes = dict(changes)
    said["input"] = {**said["input"], **changes.pop("input", {})}
    found = faults({**said, **changes})
    assert message.lower() in found[path].lower()


def test_versions_with_different_outputs_cannot_be_compared(
    repository: Path, tmp_path: Path
) -> None:
    from onnx import TensorProto, helper

    models = Repository(tmp_path / "models")
    push_model(models, "m", repository / "risk" / "1" / "risk-1.onnx", example={"x": [0.5, 0.1]})
    other = save_onnx(
        tmp_path / "other.onnx",
        [helper.make_node("Greater", ["x", "x"], ["p"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("p", TensorProto.BOOL, ["batch"])],
    )
    push_model(models, "m", other, example={"x": [0.5, 0.1]})
    write(tmp_path, table())
    found = faults(told(models.root, tmp_path, model="m"))
    assert "a class a row" in found["versions[1]"]
    assert "a score a row" in found["versions[1]"]


def test_a_label_that_fits_no_class_far_down_keeps_what_is_predicted(
    repository: Path, tmp_path: Path
) -> None:
    labels = np.tile(["late", "on time"], ROWS // 2)
    labels[-1] = "maybe"
    data = table().set_column(1, "late", pa.array(labels))
    # The first look takes the first shard, of 1,000 rows.
    write(tmp_path, data)
    runs = Runs()
    said = told(repository, tmp_path, positive="late")
    with pytest.raises(ConfigInvalid, match="'maybe'"):
        run(said, runs)
    assert runs.shards == 6
    assert not (tmp_path / "out" / "report.json").exists()


def test_no_row_to_compare(repository: Path, tmp_path: Path) -> None:
    data = table().set_column(1, "late", pa.nulls(ROWS, pa.bool_()))
    write(tmp_path, data)
    with pytest.raises(SetupError, match="no row is left to compare: of 3,000 rows"):
        run(told(repository, tmp_path))


def test_more_rows_than_memory_allows_are_refused_before_any_work(
    repository: Path, tmp_path: Path
) -> None:
    least = 64 * 1024 * 1024
    big = pa.table({"x": np.zeros(600_000, np.float32), "late": np.zeros(600_000, np.bool_)})
    write(tmp_path, big)
    runs = Runs()
    with pytest.raises(SetupError, match=r"600,000 rows need about 74 MiB.*raise max_evaluation"):
        run(told(repository, tmp_path, max_evaluation_bytes=least), runs)
    assert runs.shards == 0


def test_a_folder_with_something_else_is_left_alone(repository: Path, tmp_path: Path) -> None:
    write(tmp_path, table())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(SetupError, match=r"thesis\.tex"):
        run(told(repository, tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_input_that_changed_between_two_versions_is_refused(
    repository: Path, tmp_path: Path
) -> None:
    write(tmp_path, table())
    run(told(repository, tmp_path, versions=[1]))
    (tmp_path / "in.parquet").unlink()
    write(tmp_path, table().slice(0, 2_500))
    with pytest.raises(SetupError, match="begun by another job"):
        run(told(repository, tmp_path))


# --- the file


def test_the_shipped_file_is_valid() -> None:
    spec = load_evaluation(ROOT / "batch" / "configs" / "evaluate_flights.yaml")
    assert (spec.versions, spec.label, spec.positive) == ((1, 2), "delayed", True)
    assert spec.job(2).output.passthrough == ("delayed", "carrier", "month")


def test_every_fault_of_a_file_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: risk\nversion: 2\nversions: [1, 1]\ninput: {uri: a, formt: csv}\n"
        "label: late\ntask: binary\npositive: 0.5\noutput: out\nlimits:\n  batch_rows: no\n"
    )
    with pytest.raises(ConfigInvalid) as caught:
        load_evaluation(path, ["confidence=2"])
    found = {fault.path: (fault.line, fault.message) for fault in caught.value.faults}
    assert found["version"][0] == 2
    assert "versions, the baseline first" in found["version"][1]
    assert found["versions"][0] == 3
    assert "given twice" in found["versions"][1]
    assert "Did you mean 'format'" in found["input.formt"][1]
    assert "a whole number, text, true or false" in found["positive"][1]
    assert found["limits.batch_rows"][0] == 10
    assert "confidence" in found


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"versions": []}, "versions"),
        ({"task": "ranking"}, "task"),
        ({"task": "regression", "classes": ["a", "b"]}, "classes"),
        ({"classes": ["a", "b", "c"]}, "classes"),
        ({"classes": [1, "1"]}, "classes"),
        ({"positive": "c", "classes": ["a", "b"]}, "classes"),
        ({"task": "multiclass", "positive": 1}, "positive"),
        ({"output": "data/deeper", "input": {"uri": "data"}}, "output"),
        ({"resamples": 10}, "resamples"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    repository: Path, tmp_path: Path, changes: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_evaluation(told(repository, tmp_path, **changes))
    assert [fault.path for fault in caught.value.faults] == [path]


def test_the_command_tells_a_fault_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: risk\n")
    command = [sys.executable, str(ROOT / "batch" / "evaluate.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "label: missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
