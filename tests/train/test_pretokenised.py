"""Corpora that are tokens already."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from chorus.population.tokens import TextTokenizer
from chorus.train import pretokenised
from chorus.train.data import TrainTokens
from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from tests.worlds import save_tokenizer, some_documents

FRACTIONS = {"train": 0.7, "fitness": 0.1, "selection": 0.1, "test": 0.1}
Tokens = NDArray[np.uint16]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return save_tokenizer(tmp_path / "tokenizer", vocab_size=300)


@pytest.fixture
def documents(tokenizer: TextTokenizer) -> list[list[int]]:
    """Real documents between their marks, tokens 0 and 1."""
    return [tokenizer.encode_document(document.text) for document in some_documents(30)]


def prepared(corpus: Path, out: Path) -> Run:
    settings = Settings(
        corpus=str(corpus), tokenizer=str(corpus.parent / "tokenizer"), layers=1, width=32, heads=1, context_length=32,
        batch_tokens=512,
    )  # fmt: skip
    return prepare(settings, out)


def all_documents(run: Run) -> list[list[int]]:
    data = TrainTokens(run.directory / "training")
    return [list(data.tokens[a:b]) for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]


def as_npy(path: Path, tokens: Tokens) -> Path:
    np.save(path.with_suffix(".npy"), tokens.astype(np.int64))
    return path.with_suffix(".npy")


def as_bin(path: Path, tokens: Tokens) -> Path:
    path.with_suffix(".bin").write_bytes(tokens.tobytes())
    return path.with_suffix(".bin")


def as_bin_with_a_header(path: Path, tokens: Tokens) -> Path:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.with_suffix(".bin").write_bytes(header.tobytes() + tokens.tobytes())
    return path.with_suffix(".bin")


def as_folder(path: Path, tokens: Tokens) -> Path:
    path.mkdir()
    middle = int(np.flatnonzero(tokens == 1)[12]) + 1  # between two documents
    as_bin(path / "a", tokens[:middle])
    as_npy(path / "b", tokens[middle:])
    return path


@pytest.mark.parametrize("write", [as_npy, as_bin, as_bin_with_a_header, as_folder])
@pytest.mark.parametrize("marks", ["both", "behind"])
def test_documents_are_those_of_the_text_whatever_holds_and_parts_them(
    write: Callable[[Path, Tokens], Path],
    marks: str,
    documents: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretokenised, "_CHUNK_TOKENS", 1_000)  # documents lie across what is looked at
    written = documents if marks == "both" else [document[1:] for document in documents]
    stream = np.concatenate([*written, written[0]]).astype(np.uint16)  # one copy: to be dropped
    run = prepared(write(tmp_path / "tokens", stream), tmp_path / "out")
    assert sum(run.prepared.documents.values()) == 30
    assert sum(run.prepared.tokens.values()) == sum(map(len, documents))
    train = all_documents(run)
    assert all(document in documents for document in train)
    assert train != sorted(train, key=documents.index), "the order is seeded"
    assert run.prepared.tokens["train"] == sum(map(len, train))


def test_a_last_document_without_a_mark_and_marks_without_a_document(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.asarray([1, 1, 7, 8, 1, 0, 0, 9, 1, 0, 10, 11, 12]))
    found = pretokenised._document_spans(tmp_path / "t.npy", np.load(tmp_path / "t.npy"), tokenizer)
    assert list(found) == [(2, 4), (7, 8), (10, 13)]
    assert list(tokenizer.add_markers(np.asarray([7, 8]))) == [0, 7, 8, 1]


def test_memory_does_not_grow_with_the_tokens(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.train.corpus.HELD_OUT_CHARACTERS", 40_000)
    monkeypatch.setattr(pretokenised, "_CHUNK_TOKENS", 1 << 14)
    tokens = np.random.default_rng(0).integers(2, 300, size=4_000_000, dtype=np.uint16)
    tokens[9_999::10_000] = 1
    path = as_bin(tmp_path / "large", tokens)
    del tokens
    tracemalloc.start()
    try:
        found = pretokenised.tokenised([path], tokenizer, max_bytes=None, seed=0, fractions=FRACTIONS)
        found.save_train(tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.counts()["train"] > 3_500_000
    assert peak < path.stat().st_size / 4
