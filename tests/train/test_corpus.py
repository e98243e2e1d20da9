"""A corpus on its way to tokens: the same whether it is held or read again, and in bounded memory."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chorus.population.corpus import Document, read_documents
from chorus.population.errors import ChorusError
from chorus.train import corpus as module
from chorus.train.corpus import Corpus, SplitCorpus, capped
from chorus.train.data import TrainTokens
from chorus.train.prepare import prepare
from chorus.train.settings import Settings
from tests.worlds import save_tokenizer, some_documents

FRACTIONS = {"train": 0.7, "fitness": 0.1, "selection": 0.1, "test": 0.1}


def deal(corpus: Corpus) -> SplitCorpus:
    return SplitCorpus.sample(corpus, max_bytes=None, seed=1, fractions=FRACTIONS, source="tests")


def test_tokens_are_those_of_each_document_in_the_order_dealt_whether_held_or_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = some_documents(30)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    reads: list[int] = []

    def read() -> Iterator[Document]:
        reads.append(1)
        return iter([*documents, documents[0]])  # one copy: to be dropped

    found = []
    for held_bytes, expected_reads in ((1 << 20, 1), (1_000, 3)):
        monkeypatch.setattr(module, "_MAX_CACHED_BYTES", held_bytes)
        reads.clear()
        dealt = deal(Corpus(read))
        assert "".join(dealt.texts("train")).startswith(documents[min(o.idx for o in dealt.splits["train"])].text)
        with dealt.tokenise(tokenizer) as tokens:
            tokens.save_train(tmp_path / str(held_bytes))
            assert sum(tokens.documents().values()) == 30
            test = tokens.heldout("test")
        assert len(reads) == expected_reads
        saved = TrainTokens(tmp_path / str(held_bytes))
        expected = [tokenizer.encode_document(documents[outline.idx].text) for outline in dealt.splits["train"]]
        assert [list(saved.tokens[a:b]) for a, b in zip(saved.offsets[:-1], saved.offsets[1:], strict=True)] == expected
        first = documents[dealt.splits["test"][0].idx]
        assert list(test.document(0)) == tokenizer.encode_document(first.text)
        found.append(np.array(saved.tokens))
    assert np.array_equal(*found)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    words = random.Random(0).choices(["some", "words", "again", "and", "more", "text"], k=1_000)
    with (tmp_path / "large.jsonl").open("w") as file:
        for idx in range(400):
            file.write(json.dumps({"text": f"{idx} " + " ".join(words)}) + "\n")
    size = (tmp_path / "large.jsonl").stat().st_size
    assert size > 1_500_000
    monkeypatch.setattr(module, "_MAX_CACHED_BYTES", 50_000)
    monkeypatch.setattr(module, "HELD_OUT_CHARACTERS", 10_000)
    tracemalloc.start()
    try:
        dealt = deal(Corpus(lambda: read_documents(str(tmp_path / "large.jsonl"))))
        with dealt.tokenise(tokenizer) as tokens:
            tokens.save_train(tmp_path / "out")
            num_tokens = tokens.counts()["train"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(TrainTokens(tmp_path / "out").tokens) == num_tokens > 300_000
    assert peak < size / 2


def test_held_out_splits_of_a_large_corpus_stop_at_the_cap() -> None:
    assert capped(FRACTIONS, 1_000_000) == FRACTIONS
    shares = capped(FRACTIONS, 10 * module.HELD_OUT_CHARACTERS * 100)
    assert shares["test"] == pytest.approx(0.001)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CACHED_BYTES", 0)
    documents = some_documents(8)
    reads: list[int] = []

    def read() -> Iterator[Document]:
        reads.append(1)
        return (Document(name=d.name, text=d.text + "x" * len(reads)) for d in documents)

    with pytest.raises(ChorusError, match="changed while the corpus was read"):
        deal(Corpus(read)).tokenise(save_tokenizer(tmp_path, vocab_size=300))


def test_rows_and_files_of_the_same_texts_make_the_same_run(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    texts = [document.text for document in some_documents(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))
    parquet.write_table(table({"body": texts, "n": [1] * len(texts)}), tmp_path / "rows.parquet")
    tokens = []
    for name in ("rows.jsonl", "rows.parquet"):
        settings = Settings(
            corpus=str(tmp_path / name), text_field="body", vocab_size=300, layers=1, width=32, heads=1,
            context_length=32, batch_tokens=512,
        )  # fmt: skip
        prepare(settings, tmp_path / f"{name}.out")
        tokens.append(np.array(TrainTokens(tmp_path / f"{name}.out" / "training").tokens))
    assert np.array_equal(*tokens)
