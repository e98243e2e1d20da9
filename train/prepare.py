"""Prepares a run from a corpus: documents, splits, tokenizer, tokens. All checks run before the first file is written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chorus.population.corpus import STDLIB, read_all_documents
from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.tokens import TextTokenizer, split_path
from chorus.train import pretokenised
from chorus.train import run as runs
from chorus.train.corpus import Corpus, SplitCorpus, Tokenised
from chorus.train.run import Prepared, Run
from chorus.train.schedule import batch_rows
from chorus.train.settings import VOCAB_SIZE, Settings
from chorus.train.shape import Shape
from chorus.train.tokenizer import given_tokenizer, train_tokenizer

_FRACTIONS = {"train": 0.76, "fitness": 0.08, "selection": 0.06, "test": 0.10}
# stdlib is sampled for a short run and has far more text than that, so larger held-out splits cost nothing.
_STDLIB_FRACTIONS = {"train": 0.50, "fitness": 0.18, "selection": 0.12, "test": 0.20}
_SPARE_BYTES = 64 << 20


def prepare(settings: Settings, directory: Path) -> Run:
    """Prepare a run in `directory`, unless the same run is already prepared there.

    Raises:
        ChorusError: the corpus or tokenizer is unusable, the directory contains something else, or the disk is too full.
    """
    if runs.check_out(directory, settings):
        return Run.load(directory)
    with (
        tempfile.TemporaryDirectory(prefix="chorus-tokenizer-") as name,
        read_corpus(settings, Path(name)) as (tokenizer, tokens),
    ):
        prepared = Prepared(
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            tokens=tokens.counts(),
            documents=tokens.documents(),
            empty_documents=tokens.num_empty,
        )
        check_fits_a_batch(settings, prepared.tokens["train"])
        check_disk(settings, runs.make_shape(settings, tokenizer.vocab_size), prepared.tokens["train"], directory)

        runs.save(directory, settings, None)
        for leftover in (directory / "training").glob(".train-*"):  # from a killed preparation, as large as the corpus
            leftover.unlink()
        for file in Path(name).iterdir():
            shutil.copyfile(file, directory / file.name)
        tokens.save_train(directory / "training")
        for split in ("fitness", "selection", "test"):
            tokens.heldout(split).save(split_path(directory, split))
    runs.save(directory, settings, prepared)
    return Run.load(directory)


@contextmanager
def read_corpus(settings: Settings, directory: Path) -> Iterator[tuple[TextTokenizer, Tokenised]]:
    """The tokenizer, and the corpus as tokens in splits. The tokenizer's files are written to `directory`.

    Raises:
        ChorusError: the corpus cannot be read or is too small, or the tokenizer is unusable.
    """
    if files := pretokenised.token_files(settings.corpus):
        if settings.tokenizer is None:
            raise ChorusError(
                f"corpus {settings.corpus!r} contains tokens ({files[0].name}). Set --tokenizer to the tokenizer that made them."
            )
        tokenizer = make_tokenizer(settings, None, directory)
        yield (
            tokenizer,
            pretokenised.tokenised(
                files, tokenizer, max_bytes=settings.max_bytes, seed=settings.seed, fractions=_FRACTIONS
            ),
        )
        return
    split_corpus = sample_corpus(settings)
    tokenizer = make_tokenizer(settings, split_corpus, directory)
    with split_corpus.tokenise(tokenizer) as tokens:
        yield tokenizer, tokens


def sample_corpus(settings: Settings) -> SplitCorpus:
    """A seeded sample of the corpus, with whole documents assigned to splits.

    Raises:
        ChorusError: the corpus cannot be read, or is too small.
    """
    notes = Notes()
    corpus = Corpus(
        lambda: read_all_documents(
            settings.corpus, split_on=settings.split_on, text_field=settings.text_field, notes=notes
        )
    )
    fractions = _STDLIB_FRACTIONS if settings.corpus == STDLIB else _FRACTIONS
    return SplitCorpus.sample(
        corpus, max_bytes=settings.max_bytes, seed=settings.seed, fractions=fractions, source=settings.corpus
    )


def make_tokenizer(settings: Settings, split_corpus: SplitCorpus | None, directory: Path) -> TextTokenizer:
    """Train or copy the tokenizer of the settings into `directory`. Without a text corpus, the settings must name one."""
    if settings.tokenizer is not None:
        tokenizer = given_tokenizer(Path(settings.tokenizer), directory)
        if settings.vocab_size not in (None, tokenizer.vocab_size):
            raise ChorusError(
                f"--tokenizer {settings.tokenizer} has {tokenizer.vocab_size} tokens, not --vocab-size "
                f"{settings.vocab_size}. Drop --vocab-size, which is only for training a tokenizer."
            )
        return tokenizer
    assert split_corpus is not None
    vocab_size = settings.vocab_size or VOCAB_SIZE
    return train_tokenizer(split_corpus.texts("train"), vocab_size, directory, context_length=settings.context_length)


def check_fits_a_batch(settings: Settings, train_tokens: int) -> None:
    """Raise ChorusError if the train split does not fill one batch."""
    largest = max(trajectory.batch_tokens for trajectory in settings.of_each())
    needed = batch_rows(largest, settings.context_length) * settings.context_length + 1
    if train_tokens < needed:
        raise ChorusError(
            f"the train split has {train_tokens:,} tokens and does not fill one batch of {needed:,}: the corpus is too "
            "small. Add text, or lower --batch-tokens (and --context-length)."
        )


def check_disk(settings: Settings, shape: Shape, train_tokens: int, directory: Path) -> None:
    """Raise ChorusError if the disk has no room for all members, the checkpoints of every trajectory, and the tokens."""
    needed = disk_bytes(settings, shape, train_tokens) + _SPARE_BYTES
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ChorusError(
            f"--out {directory} is on a disk with {free / 1e9:.2f} GB free; this run needs {needed / 1e9:.2f} GB. "
            "Free some space, choose another --out, or train fewer or smaller members."
        )


def disk_bytes(settings: Settings, shape: Shape, train_tokens: int) -> int:
    """Upper bound of what a run writes: members in bf16, three checkpoints per trajectory (one being written), tokens."""
    members = settings.trajectories * settings.cycles * shape.num_parameters * 2
    checkpoints = settings.trajectories * 3 * shape.num_parameters * 12
    return members + checkpoints + 5 * train_tokens
