"""What a training writes and learns from: its directory, its seeds, the members that it produces, and their teachers."""

from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import JsonValue

from chorus.train import heldout
from chorus.train.run import Run, likelihoods_path, member_name
from chorus.train.schedule import Cycle, saturated


class Lineage(Protocol):
    """The members that a trajectory of training produces, one per cycle."""

    @property
    def directory(self) -> Path:
        """Where its checkpoints and its log lie."""
        ...

    @property
    def seeds(self) -> tuple[int, int]:
        """The seeds of initialisation, document order and noise, besides epoch and cycle."""
        ...

    def member(self, cycle: Cycle) -> str:
        """The name of the member that the cycle produces."""
        ...

    def origin(self, cycle: Cycle) -> dict[str, JsonValue]:
        """The optional manifest fields of that member."""
        ...

    def teachers(self, cycle: Cycle) -> dict[str, float]:
        """The members that teach in the cycle, with weights on the simplex. It depends only on files of finished members, so a
        resumed run finds the same."""
        ...


class Chain:
    """A trajectory of a population: each member may be taught by the one before (chain distillation, q0, 2606.03938)."""

    def __init__(self, run: Run, idx: int) -> None:
        self._run, self._idx = run, idx
        self.directory = run.directory / "training" / f"t{idx}"
        self.seeds = run.settings.seed, idx

    def member(self, cycle: Cycle) -> str:
        """See `Lineage`."""
        return member_name(self._idx, cycle.idx)

    def origin(self, cycle: Cycle) -> dict[str, JsonValue]:
        """See `Lineage`."""
        return {"trajectory": self._idx, "cycle": cycle.idx, "teacher": next(iter(self.teachers(cycle)), None)}

    def teachers(self, cycle: Cycle) -> dict[str, float]:
        """See `Lineage`."""
        return {member_name(self._idx, cycle.idx - 1): 1.0} if self._distils(cycle) else {}

    def _distils(self, cycle: Cycle) -> bool:
        if cycle.distils is not None:
            return cycle.distils
        paths = [likelihoods_path(self._run, member_name(self._idx, earlier)) for earlier in range(cycle.idx)]
        return saturated([heldout.loss(np.load(path)) for path in paths])
