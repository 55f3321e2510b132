"""A manifest says everything that is wrong with it, and where."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, numpy_dtype
from rayprism.errors import ConfigInvalid, InvalidInput
from rayprism.models.manifest import Manifest, TensorValue, is_model_name

DIGEST = "0123456789abcdef" * 4


def whole() -> dict[str, Any]:
    """A manifest with something in every part."""
    return {
        "manifest_version": 1,
        "model": "flights",
        "version": 3,
        "created": "2026-01-01T00:00:00+00:00",
        "runtime": "onnx",
        "file": "model.onnx",
        "code": {"file": "processor.py", "class_name": "Processor"},
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [
            {"name": "score", "datatype": "FP32", "shape": [-1, 2], "allow_nan": False},
            {"name": "tokens", "datatype": "INT64", "shape": [-1, -1], "description": "ids"},
        ],
        "runtime_inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "mask", "datatype": "INT64", "shape": [-1, -1]},
        ],
        "batching": {
            "batched": True,
            "max_rows": 8,
            "max_cost": 1024,
            "max_padding_share": 0.5,
            "max_delay_s": 0.01,
            "ragged": {"ids": {"axis": 1, "value": 0}, "mask": {"axis": 1}},
            "ragged_outputs": {"tokens": 1},
            "execution": "thread",
        },
        "warmup": [{"ids": [8, 16], "mask": [8, 16]}],
        "golden": {
            "inputs": [
                {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["late", "früh"]}
            ],
            "outputs": [
                {"name": "score", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 1, None, -1]},
                {"name": "tokens", "datatype": "INT64", "shape": [2, 1], "data": [7, 8]},
            ],
            "tolerance": {"rule": "close", "absolute": 1e-4, "relative": 0.0},
        },
        "files": {
            "model.onnx": {"sha256": DIGEST, "size_bytes": 1},
            "processor.py": {"sha256": DIGEST, "size_bytes": 0},
        },
        "options": {"onnx": {"graph_optimization": "basic"}},
        "metadata": {"auc": 0.77, "nested": {"free": [1, 2]}},
    }


def plain() -> dict[str, Any]:
    """The least that a manifest holds."""
    spec = {"name": "x", "datatype": "FP32", "shape": [-1, 2]}
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    return {
        "model": "m",
        "version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "runtime": "onnx",
        "file": "m.onnx",
        "inputs": [spec],
        "outputs": [dict(spec)],
        "golden": {"inputs": [tensor], "outputs": [dict(tensor)]},
        "files": {"m.onnx": {"sha256": DIGEST, "size_bytes": 1}},
    }


def parse(raw: dict[str, Any]) -> Manifest:
    return Manifest.from_json(json.dumps(raw), "manifest.json")


def test_what_is_right_is_read() -> None:
    manifest = parse(whole())
    assert manifest.runs_code
    assert [spec.name for spec in manifest.inner_inputs] == ["ids", "mask"]
    assert manifest.output_names == ["score", "tokens"]
    assert manifest.batching.ragged["ids"].axis == 1
    assert manifest.golden.tolerance == Tolerance(absolute=1e-4, relative=0.0)
    assert manifest.golden.input_arrays()["text"].tolist() == [[b"late"], ["früh".encode()]]
    assert np.isnan(manifest.golden.output_arrays()["score"][1, 0])
    assert Manifest.from_json(manifest.to_json(), "m") == manifest
    least = parse(plain())
    assert not least.runs_code
    assert least.inner_inputs == least.inputs


def test_the_digest_is_of_the_content() -> None:
    raw = whole()
    again = dict(reversed(list(copy.deepcopy(raw).items())))
    assert parse(raw).digest == parse(again).digest
    again["files"]["model.onnx"]["sha256"] = DIGEST[::-1]
    assert parse(raw).digest != parse(again).digest
    assert parse(raw).digest.startswith("sha256:")


_MISSING = object()

# Where, what is put there (or _MISSING), the fault's path, and a part of what it says.
FAULTS: list[tuple[str, Any, str, str]] = [
    ("manifest_version", 2, "manifest_version", "1"),
    ("manifest_version", "one", "manifest_version", "1"),
    ("model", _MISSING, "model", "required"),
    ("model", "", "model", "letters"),
    ("model", "a/b", "model", "letters"),
    ("model", "../flights", "model", "letters"),
    ("model", "a..b", "model", "letters"),
    ("model", ".hidden", "model", "letters"),
    ("model", "m" * 129, "model", "at most 128"),
    ("model", 3, "model", "string"),
    ("version", _MISSING, "version", "required"),
    ("version", 0, "version", "greater than or equal to 1"),
    ("version", -1, "version", "greater than or equal to 1"),
    ("version", 1.5, "version", "integer"),
    ("version", "one", "version", "integer"),
    ("version", None, "version", "integer"),
    ("created", _MISSING, "created", "required"),
    ("created", 7, "created", "string"),
    ("runtime", _MISSING, "runtime", "required"),
    ("runtime", "pickle", "runtime", "'onnx', 'torch' or 'python'"),
    ("file", _MISSING, "file", "required"),
    ("file", "other.onnx", "", "file 'other.onnx' is not among files"),
    ("code", "processor.py", "code", "dictionary"),
    ("code.file", "other.py", "", "code.file 'other.py' is not among files"),
    ("code.file", _MISSING, "code.file", "required"),
    ("code.class_name", "not a name", "code.class_name", "not a Python identifier"),
    ("code.class_name", "", "code.class_name", "not a Python identifier"),
    ("code.extra", 1, "code.extra", "unknown key"),
    ("code", None, "", "runtime_inputs needs code"),
    ("inputs", _MISSING, "inputs", "required"),
    ("inputs", [], "", "inputs is empty"),
    ("inputs", {}, "inputs", "tuple"),
    ("inputs[0].name", _MISSING, "inputs[0].name", "required"),
    ("inputs[0].name", "", "inputs[0]", "1 to 256 characters"),
    ("inputs[0].name", "a\nb", "inputs[0]", "no control characters"),
    ("inputs[0].datatype", "FLOAT", "inputs[0].datatype", "'FP32'"),
    ("inputs[0].datatype", "fp32", "inputs[0].datatype", "'FP32'"),
    ("inputs[0].datatype", "INT64", "", "allowed is INT64"),
    ("inputs[0].shape", [-2, 1], "inputs[0]", "-1 (free) or a size from 1"),
    ("inputs[0].shape", [-1, 0], "inputs[0]", "-1 (free) or a size from 1"),
    ("inputs[0].shape", [-1, "x"], "inputs[0].shape[1]", "integer"),
    ("inputs[0].shape", [-1, 2], "", "golden: input 'text': shape [2, 1] does not fit"),
    ("inputs[0].shape", [], "", "'text' has no axis"),
    ("inputs[0].allow_nan", "perhaps", "inputs[0].allow_nan", "boolean"),
    ("inputs[0].dtype", "FP32", "inputs[0].dtype", "unknown key"),
    ("outputs", [], "", "outputs is empty"),
    ("outputs[1].name", "score", "", "outputs names 'score' twice"),
    ("outputs[0].name", "other", "", "golden.outputs names ['score', 'tokens']"),
    ("runtime_inputs[1].name", "ids", "", "runtime_inputs names 'ids' twice"),
    ("runtime_inputs[0].shape", [-1, 16], "", "axis 1 of 'ids' is not a free axis"),
    ("runtime_inputs[0].datatype", "BYTES", "", "'ids' is BYTES; pad numbers only"),
    ("runtime_inputs[0].datatype", "BOOL", "", "'ids' is BOOL; pad numbers only"),
    ("batching.batched", False, "batching", "not batched has max_rows 1"),
    ("batching.max_rows", 0, "batching.max_rows", "greater than or equal to 1"),
    ("batching.max_rows", 10**7, "batching.max_rows", "less than or equal"),
    ("batching.max_cost", 0, "batching.max_cost", "greater than or equal to 1"),
    ("batching.ragged", {}, "batching", "needs a ragged axis"),
    ("batching.max_padding_share", 1.5, "batching.max_padding_share", "less than or equal to 1"),
    ("batching.max_delay_s", -0.1, "batching.max_delay_s", "greater than or equal to 0"),
    ("batching.max_delay_s", 61, "batching.max_delay_s", "less than or equal to 60"),
    ("batching.max_wait", 1, "batching.max_wait", "unknown key"),
    ("batching.ragged.ids.value", 0.5, "", "'ids' cannot hold the padding 0.5"),
    ("batching.ragged.ids.value", 1e30, "", "'ids' cannot hold the padding 1e+30"),
    ("batching.ragged.ids.axis", 0, "batching.ragged.ids", "axis 0 is the row"),
    ("batching.ragged.ids.axis", 2, "", "axis 2 of 'ids' is not a free axis"),
    ("batching.ragged.words", {"axis": 1}, "", "names 'words', the runtime takes ['ids', 'mask']"),
    ("batching.ragged_outputs.other", 1, "", "'other' with an axis 1 is not among the outputs"),
    ("batching.ragged_outputs.tokens", 2, "", "'tokens' with an axis 2"),
    ("batching.ragged_outputs.tokens", 0, "batching.ragged_outputs.tokens", "greater than or"),
    ("batching.execution", "gpu", "batching.execution", "'auto', 'inline' or 'thread'"),
    ("warmup[0].ids", _MISSING, "", "warmup[0] names ['mask'], needs ['ids', 'mask']"),
    ("warmup[0].ids", [8, 0], "warmup[0].ids[1]", "greater than or equal to 1"),
    ("warmup[0].text", [8, 1], "", "warmup[0] names"),
    ("golden", _MISSING, "golden", "required"),
    ("golden.inputs", [], "", "input 'text' is missing"),
    ("golden.inputs[0].name", "txt", "", "Did you mean 'text'?"),
    ("golden.inputs[0].datatype", "FP32", "", "golden: input 'text'"),
    ("golden.inputs[0].shape", [3, 1], "", "got 2 values"),
    ("golden.inputs[0].shape", [-1, 1], "golden.inputs[0].shape[0]", "greater than or equal to 0"),
    ("golden.inputs[0].shape", [0, 1], "", "got 2 values"),
    ("golden.inputs[0].data", [1, 2], "", "allowed for BYTES are strings"),
    ("golden.inputs[0].data", "late", "golden.inputs[0].data", "list"),
    ("golden.outputs[0].data", [1, 2, 3], "", "got 3 values, shape [2, 2] needs 4"),
    ("golden.outputs[1].data", [0.5, 1], "", "allowed for INT64 are whole numbers"),
    ("golden.outputs[1].data", [2**70, 1], "", "out of range for INT64"),
    ("golden.outputs", [], "", "golden.outputs names []"),
    ("golden.tolerance.rule", "near", "golden.tolerance.rule", "'close', 'exact', 'top1' or"),
    ("golden.tolerance.absolute", -1, "golden.tolerance", "0 or more"),
    ("golden.tolerance.cosine", 1.1, "golden.tolerance", "from 0 to 1"),
    ("golden.extra", 1, "golden.extra", "unknown key"),
    ("files", _MISSING, "files", "required"),
    ("files", {}, "", "file 'model.onnx' is not among files"),
    ("files['model.onnx'].sha256", "abc", "files.model.onnx.sha256", "64 lower-case"),
    ("files['model.onnx'].sha256", DIGEST.upper(), "files.model.onnx.sha256", "64 lower-case"),
    ("files['model.onnx'].size_bytes", -1, "files.model.onnx.size_bytes", "greater than or"),
    ("files['model.onnx'].size_bytes", _MISSING, "files.model.onnx.size_bytes", "required"),
    ("files['../up']", {"sha256": DIGEST, "size_bytes": 1}, "files", "inside the version's folder"),
    ("files['/etc/passwd']", {"sha256": DIGEST, "size_bytes": 1}, "files", "inside the version's"),
    ("files['a\\\\b']", {"sha256": DIGEST, "size_bytes": 1}, "files", "inside the version's"),
    ("files['manifest.json']", {"sha256": DIGEST, "size_bytes": 1}, "files", "list itself"),
    ("options", [], "options", "dictionary"),
    ("metadata", "free", "metadata", "dictionary"),
    ("surprise", 1, "surprise", "unknown key"),
]  # fmt: skip


def put(raw: dict[str, Any], where: str, value: Any) -> None:
    steps: list[Any] = []
    for part in where.replace("[", ".[").split(".") if "'" not in where else _quoted(where):
        steps.append(int(part[1:-1]) if part.startswith("[") else part)
    target: Any = raw
    for step in steps[:-1]:
        target = target[step]
    if value is _MISSING:
        del target[steps[-1]]
    else:
        target[steps[-1]] = value


def _quoted(where: str) -> list[str]:
    head, name, rest = where.split("'")
    return [
        head.removesuffix("["),
        name.replace("\\\\", "\\"),
        *rest.removeprefix("]").split(".")[1:],
    ]


def test_the_table_is_large_and_without_doubles() -> None:
    cases = {(where, repr(value)) for where, value, _, _ in FAULTS}
    assert len(cases) == len(FAULTS) >= 60


@pytest.mark.parametrize(
    ("where", "value", "path", "said"),
    FAULTS,
    ids=[f"{where}={str(value)[:20]!r}" for where, value, _, _ in FAULTS],
)
def test_each_fault_is_named_at_its_path(where: str, value: Any, path: str, said: str) -> None:
    raw = whole()
    put(raw, where, value)
    with pytest.raises(ConfigInvalid) as caught:
        parse(raw)
    faults = {fault.path: fault.message for fault in caught.value.faults}
    assert path in faults, faults
    assert said in faults[path]
    assert caught.value.source == "manifest.json"


def test_all_faults_come_at_once() -> None:
    raw = whole()
    raw["version"] = 0
    raw["runtime"] = "pickle"
    raw["files"]["model.onnx"]["sha256"] = "abc"
    with pytest.raises(ConfigInvalid) as caught:
        parse(raw)
    assert [fault.path for fault in caught.value.faults] == [
        "version",
        "runtime",
        "files.model.onnx.sha256",
    ]
    assert "3 faults" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[1, 2]", "\xff"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        Manifest.from_json(text.encode("latin-1"), "manifest.json")


def test_a_python_model_needs_its_class() -> None:
    raw = plain()
    raw["runtime"] = "python"
    with pytest.raises(ConfigInvalid, match="runtime python needs code"):
        parse(raw)


def test_golden_may_not_hold_the_nan_that_clients_may_not() -> None:
    raw = plain()
    raw["inputs"][0] = {**raw["inputs"][0], "allow_nan": False}
    raw["golden"]["inputs"][0]["data"] = [1, None]
    with pytest.raises(ConfigInvalid, match="holds NaN"):
        parse(raw)


@pytest.mark.parametrize("datatype", list(Datatype))
def test_tensors_survive_being_written(datatype: Datatype) -> None:
    if datatype is Datatype.BYTES:
        array = np.array([[b"", "ä€".encode(), b"x" * 300]], object)
    elif datatype is Datatype.BOOL:
        array = np.array([[True, False, True]])
    elif datatype.is_integer:
        limits = np.iinfo(numpy_dtype(datatype))
        array = np.array([[limits.min, 0, limits.max]], numpy_dtype(datatype))
    else:
        array = np.array([[0.1, -np.inf, np.inf, np.nan, 1e-8]]).astype(numpy_dtype(datatype))
    value = TensorValue.from_array("t", array)
    text = value.model_dump_json()
    assert "NaN" not in text
    back = TensorValue.model_validate_json(text).to_array()
    assert back.dtype == array.dtype
    if datatype.is_float:
        np.testing.assert_array_equal(back.astype(np.float64), array.astype(np.float64))
    else:
        assert back.tolist() == array.tolist()


def test_bytes_that_are_no_text_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        TensorValue.from_array("t", np.array([b"\xff"], object))


def test_a_float_is_no_integer() -> None:
    value = TensorValue(name="t", datatype=Datatype.INT32, shape=(1,), data=[1.5])
    with pytest.raises(InvalidInput, match="whole numbers"):
        value.to_array()


@pytest.mark.parametrize(
    ("name", "right"),
    [("a", True), ("A-b_c.1", True), ("0", True), ("m" * 128, True), ("m" * 129, False),
     ("", False), (".a", False), ("-a", False), ("a..b", False), ("a/b", False), ("a b", False),
     ("ü", False), ("a\n", False)],
)  # fmt: skip
def test_model_names(name: str, right: bool) -> None:
    assert is_model_name(name) is right
