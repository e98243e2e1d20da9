"""Tokens of documents, and the windows on which held-out losses are defined."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population.errors import ChorusError
from chorus.population.tokens import TextTokenizer, TokenSplit


def test_a_document_stands_between_its_marks(tiny_population: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_population)
    ids = tokenizer.encode_document("import os\n")
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.vocab_size == 512


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(2, 16))
def test_windows_score_every_token_but_a_documents_first_once(lengths: list[int], length: int) -> None:
    split = TokenSplit.from_documents([list(range(count)) for count in lengths])
    scored = []
    for idx, start, stop in split.windows(length):
        assert 2 <= stop - start <= length
        assert split.offsets[idx] <= start < stop <= split.offsets[idx + 1]
        scored += range(start + 1, stop)
    firsts = set(split.offsets[:-1].tolist())
    assert scored == [position for position in range(len(split.tokens)) if position not in firsts]


def test_a_split_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    split = TokenSplit.from_documents([[5, 6, 7], [8], [9, 10]])
    split.save(tmp_path / "split.npz")
    again = TokenSplit.load(tmp_path / "split.npz")
    assert np.array_equal(again.tokens, split.tokens)
    assert [again.document(idx).tolist() for idx in range(3)] == [[5, 6, 7], [8], [9, 10]]


def test_a_missing_or_damaged_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match="--corpus"):
        TokenSplit.load(tmp_path / "no.npz")
    (tmp_path / "bad.npz").write_bytes(b"not numpy")
    with pytest.raises(ChorusError, match="not a split"):
        TokenSplit.load(tmp_path / "bad.npz")
