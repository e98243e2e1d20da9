"""Checkpoints of a trajectory: everything that its future depends on, written atomically, the last two kept.

That is the step, the weights and the optimiser's state. Data order, noise and initialisation are functions of the seed and the
step, and the teacher is a member on disk.
"""

import io
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chorus.population.files import replacing
from chorus.train.optimiser import Optimiser

_KEPT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a trajectory stands: the step that comes next."""

    cycle: int
    step: int
    """In the cycle."""
    log_bytes: int
    """Length of the log up to here; what a killed run wrote behind it is taken back."""


def save_checkpoint(directory: Path, position: Position, model: nn.Module, optimiser: Optimiser) -> None:
    """Write one checkpoint and remove the oldest beyond the last two."""
    path = directory / f"checkpoint-{position.cycle:04d}-{position.step:08d}.pt"
    state = {
        "position": vars(position),
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    # Through memory: told to write a file, torch.save reports a full disk as an internal error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    for old in _checkpoints(directory)[:-_KEPT]:
        old.unlink()


def load_checkpoint(directory: Path, model: nn.Module, optimiser: Optimiser) -> Position | None:
    """Restore the newest checkpoint that can be read; None where there is none."""
    for path in reversed(_checkpoints(directory)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _log.warning("%s cannot be read (%s); going back to the one before", path, error)
            continue
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return Position(**state["position"])
    return None


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a finished trajectory."""
    for path in _checkpoints(directory):
        path.unlink()


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*.pt"))
