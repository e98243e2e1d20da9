"""The obvious way to mix: every member through Hugging Face, in float32, and the pool in float64. Slow, and right."""

from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from chorus.population import manifest

# Transformers replaces `PreTrainedModel.tie_weights` while it loads; two threads at once leave it replaced for good.
_loading = Lock()


@cache
def _load_member(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def member_log_probs(directory: Path, name: str, token_ids: list[int] | list[list[int]]) -> Tensor:
    """Log-probabilities (T, V) of the token after each of `token_ids`, under one member; (B, T, V) for B lists of one length."""
    with _loading:
        model = _load_member(directory / manifest.load(directory).member(name).path)
    ids = torch.tensor(token_ids)
    logits = model(torch.atleast_2d(ids)).logits.double()
    return torch.log_softmax(logits if ids.dim() == 2 else logits[0], -1)


@torch.no_grad()
def mixture_log_probs(directory: Path, tier_name: str, token_ids: list[int] | list[list[int]]) -> Tensor:
    """The same under a tier of the population in `directory`."""
    population = manifest.load(directory)
    tier = population.tier(tier_name)
    log_p_MTV = torch.stack([member_log_probs(directory, name, token_ids) for name in tier.members])
    weights_M11 = torch.tensor(tier.weights, dtype=torch.float64).view(-1, *[1] * (log_p_MTV.dim() - 1))
    if tier.pool == "linear":
        pooled_TV = torch.logsumexp(log_p_MTV + weights_M11.log(), dim=0)
    else:
        pooled_TV = (weights_M11 * log_p_MTV).sum(0)
    return torch.log_softmax(pooled_TV / tier.temperature, dim=-1)
