"""Trains a small convolutional network on handwritten digits and pushes it as `digits`.

Run from the root of the repository:

    python examples/digits/train.py --repository models
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from rayprism.core.compare import Tolerance
from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.models.manifest import Batching
from rayprism.models.push import push_model
from rayprism.models.repository import ModelVersion, Repository

MODEL = "digits"
SEED = 8
RECIPE = {"seed": SEED, "epochs": 30, "batch_rows": 64, "learning_rate": 2e-3, "held_out": 0.25}
LEAST_ACCURACY = 0.97
"""What is worse is not pushed: the data or the code must be broken."""

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class DigitNetwork(nn.Module):
    """8x8 pixels from 0 to 16 in, ten probabilities out.

    Scaling and softmax are inside, so that clients send pixels as they are and get
    probabilities.

    Shapes:
        `[rows, 1, 8, 8] float32` -> `[rows, 10] float32`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(32 * 4 * 4, 10),
        )

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """What the loss takes."""
        scores: torch.Tensor = self.layers(image / 16.0)
        return scores

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """What is served."""
        return torch.softmax(self.logits(image), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path(os.environ.get("RAYPRISM_REPOSITORY", "models")),
        help="folder of the model repository (default: $RAYPRISM_REPOSITORY, else ./models)",
    )
    parser.add_argument(
        "--force", action="store_true", help="train and push again what is already there"
    )
    arguments = parser.parse_args()

    repository = Repository(arguments.repository)
    recipe = describe_recipe()
    existing = None if arguments.force else find_version(repository, recipe)
    if existing is not None:
        print(
            f"version {existing.manifest.version} came out of the same settings and packages. "
            "--force trains it again."
        )
        return
    images, labels = load_images()
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=RECIPE["held_out"], random_state=SEED, stratify=labels
    )
    network = train(train_x, train_y)
    accuracy = measure_accuracy(network, test_x, test_y)
    print(f"held-out accuracy: {accuracy:.2%} of {len(test_y)} digits")
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"below {LEAST_ACCURACY:.0%}: not pushed")
    metadata = {
        "task": "which of ten digits a handwritten 8x8 image shows",
        "recipe": recipe,
        "source": {"package": "scikit-learn", "data": "load_digits", "licence": "CC-BY-4.0"},
        "training": {"rows": len(train_y)},
        "held_out": {"rows": len(test_y), "accuracy": round(accuracy, 4)},
    }
    version = push(repository, network, test_x[:4], metadata)
    print(f"pushed {MODEL} as version {version.manifest.version} to {repository.root}")


def describe_recipe() -> dict[str, Any]:
    """All that decides what a training run gives."""
    packages = {name: importlib.metadata.version(name) for name in ("scikit-learn", "torch")}
    return {**RECIPE, "packages": packages}


def find_version(repository: Repository, recipe: dict[str, Any]) -> ModelVersion | None:
    """The newest version that was made by this recipe."""
    if MODEL not in repository.models():
        return None
    for number in reversed(repository.versions(MODEL)):
        version = repository.version(MODEL, number)
        if version.manifest.metadata.get("recipe") == recipe:
            return version
    return None


def load_images() -> tuple[Images, Labels]:
    """1,797 digits.

    Shapes:
        `[1797, 1, 8, 8] float32` from 0 to 16, and `[1797] int64`.
    """
    digits = load_digits()
    return digits.images.astype(np.float32)[:, np.newaxis], digits.target.astype(np.int64)


def train(images: Images, labels: Labels) -> DigitNetwork:
    """A trained network, ready to predict."""
    torch.manual_seed(SEED)
    # So small a network is no faster on more threads, and slower where they wait for a CPU.
    torch.set_num_threads(1)
    network = DigitNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=RECIPE["learning_rate"])
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    began = time.perf_counter()
    for epoch in range(1, int(RECIPE["epochs"]) + 1):
        total = 0.0
        for rows in torch.randperm(len(x)).split(int(RECIPE["batch_rows"])):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network.logits(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        if epoch % 10 == 0:
            took = time.perf_counter() - began
            print(f"epoch {epoch}: training loss {total / len(x):.4f} ({took:.1f} s)", flush=True)
    return network.eval()


@torch.no_grad()
def measure_accuracy(network: DigitNetwork, images: Images, labels: Labels) -> float:
    """Share of images whose most probable digit is the right one."""
    predicted = network(torch.from_numpy(images)).argmax(dim=1).numpy()
    return float((predicted == labels).mean())


def push(
    repository: Repository, network: DigitNetwork, example: Images, metadata: dict[str, Any]
) -> ModelVersion:
    """Exports the network with a free number of rows, and pushes it."""
    # Two rows: a size of 1 would be taken for a constant.
    program = torch.export.export(
        network,
        (torch.from_numpy(example[:2]),),
        dynamic_shapes={"image": {0: torch.export.Dim("rows")}},
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt2")
        torch.export.save(program, file)
        result = push_model(
            repository,
            MODEL,
            file,
            example={"image": example},
            inputs=[TensorSpec("image", Datatype.FP32, (-1, 1, 8, 8), description="0 to 16")],
            outputs=[TensorSpec("probabilities", Datatype.FP32, (-1, 10))],
            batching=Batching(max_rows=256),
            tolerance=Tolerance(rule="close", absolute=1e-4, relative=1e-3),
            metadata=metadata,
        )
    for warning in result.warnings:
        print(f"warning: {warning}")
    return result.version


if __name__ == "__main__":
    main()
