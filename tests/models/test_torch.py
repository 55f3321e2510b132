"""torch archives: names, datatypes, and that none of them runs code without permission."""

from __future__ import annotations

import io
import json
import pickle
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.core.tensors import Datatype, TensorSpec, numpy_dtype
from rayprism.errors import CodeNotAllowed, LoadFailed
from rayprism.models.loader import load_model
from rayprism.models.push import push_model
from rayprism.models.repository import Repository
from rayprism.models.runtime import RuntimeSettings
from rayprism.models.torch import TorchRuntime
from rayprism.models.torch_archive import archive_kind, find_risks
from tests.support.models import (
    FEATURES,
    example_rows,
    mlp_example,
    save_mlp_export,
    save_mlp_script,
    torch_mlp,
)

torch = pytest.importorskip("torch")


class Two(torch.nn.Module):  # type: ignore[misc]
    """Two inputs and two outputs, told apart only by their names."""

    def forward(self, a: Any, b: Any) -> Any:
        return {"difference": a - b, "larger": a.argmax(-1)}


class Pair(torch.nn.Module):  # type: ignore[misc]
    def forward(self, a: Any, b: Any) -> Any:
        return a - b, (a + b).sum(-1)


def export(
    module: Any, path: Path, arguments: tuple[Any, ...], names: str = "ab", **keywords: Any
) -> Path:
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in (*names, *keywords)}
    torch.export.save(
        torch.export.export(module.eval(), arguments, keywords, dynamic_shapes=shapes), str(path)
    )
    return path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports are slow; these are made once."""
    folder = tmp_path_factory.mktemp("archives")
    # Two tensors: given one tensor twice, torch.export takes both arguments for one.
    ones, zeros = torch.ones(3, 2), torch.zeros(3, 2)
    export(Two(), folder / "dict.pt2", (ones, zeros))
    export(Pair(), folder / "pair.pt2", (ones,), "a", b=zeros)
    save_mlp_export(folder / "mlp.pt2")
    save_mlp_script(folder / "mlp.pt")
    torch.save(Two(), folder / "module.pt")
    torch.save({"w": ones}, folder / "state.pt2")
    torch.save({"w": ones}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder


def open_torch(path: Path, **arguments: Any) -> TorchRuntime:
    settings = RuntimeSettings(allow_code=arguments.pop("allow_code", False))
    return TorchRuntime.open(path.parent, path.name, settings, **arguments)


A, B = np.array([[1, 2], [5, 3]], np.float32), np.array([[4, 4], [1, 1]], np.float32)


def test_a_dict_keeps_its_names(archives: Path) -> None:
    runtime = open_torch(archives / "dict.pt2")
    signature = runtime.signature()
    assert signature.inputs == (
        TensorSpec("a", Datatype.FP32, (-1, 2)),
        TensorSpec("b", Datatype.FP32, (-1, 2)),
    )
    assert signature.outputs == (
        TensorSpec("difference", Datatype.FP32, (-1, 2)),
        TensorSpec("larger", Datatype.INT64, (-1,)),
    )
    outputs = runtime.run({"b": B, "a": A})
    np.testing.assert_array_equal(outputs["difference"], A - B)
    np.testing.assert_array_equal(outputs["larger"], [1, 0])


def test_a_tuple_takes_the_names_in_order_and_keywords_work(archives: Path) -> None:
    plain = open_torch(archives / "pair.pt2")
    assert [spec.name for spec in plain.signature().inputs] == ["a", "b"]
    assert plain.run({"b": B, "a": A}).keys() == {"output_0", "output_1"}
    named = open_torch(
        archives / "pair.pt2",
        outputs=(TensorSpec("d", Datatype.FP32, (-1, 2)), TensorSpec("s", Datatype.FP32, (-1,))),
    )
    assert [spec.name for spec in named.signature().outputs] == ["d", "s"]
    outputs = named.run({"b": B, "a": A})
    np.testing.assert_array_equal(outputs["d"], A - B)
    np.testing.assert_array_equal(outputs["s"], (A + B).sum(-1))
    with pytest.raises(LoadFailed, match="it gives 2 outputs, and 1 are named: d"):
        open_torch(archives / "pair.pt2", outputs=(TensorSpec("d", Datatype.FP32, (-1, 2)),))


def test_a_script_is_called_by_name_or_in_order(archives: Path, tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Pair(), (torch.ones(3, 2), torch.ones(3, 2))).save(tmp_path / "m.ts")
    for names in ("ab", "xy"):
        runtime = open_torch(
            tmp_path / "m.ts",
            allow_code=True,
            inputs=tuple(TensorSpec(name, Datatype.FP32, (-1, 2)) for name in names),
        )
        feed = dict(zip(reversed(names), (B, A), strict=True))
        np.testing.assert_array_equal(runtime.run(feed)["output_0"], A - B)
    wrong = open_torch(
        tmp_path / "m.ts", allow_code=True, outputs=(TensorSpec("d", Datatype.FP32, (-1, 2)),)
    )
    with pytest.raises(ValueError, match="gives 2 outputs, the manifest names 1"):
        wrong.run({"a": A, "b": B})


@pytest.mark.parametrize(
    ("datatype", "name"),
    [
        ("bfloat16", "BF16"),
        ("float16", "FP16"),
        ("float64", "FP64"),
        ("int32", "INT32"),
        ("uint8", "UINT8"),
        ("bool", "BOOL"),
    ],
)
def test_datatypes_go_through(
    tmp_path: Path, datatype: str, name: str, repository: Repository
) -> None:
    class Same(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"y": x.clone()}

    given = torch.ones(3, 2, dtype=getattr(torch, datatype))
    path = export(Same(), tmp_path / "m.pt2", (given,), "x")
    runtime = open_torch(path)
    spec = runtime.signature().inputs[0]
    assert str(spec.datatype) == name
    x = np.array([[0, 1], [1, 1]]).astype(numpy_dtype(spec.datatype))
    pushed = push_model(repository, "m", path, example={"x": x})
    assert pushed.version.manifest.inputs[0] == spec
    y = load_model(pushed.version).run({"x": x})["y"]
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()


def test_inputs_that_are_no_plain_tensors_are_refused(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):  # type: ignore[misc]
        def forward(self, pair: Any) -> Any:
            return pair[0] + pair[1]

    class NestedOut(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"a": [x, x]}

    ones = torch.ones(2, 2)
    torch.export.save(torch.export.export(Nested(), ([ones, ones],)), str(tmp_path / "in.pt2"))
    torch.export.save(torch.export.export(NestedOut(), (ones,)), str(tmp_path / "out.pt2"))
    with pytest.raises(LoadFailed, match="an input is a list or a dict"):
        open_torch(tmp_path / "in.pt2")
    with pytest.raises(LoadFailed, match="an output is a list or a dict"):
        open_torch(tmp_path / "out.pt2")


@pytest.mark.parametrize("name", ["module.pt", "state.pt2", "legacy.pt"])
def test_pickles_are_refused_with_how_to_export(
    archives: Path, repository: Repository, name: str
) -> None:
    with pytest.raises(LoadFailed, match=r"run whatever it holds\. .*torch\.export\.save"):
        push_model(repository, "m", archives / name, example=mlp_example(), allow_code=True)


def test_archives_of_an_old_torch_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(LoadFailed, match=r"by a torch before 2\.9"):
        archive_kind(tmp_path / "old.pt2")


@pytest.mark.parametrize("cut", [0, 10, 1000, 5000])
def test_an_archive_that_was_cut_short(archives: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "m.pt2").write_bytes((archives / "mlp.pt2").read_bytes()[:cut])
    with pytest.raises(LoadFailed, match=r"m\.pt2"):
        open_torch(tmp_path / "m.pt2")


def test_threads_are_set(archives: Path) -> None:
    before = torch.get_num_threads()
    try:
        TorchRuntime.open(archives, "mlp.pt2", RuntimeSettings(threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_it_runs_on_a_thread_of_its_own_without_gradients(archives: Path) -> None:
    runtime = open_torch(archives / "mlp.pt2")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(runtime.run({"x": example_rows(2)})))
    thread.start()
    thread.join()
    assert found[0]["output"].shape == (2, 3)
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        runtime.run({"x": example_rows(2)})


# Attacks. Each makes an archive that makes a folder when plain torch.export.load reads it (or its
# module runs); so these tests would notice if one of them stopped to be an attack.


class Marker:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.folder,)


Records = dict[str, bytes]


def _edit(records: Records, name: str, change: Callable[[Any], None]) -> None:
    raw = json.loads(records[name])
    change(raw)
    records[name] = json.dumps(raw).encode()


def _sample_inputs(records: Records, call: str, mark: str) -> None:
    records["data/sample_inputs/model.pt"] = pickle.dumps((Marker(mark), {}))


def _pickled_weight(records: Records, call: str, mark: str) -> None:
    def change(raw: Any) -> None:
        next(iter(raw["config"].values()))["use_pickle"] = True

    _edit(records, "data/weights/model_weights_config.json", change)
    buffer = io.BytesIO()
    torch.save(Marker(mark), buffer)
    records["data/weights/weight_0"] = buffer.getvalue()


def _opaque_constant(records: Records, call: str, mark: str) -> None:
    def change(raw: Any) -> None:
        raw["config"]["evil"] = {
            "path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None,
        }  # fmt: skip

    _edit(records, "data/constants/model_constants_config.json", change)
    records["data/constants/opaque_obj_0"] = pickle.dumps(Marker(mark))


def _shape(records: Records, call: str, mark: str) -> None:
    def change(raw: Any) -> None:
        values = raw["graph_module"]["graph"]["tensor_values"]
        for value in list(values.values()):
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = call

    _edit(records, "models/model.json", change)


def _shape_of_a_tensor_called_metadata(records: Records, call: str, mark: str) -> None:
    """The same at a place that looks like free text."""

    def change(raw: Any) -> None:
        raw.update(json.loads(json.dumps(raw).replace('"name": "relu"', '"name": "metadata"')))
        values = raw["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = values.pop("relu")
        values["metadata"]["sizes"][0]["as_expr"]["expr_str"] = call

    _edit(records, "models/model.json", change)


def _name(records: Records, call: str, mark: str) -> None:
    name = f"x={call}"

    def change(raw: Any) -> None:
        text = json.dumps(raw).replace('"name": "x"', json.dumps({"name": name})[1:-1])
        raw.update(json.loads(text))
        values = raw["graph_module"]["graph"]["tensor_values"]
        values[name] = values.pop("x")

    _edit(records, "models/model.json", change)


def _guard(records: Records, call: str, mark: str) -> None:
    _edit(records, "models/model.json", lambda raw: raw.update(guards_code=[f"{call} or True"]))


ATTACKS = [
    _sample_inputs,
    _pickled_weight,
    _opaque_constant,
    _shape,
    _shape_of_a_tensor_called_metadata,
    _name,
    _guard,
]


def forge(source: Path, target: Path, attack: Any, mark: Path) -> Path:
    with zipfile.ZipFile(source) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    attack(records, f"__import__('os').mkdir('{mark}')", str(mark))
    writer = torch._C.PyTorchFileWriter(str(target))
    for name, content in records.items():
        if name not in ("version", "byteorder") and not name.startswith("."):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return target


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_code_in_an_archive_does_not_run(archives: Path, tmp_path: Path, attack: Any) -> None:
    mark = tmp_path / "mark"
    path = forge(archives / "mlp.pt2", tmp_path / "evil.pt2", attack, mark)
    x = example_rows(2)
    if attack is _guard:
        # Guards are read, and never compiled.
        open_torch(path).run({"x": x})
    else:
        with pytest.raises(CodeNotAllowed, match=r"could run code .* args\.allow_code: true"):
            open_torch(path)
    assert not mark.exists()
    # The proof that it was an attack.
    with suppress(Exception):
        torch.export.load(str(path)).module()(torch.from_numpy(x))
    assert mark.exists()


def test_the_forger_by_itself_changes_nothing(archives: Path, tmp_path: Path) -> None:
    path = forge(archives / "mlp.pt2", tmp_path / "same.pt2", lambda *_: None, tmp_path / "mark")
    assert find_risks(path) == []
    np.testing.assert_array_equal(
        open_torch(path).run({"x": example_rows(2)})["output"],
        open_torch(archives / "mlp.pt2").run({"x": example_rows(2)})["output"],
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data/aotinductor/model/code.so", b"\x7fELF", "aotinductor"),
        ("data/weights/other.pt", b"", "other.pt"),
        ("models/second.json", b"{}", "second.json"),
        ("notes.txt", b"", "notes.txt"),
    ],
)
def test_records_that_are_not_known_need_permission(
    archives: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = forge(archives / "mlp.pt2", tmp_path / "m.pt2",
                 lambda records, *_: records.update({name: content}), tmp_path)  # fmt: skip
    with pytest.raises(CodeNotAllowed, match=said):
        open_torch(path)


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "torch.hub.load",
     "torch.ops.higher_order.call_torchbind", "torch.ops.mine.anything.default", "os.system",
     "#mine:op", "_operator.methodcaller", "math.__loader__.load_module"],
)  # fmt: skip
def test_operators_that_are_not_known_need_permission(
    archives: Path, tmp_path: Path, target: str
) -> None:
    def attack(records: Records, *_: Any) -> None:
        def change(raw: Any) -> None:
            raw["graph_module"]["graph"]["nodes"][0]["target"] = target

        _edit(records, "models/model.json", change)

    with pytest.raises(CodeNotAllowed, match="the graph has target"):
        open_torch(forge(archives / "mlp.pt2", tmp_path / "m.pt2", attack, tmp_path))


@pytest.mark.parametrize(
    ("expression", "plain"),
    [
        ("Symbol('s0', positive=True, integer=True)", True),
        ("4*Symbol('s31', positive=True, integer=True) + 1", True),
        ("FloorDiv(Symbol('s0', integer=True), 2)", True),
        ("Max(1, s0)", True),
        ("s0 // 2 >= 3", True),
        ("__import__('os')", False),
        ("Symbol('s0').__class__", False),
        ("Symbol.__class__", False),
        ("Symbol('__import__')", False),
        ("sympify('1')", False),
        ("(lambda: 1)()", False),
        ("[x for x in s0]", False),
        ("f'{s0}'", False),
        ("s0[0]", False),
        ("(s0 := 1)", False),
        ("Symbol(**{'a': 1})", False),
        ("Max(*s0)", False),
        ("Symbol('s0')(1)", False),
        ("b'x'", False),
        ("open", False),
        ("1 if s0 else 2", False),
        ("", False),
        ("(" * 500 + ")" * 500, False),
    ],
)
def test_shapes_are_arithmetic(expression: str, plain: bool) -> None:
    from rayprism.models.torch_archive import _is_arithmetic

    assert _is_arithmetic(expression) is plain


def test_a_tree_spec_may_not_import(archives: Path, tmp_path: Path) -> None:
    def attack(records: Records, *_: Any) -> None:
        def change(raw: Any) -> None:
            leaf = {"type": None, "context": None, "children_spec": []}
            context = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])
            raw["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(
                [1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}]
            )

        _edit(records, "models/model.json", change)

    with pytest.raises(CodeNotAllowed, match="out_spec"):
        open_torch(forge(archives / "mlp.pt2", tmp_path / "m.pt2", attack, tmp_path))


def test_a_script_needs_permission(archives: Path) -> None:
    with pytest.raises(CodeNotAllowed, match="it is a TorchScript program"):
        open_torch(archives / "mlp.pt")
    assert open_torch(archives / "mlp.pt", allow_code=True).run({"x": example_rows(2)}).keys() == {
        "output"
    }


def test_a_fixed_batch_is_padded(repository: Repository, tmp_path: Path) -> None:
    from rayprism.models.manifest import Batching
    from tests.support.models import mlp_reference

    torch.export.save(
        torch.export.export(torch_mlp(), (torch.zeros(4, FEATURES),)), str(tmp_path / "m.pt2")
    )
    version = push_model(
        repository, "m", tmp_path / "m.pt2", example=mlp_example(3), batching=Batching(max_rows=4)
    ).version
    model = load_model(version)
    for rows in (1, 3, 4, 5, 9):
        x = example_rows(rows)
        np.testing.assert_allclose(
            model.run({"x": x})["output"], mlp_reference(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"threads": 2},
            r"options\.torch: unknown key 'threads', allowed: autocast, compile, tf32",
        ),
        ({"compile": "fast"}, r"options\.torch\.compile: got 'fast', allowed: False, 'default'"),
        ({"autocast": "float64"}, r"options\.torch\.autocast: got 'float64'"),
    ],
)
def test_options_are_checked(archives: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadFailed, match=said):
        TorchRuntime.open(archives, "mlp.pt2", RuntimeSettings(options={"torch": options}))


def test_cuda_that_is_not_there(archives: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(LoadFailed, match=r"a GPU was asked for, and torch .* sees none"):
        TorchRuntime.open(archives, "mlp.pt2", RuntimeSettings(device="cuda"))
