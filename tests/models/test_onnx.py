"""ONNX Runtime: datatypes, strings, what is refused and how it is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rayprism.core.tensors import Datatype, TensorSpec, numpy_dtype
from rayprism.errors import InvalidInput, LoadFailed
from rayprism.models.loader import load_model
from rayprism.models.onnx import OnnxRuntime
from rayprism.models.onnx_file import external_files
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.models.runtime import RuntimeSettings
from tests.support.models import example_rows, mlp_example, mlp_reference, save_mlp, save_onnx


def open_onnx(path: Path, **settings: Any) -> OnnxRuntime:
    return OnnxRuntime.open(path.parent, path.name, RuntimeSettings(**settings))


def identity(path: Path, element: int, shape: list[Any] | None = None) -> Path:
    shape = ["n", 2] if shape is None else shape
    return save_onnx(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )


@pytest.mark.parametrize("datatype", [d for d in Datatype if d is not Datatype.BF16])
def test_every_datatype_goes_through(
    datatype: Datatype, repository: Repository, tmp_path: Path
) -> None:
    names = {"BYTES": "STRING", "FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE"}
    path = identity(tmp_path / "m.onnx", getattr(TensorProto, names.get(datatype, datatype)))
    x: Any
    if datatype is Datatype.BYTES:
        x = np.array([[b"", b"b"], ["ä€".encode(), b"d" * 300], [b"e", b"f"]], object)
    else:
        x = np.array([[0, 1], [1, 1], [1, 0]]).astype(numpy_dtype(datatype))
    pushed = push_model(repository, "m", path, example={"x": x})
    assert pushed.warnings == ()
    manifest = pushed.version.manifest
    assert manifest.inputs[0].datatype is datatype
    assert manifest.outputs[0].datatype is datatype
    y = load_model(pushed.version).run({"x": x})["y"]
    assert y.dtype == numpy_dtype(datatype)
    assert y.tolist() == x.tolist()


@pytest.mark.parametrize("rows", [1, 3000])
def test_bytes_that_are_no_text_are_the_client_s_fault(tmp_path: Path, rows: int) -> None:
    runtime = open_onnx(identity(tmp_path / "m.onnx", TensorProto.STRING))
    with pytest.raises(InvalidInput, match="input 'x': an element is not UTF-8"):
        runtime.run({"x": np.array([[b"a", b"\xff"]] * rows, object)})


def test_many_strings_stay_at_their_places(tmp_path: Path) -> None:
    runtime = open_onnx(identity(tmp_path / "m.onnx", TensorProto.STRING))
    x = np.array([[b"a", f"{row % 7}\u00e4".encode()] for row in range(2000)], object)
    assert runtime.run({"x": x})["y"].tolist() == x.tolist()


def test_strings_may_come_as_text(tmp_path: Path) -> None:
    runtime = open_onnx(identity(tmp_path / "m.onnx", TensorProto.STRING))
    given = runtime.run({"x": np.array([["ä", "b"]], object)})
    assert given["y"].tolist() == [["ä".encode(), b"b"]]


def test_the_signature_is_the_graph_s(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["a"], ["y"]), helper.make_node("Shape", ["a"], ["z"])],
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", None, 3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("z", TensorProto.INT64, [3]),
        ],
    )
    signature = open_onnx(path).signature()
    assert signature.inputs == (TensorSpec("a", Datatype.FP32, (-1, -1, 3)),)
    assert [spec.name for spec in signature.outputs] == ["y", "z"]
    assert signature.outputs[1].shape == (3,)


def test_only_the_wanted_outputs_are_computed(tmp_path: Path) -> None:
    save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "ab"],
    )
    wanted = (TensorSpec("b", Datatype.FP32, (-1,)),)
    runtime = OnnxRuntime.open(tmp_path, "m.onnx", RuntimeSettings(), outputs=wanted)
    assert runtime.run({"x": np.array([-1], np.float32)}).keys() == {"b"}
    with pytest.raises(LoadFailed, match=r"no output 'bb'\. Did you mean 'b'\?"):
        OnnxRuntime.open(
            tmp_path, "m.onnx", RuntimeSettings(), outputs=(TensorSpec("bb", Datatype.FP32, (-1,)),)
        )


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (TensorProto.BFLOAT16, "put a Cast to float at the edge"),
        (TensorProto.COMPLEX64, "m.onnx"),
        (TensorProto.FLOAT8E4M3FN, "put a Cast at the edge"),
    ],
)
def test_types_that_cannot_be_served_are_refused(tmp_path: Path, element: int, said: str) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", element, ["n"])],
        [helper.make_tensor_value_info("y", element, ["n"])],
        opset=19,
        ir_version=9,
    )
    with pytest.raises(LoadFailed, match=said):
        open_onnx(path)


def test_zip_maps_are_refused_with_how_to_mend(repository: Repository, tmp_path: Path) -> None:
    output = helper.make_value_info(
        "p",
        helper.make_sequence_type_proto(
            helper.make_map_type_proto(
                TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
            )
        ),
    )
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("ZipMap", ["x"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [output],
        imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)],
    )
    with pytest.raises(LoadFailed, match=r"output 'p' is a seq\(map.*options=\{'zipmap': False\}"):
        push_model(repository, "m", path, example={"x": [[0.0, 1.0]]})
    assert repository.models() == []


def test_sequences_are_refused(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("SequenceConstruct", ["x"], ["s"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)],
    )
    with pytest.raises(LoadFailed, match="only tensors can be served"):
        open_onnx(path)


def test_an_opset_of_the_future(tmp_path: Path) -> None:
    model = onnx.load(str(save_mlp(tmp_path / "m.onnx")))
    model.opset_import[0].version = 99
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(LoadFailed, match="export the model with a lower one"):
        open_onnx(tmp_path / "m.onnx")


def test_an_ir_version_of_the_future(tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.ir_version = 99
    onnx.save(model, str(path))
    with pytest.raises(LoadFailed, match="older ir_version"):
        open_onnx(path)


def test_operators_from_elsewhere_are_not_loaded(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Mystery", ["x"], ["y"], domain="com.example")],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
    )
    with pytest.raises(LoadFailed, match="operators outside ONNX are not loaded"):
        open_onnx(path)


@pytest.mark.parametrize("cut", [0, 1, 10, 100, 300])
def test_a_file_that_was_cut_short(repository: Repository, mlp_onnx: Path, cut: int) -> None:
    mlp_onnx.write_bytes(mlp_onnx.read_bytes()[:cut])
    with pytest.raises(LoadFailed, match=r"mlp\.onnx"):
        push_model(repository, "m", mlp_onnx, example=mlp_example())


@pytest.mark.parametrize(
    "content", [b"\x80\x04K\x01.", b"<html>not found</html>", b"{}", b"\0" * 64]
)
def test_a_file_that_is_no_model(repository: Repository, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(LoadFailed, match=r"m\.onnx"):
        push_model(repository, "m", tmp_path / "m.onnx", example=mlp_example())


def save_external(folder: Path, location: str) -> Path:
    folder.mkdir(exist_ok=True)
    model = onnx.load(str(save_mlp(folder / "m.onnx")))
    weights = b""
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", len(weights)), ("length", len(raw))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        weights += raw
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    target = (folder / location).resolve()
    target.parent.mkdir(exist_ok=True, parents=True)
    target.write_bytes(weights)
    return folder / "m.onnx"


def test_external_data_comes_along(repository: Repository, tmp_path: Path) -> None:
    path = save_external(tmp_path / "source", "deep/weights.bin")
    assert external_files(path) == ["deep/weights.bin"]
    version = push_model(repository, "m", path, example=mlp_example()).version
    assert version.manifest.files.keys() == {"m.onnx", "deep/weights.bin"}
    x = example_rows(2)
    np.testing.assert_allclose(load_model(version).run({"x": x})["y"], mlp_reference(x), rtol=1e-5)


def test_external_data_in_a_subgraph_is_found(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "inner.bin"
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["o"])],
        "branch",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])],
        [tensor],
    )
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    assert external_files(path) == ["inner.bin"]


def test_external_data_that_is_missing(repository: Repository, tmp_path: Path) -> None:
    path = save_external(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(LoadFailed, match=r"its weights are in 'weights\.bin', which is not there"):
        push_model(repository, "m", path, example=mlp_example())


@pytest.mark.parametrize("absolute", [False, True])
def test_external_data_outside_is_refused(
    repository: Repository, tmp_path: Path, absolute: bool
) -> None:
    outside = str(tmp_path / "outside.bin") if absolute else "../outside.bin"
    path = save_external(tmp_path / "source", outside)
    assert (tmp_path / "outside.bin").exists()
    with pytest.raises(LoadFailed, match="outside the model's folder"):
        push_model(repository, "m", path, example=mlp_example())
    # Nor does the engine itself read there, whatever came into the repository.
    with pytest.raises(LoadFailed):
        open_onnx(path)


def test_cuda_that_is_not_there(mlp_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(LoadFailed, match=r"without CUDA\. Mend: .*rayprism\[gpu\]"):
        open_onnx(mlp_onnx, device="cuda")
    for value, device in (("", "auto"), ("-1", "auto"), ("0", "cpu")):
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", value)
        assert open_onnx(mlp_onnx, device=device).device == "cpu"


def test_a_gpu_that_was_assigned_and_cannot_be_used_is_logged(
    mlp_onnx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "0")
    assert open_onnx(mlp_onnx).device == "cpu"
    assert "running on the CPU" in caplog.text


def test_the_device_is_the_one_that_the_session_got(
    mlp_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is listed may still fail to start; only the session tells."""
    onnxruntime = pytest.importorskip("onnxruntime")
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **_: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(LoadFailed, match=r"asked for with CUDA.*, and onnxruntime runs this model"):
        open_onnx(mlp_onnx, device="cuda")


def test_threads_and_options_reach_the_session(mlp_onnx: Path) -> None:
    runtime = open_onnx(mlp_onnx, threads=3, options={"onnx": {"graph_optimization": "disable"}})
    options = runtime._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert "DISABLE_ALL" in str(options.graph_optimization_level)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"onnx": {"graph": "all"}}, "unknown key 'graph'"),
        ({"onnx": {"graph_optimization": "most"}}, "allowed: 'all', 'extended'"),
        ({"onnx": "all"}, "allowed is a mapping"),
    ],
)
def test_options_are_checked(mlp_onnx: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadFailed, match=said):
        open_onnx(mlp_onnx, options=options)
    open_onnx(mlp_onnx, options={"mine": 1})


def test_no_threads_is_no_setting() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        RuntimeSettings(threads=0)
