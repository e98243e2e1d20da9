"""What a user can choose about a training run. Checked here, before any compute is spent."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from pydantic import JsonValue

from chorus.population.corpus import STDLIB
from chorus.population.errors import ChorusError

# What vLLM's CPU attention serves; its CUDA backends serve these too.
_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
STDLIB_BYTES = 360_000
VOCAB_SIZE = 2_048
_DISTIL_AFTER = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run. Two runs with equal settings on one machine give the same weights."""

    corpus: str
    """File, folder, dataset name or `stdlib`."""
    split_on: str | None = None
    """Regular expression of the lines that begin a document."""
    text_field: str = "text"
    """Field of a JSON or Parquet row, or column of a dataset, that holds the text."""
    max_bytes: int | None = None
    """Size of the seeded sample of the corpus in bytes of UTF-8; None for all of it."""
    tokenizer: str | None = None
    """Directory or file of a given tokenizer; None to train one."""
    vocab_size: int | None = None
    """Size of the tokenizer to train; by default 2,048, or what a given one has."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context_length: int = 256
    """Longest sequence, in tokens."""

    trajectories: int = 2
    cycles: int = 5
    """Members per trajectory."""
    epochs_per_cycle: int = 4
    burn_in: int = 0
    """Epochs that the first cycle has beyond those of the others."""
    batch_tokens: int = 1024
    """Peak batch size in tokens."""
    micro_batch_tokens: int | None = None
    """Tokens whose activations are held at once, gradients adding up; by default what suits the hardware."""
    optimiser: Literal["muon", "adamw"] = "muon"
    lr: float = 0.015
    """Peak learning rate."""
    weight_decay: float = 0.3
    """Peak decoupled weight decay."""
    weight_decay_floor: float = 0.7
    """Share of that peak at a cycle's start, where the rate is high; 1 for a flat decay."""
    cautious: bool = False
    """Decay an element only where its update pulls it towards zero as well."""
    embedding_rate: float = 1.0
    """Learning rate of embeddings and head, in multiples of `lr`."""
    distil_alpha: float = 0.45
    """Share of the divergence from the teacher; 0 for no distillation."""
    distil_temperature: float = 1.2
    distil_after: int | Literal["saturation"] | None = None
    """Completed cycles before the teacher speaks, by default 1; or `saturation`: when a cycle has gained next to nothing."""
    perturbation: float = 0.05
    """Noise at the first boundary, in units of each tensor's standard deviation."""
    restart: bool = False
    """Every cycle begins from a fresh initialisation: chained independent models, to compare with."""
    compile: bool | None = None
    """Compile the model by `torch.compile`; None for where it pays, see `train.compiling`."""
    vary: dict[str, tuple[float | int | str, ...]] = field(default_factory=dict)
    """By setting, values that trajectories take in turn; the rest is the same for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ChorusError(f"--{_flag(name)} is {getattr(self, name)}; a number above 0 is expected.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= 0:
                raise ChorusError(f"--{_flag(name)} is {value}; 0 or more is expected.")
        for name in ("distil_alpha", "weight_decay_floor"):
            if getattr(self, name) > 1:
                raise ChorusError(f"--{_flag(name)} is {getattr(self, name)}; a share between 0 and 1 is expected.")
        if self.distil_after is not None and self.distil_alpha == 0:
            raise ChorusError(
                f"--distil-after {self.distil_after} contradicts --distil-alpha 0, which means no distillation. Drop one."
            )
        if isinstance(self.distil_after, int) and self.distil_after >= self.cycles:
            raise ChorusError(
                f"--distil-after {self.distil_after} with --cycles {self.cycles} leaves no cycle to distil in. "
                "Lower the one or raise the other; --distil-alpha 0 turns distillation off."
            )
        if self.distil_after == "saturation" and (self.cycles < 3 or self.restart):
            why = (
                "with --restart no cycle goes on from the one before" if self.restart else f"--cycles is {self.cycles}"
            )
            raise ChorusError(
                f"--distil-after saturation needs two cycles to compare and a third to distil in; {why}. "
                "Give a number, or change that."
            )
        if self.burn_in and self.restart:
            raise ChorusError(
                f"--burn-in {self.burn_in} contradicts --restart, under which all cycles are alike. Drop one."
            )
        if self.perturbation > 1:
            raise ChorusError(f"--perturbation is {self.perturbation}; above 1 the noise drowns the weights. Try 0.05.")
        if self.width % self.heads:
            raise ChorusError(f"--width {self.width} cannot be shared by --heads {self.heads}: no remainder must stay.")
        if (size := self.width // self.heads) not in _HEAD_SIZES:
            raise ChorusError(
                f"--width {self.width} with --heads {self.heads} gives heads of size {size}, which the engine cannot serve; "
                f"it serves {', '.join(map(str, _HEAD_SIZES))}. Change one of the two."
            )
        if self.context_length < 16:
            raise ChorusError(f"--context-length is {self.context_length}; at least 16 tokens are expected.")
        if self.tokenizer is None and self.vocab_size is not None and self.vocab_size < 258:
            raise ChorusError(
                f"--vocab-size is {self.vocab_size}; a byte-level tokenizer has at least 258 tokens: "
                "256 bytes and the marks of begin and end."
            )
        if self.batch_tokens < self.context_length:
            raise ChorusError(
                f"--batch-tokens {self.batch_tokens} is less than --context-length {self.context_length}: "
                "a batch holds at least one row. Raise the one or lower the other."
            )

        for name, values in self.vary.items():
            if name not in VARIABLE:
                raise ChorusError(
                    f"--vary {_flag(name)} is not possible; these may differ: {', '.join(map(_flag, VARIABLE))}."
                )
            if not 1 < len(values) <= self.trajectories:
                raise ChorusError(
                    f"--vary {_flag(name)} has {len(values)} value{'s' * (len(values) > 1)} for --trajectories "
                    f"{self.trajectories}; 2 to one for each are expected."
                )
        if self.vary:
            self.of_each()

    def of_trajectory(self, idx: int) -> "Settings":
        """Those of one trajectory, in which nothing varies."""
        return replace(self, vary={}, **{name: values[idx % len(values)] for name, values in self.vary.items()})  # type: ignore[arg-type]

    def of_each(self) -> "list[Settings]":
        """Those of every trajectory."""
        return [self.of_trajectory(idx) for idx in range(self.trajectories)]

    @property
    def epochs(self) -> int:
        """Passes over the train split of one trajectory."""
        return self.burn_in + self.cycles * self.epochs_per_cycle

    @property
    def distils_after(self) -> int | Literal["saturation"] | None:
        """Completed cycles before the teacher speaks; None where it never does."""
        if self.distil_alpha == 0:
            return None
        return _DISTIL_AFTER if self.distil_after is None else self.distil_after

    def as_json(self) -> dict[str, JsonValue]:
        """The settings by name, for the manifest's provenance."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {**values, "vary": {name: list(several) for name, several in self.vary.items()}}


_POSITIVE = (
    "max_bytes", "vocab_size", "layers", "width", "heads", "trajectories", "cycles", "epochs_per_cycle",
    "batch_tokens", "micro_batch_tokens", "lr", "embedding_rate", "distil_temperature",
)  # fmt: skip
_NOT_NEGATIVE = (
    "weight_decay",
    "weight_decay_floor",
    "distil_alpha",
    "distil_after",
    "perturbation",
    "burn_in",
    "seed",
)
VARIABLE = (
    "lr", "weight_decay", "weight_decay_floor", "embedding_rate", "optimiser", "batch_tokens",
    "distil_alpha", "distil_temperature", "distil_after", "perturbation",
)  # fmt: skip
"""What may differ between trajectories: nothing that changes what a member is or when it is finished."""


def default_max_bytes(corpus: str) -> int | None:
    """The embedded corpus is sampled, so that the default run takes minutes; what a user brings is used whole."""
    return STDLIB_BYTES if corpus == STDLIB else None


def _flag(name: str) -> str:
    return name.replace("_", "-")
