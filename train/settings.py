"""The settings of a training run, checked before any compute is spent."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from pydantic import JsonValue

from chorus.population.corpus import STDLIB
from chorus.population.errors import ChorusError

# Supported by vLLM's CPU attention and its CUDA backends.
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
    """Regular expression. Each matching line starts a new document."""
    text_field: str = "text"
    """Text field of JSON and Parquet rows, or text column of a dataset."""
    max_bytes: int | None = None
    """Size of the seeded sample of the corpus in bytes of UTF-8; None for all of it."""
    tokenizer: str | None = None
    """Directory or file of an existing tokenizer; None to train one."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer to train, 2,048 if None. With `tokenizer`, it must match."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context_length: int = 256
    """Maximum sequence length, in tokens."""

    trajectories: int = 2
    cycles: int = 5
    """Members per trajectory."""
    epochs_per_cycle: int = 4
    burn_in: int = 0
    """Extra epochs of the first cycle."""
    batch_tokens: int = 1024
    """Peak batch size in tokens."""
    micro_batch_tokens: int | None = None
    """Tokens per forward and backward pass; gradients are accumulated. By default set by the hardware."""
    optimiser: Literal["muon", "adamw"] = "muon"
    lr: float = 0.015
    """Peak learning rate."""
    weight_decay: float = 0.3
    """Peak decoupled weight decay."""
    weight_decay_floor: float = 0.7
    """Fraction of the peak weight decay at the start of a cycle, while the rate is high; 1 for constant decay."""
    cautious: bool = False
    """Decay only elements that the update also moves towards zero."""
    embedding_rate: float = 1.0
    """Learning rate of the embeddings and output head, as a multiple of `lr`."""
    distil_alpha: float = 0.45
    """Weight of the distillation term in the loss; 0 for no distillation."""
    distil_temperature: float = 1.2
    distil_after: int | Literal["saturation"] | None = None
    """Completed cycles before distillation starts, 1 if None; or `saturation`: once a cycle gains next to nothing."""
    perturbation: float = 0.05
    """Noise after the first cycle, in units of each tensor's standard deviation."""
    restart: bool = False
    """Start every cycle from a fresh initialisation. This gives chained independent models, as a baseline."""
    compile: bool | None = None
    """Whether to use `torch.compile`; None if it saves time, see `train.compiling`."""
    vary: dict[str, tuple[float | int | str, ...]] = field(default_factory=dict)
    """Values by setting, assigned to the trajectories in turn. Other settings are the same for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ChorusError(f"--{_flag(name)} is {getattr(self, name)}; expected a number above 0.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= 0:
                raise ChorusError(f"--{_flag(name)} is {value}; expected 0 or more.")
        for name in ("distil_alpha", "weight_decay_floor"):
            if getattr(self, name) > 1:
                raise ChorusError(f"--{_flag(name)} is {getattr(self, name)}; expected a fraction between 0 and 1.")
        if self.distil_after is not None and self.distil_alpha == 0:
            raise ChorusError(
                f"--distil-after {self.distil_after} contradicts --distil-alpha 0, which turns distillation off. Drop one."
            )
        if isinstance(self.distil_after, int) and self.distil_after >= self.cycles:
            raise ChorusError(
                f"--distil-after {self.distil_after} with --cycles {self.cycles} leaves no cycle to distil in. "
                "Lower --distil-after or raise --cycles; --distil-alpha 0 turns distillation off."
            )
        if self.distil_after == "saturation" and (self.cycles < 3 or self.restart):
            reason = (
                "with --restart, no cycle continues the previous one" if self.restart else f"--cycles is {self.cycles}"
            )
            raise ChorusError(
                f"--distil-after saturation needs two cycles to compare and a third to distil in; {reason}. "
                "Use a number, or change that."
            )
        if self.burn_in and self.restart:
            raise ChorusError(
                f"--burn-in {self.burn_in} contradicts --restart, with which all cycles are alike. Drop one."
            )
        if self.perturbation > 1:
            raise ChorusError(
                f"--perturbation is {self.perturbation}; above 1, the noise would drown the weights. Try 0.05."
            )
        if self.width % self.heads:
            raise ChorusError(f"--width {self.width} is not a multiple of --heads {self.heads}. Change one of them.")
        if (size := self.width // self.heads) not in _HEAD_SIZES:
            raise ChorusError(
                f"--width {self.width} with --heads {self.heads} gives heads of size {size}, which the engine cannot serve; "
                f"it serves {', '.join(map(str, _HEAD_SIZES))}. Change one of them."
            )
        if self.context_length < 16:
            raise ChorusError(f"--context-length is {self.context_length}; expected at least 16 tokens.")
        if self.tokenizer is None and self.vocab_size is not None and self.vocab_size < 258:
            raise ChorusError(
                f"--vocab-size is {self.vocab_size}; a byte-level tokenizer has at least 258 tokens: "
                "256 bytes, bos and eos."
            )
        if self.batch_tokens < self.context_length:
            raise ChorusError(
                f"--batch-tokens {self.batch_tokens} is less than --context-length {self.context_length}: "
                "a batch has at least one row. Raise --batch-tokens or lower --context-length."
            )

        for name, values in self.vary.items():
            if name not in VARIABLE:
                raise ChorusError(
                    f"--vary {_flag(name)} is not possible; these settings can vary: {', '.join(map(_flag, VARIABLE))}."
                )
            if not 1 < len(values) <= self.trajectories:
                raise ChorusError(
                    f"--vary {_flag(name)} has {len(values)} value{'s' * (len(values) > 1)} for --trajectories "
                    f"{self.trajectories}; expected at least 2, and at most one per trajectory."
                )
        if self.vary:
            self.of_each()

    def of_trajectory(self, idx: int) -> "Settings":
        """The settings of one trajectory, with an empty `vary`."""
        return replace(self, vary={}, **{name: values[idx % len(values)] for name, values in self.vary.items()})  # type: ignore[arg-type]

    def of_each(self) -> "list[Settings]":
        """The settings of every trajectory."""
        return [self.of_trajectory(idx) for idx in range(self.trajectories)]

    @property
    def epochs(self) -> int:
        """Passes over the train split of one trajectory."""
        return self.burn_in + self.cycles * self.epochs_per_cycle

    @property
    def distils_after(self) -> int | Literal["saturation"] | None:
        """Completed cycles before distillation starts; None if it never does."""
        if self.distil_alpha == 0:
            return None
        return _DISTIL_AFTER if self.distil_after is None else self.distil_after

    def as_json(self) -> dict[str, JsonValue]:
        """The settings by name, for the manifest's provenance."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "vary": {name: list(options) for name, options in self.vary.items()}}


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
"""Settings that may differ between trajectories: none that changes the shape of a member or the epochs of its cycle."""


def default_max_bytes(corpus: str) -> int | None:
    """`stdlib` is sampled, so that the default run takes minutes; other corpora are used whole."""
    return STDLIB_BYTES if corpus == STDLIB else None


def _flag(name: str) -> str:
    return name.replace("_", "-")
