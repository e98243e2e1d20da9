"""Decides when to use `torch.compile`, which costs each process about half a minute and then shortens every step."""

import os
import shutil
import statistics

import torch
from torch import nn

_MEASURED_STEPS = 10
# On one H100 with members of 97M parameters (bench/LOG.md), compiling shortens a step to 0.61 of its time; the first compiled steps
# take 33 s longer. Both constants are on the safe side.
_MIN_SAVED_SHARE = 0.3
_MAX_COMPILE_SECONDS = 40.0


class Compilation:
    """Compiles a trajectory's models: from the start, never, or once the measured step time shows that it saves time."""

    def __init__(self, requested: bool | None, device: torch.device) -> None:
        """`requested`: None decides by measured step times, on GPUs only. On CPUs compiling saves little, and a resumed run could
        not end with the same bits.
        """
        self.started = bool(requested)
        self._undecided = requested is None and device.type == "cuda" and has_compiler()
        self._seconds: list[float] = []

    def apply(self, *models: nn.Module) -> None:
        """Compile these models if compiling has started."""
        if self.started:
            for model in models:
                model.compile()

    def should_start(self, seconds: float, steps_left: int) -> bool:
        """Record the seconds of one step; True if compiling starts now."""
        if not self._undecided:
            return False
        self._seconds.append(seconds)
        if len(self._seconds) < _MEASURED_STEPS:
            return False
        self._undecided = False
        self.started = statistics.median(self._seconds) * steps_left * _MIN_SAVED_SHARE > _MAX_COMPILE_SECONDS
        if self.started:
            torch._dynamo.config.suppress_errors = (
                True  # compiling was not requested: fall back to eager mode on errors
            )
        return self.started


def has_compiler() -> bool:
    """Whether a C++ compiler is installed, which `torch.compile` needs on CPUs and GPUs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))
