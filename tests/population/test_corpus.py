"""Documents out of text, and splits that keep them whole."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population.corpus import Document, read_documents, sample_documents, split_documents
from chorus.population.errors import ChorusError

FRACTIONS = {"train": 0.7, "fitness": 0.1, "selection": 0.1, "test": 0.1}


def test_the_standard_library_is_read_in_the_same_order_without_tests_and_tables() -> None:
    documents = list(read_documents("stdlib"))
    names = [document.name for document in documents]
    assert names == [document.name for document in read_documents("stdlib")]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in names)


def test_a_folder_gives_a_document_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub/b.py").write_text("second")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    assert [(d.name, d.text) for d in read_documents(str(tmp_path))] == [("a.txt", "first"), ("sub/b.py", "second")]


def test_a_file_is_cut_at_its_marks_or_at_a_given_expression(tmp_path: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_text("one<|endoftext|>two<|endoftext|>")
    assert [d.text for d in read_documents(str(marked))] == ["one", "two"]
    articles = tmp_path / "articles.txt"
    articles.write_text(" = One = \n text\n = = Part = = \n more\n = Two = \n text\n")
    cut = [d.text for d in read_documents(str(articles), split_on=r"^ = [^=]+ = $")]
    assert cut == [" = One = \n text\n = = Part = = \n more\n", " = Two = \n text\n"]


def test_one_long_file_becomes_passages_that_together_are_the_file(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {idx}. " + "word " * 200 for idx in range(40)))
    passages = [d.text for d in read_documents(str(book))]
    assert len(passages) > 5
    assert "".join(passages) == book.read_text()


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/nowhere/at/all"])
def test_a_missing_corpus_is_named(source: str) -> None:
    with pytest.raises(ChorusError, match=r"does not exist.*stdlib"):
        list(read_documents(source))


def test_a_dataset_that_cannot_be_loaded_is_a_sentence() -> None:
    with pytest.raises(ChorusError, match="neither a file nor a folder"):
        list(read_documents("nobody/no-such-dataset"))


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ChorusError, match=r"latin\.txt is not UTF-8 \(byte 3\)"):
        list(read_documents(str(tmp_path / "latin.txt")))


def test_an_empty_folder_and_a_broken_expression_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match="empty"):
        list(read_documents(str(tmp_path)))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ChorusError, match="regular expression"):
        list(read_documents(str(tmp_path / "a.txt"), split_on="("))


def test_a_sample_is_seeded_bounded_and_without_duplicates() -> None:
    documents = [Document(name=str(idx), text=f"text {idx % 30} " * 10) for idx in range(60)]
    sampled = sample_documents(iter(documents), max_bytes=1_000, seed=3)
    assert sampled == sample_documents(iter(documents), max_bytes=1_000, seed=3)
    assert sampled != sample_documents(iter(documents), max_bytes=1_000, seed=4)
    assert 800 < sum(len(d.text) for d in sampled) <= 1_000
    assert len({d.text for d in sample_documents(iter(documents), max_bytes=None, seed=0)}) == 30


def test_a_sample_prefers_documents_that_no_split_hangs_on_and_takes_long_ones_where_it_must() -> None:
    long = [Document(name=f"long {idx}", text=f"{idx:400}") for idx in range(10)]
    short = [Document(name=f"short {idx}", text=f"{idx:100}") for idx in range(30)]
    sampled = sample_documents(iter(long + short), max_bytes=4_000, seed=0)
    assert sum(d.name.startswith("short") for d in sampled) == 30
    assert sum(d.name.startswith("long") for d in sampled) == 2


@given(st.lists(st.integers(1, 500), min_size=12, max_size=60))
def test_splits_hold_every_document_once(lengths: list[int]) -> None:
    documents = [Document(name=str(idx), text="x" * length) for idx, length in enumerate(lengths)]
    splits = split_documents(documents, FRACTIONS)
    assert sorted(d.name for held in splits.values() for d in held) == sorted(d.name for d in documents)
    assert all(splits[name] for name in FRACTIONS)


def test_splits_approach_their_shares() -> None:
    documents = [Document(name=str(idx), text="x" * (50 + idx % 37)) for idx in range(500)]
    splits = split_documents(documents, FRACTIONS)
    total = sum(len(d.text) for d in documents)
    for name, fraction in FRACTIONS.items():
        assert sum(len(d.text) for d in splits[name]) / total == pytest.approx(fraction, abs=0.01)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_documents_are_refused(count: int) -> None:
    documents = [Document(name=str(idx), text="text") for idx in range(count)]
    with pytest.raises(ChorusError, match=r"empty|too small"):
        split_documents(documents, FRACTIONS)
