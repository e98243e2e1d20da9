"""Evaluates a member on held-out tokens, on the windows that every stage scores (`TokenSplit.windows`)."""

# N scored tokens

import numpy as np
import torch
from numpy.typing import NDArray

from chorus.population.tokens import TokenSplit
from chorus.train.model import Llama

_BATCH_TOKENS = 8_192


@torch.no_grad()
def likelihoods(model: Llama, split: TokenSplit, device: torch.device) -> NDArray[np.float32]:
    """The probability of every scored token, shape (N,), in the order of the split's windows."""
    length = model.shape.context_length
    windows = split.windows(length)
    rows = max(1, _BATCH_TOKENS // length)
    found = []
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        padded = np.zeros((len(batch), length), dtype=np.int64)
        for row, (_, first, stop) in enumerate(batch):
            padded[row, : stop - first] = split.tokens[first:stop]
        tokens = torch.from_numpy(padded).to(device)
        hidden = model(tokens[:, :-1])
        for row, (_, first, stop) in enumerate(batch):
            num_scored = stop - first - 1
            logits = hidden[row, :num_scored] @ model.lm_head.weight.T
            log_p = torch.log_softmax(logits.float(), dim=-1)
            found.append(log_p.gather(1, tokens[row, 1 : num_scored + 1, None])[:, 0].exp().cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)
