"""Shows how near a few sentences are to each other, by the embeddings of a running fleet.

python examples/minilm/client.py "How late is my flight?" "When will the plane arrive?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tritonclient.http
from tritonclient.utils import InferenceServerException

SENTENCES = (
    "My flight was cancelled because of the snow.",
    "Bad weather kept the plane on the ground.",
    "The recipe needs two eggs and some butter.",
    "Whisk the butter until it is soft.",
    "When does the next train leave?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sentences", nargs="*", help="default: five examples")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP address of the fleet")
    parser.add_argument("--model", default="minilm")
    arguments = parser.parse_args()

    sentences = arguments.sentences or SENTENCES
    try:
        embeddings = embed(arguments.url, arguments.model, sentences)
    except (InferenceServerException, OSError) as error:
        sys.exit(f"{error}\nIs a fleet up at {arguments.url} that serves {arguments.model!r}?")
    print(describe_similarity(sentences, embeddings))


def embed(url: str, model: str, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
    """The fleet's answer.

    Shapes:
        Returns `[sentences, 384]`, each row of length 1.
    """
    text = np.array([sentence.encode() for sentence in sentences], dtype=object)
    tensor = tritonclient.http.InferInput("text", list(text.shape), "BYTES")
    tensor.set_data_from_numpy(text)
    address = url.removeprefix("http://").rstrip("/")
    with tritonclient.http.InferenceServerClient(address) as client:
        return np.asarray(client.infer(model, [tensor]).as_numpy("embedding"))


def describe_similarity(sentences: Sequence[str], embeddings: npt.NDArray[np.float32]) -> str:
    """A table of cosine similarities. The rows have length 1, so a product of rows is one."""
    similarity = embeddings @ embeddings.T
    numbers = "".join(f"{index + 1:>6}" for index in range(len(sentences)))
    lines = [f"{'cosine similarity':<48}{numbers}"]
    for index, sentence in enumerate(sentences):
        values = "".join(f"{value:>6.2f}" for value in similarity[index])
        lines.append(f"{f'{index + 1}. {sentence}':<48.47}{values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
