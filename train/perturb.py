"""Perturbs the weights between cycles, to move a trajectory away from its last snapshot (q0)."""

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def perturb(model: nn.Module, sigma: float, generator: torch.Generator) -> None:
    """Add N(0, 1) * std(p) * sigma to every tensor p with more than one element.

    The noise is drawn on the CPU, so that it is the same on every device.
    """
    if sigma == 0:
        return
    for parameter in model.parameters():
        if parameter.numel() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * (parameter.std() * sigma))


def generator_for(*keys: int) -> torch.Generator:
    """A generator seeded by its purpose: (the run's seed, trajectory, purpose, ...).

    Nothing in a run uses a global generator, so a killed run has no generator state to restore.
    """
    (seed,) = np.random.SeedSequence(keys).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) >> 1)
