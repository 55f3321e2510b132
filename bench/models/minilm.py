"""A sentence model, whose own work is nearly everything there is to do: `examples/minilm`."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.models.base import (
    BenchModel,
    ModelFiles,
    ModelUnavailable,
    missing_versions,
    open_session,
)
from bench.sentences import sentences
from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Array, Datatype, Tensors, TensorSpec
from rayprism.models.repository import Repository

__all__ = ["MINILM", "MiniLM"]

_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "minilm"
_INPUT, _OUTPUT = "text", "embedding"
_MAX_TOKENS = 256


class MiniLM(BenchModel):
    """Text in, embedding out: the server tokenises."""

    inputs = (TensorSpec(_INPUT, Datatype.BYTES, (-1,)),)
    # A batch mate changes the last digits.
    tolerance = Tolerance(rule="cosine", cosine=0.999)

    def prepare(self, folder: Path) -> ModelFiles:
        """Finds network and tokenizer in their packages; writes nothing."""
        script = self._script
        return {
            "model_file": self._find(*script.NETWORK),
            "tokenizer": self._find(*script.TOKENIZER),
        }

    def push(self, repository: Path, versions: int) -> None:
        """Pushes what is missing of versions 1, 2, ... with the example's own code."""
        missing = missing_versions(repository, self.name, versions)
        if not missing:
            return
        files = self.prepare(repository.parent)
        sources = {
            "model.onnx": files["model_file"],
            "tokenizer.json": files["tokenizer"],
            "processor.py": self._script.PROCESSOR,
        }
        for _ in missing:
            self._script.push(Repository(repository), sources)

    def application_args(self) -> dict[str, Any]:
        """The version brings a processor."""
        return {"allow_code": True}

    def requests(self, count: int, rows: int, seed: int) -> list[Tensors]:
        """Sentences of 5 to 60 words.

        Shapes: `text` `[rows]`, objects that are UTF-8 `bytes`.
        """
        texts = [text.encode() for text in sentences(count * rows, seed)]
        return [
            {_INPUT: np.array(texts[start : start + rows], object)}
            for start in range(0, count * rows, rows)
        ]

    def expected(self, tensors: Tensors) -> Tensors:
        """Each sentence alone through tokenizer and network, mean-pooled, of length 1."""
        return {_OUTPUT: np.stack([self._embed(text.decode()) for text in tensors[_INPUT].flat])}

    def _embed(self, text: str) -> Array:
        session = self._session
        ids = np.array([self._tokenizer.encode(text).ids], np.int64)
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        wanted = {item.name: feed[item.name] for item in session.get_inputs()}
        hidden: Array = session.run(None, wanted)[0]
        pooled = hidden[0].mean(axis=0)
        return np.asarray(pooled / np.linalg.norm(pooled))

    @cached_property
    def _script(self) -> Any:
        spec = importlib.util.spec_from_file_location("bench_minilm_push", _FOLDER / "push.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _find(self, package: str, path: str) -> Path:
        try:
            found: Path = self._script.find_file(package, path)
        except SystemExit as error:
            raise ModelUnavailable(str(error)) from None
        return found

    @cached_property
    def _session(self) -> Any:
        return open_session(self._find(*self._script.NETWORK))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._find(*self._script.TOKENIZER)))
        tokenizer.no_padding()
        tokenizer.enable_truncation(_MAX_TOKENS)
        return tokenizer


MINILM = MiniLM("minilm")
