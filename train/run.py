"""A run on disk: its settings, its prepared data, and the paths of its files. Every training process reads it.

DIR/training/run.json            settings and, once the corpus is prepared, sizes
DIR/training/train-*.npy         the train split as tokens
DIR/training/t0/                 checkpoints and the log of trajectory 0
DIR/training/likelihoods/*.npy   each member's token probabilities on the selection split
DIR/training/diversity/*.npy     each member's log-probabilities on a sample of it
DIR/training/report.*            the report of the finished run
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.files import write_text
from chorus.train.schedule import Schedule
from chorus.train.settings import Settings
from chorus.train.shape import Shape

_RECORD = "run.json"


class Prepared(BaseModel):
    """Sizes of the prepared corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    bos: int | None
    eos: int | None
    tokens: dict[str, int]
    """Tokens of each split."""
    documents: dict[str, int]
    """Documents of each split."""
    empty_documents: int = 0
    """Skipped documents without text."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    prepared: Prepared | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared run."""

    directory: Path
    settings: Settings
    prepared: Prepared

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a prepared run.

        Raises:
            ChorusError: the directory contains none.
        """
        record = read_record(directory)
        if record is None or record.prepared is None:
            raise ChorusError(f"{directory} contains no prepared training run. Start one with `chorus train`.")
        return cls(directory=directory, settings=record.settings, prepared=record.prepared)

    @property
    def finished(self) -> bool:
        """Whether the last member of every trajectory is in the manifest."""
        last = {member_name(idx, self.settings.cycles - 1) for idx in range(self.settings.trajectories)}
        return last <= finished_members(self.directory)

    @property
    def shape(self) -> Shape:
        """The sizes of a member."""
        return make_shape(self.settings, self.prepared.vocab_size)

    def schedule(self, trajectory: int) -> Schedule:
        """The schedule of a trajectory."""
        return make_schedule(self.settings.of_trajectory(trajectory), self.prepared.tokens["train"])


def member_name(trajectory: int, cycle: int) -> str:
    """`t0-c03`: the snapshot after cycle 3 of trajectory 0."""
    return f"t{trajectory}-c{cycle:02d}"


def finished_members(directory: Path) -> set[str]:
    """Names of the members that are in the manifest."""
    if not (directory / manifest.MANIFEST).exists():
        return set()
    return {member.name for member in manifest.load(directory).members}


def likelihoods_path(run: Run, name: str) -> Path:
    """The file of a member's token probabilities on the selection split."""
    return run.directory / "training" / "likelihoods" / f"{name}.npy"


def diversity_path(run: Run, name: str) -> Path:
    """The file of a member's log-probabilities on a sample of the selection split."""
    return run.directory / "training" / "diversity" / f"{name}.npy"


def make_shape(settings: Settings, vocab_size: int) -> Shape:
    """The sizes of a member with these settings."""
    return Shape(
        vocab_size=vocab_size,
        context_length=settings.context_length,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
    )


def make_schedule(settings: Settings, train_tokens: int) -> Schedule:
    """The schedule of a trajectory with these settings."""
    return Schedule(
        num_cycles=settings.cycles,
        epochs_per_cycle=settings.epochs_per_cycle,
        train_tokens=train_tokens,
        context_length=settings.context_length,
        batch_tokens=settings.batch_tokens,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        perturbation=settings.perturbation,
        distil_after=settings.distils_after,
        weight_decay_floor=settings.weight_decay_floor,
        burn_in=settings.burn_in,
        restarts=settings.restart,
    )


def record_path(directory: Path) -> Path:
    """The file with the record of a training run."""
    return directory / "training" / _RECORD


def read_record(directory: Path) -> _Record | None:
    """Read the record of a run; None if the directory contains no run.

    Raises:
        ChorusError: the file is damaged or from another version.
    """
    path = record_path(directory)
    if not path.exists():
        return None
    try:
        return _Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ChorusError(
            f"{path} is not a valid training run record of this version "
            f"({error.error_count()} problems, first: {error.errors()[0]['msg']}). Train into a new --out."
        ) from None


def save(directory: Path, settings: Settings, prepared: Prepared | None) -> None:
    """Reserve a directory for a run (`prepared` None), or record that its preparation is complete."""
    write_text(record_path(directory), _Record(settings=settings, prepared=prepared).model_dump_json(indent=2) + "\n")


def check_out(directory: Path, settings: Settings) -> bool:
    """Whether the directory contains this run, prepared; False if the run may start there.

    Raises:
        ChorusError: it contains another run or something else.
    """
    if directory.exists() and not directory.is_dir():
        raise ChorusError(f"--out {directory} is a file; expected a directory.")
    record = read_record(directory)
    if record is None:
        # Ignore empty folders, and a record that a killed run left half written under a temporary name.
        if any(path.is_file() and not path.name.startswith(f".{_RECORD}.") for path in directory.rglob("*")):
            raise ChorusError(
                f"--out {directory} exists and contains something else. Choose another --out, or remove it."
            )
        return False
    given, saved = settings.as_json(), record.settings.as_json()
    if differences := [f"{key} {saved[key]} there, {given[key]} here" for key in given if given[key] != saved[key]]:
        raise ChorusError(
            f"--out {directory} contains another run ({'; '.join(differences)}). "
            "Use its settings to continue it, or choose another --out."
        )
    return record.prepared is not None
