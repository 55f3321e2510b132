"""Python models and processors: permission, isolation, and what they may do wrong."""

from __future__ import annotations

import os
import py_compile
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec
from rayprism.errors import (
    CodeNotAllowed,
    ConfigInvalid,
    DigestMismatch,
    InvalidInput,
    LoadFailed,
    ModelFailed,
    RepositoryError,
)
from rayprism.models.loader import LoadedModel, load_model
from rayprism.models.manifest import Batching
from rayprism.models.push import PushResult, push_model
from rayprism.models.repository import Repository
from tests.support.models import example_rows, save_mlp

X = TensorSpec("x", Datatype.FP32, (-1, 2))
Y = TensorSpec("y", Datatype.FP32, (-1, 2))
ROWS = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


def model(body: str, init: str = "self.folder, self.options = folder, options") -> str:
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return (
        "import numpy as np\n"
        "from rayprism.errors import InvalidInput\n"
        "class Model:\n"
        f"    def __init__(self, folder, options):\n        {init}\n"
        f"    def predict(self, inputs):\n{lines}\n"
    )


def push(repository: Repository, tmp_path: Path, code: str, **arguments: Any) -> PushResult:
    (tmp_path / "model.py").write_text(code)
    given: dict[str, Any] = {
        "example": {"x": ROWS}, "inputs": [X], "outputs": [Y], "allow_code": True, **arguments,
    }  # fmt: skip
    return push_model(repository, "m", tmp_path / "model.py", **given)


def pushed(repository: Repository, tmp_path: Path, code: str, **arguments: Any) -> LoadedModel:
    return load_model(push(repository, tmp_path, code, **arguments).version, allow_code=True)


def test_the_constructor_gets_folder_and_options(repository: Repository, tmp_path: Path) -> None:
    code = model(
        "assert (self.folder / 'model.py').is_file()\n"
        "return {'y': inputs['x'] * self.options['by']}"
    )
    loaded = pushed(repository, tmp_path, code, options={"by": 3})
    np.testing.assert_array_equal(loaded.run({"x": ROWS})["y"], ROWS * 3)


def test_strings_of_every_kind_become_bytes(repository: Repository, tmp_path: Path) -> None:
    code = model(
        "rows = len(inputs['x'])\n"
        "return {'u': np.array(['ä'] * rows), 's': np.array([b'b'] * rows),\n"
        "        'o': np.array((['c', b'd', 'e'] * rows)[:rows], object)}"
    )
    outputs = [TensorSpec(name, Datatype.BYTES, (-1,)) for name in "uso"]
    result = pushed(repository, tmp_path, code, outputs=outputs).run({"x": ROWS})
    assert result["u"].tolist() == ["ä".encode()] * 3
    assert result["s"].tolist() == [b"b"] * 3
    assert result["o"].tolist() == [b"c", b"d", b"e"]


def test_bytes_come_as_bytes(repository: Repository, tmp_path: Path) -> None:
    code = model(
        "return {'y': np.array([[len(v)] for v in inputs['t'].ravel().tolist()], np.int64)}"
    )
    loaded = pushed(
        repository, tmp_path, code,
        example={"t": [["a"], ["äö"]]},
        inputs=[TensorSpec("t", Datatype.BYTES, (-1, 1))],
        outputs=[TensorSpec("y", Datatype.INT64, (-1, 1))],
    )  # fmt: skip
    t = np.array([[b"\xff\xff\xff"]], object)
    assert loaded.run({"t": t})["y"].tolist() == [[3]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return {}", "output 'y' is missing"),
        ("return {'y': inputs['x'].astype(np.float64)}", "output 'y' is FP64, the manifest says"),
        ("return {'y': inputs['x'].astype('complex64')}", "output 'y' is complex64"),
        ("return {'y': inputs['x'][:1]}", r"output 'y' has shape \[1, 2\], the batch has 2 rows"),
        ("return {'y': np.array(1, np.float32)}", r"output 'y' has shape \[\]"),
        ("return {'y': inputs['x'].tolist()}", "output 'y' is list, allowed is a numpy array"),
        ("return inputs['x']", "returned ndarray, allowed is a dict"),
        ("return None", "returned NoneType, allowed is a dict"),
    ],
)
def test_what_the_manifest_forbids_is_a_fault_of_the_model(
    repository: Repository, tmp_path: Path, body: str, said: str
) -> None:
    """It behaves while it is pushed, and not afterwards."""
    code = model(f"if inputs['x'][0, 0] < 100: return {{'y': inputs['x'] + 0}}\n{body}")
    loaded = pushed(repository, tmp_path, code)
    with pytest.raises(ModelFailed, match=said):
        loaded.run({"x": np.full((2, 2), 100, np.float32)})


def test_outputs_beyond_the_manifest_s_are_dropped(repository: Repository, tmp_path: Path) -> None:
    code = model("return {'more': inputs['x'], 'y': inputs['x'] + 1, 'z': inputs['x']}")
    assert pushed(repository, tmp_path, code).run({"x": ROWS}).keys() == {"y"}


def test_exceptions_go_through_as_they_are(repository: Repository, tmp_path: Path) -> None:
    code = model(
        "if inputs['x'][0, 0] == 100: raise InvalidInput('x may not be 100')\n"
        "if inputs['x'][0, 0] == 200: raise ZeroDivisionError('mine')\n"
        "return {'y': inputs['x'] + 0}"
    )
    loaded = pushed(repository, tmp_path, code)
    with pytest.raises(InvalidInput, match="may not be 100"):
        loaded.run({"x": np.full((1, 2), 100, np.float32)})
    with pytest.raises(ZeroDivisionError, match="mine"):
        loaded.run({"x": np.full((1, 2), 200, np.float32)})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def broken(:", r"model\.py: importing it raised SyntaxError"),
        ("import not_there_at_all", "importing it raised ModuleNotFoundError: No module named"),
        ("class Modell: pass", r"no class 'Model'\. Did you mean 'Modell'\? It has: Modell"),
        ("Model = 3", "no class 'Model'.* It has: no class"),
        ("class Model:\n    def __init__(self, folder, options): pass", "no method predict"),
        ("class Model: pass", r"Model\(folder, options\) raised TypeError"),
        (model("return {}", init="raise OSError('no disk')"), "raised OSError: no disk"),
        (model("return 1 / 0"), "the model raised ZeroDivisionError"),
    ],
)
def test_code_that_does_not_load(
    repository: Repository, tmp_path: Path, code: str, said: str
) -> None:
    with pytest.raises(LoadFailed, match=said):
        push(repository, tmp_path, code)
    assert repository.models() == []


def test_the_example_may_be_refused_by_the_model(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="the model refused it: too cold"):
        push(repository, tmp_path, model("raise InvalidInput('too cold')"))


def test_versions_do_not_share_modules(repository: Repository, tmp_path: Path) -> None:
    for factor in (2, 5):
        source = tmp_path / str(factor)
        (source / "inner").mkdir(parents=True)
        (source / "factor.py").write_text(f"FACTOR = {factor}")
        (source / "inner" / "deep.py").write_text("from ..factor import FACTOR\nTWICE = FACTOR * 2")
        (source / "model.py").write_text(
            "from .inner import deep\n"
            + model("from .factor import FACTOR\nreturn {'y': inputs['x'] * (deep.TWICE - FACTOR)}")
        )
        push_model(repository, "m", source, example={"x": ROWS}, inputs=[X], outputs=[Y],
                   allow_code=True)  # fmt: skip
    first = load_model(repository.version("m", 1), allow_code=True)
    second = load_model(repository.version("m", 2), allow_code=True)
    np.testing.assert_array_equal(first.run({"x": ROWS})["y"], ROWS * 2)
    np.testing.assert_array_equal(second.run({"x": ROWS})["y"], ROWS * 5)
    assert "factor" not in sys.modules
    assert "model" not in sys.modules
    assert not list(repository.root.rglob("__pycache__"))


def test_a_trace_names_the_file_of_the_version(repository: Repository, tmp_path: Path) -> None:
    loaded = pushed(repository, tmp_path, model("return {'y': inputs['x'] + 0}"))
    assert loaded._runtime.run.__code__.co_filename == str(  # type: ignore[attr-defined]
        loaded.version.folder / "model.py"
    )


def test_planted_code_is_found_before_it_runs(repository: Repository, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    version = push(repository, tmp_path, model("return {'y': inputs['x'] + 0}")).version
    path = version.folder / "model.py"
    path.chmod(0o644)
    text = path.read_text()
    path.write_text(f"import os; os.mkdir({str(mark)!r})\n" + text)
    with pytest.raises(DigestMismatch):
        load_model(version, allow_code=True)
    path.write_text(text)
    evil = tmp_path / "evil.py"
    evil.write_text(f"import os; os.mkdir({str(mark)!r})\n" + text)
    stat = path.stat()
    cache = version.folder / "__pycache__"
    cache.mkdir()
    os.utime(evil, (stat.st_atime, stat.st_mtime))
    name = cache / f"model.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(
        str(evil), str(name), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    with pytest.raises(DigestMismatch, match="__pycache__/model"):
        load_model(version, allow_code=True)
    assert not mark.exists()


def test_permission_comes_before_any_code(repository: Repository, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import os; os.makedirs({str(mark)!r}, exist_ok=True)\n" + model(
        "return {'y': inputs['x'] + 0}"
    )
    with pytest.raises(CodeNotAllowed, match=r"model\.py runs Python code"):
        push(repository, tmp_path, code, allow_code=False)
    assert not mark.exists()
    version = push(repository, tmp_path, code).version
    mark.rmdir()
    with pytest.raises(CodeNotAllowed, match="m 1 runs Python code"):
        load_model(version)
    assert not mark.exists()


TOKENIZER = """
import numpy as np
from rayprism.errors import InvalidInput


class Processor:
    def __init__(self, folder, options):
        self.words = (folder / "vocabulary.txt").read_text().split()

    def preprocess(self, inputs):
        texts = [text.decode().split() for text in inputs["text"].ravel()]
        longest = max(map(len, texts))
        ids = np.zeros((len(texts), longest), np.int64)
        mask = np.zeros((len(texts), longest), np.int64)
        for row, words in enumerate(texts):
            for column, word in enumerate(words):
                if word not in self.words:
                    raise InvalidInput(f"{word!r} is not a word")
                ids[row, column] = self.words.index(word) + 1
                mask[row, column] = 1
        return {"ids": ids, "mask": mask}

    def postprocess(self, inputs, outputs):
        total = (outputs["value"] * inputs["mask"]).sum(axis=1)
        return {"mean": (total / inputs["mask"].sum(axis=1)).astype(np.float32)}
"""

TEXT = TensorSpec("text", Datatype.BYTES, (-1, 1))
RAGGED = Batching(ragged={"ids": RaggedAxis(1), "mask": RaggedAxis(1)}, max_cost=64)


def push_tokenizer(repository: Repository, tmp_path: Path, **arguments: Any) -> PushResult:
    from onnx import TensorProto, helper

    from tests.support.models import save_onnx

    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    code = arguments.pop("source", TOKENIZER)
    (folder / "processor.py").write_text(code)
    (folder / "vocabulary.txt").write_text("one two three four")
    save_onnx(
        folder / "model.onnx",
        [
            helper.make_node("Add", ["ids", "mask"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["value"], to=TensorProto.FLOAT),
        ],
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("ids", "mask")],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["b", "s"])],
    )
    given: dict[str, Any] = {
        "code": "processor.py:Processor",
        "example": {"text": [["one"], ["two three"], ["one two four"]]},
        "inputs": [TEXT],
        "batching": RAGGED,
        "allow_code": True,
        **arguments,
    }
    return push_model(repository, "words", folder, **given)


def test_a_processor_makes_the_runtime_s_inputs(repository: Repository, tmp_path: Path) -> None:
    result = push_tokenizer(repository, tmp_path)
    assert list(result.warnings) == ["outputs were taken from the example: mean FP32 [-1]"]
    manifest = result.version.manifest
    assert manifest.inputs == (TEXT,)
    assert [spec.name for spec in manifest.runtime_inputs] == ["ids", "mask"]
    assert manifest.outputs == (TensorSpec("mean", Datatype.FP32, (-1,)),)
    loaded = load_model(result.version, allow_code=True)
    assert loaded.has_prepare
    assert loaded.measured_rows <= 64 // 3
    batch = loaded.prepare({"text": np.array([[b"one"], [b"four two"]], object)})
    assert batch["ids"].tolist() == [[1, 0], [4, 2]]
    assert loaded.run(batch)["mean"].tolist() == [2.0, 4.0]
    with pytest.raises(InvalidInput, match="'five' is not a word"):
        loaded.prepare({"text": np.array([[b"five"]], object)})


def test_padding_that_changes_the_answer_is_refused(repository: Repository, tmp_path: Path) -> None:
    from rayprism.errors import GoldenMismatch

    careless = TOKENIZER.replace(
        'total / inputs["mask"].sum(axis=1)', "outputs['value'].mean(axis=1)"
    )
    with pytest.raises(GoldenMismatch, match="padding ids, mask by 3 changes the answer"):
        push_tokenizer(repository, tmp_path, source=careless)
    assert repository.models() == []


def test_outputs_that_grow_with_the_padding_are_told(
    repository: Repository, tmp_path: Path
) -> None:
    growing = (
        TOKENIZER.replace(
            'return {"mean": (total / inputs["mask"].sum(axis=1)).astype(np.float32)}',
            'return {"each": outputs["value"] * inputs["mask"]}',
        )
        .replace(".astype(np.float32)", "")
        .replace('"mask"]}', '"mask"].astype(np.float32)}')
    )
    outputs = [TensorSpec("each", Datatype.FP32, (-1, -1))]
    result = push_tokenizer(repository, tmp_path, source=growing, outputs=outputs)
    assert [w for w in result.warnings if "grow with the padding" in w and "each" in w]
    named = RAGGED.model_copy(update={"ragged_outputs": {"each": 1}})
    assert (
        push_tokenizer(
            repository, tmp_path, source=growing, outputs=outputs, batching=named
        ).warnings
        == ()
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('return {"ids": ids}', "returned what the runtime does not take: input 'mask' is missing"),
        ('return {"ids": ids[:1], "mask": mask[:1]}', "made 1 rows out of 3"),
        ('return {"ids": ids, "mask": mask.astype(np.int32)}', "allowed is INT64"),
        ('return {"ids": ids, "mask": mask[:, :1]}', "ragged inputs of one request need the same"),
        ('return {"ids": ids.tolist(), "mask": mask}', "returned a dict of list, ndarray, allowed"),
        ("return ids", "returned ndarray, allowed is a dict of numpy arrays"),
    ],
)
def test_what_preprocess_returns_is_checked(
    repository: Repository, tmp_path: Path, broken: str, said: str
) -> None:
    source = TOKENIZER.replace('return {"ids": ids, "mask": mask}', broken)
    assert source != TOKENIZER
    with pytest.raises(ModelFailed, match=said):
        push_tokenizer(repository, tmp_path, source=source)


def test_a_processor_that_does_nothing_is_refused(repository: Repository, tmp_path: Path) -> None:
    idle = "class Processor:\n    def __init__(self, folder, options): pass\n"
    with pytest.raises(LoadFailed, match="neither preprocess"):
        push_tokenizer(repository, tmp_path, source=idle)


def test_postprocess_alone(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "label.py").write_text(
        "import numpy as np\n"
        "class Label:\n"
        "    def __init__(self, folder, options): self.labels = np.array(options['labels'])\n"
        "    def postprocess(self, inputs, outputs):\n"
        "        return {'label': self.labels[outputs['y'].argmax(axis=1)], 'y': outputs['y']}\n"
    )
    result = push_model(
        repository, "m", save_mlp(tmp_path / "m.onnx"), example={"x": example_rows(3)},
        code="label.py:Label", options={"labels": ["a", "b", "c"]}, allow_code=True,
    )  # fmt: skip
    assert result.version.manifest.outputs == (
        TensorSpec("label", Datatype.BYTES, (-1,)),
        TensorSpec("y", Datatype.FP32, (-1, 3)),
    )
    loaded = load_model(result.version, allow_code=True)
    assert not loaded.has_prepare
    outputs = loaded.run({"x": example_rows(3)})
    assert [bytes(v) for v in outputs["label"]] == [
        b"abc"[i : i + 1] for i in outputs["y"].argmax(axis=1)
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [("label.py", "allowed is FILE.py:ClassName"), ("label:Label", "allowed is FILE"),
     ("missing.py:Label", "no such file beside"), ("label.py:not a name", "allowed is FILE")],
)  # fmt: skip
def test_code_is_named_with_its_class(
    repository: Repository, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "label.py").write_text("")
    with pytest.raises(RepositoryError, match=said):
        push_model(repository, "m", save_mlp(tmp_path / "m.onnx"), example={"x": example_rows(3)},
                   code=code, allow_code=True)  # fmt: skip
