"""Which rows of a step each member runs: fifteen one-member requests and one of eight members cost 15 + 8 rows, not 128.

A *request row* is an index into the batch of requests, a *token row* one into the batch of scheduled tokens. A member that was left
out of earlier steps of a request runs the missed tokens first: its *catch-up rows*, which have no token row. Pure index arithmetic
on NumPy arrays and torch tensors; `attention` and `worker` apply it to vLLM's structures.

S sequences of `MergedRows`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chorus.serve.engine.mixing import make_headers
from chorus.serve.engine.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class MemberRows:
    """The part of a step's batch that one member runs. Tensors are on the engine's device, except those named `_cpu`."""

    num_requests: int
    num_rows: int
    """Rows, catch-up rows included."""
    max_query_len: int
    requests: Tensor
    """(num_requests,) int64: request rows, ascending."""
    tokens: Tensor
    """(num_tokens,) int64: token rows, ascending, without catch-up rows."""
    query_start_loc: Tensor
    """(num_requests + 1,) int32: start of each request's rows among this member's rows."""
    query_start_loc_cpu: Tensor
    catch_up: "CatchUp | None" = None
    """None if the member runs only scheduled tokens."""


@dataclass(frozen=True, kw_only=True)
class CatchUp:
    """The rows of a member that runs catch-up rows, in the order in which it runs them."""

    requests: NDArray[np.int64]
    """(num_rows,): request row of each."""
    offsets: NDArray[np.int64]
    """(num_rows,): position relative to the request's first scheduled token; negative for catch-up rows."""
    kept: Tensor
    """(num_tokens,) int64: indices of those that are token rows, ascending."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the engine: which member runs what, and the header of every token row."""

    rows: tuple[MemberRows | None, ...]
    """Each member's part of the batch; None if that is exactly the whole batch."""
    header_TH: Tensor | None
    """(num_tokens, M + 2) float32, see `mixing.make_headers`; None if all requests have the same mixture."""
    running: tuple[int, ...]
    """Members of this rank that run any rows, ascending."""
    common: Mixture | None
    """The mixture of all requests, if they have the same one; its members run the whole batch, and possibly catch-up rows."""


def plan_step(
    mixtures: Sequence[Mixture],
    num_scheduled_tokens: NDArray[np.int32],
    num_members: int,
    device: torch.device,
    *,
    local_members: Sequence[int] | None = None,
    missed: Sequence[Mapping[int, int]] | None = None,
) -> Step:
    """Lay out a step for requests answered by `mixtures`, in batch order.

    Args:
        mixtures: mixture of each request.
        num_scheduled_tokens: (num_requests,) tokens that this step computes for each request.
        num_members: members of the population.
        device: the engine's device.
        local_members: the members of this rank; None for all.
        missed: for each request, by member, how many tokens before the scheduled ones the member must catch up with. Members not
            listed have computed them all.
    """
    common = mixtures[0] if all(mixture == mixtures[0] for mixture in mixtures) else None
    if common is not None and not (missed and any(missed)):
        running = tuple(member for member in common.members if local_members is None or member in local_members)
        return Step(rows=(None,) * num_members, header_TH=None, running=running, common=common)
    is_active_RM = np.zeros((len(mixtures), num_members), dtype=bool)
    missed_RM = np.zeros((len(mixtures), num_members), dtype=np.int64)
    for row, mixture in enumerate(mixtures):
        is_active_RM[row, list(mixture.members)] = True
        for member, count in (missed[row] if missed else {}).items():
            missed_RM[row, member] = count
    header_TH = None
    if common is None:
        header_RH = make_headers(mixtures, num_members)
        repeats = torch.from_numpy(num_scheduled_tokens.astype(np.int64))
        header_TH = header_RH if len(header_RH) == repeats.sum() else torch.repeat_interleave(header_RH, repeats, dim=0)
        header_TH = header_TH.to(device)
    planned: dict[bytes, MemberRows | None] = {}
    rows = []
    for member in range(num_members):
        key = is_active_RM[:, member].tobytes() + missed_RM[:, member].tobytes()
        if key not in planned:
            planned[key] = _select(is_active_RM[:, member], missed_RM[:, member], num_scheduled_tokens, device)
        rows.append(planned[key])
    return Step(
        rows=tuple(rows),
        header_TH=header_TH,
        running=tuple(
            m for m in np.flatnonzero(is_active_RM.any(0)).tolist() if local_members is None or m in local_members
        ),
        common=common,
    )


@dataclass(frozen=True, kw_only=True)
class MergedRows:
    """The rows of several members, one member after the other. Each request of each member is a sequence of its own."""

    members: Sequence[int]
    num_requests: int
    num_rows: int
    max_query_len: int
    requests: Tensor
    """(S,) int64: request row of each sequence."""
    query_start_loc: Tensor
    """(S + 1,) int32: start of each sequence's rows."""
    query_start_loc_cpu: Tensor


def merge_rows(
    step: Step, members: Sequence[int], num_scheduled_tokens: NDArray[np.int32], device: torch.device
) -> MergedRows:
    """The rows of `members`, all running in `step`, as one batch of sequences."""
    requests, lengths = list[Tensor](), list[NDArray[np.int32]]()
    for member in members:
        rows = step.rows[member]
        if rows is None:
            requests.append(torch.arange(len(num_scheduled_tokens), device=device))
            lengths.append(num_scheduled_tokens)
        else:
            requests.append(rows.requests)
            lengths.append(np.diff(rows.query_start_loc_cpu.numpy()))
    lengths_S = np.concatenate(lengths)
    query_start_loc_cpu = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths_S))).astype(np.int32))
    return MergedRows(
        members=members,
        num_requests=len(lengths_S),
        num_rows=int(query_start_loc_cpu[-1]),
        max_query_len=int(lengths_S.max()),
        requests=torch.cat(requests),
        query_start_loc=query_start_loc_cpu.to(device),
        query_start_loc_cpu=query_start_loc_cpu,
    )


def _select(
    is_active_R: NDArray[np.bool_],
    missed_R: NDArray[np.int64],
    num_scheduled_tokens: NDArray[np.int32],
    device: torch.device,
) -> MemberRows | None:
    requests = np.flatnonzero(is_active_R)
    missed = missed_R[requests]
    catches_up = bool(missed.any())
    if len(requests) == len(is_active_R) and not catches_up:
        return None
    lengths = num_scheduled_tokens[requests] + missed
    starts = np.concatenate(([0], np.cumsum(lengths)))
    query_start_loc_cpu = torch.from_numpy(starts.astype(np.int32))
    catch_up = None
    if catches_up:
        offsets = np.arange(starts[-1]) - np.repeat(starts[:-1] + missed, lengths)
        catch_up = CatchUp(
            requests=np.repeat(requests, lengths),
            offsets=offsets,
            kept=torch.from_numpy(np.flatnonzero(offsets >= 0)).to(device),
        )
    return MemberRows(
        num_requests=len(requests),
        num_rows=int(starts[-1]),
        max_query_len=int(lengths.max(initial=0)),
        requests=torch.from_numpy(requests).to(device),
        tokens=torch.from_numpy(np.flatnonzero(np.repeat(is_active_R, num_scheduled_tokens))).to(device),
        query_start_loc=query_start_loc_cpu.to(device),
        query_start_loc_cpu=query_start_loc_cpu,
        catch_up=catch_up,
    )
