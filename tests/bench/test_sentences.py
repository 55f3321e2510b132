from __future__ import annotations

from bench.sentences import sentences
from bench.yardstick import batches_of


def test_the_same_sentences_every_time() -> None:
    assert sentences(20) == sentences(20)
    assert sentences(5) == sentences(20)[:5]


def test_lengths_are_mixed() -> None:
    lengths = [len(text.split()) for text in sentences(400)]
    assert min(lengths) == 5
    assert max(lengths) == 60


def test_batches_keep_the_order_and_are_whole() -> None:
    assert batches_of([3, 1, 4, 1, 5], 2) == [[3, 1], [4, 1]]
