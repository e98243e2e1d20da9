"""Checkpoints of a trajectory: everything that its future depends on, written atomically, the last two kept.

    checkpoint-<cycle>-<step>-<SHA-256 of the file>.pt

A checkpoint that differs from its digest is left aside for the one before. It holds the step, the weights and the optimiser's
state. Data order, noise and initialisation are functions of the seed and the step, and the teacher is a member on disk.
"""

import hashlib
import io
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chorus.population.files import replacing, sha256
from chorus.train.optimiser import Optimiser

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
    """Write one checkpoint and keep the one before it; what lies further back, or ahead after a fall back, is removed."""
    state = {
        "position": vars(position),
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    # Through memory: told to write a file, torch.save reports a full disk as an internal error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    stem = f"checkpoint-{position.cycle:04d}-{position.step:08d}-"
    path = directory / f"{stem}{hashlib.sha256(buffer.getbuffer()).hexdigest()}.pt"
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    found = _checkpoints(directory)
    before = [other for other in found if other.name < stem]
    for other in found:
        if other not in (path, *before[-1:]):
            other.unlink()


def load_checkpoint(directory: Path, model: nn.Module, optimiser: Optimiser) -> Position | None:
    """Restore the newest checkpoint that is as it was written; None where there is none."""
    found = _checkpoints(directory)
    for path in reversed(found):
        try:
            if not path.stem.endswith(f"-{sha256(path)}"):
                raise OSError("it differs from the digest in its name")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _log.warning("%s is damaged (%s); going back to the one before", path, error)
            continue
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return Position(**state["position"])
    if found:
        _log.warning("no checkpoint in %s can be used; the trajectory begins again", directory)
    return None


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a finished trajectory."""
    for path in _checkpoints(directory):
        path.unlink()


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*.pt"))
