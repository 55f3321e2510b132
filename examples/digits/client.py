"""Shows a few handwritten digits and what a running fleet takes them for.

python examples/digits/client.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tritonclient.http
from sklearn.datasets import load_digits
from tritonclient.utils import InferenceServerException

SHADES = " .:-=+*#@"
LARGEST_PIXEL = 16
EXAMPLES = (5, 11, 14, 17, 18)
"""Of the digits that train.py holds out: the network has not seen them."""

Images = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP address of the fleet")
    parser.add_argument("--model", default="digits")
    arguments = parser.parse_args()

    digits = load_digits()
    images = digits.images[list(EXAMPLES)].astype(np.float32)
    try:
        probabilities = ask(arguments.url, arguments.model, images)
    except (InferenceServerException, OSError) as error:
        sys.exit(f"{error}\nIs a fleet up at {arguments.url} that serves {arguments.model!r}?")
    print(draw_side_by_side(images))
    print(join_columns([f"is {digits.target[index]}" for index in EXAMPLES]))
    print(
        join_columns(
            [f"got {row.argmax()}, {row.max():.0%}" for row in probabilities],
        )
    )


def ask(url: str, model: str, images: Images) -> npt.NDArray[np.float32]:
    """The fleet's answer.

    Shapes:
        images: `[rows, 8, 8]`.
        Returns: `[rows, 10]`.
    """
    pixels = images[:, np.newaxis]
    tensor = tritonclient.http.InferInput("image", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    address = url.removeprefix("http://").rstrip("/")
    with tritonclient.http.InferenceServerClient(address) as client:
        return np.asarray(client.infer(model, [tensor]).as_numpy("probabilities"))


def draw_side_by_side(images: Images) -> str:
    """The images as text, two characters a pixel."""
    levels = np.rint(images / LARGEST_PIXEL * (len(SHADES) - 1)).astype(int)
    return "\n".join(
        join_columns(["".join(SHADES[level] * 2 for level in row) for row in rows])
        for rows in levels.transpose(1, 0, 2)
    )


def join_columns(texts: Sequence[str]) -> str:
    """Texts as wide as an image, side by side."""
    return "  ".join(f"{text:<16}" for text in texts).rstrip()


if __name__ == "__main__":
    main()
