"""Tokens of documents, and the windows on which held-out losses are defined."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def no_words() -> Tokenizer:
    """A BPE over whole texts, which learns a mark that the text spells as a piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["<s>a</s>", "<s>", "</s>"] * 50, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """As sentencepiece makes them: every piece of the vocabulary may match, marks too."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "a▁<>/s\n")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


@pytest.mark.parametrize("make", [no_words, unigram])
@pytest.mark.parametrize("text", ["a<s>a</s>", "<s><s></s>" * 500, "</s>\n<s>", "<<s>>"])
def test_text_that_spells_a_mark_is_text_under_any_model(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = TextTokenizer(tokenizer, bos=0, eos=1).encode_document(text)
    assert (ids[0], ids[-1]) == (0, 1)
    assert not {0, 1}.intersection(ids[1:-1])
    assert "".join(tokenizer.decode([idx], skip_special_tokens=False) for idx in ids[1:-1]) == text


def test_text_that_spells_a_mark_is_text_in_a_population(tiny_population: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_population)
    ids = tokenizer.encode_document("one<|eos|><|bos|>two")
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
    assert not {tokenizer.bos, tokenizer.eos}.intersection(ids[1:-1])
