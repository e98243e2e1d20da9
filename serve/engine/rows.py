"""Which rows of a step each member runs: fifteen one-member requests and one of eight members cost 15 + 8 rows, not 128.

A *request row* is a position in the batch of requests; a *token row* one in the batch of their scheduled tokens.
Pure index arithmetic, on NumPy arrays and torch tensors; `attention` and `worker` apply it to vLLM's structures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chorus.serve.engine.mixing import make_headers
from chorus.serve.engine.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class MemberRows:
    """The part of a step's batch that one member runs. Tensors are on the engine's device unless their name says otherwise."""

    num_requests: int
    num_tokens: int
    max_query_len: int
    requests: Tensor
    """(num_requests,) int64: request rows, ascending."""
    tokens: Tensor
    """(num_tokens,) int64: token rows, ascending."""
    query_start_loc: Tensor
    """(num_requests + 1,) int32: where each request's tokens begin among the member's own."""
    query_start_loc_cpu: Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the engine: who runs what, and the header of every token row."""

    rows: tuple[MemberRows | None, ...]
    """For each member that runs any row its part of the batch; None where that is the whole batch."""
    header_TH: Tensor | None
    """(num_tokens, M + 2) float32, see `mixing.make_headers`; None where all requests have the same mixture."""
    running: tuple[int, ...]
    """Members here that run any row, ascending."""
    common: Mixture | None
    """The mixture of all requests, if they have the same one; its members run the whole batch."""


def plan_step(
    mixtures: Sequence[Mixture],
    num_scheduled_tokens: NDArray[np.int32],
    num_members: int,
    device: torch.device,
    *,
    here: Sequence[int] | None = None,
) -> Step:
    """Lay out a step for requests answered by `mixtures`, in batch order.

    Args:
        num_scheduled_tokens: (num_requests,) tokens that this step computes for each request.
        here: the members that this rank holds; None for all.
    """
    if all(mixture == mixtures[0] for mixture in mixtures):
        return Step(
            rows=(None,) * num_members,
            header_TH=None,
            running=tuple(member for member in mixtures[0].members if here is None or member in here),
            common=mixtures[0],
        )
    is_active_RM = np.zeros((len(mixtures), num_members), dtype=bool)
    for row, mixture in enumerate(mixtures):
        is_active_RM[row, list(mixture.members)] = True
    header_RH = make_headers(mixtures, num_members)
    repeats = torch.from_numpy(num_scheduled_tokens.astype(np.int64))
    header_TH = header_RH if len(header_RH) == repeats.sum() else torch.repeat_interleave(header_RH, repeats, dim=0)
    planned: dict[bytes, MemberRows | None] = {}
    rows = []
    for member in range(num_members):
        key = is_active_RM[:, member].tobytes()
        if key not in planned:
            planned[key] = _select(is_active_RM[:, member], num_scheduled_tokens, device)
        rows.append(planned[key])
    return Step(
        rows=tuple(rows),
        header_TH=header_TH.to(device),
        running=tuple(m for m in np.flatnonzero(is_active_RM.any(0)).tolist() if here is None or m in here),
        common=None,
    )


def _select(
    is_active_R: NDArray[np.bool_], num_scheduled_tokens: NDArray[np.int32], device: torch.device
) -> MemberRows | None:
    if is_active_R.all():
        return None
    requests = np.flatnonzero(is_active_R)
    lengths = num_scheduled_tokens[requests]
    query_start_loc_cpu = torch.zeros(len(requests) + 1, dtype=torch.int32)
    query_start_loc_cpu[1:] = torch.from_numpy(np.cumsum(lengths, dtype=np.int32))
    tokens = np.flatnonzero(np.repeat(is_active_R, num_scheduled_tokens))
    return MemberRows(
        num_requests=len(requests),
        num_tokens=len(tokens),
        max_query_len=int(lengths.max(initial=0)),
        requests=torch.from_numpy(requests).to(device),
        tokens=torch.from_numpy(tokens).to(device),
        query_start_loc=query_start_loc_cpu.to(device),
        query_start_loc_cpu=query_start_loc_cpu,
    )
