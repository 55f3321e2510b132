"""A torch model: trained for real, exported with a free number of rows, served and asked."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from rayprism.models.loader import load_model
from tests.examples.conftest import Pushed
from tests.examples.local_server import serve_version
from tests.examples.scripts import import_script, run_script


def test_accuracy(digits: Pushed) -> None:
    held_out = digits.repository.version("digits", 1).manifest.metadata["held_out"]
    assert held_out["rows"] == 450
    assert held_out["accuracy"] >= 0.97
    assert "warning" not in digits.printed


def test_any_number_of_rows(digits: Pushed) -> None:
    model = load_model(digits.repository.version("digits", 1))
    data = load_digits()
    images = data.images.astype(np.float32)[:, np.newaxis]
    for rows in (1, 3, 256):
        output = model.run(model.prepare({"image": images[:rows]}))["probabilities"]
        assert output.shape == (rows, 10)
        np.testing.assert_allclose(output.sum(axis=1), 1, atol=1e-5)
    model.close()


def test_second_run_pushes_nothing(digits: Pushed) -> None:
    root = digits.repository.root
    assert "--force" in run_script("digits/train.py", "--repository", root)
    assert digits.repository.versions("digits") == [1]


@pytest.mark.e2e
def test_client_draws_digits(digits: Pushed) -> None:
    with serve_version(digits.repository.version("digits", 1)) as server:
        printed = run_script("digits/client.py", "--url", server.url)
    lines = printed.splitlines()
    assert len(lines) == 10
    assert lines[8].split() == ["is", "5", "is", "1", "is", "4", "is", "7", "is", "8"]
    assert lines[9].count("got") == 5


def test_client_shows_digits_that_were_held_out() -> None:
    client = import_script("digits/client.py")
    train = import_script("digits/train.py")
    labels = load_digits().target
    _, held_out = train_test_split(
        np.arange(len(labels)),
        test_size=train.RECIPE["held_out"],
        random_state=train.SEED,
        stratify=labels,
    )
    assert set(client.EXAMPLES) <= set(held_out.tolist())
