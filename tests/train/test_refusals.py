"""What `chorus train` refuses before it spends any compute: one sentence each, and nothing written."""

import json
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from chorus.population.corpus import Document
from chorus.population.errors import ChorusError
from chorus.train import prepare
from chorus.train import run as runs
from chorus.train.command import _headline, train
from chorus.train.settings import Settings
from tests.worlds import save_tokenizer, some_documents


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Real documents."""
    return some_documents(12)


@pytest.fixture
def corpus(documents: list[Document], tmp_path: Path) -> Path:
    """A folder of twelve documents, one file each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for idx, document in enumerate(documents):
        (folder / f"{idx}.txt").write_text(document.text, encoding="utf-8")
    return folder


def refusal(*arguments: str | Path, out: Path) -> str:
    """The sentence that the command ends with. Nothing may be written."""
    before = sorted(out.rglob("*")) if out.exists() else None
    result = CliRunner().invoke(train, [*map(str, arguments), "--out", str(out)])
    assert isinstance(result.exception, ChorusError), result.output
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cycles", "0"], "--cycles is 0; expected a number above 0"),
        (["--lr", "-1"], "--lr is -1.0; expected a number above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--weight-decay", "-0.1"], "--weight-decay is -0.1; expected 0 or more"),
        (["--distil-alpha", "1.5"], "a fraction between 0 and 1"),
        (["--weight-decay-floor", "1.5"], "--weight-decay-floor is 1.5; expected a fraction between 0 and 1"),
        (["--embedding-rate", "0"], "--embedding-rate is 0.0; expected a number above 0"),
        (["--distil-alpha", "0", "--distil-after", "3"], "--distil-after 3 contradicts --distil-alpha 0"),
        (["--distil-after", "9"], "--distil-after 9 with --cycles 5"),
        (["--distil-after", "saturation", "--cycles", "2"], "--cycles is 2. Use a number"),
        (["--distil-after", "saturation", "--restart"], "with --restart, no cycle continues"),
        (["--distil-after", "saturation", "--distil-alpha", "0"], "contradicts --distil-alpha 0"),
        (["--burn-in", "-1"], "--burn-in is -1; expected 0 or more"),
        (["--burn-in", "2", "--restart"], "--burn-in 2 contradicts --restart"),
        (["--micro-batch-tokens", "0"], "--micro-batch-tokens is 0; expected a number above 0"),
        (["--vary", "lr=0.1,0.2", "--lr", "0.1"], "--lr contradicts --vary lr="),
        (["--vary", "lr=0.1,0.2,0.3"], "--vary lr has 3 values for --trajectories 2"),
        (["--vary", "layers=1,2"], "'layers' cannot differ between trajectories"),
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--epochs", "20", "--cycles", "4"], "--epochs 20 already sets --cycles"),
        (["--perturbation", "3"], "noise would drown"),
        (["--width", "100", "--heads", "3"], "--width 100 is not a multiple of --heads 3"),
        (["--width", "128", "--heads", "8"], "heads of size 16, which the engine cannot serve"),
        (["--vocab-size", "100"], "at least 258 tokens"),
        (["--batch-tokens", "64"], "--batch-tokens 64 is less than --context-length 256"),
        (["--max-bytes", "0"], "--max-bytes is 0"),
        (["--max-bytes", "10"], "fits in --max-bytes 10"),
        (["--tokenizer", "nowhere"], "nowhere does not exist"),
        (["--split-on", "("], "not a regular expression"),
    ],
)
def test_flags_that_cannot_be_meant(arguments: list[str], sentence: str, corpus: Path, tmp_path: Path) -> None:
    assert sentence in refusal(corpus, *arguments, out=tmp_path / "out")


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal("./nowhere.txt", out=tmp_path / "out")


def test_an_unknown_dataset(tmp_path: Path) -> None:
    assert "cannot be loaded" in refusal("nobody/nothing-of-that-name", out=tmp_path / "out")


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "the corpus is empty" in refusal(tmp_path / "empty.txt", out=tmp_path / "out")


def test_a_corpus_with_fewer_documents_than_splits(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one short document\n")
    assert "too small for its splits" in refusal(tmp_path / "short.txt", out=tmp_path / "out")


def test_a_corpus_smaller_than_a_batch(corpus: Path, tmp_path: Path) -> None:
    sentence = refusal(corpus, "--batch-tokens", "1000000", "--vocab-size", "300", out=tmp_path / "out")
    assert "does not fill one batch of 999,937" in sentence


def test_text_that_is_not_utf8(corpus: Path, tmp_path: Path) -> None:
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "is not UTF-8 (byte 3)" in refusal(corpus / "latin.txt", out=tmp_path / "out")


def test_a_vocabulary_larger_than_the_corpus_yields(corpus: Path, tmp_path: Path) -> None:
    assert "Lower --vocab-size to" in refusal(corpus, "--vocab-size", "50000", out=tmp_path / "out")


def test_a_size_for_a_tokenizer_that_is_given(corpus: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "given", vocab_size=300)
    sentence = refusal(corpus, "--tokenizer", tmp_path / "given", "--vocab-size", "400", out=tmp_path / "out")
    assert "has 300 tokens, not --vocab-size 400" in sentence


def test_a_tokenizer_whose_numbers_have_gaps(corpus: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "given", vocab_size=300)
    path = tmp_path / "given" / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 5_000
    path.write_text(json.dumps(content))
    assert "has 300 tokens but ids up to 5,000" in refusal(
        corpus, "--tokenizer", tmp_path / "given", out=tmp_path / "out"
    )


def test_a_directory_that_holds_something_else(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "contains something else" in refusal(corpus, out=tmp_path / "out")
    assert "is a file" in refusal(corpus, out=tmp_path / "out" / "thesis.txt")


def test_what_a_kill_left_of_a_record_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / ".run.json.a1b2.json").write_text("{")
    settings = Settings(corpus="stdlib")
    assert not runs.check_out(tmp_path, settings)
    (tmp_path / "training" / "notes.txt").write_text("precious")
    with pytest.raises(ChorusError, match="contains something else"):
        runs.check_out(tmp_path, settings)


def test_tokens_without_their_tokenizer_or_with_another(tmp_path: Path, corpus: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "given", vocab_size=300)
    encoded = np.concatenate([tokenizer.encode_document(path.read_text()) for path in sorted(corpus.iterdir())])
    np.save(tmp_path / "tokens.npy", encoded.astype(np.uint16))
    out, given = tmp_path / "out", ("--tokenizer", tmp_path / "given")
    assert "Set --tokenizer to the tokenizer that made them" in refusal(tmp_path / "tokens.npy", out=out)
    np.save(tmp_path / "large.npy", np.asarray([5, 400, 1, 7]))
    assert "contains the token 400; the tokenizer has 300" in refusal(tmp_path / "large.npy", *given, out=out)
    np.save(tmp_path / "flat.npy", np.full(1000, 5))
    assert "contains no marker between documents" in refusal(tmp_path / "flat.npy", *given, out=out)
    np.save(tmp_path / "square.npy", np.zeros((4, 4)))
    assert "contains float64 of shape (4, 4)" in refusal(tmp_path / "square.npy", *given, out=out)
    (tmp_path / "words.bin").write_bytes(b"odd")
    assert "cannot be read as tokens" in refusal(tmp_path / "words.bin", *given, out=out)
    np.save(corpus / "tokens.npy", encoded)
    assert "and other files (0.txt)" in refusal(corpus, *given, out=out)


def test_compiling_without_a_compiler(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--compile needs a C++ compiler" in refusal(corpus, "--compile", out=tmp_path / "out")


def test_a_disk_without_room(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    assert "0.00 GB free; this run needs" in refusal(corpus, "--vocab-size", "300", out=tmp_path / "out")


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_where_it_is_not_installed(corpus: Path, tmp_path: Path) -> None:
    assert "pip install tensorboard" in refusal(corpus, "--tensorboard", out=tmp_path / "out")


def test_no_directory_named(corpus: Path) -> None:
    result = CliRunner().invoke(train, [str(corpus)])
    assert result.exit_code == 2
    assert "--out is missing" in result.output


def test_a_picture_without_a_plan(corpus: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        train, [str(corpus), "--out", str(tmp_path / "o"), "--plan-picture", str(tmp_path / "p")]
    )
    assert result.exit_code == 2
    assert "Add --plan" in result.output


def test_documents_without_text_stay_out_and_are_counted(corpus: Path, tmp_path: Path) -> None:
    (corpus / "12.txt").write_text(" \n")
    (corpus / "13.txt").write_text("")
    settings = Settings(
        corpus=str(corpus), vocab_size=300, layers=1, width=32, heads=1, context_length=32, batch_tokens=64
    )
    run = prepare.prepare(settings, tmp_path / "out")
    assert run.prepared.empty_documents == 2
    assert sum(run.prepared.documents.values()) == 12
    assert "Skipped 2 documents without text" in _headline(run)


def test_the_plan_shows_schedule_and_cost_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        train,
        [
            str(corpus), "--plan", "--vocab-size", "300", "--width", "32", "--heads", "1", "--batch-tokens", "512",
            "--plan-picture", str(tmp_path / "plan.png"), "--vary", "lr=0.01,0.02",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "trajectory 0: lr 0.01" in result.output
    assert result.output.count("epochs 0 ") == 2, "each is drawn"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] in (["corpus", "plan.png"], ["plan.png", "corpus"])
    assert "previous" in result.output
    assert "TFLOP" in result.output
    assert " min, " in result.output
