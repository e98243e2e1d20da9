"""Writes checkpoints of a trajectory atomically and keeps the last two.

    checkpoint-<cycle>-<step>-<SHA-256 of the file>.pt

A checkpoint contains the step, the weights and the optimiser state; one that does not match its digest is skipped in favour of the
previous one. Data order, noise and initialisation are functions of the seed and the step, and the teacher is a member on disk.
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
    """The next step of a trajectory."""

    cycle: int
    step: int
    """Step within the cycle."""
    log_bytes: int
    """Length of the log at this point. On resume, the log is truncated to it."""


def save_checkpoint(directory: Path, position: Position, model: nn.Module, optimiser: Optimiser) -> None:
    """Write a checkpoint and keep the previous one. Older ones are removed, as are later ones left from before a fall-back."""
    state = {
        "position": vars(position),
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    # Through memory: torch.save to a file reports a full disk as an internal error of PyTorch.
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
    """Restore the newest intact checkpoint; None if there is none."""
    found = _checkpoints(directory)
    for path in reversed(found):
        try:
            if not path.stem.endswith(f"-{sha256(path)}"):
                raise OSError("its content does not match the digest in its name")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _log.warning("%s is damaged (%s); trying the previous checkpoint", path, error)
            continue
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return Position(**state["position"])
    if found:
        _log.warning("no checkpoint in %s is usable; the trajectory starts again", directory)
    return None


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of a finished trajectory."""
    for path in _checkpoints(directory):
        path.unlink()


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*.pt"))
