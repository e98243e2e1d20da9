"""A small setup for experiments: articles of WikiText-2, members of 0.7M parameters, resumable runs.

Whole articles are assigned to the splits in a fixed order. Only the first tokens of each are used, so that many articles need
little compute. Train, fitness and selection come from `valid.txt`, test from `test.txt`. All training uses `train/`.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.tokens import TokenSplit, split_path
from chorus.train import run as runs
from chorus.train.data import TrainTokens
from chorus.train.evaluate import likelihoods
from chorus.train.log import Record
from chorus.train.run import Prepared, Run, member_name
from chorus.train.settings import Settings
from chorus.train.snapshot import load_member
from chorus.train.tokenizer import train_tokenizer
from chorus.train.trajectory import Trajectory
from chorus.train.worker import choose_device

# Articles, and tokens of each: enough articles for a bootstrap, and so little text that a model saturates within minutes.
_SPLITS = {"train": (30, 800), "fitness": (15, 1_200), "selection": (15, 1_200), "test": (62, 768)}
_ARTICLE = re.compile(r"^ = [^=\n]+ = \n", re.MULTILINE)
DEVICE = choose_device(0)

BASE = Settings(
    corpus="wikitext-2", layers=2, width=128, heads=4, context_length=128, vocab_size=1_024,
    batch_tokens=512, lr=0.015, weight_decay=0.3, perturbation=0.05,
)  # fmt: skip


def articles(path: Path) -> list[str]:
    """The articles of one file. Each begins at a line ` = Title = `."""
    text = path.read_text(encoding="utf-8")
    starts = [match.start() for match in _ARTICLE.finditer(text)]
    return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]


def prepared_run(data: Path, directory: Path, **changes: object) -> Run:
    """A run on these splits with the settings of `BASE`, updated by `changes`. Prepares it if necessary."""
    settings = Settings(**{**vars(BASE), **changes})  # type: ignore[arg-type]
    if runs.check_out(directory, settings):
        return Run.load(directory)
    runs.save(directory, settings, None)  # first, so that a killed preparation can be resumed
    texts = _deal(data)
    tokenizer = train_tokenizer(texts["train"], settings.vocab_size or 0, directory, context_length=128)
    splits = {
        split: [tokenizer.encode_document(text)[: _SPLITS[split][1]] for text in texts[split]] for split in _SPLITS
    }
    TrainTokens.save(directory / "training", [len(document) for document in splits["train"]], splits["train"])
    for split in ("fitness", "selection", "test"):
        TokenSplit.from_documents(splits[split]).save(split_path(directory, split))
    prepared = Prepared(
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        tokens={split: sum(map(len, documents)) for split, documents in splits.items()},
        documents={split: len(documents) for split, documents in splits.items()},
    )
    runs.save(directory, settings, prepared)
    return Run.load(directory)


def _deal(data: Path) -> dict[str, list[str]]:
    valid, test = articles(data / "valid.txt"), articles(data / "test.txt")
    order = [valid[idx] for idx in np.random.default_rng(0).permutation(len(valid))]
    texts: dict[str, list[str]] = {"test": test[: _SPLITS["test"][0]]}
    for split in ("train", "fitness", "selection"):
        texts[split], order = order[: _SPLITS[split][0]], order[_SPLITS[split][0] :]
    return texts


def train_run(run: Run) -> None:
    """Train all trajectories of a run, one after the other. Resumes from their checkpoints."""
    for idx in range(run.settings.trajectories):
        Trajectory(run, idx, DEVICE, checkpoint_seconds=120).train(_ignore, lambda: False)


def members(run: Run) -> list[tuple[int, int]]:
    """(trajectory, cycle) of all members, in the order in which parallel trajectories finish them."""
    return [(t, c) for c in range(run.settings.cycles) for t in range(run.settings.trajectories)]


def scores(run: Run, split: str) -> NDArray[np.float32]:
    """p(ground truth) (M, N) of all members of a finished run, in the order of `members`. Cached with the run."""
    rows = []
    for trajectory, cycle in members(run):
        name = member_name(trajectory, cycle)
        path = run.directory / "scores" / split / f"{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens = TokenSplit.load(split_path(run.directory, split))
            np.save(path, likelihoods(load_member(run, name, DEVICE), tokens, DEVICE))
        rows.append(np.load(path))
    return np.stack(rows)


def scored_offsets(run: Run, split: str) -> NDArray[np.int64]:
    """Offsets (D + 1): document d has scored tokens offsets[d] : offsets[d + 1], all of its tokens but the first."""
    split_tokens = TokenSplit.load(split_path(run.directory, split))
    lengths = np.diff(split_tokens.offsets) - 1
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ignore(record: Record) -> None:
    pass
