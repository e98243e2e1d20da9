"""From a corpus to a prepared run: documents, splits, tokenizer, tokens. All checks come before the first file is written."""

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
from chorus.train.corpus import Corpus, Dealt, Tokenised
from chorus.train.run import Prepared, Run
from chorus.train.schedule import batch_rows
from chorus.train.settings import VOCAB_SIZE, Settings
from chorus.train.shape import Shape
from chorus.train.tokenizer import given_tokenizer, train_tokenizer

_FRACTIONS = {"train": 0.76, "fitness": 0.08, "selection": 0.06, "test": 0.10}
# The embedded corpus is sampled for a short run, and there is far more of it: text to judge by costs nothing there.
_STDLIB_FRACTIONS = {"train": 0.50, "fitness": 0.18, "selection": 0.12, "test": 0.20}
_SPARE_BYTES = 64 << 20


def prepare(settings: Settings, directory: Path) -> Run:
    """Make `directory` a prepared run, or find that it is one.

    Raises:
        ChorusError: the corpus or tokenizer cannot be used, or the directory holds something else, or the disk is too full.
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
        for leftover in (directory / "training").glob(
            ".train-*"
        ):  # of a killed preparation, and as large as the corpus
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
    """The corpus as tokens in splits, and the tokenizer, whose files go to `directory`.

    Raises:
        ChorusError: the corpus cannot be read or is too small, or the tokenizer cannot be used.
    """
    if files := pretokenised.token_files(settings.corpus):
        if settings.tokenizer is None:
            raise ChorusError(
                f"corpus {settings.corpus!r} holds tokens ({files[0].name}); name the tokenizer that made them with --tokenizer."
            )
        tokenizer = make_tokenizer(settings, None, directory)
        yield (
            tokenizer,
            pretokenised.tokenised(
                files, tokenizer, max_bytes=settings.max_bytes, seed=settings.seed, fractions=_FRACTIONS
            ),
        )
        return
    dealt = deal_corpus(settings)
    tokenizer = make_tokenizer(settings, dealt, directory)
    with dealt.tokenise(tokenizer) as tokens:
        yield tokenizer, tokens


def deal_corpus(settings: Settings) -> Dealt:
    """The seeded sample of the corpus, dealt to the splits by whole documents.

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
    return Dealt.deal(
        corpus, max_bytes=settings.max_bytes, seed=settings.seed, fractions=fractions, source=settings.corpus
    )


def make_tokenizer(settings: Settings, dealt: Dealt | None, directory: Path) -> TextTokenizer:
    """The tokenizer that the settings ask for, its files in `directory`; without text it must be a given one."""
    if settings.tokenizer is not None:
        tokenizer = given_tokenizer(Path(settings.tokenizer), directory)
        if settings.vocab_size not in (None, tokenizer.vocab_size):
            raise ChorusError(
                f"--tokenizer {settings.tokenizer} has {tokenizer.vocab_size} tokens, not --vocab-size "
                f"{settings.vocab_size}. Drop --vocab-size: it is for a tokenizer to be trained."
            )
        return tokenizer
    assert dealt is not None
    vocab_size = settings.vocab_size or VOCAB_SIZE
    return train_tokenizer(dealt.texts("train"), vocab_size, directory, context_length=settings.context_length)


def check_fits_a_batch(settings: Settings, train_tokens: int) -> None:
    """Refuse a train split that does not fill one batch."""
    largest = max(own.batch_tokens for own in settings.of_each())
    needed = batch_rows(largest, settings.context_length) * settings.context_length + 1
    if train_tokens < needed:
        raise ChorusError(
            f"the train split has {train_tokens:,} tokens and does not fill one batch of {needed:,}: the corpus is too "
            "small. Give more text, or lower --batch-tokens (and --context-length)."
        )


def check_disk(settings: Settings, shape: Shape, train_tokens: int, directory: Path) -> None:
    """Refuse a disk without room for all members, the checkpoints of every trajectory and the tokens."""
    needed = disk_bytes(settings, shape, train_tokens) + _SPARE_BYTES
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ChorusError(
            f"--out {directory} lies on a disk with {free / 1e9:.2f} GB free; this run needs {needed / 1e9:.2f} GB. "
            "Free some space, choose another --out, or train fewer or smaller members."
        )


def disk_bytes(settings: Settings, shape: Shape, train_tokens: int) -> int:
    """What a run writes at most: members in bf16, three checkpoints per trajectory while one is written, tokens."""
    members = settings.trajectories * settings.cycles * shape.num_parameters * 2
    checkpoints = settings.trajectories * 3 * shape.num_parameters * 12
    return members + checkpoints + 5 * train_tokens
