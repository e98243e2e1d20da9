"""Documents out of text, and splits that keep them whole."""

import gzip
import os
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population.corpus import Document, read_all_documents, read_documents, sample_documents, split_documents
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


PTB = "".join(f" sentence {idx} of the <unk> treebank with N words \n" for idx in range(4_000))


@pytest.mark.parametrize("split", ["file", "folder"])
def test_a_corpus_without_blank_lines_can_be_split(split: str, tmp_path: Path) -> None:
    for name in ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"):
        (tmp_path / name).write_text(f"{name}\n{PTB}")
    (tmp_path / "README").write_bytes(bytes(range(256)))
    source = tmp_path if split == "folder" else tmp_path / "ptb.train.txt"
    documents = sample_documents(read_documents(str(source)), max_bytes=100_000, seed=0)
    assert all(split_documents(documents, FRACTIONS).values())
    assert all(document.text.endswith("\n") for document in documents)


def test_short_files_of_a_folder_stay_whole(tmp_path: Path) -> None:
    for idx in range(3):
        (tmp_path / f"{idx}.txt").write_text(f"{idx}\n" + "word \n\n" * 1_500)
    assert [d.name for d in read_documents(str(tmp_path))] == ["0.txt", "1.txt", "2.txt"]


def test_many_files_of_a_folder_stay_whole(tmp_path: Path) -> None:
    for idx in range(20):
        (tmp_path / f"{idx}.txt").write_text(f"{idx}\n{PTB[:40_000]}")
    assert len(list(read_documents(str(tmp_path)))) == 20


def test_what_cannot_be_read_is_named_and_the_rest_of_the_folder_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a b.txt").write_text("text")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("more")
    (tmp_path / "README").write_bytes(b"\x7fELF\0")
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "late.txt").write_bytes(b"a" * 3_000_000 + b"\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text")[:-4])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "empty.txt").touch()
    assert [d.text for d in read_documents(str(tmp_path))] == ["text", "more"]
    for named in (
        "README is binary",
        "wide.txt is UTF-16",
        "late.txt is not UTF-8 (byte 3000000)",
        "cut.txt.gz cannot be read",
    ):
        assert named in caplog.text
    assert "files of other types: 1 broken link or special file, 1 .png" in caplog.text
    assert "skipped 1 document without text" in caplog.text


def test_a_folder_of_nothing_but_binaries_is_refused_with_the_reason(tmp_path: Path) -> None:
    for idx in range(9):
        (tmp_path / f"{idx}.txt").write_bytes(b"\0")
    with pytest.raises(ChorusError, match=r"no readable text.*0\.txt is binary"):
        list(read_documents(str(tmp_path)))


def test_many_unreadable_files_are_named_in_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for idx in range(9):
        (tmp_path / f"{idx}.txt").write_bytes(b"\0")
    (tmp_path / "text.md").write_text("text")
    assert len(list(read_documents(str(tmp_path)))) == 1
    assert "and 4 more" in caplog.text
    assert len(caplog.records) == 1


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "a" / "corpus"
    (root / "inner").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (tmp_path / "private.txt").write_text("above the corpus")
    (outside / "deep" / "linked.txt").write_text("linked")
    (root / "inner" / "own.txt").write_text("own")
    (root / "inner" / "up").symlink_to("..")
    (root / "inner" / "above").symlink_to(tmp_path)
    (root / "one").symlink_to(outside)
    (root / "two").symlink_to(outside)
    (outside / "back").symlink_to(root)
    assert [(d.name, d.text) for d in read_documents(str(root))] == [
        ("inner/own.txt", "own"),
        ("one/deep/linked.txt", "linked"),
    ]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.json.gz", "does not exist"),
        ("some words", "does not exist"),
        ("data/raw/news", "does not exist"),
        ("x" * 300, "File name too long"),
        ("/dev/null", "neither a file nor a folder"),
        (os.fsdecode(b"caf\xe9"), "is not UTF-8. Rename it"),
    ],
)
def test_what_can_be_no_dataset_is_not_looked_for_on_the_hub(source: str, sentence: str) -> None:
    with pytest.raises(ChorusError, match=sentence):
        list(read_documents(source))


def test_a_name_is_tried_aloud_and_an_unreachable_hub_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str] = []

    def unreachable(self: huggingface_hub.HfApi, name: str, **_: object) -> None:
        tried.append(name)
        assert "trying the Hugging Face dataset" in caplog.text  # before anything is waited for
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("retries for half a minute"))
    with pytest.raises(ChorusError, match="cannot be loaded: Name or service not known"):
        list(read_documents("nobody/no-such-dataset:config"))
    assert tried == ["nobody/no-such-dataset"]


def test_rows_of_a_dataset_are_documents_and_nulls_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    held = datasets.Dataset.from_dict({"text": ["one", None, "three"], "chat": [["a"], ["b"], None]})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held.to_iterable_dataset())
    assert [d.text for d in read_all_documents("some/name")] == ["one", "", "three"]
    with pytest.raises(ChorusError, match="dataset some/name, row 1: no text in the field 'chat'; it contains list"):
        list(read_documents("some/name", text_field="chat"))
    with pytest.raises(ChorusError, match="no text in the field 'body'; it has text, chat"):
        list(read_documents("some/name", text_field="body"))
