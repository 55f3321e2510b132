"""Text in, sentence embedding out: what goes around the MiniLM network.

Pushed along with the network; a replica runs it where `allow_code: true` is set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rayprism.errors import InvalidInput

Tensors = dict[str, npt.NDArray[Any]]

MAX_TOKENS = 256
"""Source: `sentence_bert_config.json` of all-MiniLM-L6-v2, `max_seq_length`. What comes after is
cut off: the network was not trained on longer texts."""

_SMALLEST_NORM = 1e-12


class SentenceEmbedding:
    """Tokenizes each request; pools each batch.

    Args:
        folder: The version's folder, with `tokenizer.json`.
        options: `max_tokens`, by default 256.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        # A replica has a CPU or less: the tokenizer's own pool has a thread for each of the
        # machine's, and requests of some sentences are too small for it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file says "pad to 128, cut at 128", which would waste most of every short batch.
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(int(options.get("max_tokens", MAX_TOKENS)))

    def preprocess(self, inputs: Tensors) -> Tensors:
        """The network's inputs for one request, padded to its own longest text only.

        Shapes:
            inputs: `text` `[rows]`, objects that are UTF-8 `bytes`.
            Returns: `input_ids`, `attention_mask`, `token_type_ids`, `[rows, length] int64`.
        """
        encodings = self._tokenizer.encode_batch_fast(_texts(inputs["text"]))
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
        }

    def postprocess(self, inputs: Tensors, outputs: Tensors) -> Tensors:
        """The mean over the tokens that are not padding, scaled to length 1.

        Shapes:
            inputs: `attention_mask` `[rows, length] int64`.
            outputs: `last_hidden_state` `[rows, length, 384] float32`.
            Returns: `embedding` `[rows, 384] float32`.

        Source: `modules.json` of all-MiniLM-L6-v2: Transformer, mean Pooling, Normalize. The
        division by the number of tokens is left out, as scaling to length 1 undoes it.
        """
        mask = inputs["attention_mask"].astype(np.float32)
        # A product of matrices sums without a masked copy of the hidden state.
        summed = np.matmul(mask[:, np.newaxis, :], outputs["last_hidden_state"])[:, 0, :]
        norms = np.linalg.norm(summed, axis=1, keepdims=True)
        return {"embedding": summed / np.maximum(norms, _SMALLEST_NORM)}


def _texts(values: npt.NDArray[Any]) -> list[str]:
    texts = []
    for row, value in enumerate(values):
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            raise InvalidInput(f"input 'text': row {row} is not UTF-8 ({error.reason})") from None
    return texts
