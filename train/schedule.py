"""The cyclic schedule of q0 as pure functions of the step (arXiv 2606.03938 and its authors' public code; see docs/training.md).

It needs no model or optimiser, so a run can be planned, drawn and tested without them, and a resumed run needs only its step.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEARNING_RATE_FLOOR = 0.08
WEIGHT_DECAY_FLOOR = 0.7
LAST_PERTURBATION = 0.2  # relative to the first: in the record run, 0.25 falls to 0.05
EDGE_BATCH = 0.75
WARMUP = 0.05
SATURATED_GAIN = 0.01
"""A trajectory is saturated once a cycle lowers the loss by less than this, in nats per token."""


def learning_rate_multiplier(step: int, steps: int, *, floor: float = LEARNING_RATE_FLOOR, warmup: int = 0) -> float:
    """m(s) = l + (1 - l)(1 - s / L) for step s of a cycle of L, times a linear warm-up over the first `warmup` steps."""
    linear = floor + (1 - floor) * (1 - step / steps)
    return linear * min(1.0, (step + 1) / (warmup + 1))


def weight_decay_multiplier(
    multiplier: float, *, floor: float = LEARNING_RATE_FLOOR, decay_floor: float = WEIGHT_DECAY_FLOOR
) -> float:
    """f + (1 - f)(1 - m) / (1 - l): low while the rate is high, 1 when the rate is at its floor (or below it, during warm-up)."""
    return decay_floor + (1 - decay_floor) * min(1.0, (1 - multiplier) / (1 - floor))


def batch_multiplier(cycle: int, num_cycles: int, *, edge: float = EDGE_BATCH) -> float:
    """Block-triangular batch size: `edge` of the peak in the first and the last quarter of the cycles."""
    quarter = num_cycles // 4
    return edge if cycle < quarter or cycle >= num_cycles - quarter else 1.0


def perturbation_sigma(boundary: int, num_boundaries: int, *, first: float, last: float | None = None) -> float:
    """Noise after cycle `boundary`, in units of each tensor's standard deviation: a cosine from `first` to `last`."""
    last = first * LAST_PERTURBATION if last is None else last
    progress = boundary / (num_boundaries - 1) if num_boundaries > 1 else 0.0
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def saturated(losses: Sequence[float]) -> bool:
    """Whether any cycle lowered a trajectory's held-out loss (one per cycle) by less than `SATURATED_GAIN`."""
    return any(before - after < SATURATED_GAIN for before, after in itertools.pairwise(losses))


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """One cycle of a trajectory: a constant batch size, and one decay of the learning rate."""

    idx: int
    first_step: int
    """Steps of the trajectory before this cycle."""
    first_epoch: int
    epochs: int
    batch_rows: int
    """Rows of a batch, each of one context length."""
    steps_per_epoch: int
    distils: bool | None
    """Whether this cycle distils from the previous snapshot; None if it does once the trajectory is `saturated`."""
    sigma_after: float | None
    """Perturbation after the cycle; None for none."""

    @property
    def steps(self) -> int:
        """Steps of this cycle."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All of a trajectory's steps."""

    num_cycles: int
    epochs_per_cycle: int
    train_tokens: int
    context_length: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    """Peak of the decoupled decay: each step shrinks weights by learning rate times this."""
    perturbation: float
    distil_after: int | Literal["saturation"] | None
    """Completed cycles before distillation starts; `saturation`: see `saturated`; None for never."""
    weight_decay_floor: float = WEIGHT_DECAY_FLOOR
    """Fraction of the peak weight decay at the start of a cycle; 1 for constant decay."""
    burn_in: int = 0
    """Extra epochs of the first cycle."""
    restarts: bool = False
    """Every cycle starts from a fresh initialisation, with a warm-up, the full batch and no perturbation."""

    def cycles(self) -> list[Cycle]:
        """The cycles in order."""
        cycles: list[Cycle] = []
        for idx in range(self.num_cycles):
            multiplier = 1.0 if self.restarts else batch_multiplier(idx, self.num_cycles)
            rows = batch_rows(self.batch_tokens, self.context_length, multiplier)
            cycles.append(
                Cycle(
                    idx=idx,
                    first_step=cycles[-1].first_step + cycles[-1].steps if cycles else 0,
                    first_epoch=idx * self.epochs_per_cycle + (self.burn_in if idx else 0),
                    epochs=self.epochs_per_cycle + (0 if idx else self.burn_in),
                    batch_rows=rows,
                    # The last token of an epoch is only a target. Tokens that do not fill a batch wait for the next shuffle.
                    steps_per_epoch=(self.train_tokens - 1) // (rows * self.context_length),
                    distils=self._distils(idx),
                    sigma_after=None
                    if self.restarts or idx + 1 == self.num_cycles
                    else perturbation_sigma(idx, self.num_cycles - 1, first=self.perturbation),
                )
            )
        return cycles

    def _distils(self, cycle: int) -> bool | None:
        if self.distil_after is None:
            return False
        if self.distil_after == "saturation":
            return None if cycle > 1 else False
        return cycle >= max(1, self.distil_after)

    def rates(self, cycle: Cycle, step: int) -> tuple[float, float]:
        """Learning rate and weight decay at step `step` of the cycle. There is a warm-up only after an initialisation."""
        warmup = math.ceil(WARMUP * cycle.steps) if cycle.idx == 0 or self.restarts else 0
        multiplier = learning_rate_multiplier(step, cycle.steps, warmup=warmup)
        decay = weight_decay_multiplier(multiplier, decay_floor=self.weight_decay_floor)
        return self.learning_rate * multiplier, self.weight_decay * decay


def batch_rows(batch_tokens: int, context_length: int, multiplier: float = 1.0) -> int:
    """Rows of one context length closest to `batch_tokens` times `multiplier`, at least one."""
    return max(1, round(batch_tokens * multiplier / context_length))
