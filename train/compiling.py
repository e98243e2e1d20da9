"""When `torch.compile` pays. It costs a process its first half minute, and makes every step after that shorter."""

import os
import shutil
import statistics

import torch
from torch import nn

_MEASURED_STEPS = 10
# One H100, members of 97M parameters (bench/LOG.md): a step takes 0.61 of its time, the first compiled steps 33 s more than others.
_SAVED_SHARE = 0.3
_COST_SECONDS = 40.0


class Compilation:
    """Compiles a trajectory's models: from the beginning, never, or from the moment on when there is enough left to do."""

    def __init__(self, wanted: bool | None, device: torch.device) -> None:
        """`wanted`: None leaves it to measured step times, on GPUs. On CPUs it pays little, and a resumed run could not end with
        the same bits.
        """
        self.begun = bool(wanted)
        self._undecided = wanted is None and device.type == "cuda" and has_compiler()
        self._seconds: list[float] = []

    def take(self, *models: nn.Module) -> None:
        """Compile these if it has begun."""
        if self.begun:
            for model in models:
                model.compile()

    def begins(self, seconds: float, steps_left: int) -> bool:
        """Note how long a step took; whether compiling begins now."""
        if not self._undecided:
            return False
        self._seconds.append(seconds)
        if len(self._seconds) < _MEASURED_STEPS:
            return False
        self._undecided = False
        self.begun = statistics.median(self._seconds) * steps_left * _SAVED_SHARE > _COST_SECONDS
        if self.begun:
            torch._dynamo.config.suppress_errors = True  # nobody asked for it: what cannot be compiled runs as it is
        return self.begun


def has_compiler() -> bool:
    """Whether there is the C++ compiler that `torch.compile` needs, on CPUs and GPUs alike."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))
