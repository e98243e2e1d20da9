"""Measures how different members are: the KL divergence between their distributions on the same held-out tokens.

Each finished member saves its log-probabilities on a small sample of the selection split, so that the report needs neither the
models nor torch.
"""

# M members, S sampled tokens, V vocabulary

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chorus.population.tokens import TokenSplit

if TYPE_CHECKING:
    from chorus.train.model import Llama

_SAMPLED_VALUES = 1 << 19  # 1 MB in float16 per member
_MIN_TOKENS = 32


def sampled_log_p(model: "Llama", split: TokenSplit) -> NDArray[np.float16]:
    """Log-probabilities (S, V) of the next token after evenly spaced tokens of a split; the same tokens for every member."""
    import torch

    windows = split.windows(model.shape.context_length)
    num_tokens = max(_MIN_TOKENS, _SAMPLED_VALUES // model.shape.vocab_size)
    picked = [windows[idx] for idx in np.unique(np.linspace(0, len(windows) - 1, min(len(windows), 16)).astype(int))]
    found = []
    with torch.no_grad():
        for _, first, stop in picked:
            tokens = torch.from_numpy(split.tokens[first:stop].astype(np.int64)).to(model.lm_head.weight.device)
            scored = np.linspace(0, stop - first - 2, min(stop - first - 1, -(-num_tokens // len(picked)))).astype(int)
            hidden = model(tokens[None, :-1])[0][torch.from_numpy(scored).to(tokens.device)]
            found.append(torch.log_softmax((hidden @ model.lm_head.weight.T).float(), dim=-1).half().cpu().numpy())
    return np.concatenate(found)


def divergences(paths: list[Path]) -> NDArray[np.float64]:
    """KL(i || j) in nats (M, M), averaged over the sampled tokens, from the files of `sampled_log_p`."""
    log_p = [np.load(path).astype(np.float32) for path in paths]
    found = np.zeros((len(paths), len(paths)))
    for i, own_SV in enumerate(log_p):
        p_SV = np.exp(own_SV)
        negative_entropy = float(np.einsum("sv,sv->", p_SV, own_SV))
        for j, other_SV in enumerate(log_p):
            found[i, j] = (negative_entropy - float(np.einsum("sv,sv->", p_SV, other_SV))) / len(p_SV)
    return found
