"""Perturbation at a cycle's boundary: noise that moves a trajectory away from the snapshot it has just left behind (q0)."""

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def perturb(model: nn.Module, sigma: float, generator: torch.Generator) -> None:
    """Add N(0, 1) * std(p) * sigma to every tensor p with more than one element.

    The noise is drawn on the CPU, so that a trajectory is perturbed in the same way on every device.
    """
    if sigma == 0:
        return
    for parameter in model.parameters():
        if parameter.numel() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * (parameter.std() * sigma))


def generator_for(*keys: int) -> torch.Generator:
    """A generator seeded by what it is for (run's seed, trajectory, purpose, ...).

    Nothing in a run draws from a global generator: there is no state to lose between a kill and a resume.
    """
    (seed,) = np.random.SeedSequence(keys).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) >> 1)
