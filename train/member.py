"""Adds a model to the population: saves it, evaluates it on the selection split, then registers it in the manifest.

Registering comes last, so that every member in the manifest is complete.
"""

import torch
from pydantic import JsonValue

from chorus.population import assemble
from chorus.population.files import write_array
from chorus.population.tokens import TokenSplit, split_path
from chorus.train import diversity, heldout
from chorus.train.evaluate import likelihoods
from chorus.train.model import Llama
from chorus.train.run import Run, diversity_path, likelihoods_path
from chorus.train.snapshot import load_saved, register, save_member


def add_member(model: Llama, run: Run, name: str, device: torch.device, *, epochs: float, **origin: JsonValue) -> float:
    """Save, evaluate and register a model. Returns its loss on the selection split, in nats.

    `origin` holds the optional fields of its manifest entry (trajectory, cycle, teacher).
    """
    path = save_member(model, run, name)
    selection = TokenSplit.load(split_path(run.directory, "selection"))
    saved = load_saved(run, name, device)
    found = likelihoods(saved, selection, device)
    write_array(likelihoods_path(run, name), found)
    relative = str(path.relative_to(run.directory))
    register(run, assemble.describe_member(run.directory, relative, name, epochs=epochs, **origin))
    # Last, because only the report needs it: if the disk is full, the member is registered anyway.
    write_array(diversity_path(run, name), diversity.sampled_log_p(saved, selection))
    return heldout.loss(found)
