"""The measured models as peers run them: bodies in, batches through ONNX Runtime, bodies out.

Peers have environments of their own, without rayprism: nothing here needs more than numpy,
ONNX Runtime, orjson and, for text, tokenizers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = ["Arguments", "InvalidRequest", "Served", "Tensors", "best_batch", "open_model"]

Tensors = dict[str, NDArray[Any]]

_ARGUMENTS = "BENCH_PEER_ARGUMENTS"
_TEXT_MODELS = ("minilm",)
_MAX_TOKENS = 256
"""Where `examples/minilm/processor.py` cuts."""
_SMALLEST_NORM = 1e-12
_HEADER_BYTES = 4096
"""The JSON in front of binary data is looked for in so many."""
_BINARY = b'"binary_data_size"'

_DTYPES: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_DATATYPES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class InvalidRequest(ValueError):
    """The body is none that this model takes."""


@dataclass(frozen=True)
class Arguments:
    """What a peer's `server.py` is told."""

    model: str
    model_file: Path
    port: int
    tokenizer: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_command(cls, command: Sequence[str] | None = None) -> Self:
        """From a command line, by default this process's."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", required=True)
        parser.add_argument("--model-file", type=Path, required=True)
        parser.add_argument("--tokenizer", type=Path)
        parser.add_argument("--port", type=int, required=True)
        parser.add_argument("--options", type=json.loads, default={}, help="JSON")
        return cls(**vars(parser.parse_args(command)))

    @classmethod
    def from_environment(cls) -> Self:
        """As `export` left them, in a process that the peer started."""
        raw = json.loads(os.environ[_ARGUMENTS])
        tokenizer = raw["tokenizer"]
        return cls(
            model=raw["model"],
            model_file=Path(raw["model_file"]),
            port=raw["port"],
            tokenizer=None if tokenizer is None else Path(tokenizer),
            options=raw["options"],
        )

    def export(self) -> None:
        """Leaves them to the processes that this one starts."""
        os.environ[_ARGUMENTS] = json.dumps(
            {
                "model": self.model,
                "model_file": str(self.model_file.resolve()),
                "port": self.port,
                "tokenizer": None if self.tokenizer is None else str(self.tokenizer.resolve()),
                "options": dict(self.options),
            }
        )

    def options_over(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The options, and defaults for those that are not given.

        Raises:
            SystemExit: There is one that the peer does not know.
        """
        known = {"threads": 1, **defaults}
        if unknown := sorted(set(self.options) - set(known)):
            raise SystemExit(f"no such option: {', '.join(unknown)}; there are {', '.join(known)}")
        return {**known, **self.options}

    @property
    def path(self) -> str:
        """Where the Open Inference Protocol takes requests."""
        return f"/v2/models/{self.model}/infer"


class Served:
    """A model whose inputs are tensors with rows on axis 0.

    Requests that share a batch are joined; where other axes differ, as lengths of token rows, the
    shorter ones are padded with 0.

    Args:
        name: The model's.
        model_file: ONNX.
        threads: Of a run.
    """

    def __init__(self, name: str, model_file: Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.name = name
        self._session = onnxruntime.InferenceSession(
            str(model_file), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]

    def decode(self, body: bytes, header_length: int | None = None) -> Tensors:
        """What the network takes, from the body of a request.

        Args:
            body: JSON, or JSON and binary data behind it.
            header_length: How long the JSON is, of the header `Inference-Header-Content-Length`.
                Servers that do not show headers to their models find it by themselves.

        Raises:
            InvalidRequest: It is neither.
        """
        try:
            return self.prepare(_read(body, header_length))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"not a request of {self.name}: {error}") from None

    def prepare(self, tensors: Tensors) -> Tensors:
        """What the network takes, from what the client sent."""
        return tensors

    def run(self, requests: Sequence[Tensors]) -> list[Tensors]:
        """The outputs of each request of a batch.

        Args:
            requests: From `decode`; any number of rows each.
        """
        if len(requests) == 1:
            return [self._infer(requests[0])]
        outputs = self._infer(_join(requests))
        answers = []
        start = 0
        for request in requests:
            end = start + len(next(iter(request.values())))
            answers.append({name: values[start:end] for name, values in outputs.items()})
            start = end
        return answers

    def encode(self, outputs: Tensors) -> bytes:
        """The JSON of an answer."""
        return orjson.dumps(
            {
                "model_name": self.name,
                "model_version": "1",
                "outputs": [
                    {
                        "name": name,
                        "datatype": _DATATYPES[values.dtype],
                        "shape": values.shape,
                        "data": values.ravel(),
                    }
                    for name, values in outputs.items()
                ],
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )

    def _infer(self, feed: Tensors) -> Tensors:
        outputs = self._session.run(self._outputs, feed)
        return dict(zip(self._outputs, outputs, strict=True))


class _Sentences(Served):
    """Text in, embeddings out: as `examples/minilm/processor.py`, which needs rayprism."""

    def __init__(self, name: str, model_file: Path, tokenizer: Path, *, threads: int = 1) -> None:
        from tokenizers import Tokenizer

        super().__init__(name, model_file, threads=threads)
        # Requests are too small for a pool of threads, and the others of the machine are taken.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    def prepare(self, tensors: Tensors) -> Tensors:
        """Shapes: `text` `[rows, ...]` str or UTF-8 bytes -> each `[rows, length] int64`."""
        texts = [_text(item) for item in tensors["text"].ravel()]
        encodings = self._tokenizer.encode_batch_fast(texts)
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: feed[name] for name in self._inputs}

    def _infer(self, feed: Tensors) -> Tensors:
        (hidden,) = self._session.run(self._outputs[:1], feed)
        mask = feed["attention_mask"].astype(np.float32)
        summed = np.matmul(mask[:, np.newaxis, :], hidden)[:, 0, :]
        norms = np.linalg.norm(summed, axis=1, keepdims=True)
        return {"embedding": summed / np.maximum(norms, _SMALLEST_NORM)}


def best_batch(model: str) -> int:
    """How many requests a run takes where that costs least: what peers join by default.

    On one thread of a CPU, only the tiny model gains: 6.2 us a request alone, 1.1 us among 32. The
    others lose what joining takes: requests of mixed lengths are padded to the longest (minilm 12.4
    ms alone, 22.6 ms among 32; ragged 148 us, 274 us), and images are copied (20 us, 123 us).
    """
    return 32 if model == "tiny" else 1


def open_model(arguments: Arguments) -> Served:
    """The model that a peer was told to serve."""
    threads = arguments.options.get("threads", 1)
    if arguments.model not in _TEXT_MODELS:
        return Served(arguments.model, arguments.model_file, threads=threads)
    if arguments.tokenizer is None:
        raise SystemExit(f"{arguments.model} needs --tokenizer")
    return _Sentences(arguments.model, arguments.model_file, arguments.tokenizer, threads=threads)


def _read(body: bytes, header_length: int | None) -> Tensors:
    if header_length is None and body.find(_BINARY, 0, _HEADER_BYTES) >= 0:
        # Latin-1, so that a character is a byte.
        start = body[:_HEADER_BYTES].decode("latin-1")
        header_length = json.JSONDecoder().raw_decode(start)[1]
    if header_length is None:
        inputs = orjson.loads(body)["inputs"]
        return {tensor["name"]: _array(tensor, tensor["data"]) for tensor in inputs}
    tensors = {}
    rest = memoryview(body)[header_length:]
    for tensor in orjson.loads(memoryview(body)[:header_length])["inputs"]:
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            tensors[tensor["name"]] = _array(tensor, tensor["data"])
            continue
        tensors[tensor["name"]] = _from_buffer(tensor, rest[:size])
        rest = rest[size:]
    return tensors


def _array(tensor: Mapping[str, Any], data: Any) -> NDArray[Any]:
    datatype = tensor["datatype"]
    dtype: Any = object if datatype == "BYTES" else _DTYPES[datatype]
    return np.array(data, dtype).reshape(tensor["shape"])


def _from_buffer(tensor: Mapping[str, Any], buffer: memoryview) -> NDArray[Any]:
    if tensor["datatype"] != "BYTES":
        return np.frombuffer(buffer, _DTYPES[tensor["datatype"]]).reshape(tensor["shape"])
    items = []
    while buffer:
        length = int.from_bytes(buffer[:4], "little")
        items.append(bytes(buffer[4 : 4 + length]))
        buffer = buffer[4 + length :]
    return _array(tensor, items)


def _text(item: str | bytes) -> str:
    return item if isinstance(item, str) else item.decode()


def _join(requests: Sequence[Tensors]) -> Tensors:
    return {name: _concatenate([request[name] for request in requests]) for name in requests[0]}


def _concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) == 1:
        return np.concatenate(arrays)
    longest = np.max([array.shape[1:] for array in arrays], axis=0)
    joined = np.zeros((sum(map(len, arrays)), *longest), arrays[0].dtype)
    start = 0
    for array in arrays:
        end = start + len(array)
        joined[(slice(start, end), *map(slice, array.shape[1:]))] = array
        start = end
    return joined
