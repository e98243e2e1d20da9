"""The pools: from the logits of several members to the float32 log-probabilities of their mixture.

Each row carries its mixture as a *header* next to its hidden states. vLLM selects rows before it computes logits (the last token of
each request, all prompt tokens for echoed log-probabilities, speculative rows), so the weights must travel with the row.

M members, R rows, V vocabulary, W ranks
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from chorus.serve.engine.mixture import Mixture

_CPU = torch.device("cpu")
_EXTRA_COLUMNS = 2  # pool, temperature
_MIN_PROBABILITY = 1e-30
"""Smaller probabilities are pooled in log space, because float32 loses precision below 1e-38."""


def header_width(num_members: int) -> int:
    """Number of float32 values in a row's header: one weight per member, the pool, the temperature."""
    return num_members + _EXTRA_COLUMNS


def make_headers(mixtures: Sequence[Mixture], num_members: int) -> Tensor:
    """Headers (R, M + 2), float32, one row per mixture: the weights, 1 for a log pool or 0, the temperature."""
    header_RH = torch.zeros(len(mixtures), header_width(num_members))
    for row, mixture in enumerate(mixtures):
        header_RH[row, list(mixture.members)] = torch.tensor(mixture.weights)
        header_RH[row, num_members] = mixture.pool == "log"
        header_RH[row, num_members + 1] = mixture.temperature
    return header_RH


def uniform_headers(num_rows: int, num_members: int) -> Tensor:
    """Headers of rows with a linear pool of all members at equal weights."""
    header_RH = torch.full((num_rows, header_width(num_members)), 1 / num_members)
    header_RH[:, num_members] = 0
    header_RH[:, num_members + 1] = 1
    return header_RH


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Exchange of partial pools between ranks that hold different members."""

    members: Collection[int]
    """The members of this rank."""
    gather: Callable[[Tensor], Tensor]
    """From this rank's partial pool (R, V) to those of all ranks (W, R, V), equal on all ranks. Each rank calls it once per mix."""
    vocab_size: int


def mix(
    header_RH: Tensor,
    logits_of: Callable[[int, Tensor | None], Tensor],
    exchange: Exchange | None = None,
    *,
    sum_probabilities: bool = True,
    device: torch.device = _CPU,
) -> Tensor:
    """Log-probabilities (R, V), float32 and normalised, of each row's mixture.

    linear pool: log sum_m w_m p_m;  log pool: log softmax(sum_m w_m log p_m);  then log softmax(. / temperature).

    Args:
        header_RH: headers from `make_headers`, on the CPU.
        logits_of: `logits_of(m, rows)` returns member m's logits for the rows at these indices, or for all rows if `rows` is None.
            Any floating dtype; -inf is allowed. Not called for members of weight zero.
        exchange: needed if members are spread over ranks; else None.
        sum_probabilities: whether linear pools may sum probabilities instead of using log space. For CPUs: on a GPU the check
            for probabilities too small for that would have to wait for the device.
        device: device of the logits.
    """
    return _pool(_plan(header_RH.numpy().tobytes(), *header_RH.shape, device), logits_of, exchange, sum_probabilities)


def mix_common(
    mixture: Mixture,
    num_rows: int,
    logits_of: Callable[[int, Tensor | None], Tensor],
    exchange: Exchange | None = None,
    *,
    sum_probabilities: bool = True,
    device: torch.device = _CPU,
) -> Tensor:
    """Like `mix`, for `num_rows` rows that all have the same `mixture` and so need no headers."""
    return _pool(_common_plan(mixture, num_rows, device), logits_of, exchange, sum_probabilities)


def _pool(
    plan: "_Plan", logits_of: Callable[[int, Tensor | None], Tensor], exchange: Exchange | None, sum_probabilities: bool
) -> Tensor:
    pooled_RV: Tensor | None = None
    if sum_probabilities and exchange is None and not plan.has_log_pools:
        pooled_RV = _pool_probabilities(plan, logits_of)
    if pooled_RV is None:
        pooled_RV = _pool_log_probabilities(plan, logits_of, exchange)
    if plan.unnormalised is not None:
        rows = plan.unnormalised
        pooled_RV[rows] = torch.log_softmax(pooled_RV[rows] / plan.temperature_r1, dim=-1)
    return pooled_RV


def _pool_log_probabilities(
    plan: "_Plan", logits_of: Callable[[int, Tensor | None], Tensor], exchange: Exchange | None
) -> Tensor:
    """Both kinds of pool, computed in log space: accurate for probabilities of any size."""
    pooled_RV: Tensor | None = None
    for share in plan.shares:
        if exchange is not None and share.member not in exchange.members:
            continue
        log_p_rV = torch.log_softmax(logits_of(share.member, share.rows), dim=-1, dtype=torch.float32)
        if share.is_whole_mixture:
            pooled_RV = log_p_rV  # one member for the whole batch: nothing to pool
        else:
            if pooled_RV is None:
                pooled_RV = _initial_pools(plan.is_log_R, log_p_rV.shape[1])
            _add_share(pooled_RV, share, log_p_rV)
    if exchange is not None:
        if pooled_RV is None:
            pooled_RV = _initial_pools(plan.is_log_R, exchange.vocab_size)
        pooled_RV = _combine_parts(plan, exchange.gather(pooled_RV))
    assert pooled_RV is not None, "a batch needs rows, and each row a member"
    return pooled_RV


def _pool_probabilities(plan: "_Plan", logits_of: Callable[[int, Tensor | None], Tensor]) -> Tensor | None:
    """Linear pools, computed by summing probabilities; None if some are too small for that.

    On a CPU this takes a quarter of the time of log space, where one `logaddexp` costs as much as seventeen additions
    (bench/LOG.md). Rows with a single member keep its log-probabilities unchanged.
    """
    pooled_RV: Tensor | None = None
    scratch_RV: Tensor | None = None
    sole_rows: list[tuple[Tensor, Tensor]] = []
    for share in plan.shares:
        logits_rV = logits_of(share.member, share.rows)
        if share.is_whole_mixture:
            return torch.log_softmax(logits_rV, dim=-1, dtype=torch.float32)
        if pooled_RV is None and share.rows is None:
            pooled_RV = torch.softmax(logits_rV, dim=-1, dtype=torch.float32).mul_(share.weight_r1)
        else:
            if pooled_RV is None:
                pooled_RV = torch.zeros(len(plan.is_log_R), logits_rV.shape[1], device=logits_rV.device)
            if scratch_RV is None:  # shared by all members, because fresh memory costs more than the work done in it
                scratch_RV = torch.empty_like(pooled_RV)
            p_rV = torch.softmax(logits_rV, dim=-1, dtype=torch.float32, out=scratch_RV[: len(logits_rV)])
            if share.weight is None:
                p_rV.mul_(share.weight_r1)
            alpha = 1.0 if share.weight is None else share.weight
            if share.rows is None:
                pooled_RV.add_(p_rV, alpha=alpha)
            else:
                pooled_RV.index_add_(0, share.rows, p_rV, alpha=alpha)
        if share.sole_rows is not None:
            rows = share.sole_rows if share.rows is None else share.rows[share.sole_rows]
            sole_rows.append((rows, torch.log_softmax(logits_rV[share.sole_rows], dim=-1, dtype=torch.float32)))
    assert pooled_RV is not None, "a batch needs rows, and each row a member"
    for rows, _ in sole_rows:
        pooled_RV[rows] = 1.0
    if pooled_RV.amin() < _MIN_PROBABILITY:
        return None
    pooled_RV.log_()
    for rows, log_p_rV in sole_rows:
        pooled_RV[rows] = log_p_rV
    return pooled_RV


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One member's share in a batch. Tensors are on the engine's device."""

    member: int
    rows: Tensor | None
    """The rows whose mixture has this member; None for all."""
    weight_r1: Tensor
    weight: float | None
    """The weight, if it is the same in all of these rows; else None."""
    is_log_r1: Tensor | None
    """Which of these rows have a log pool; None if none has."""
    is_whole_mixture: bool
    """Whether it is the only member of all rows in the batch."""
    sole_rows: Tensor | None
    """Positions among these rows of those without another member; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A batch's headers, decoded and on the engine's device. Cached, since headers repeat while the same requests run."""

    shares: tuple[_Share, ...]
    is_log_R: Tensor
    has_log_pools: bool
    """Whether any row's log pool has several members."""
    unnormalised: Tensor | None
    """Rows that must be normalised at the end: log pools of several members, and temperatures other than 1."""
    temperature_r1: Tensor


@lru_cache(maxsize=8)
def _plan(headers: bytes, num_rows: int, width: int, device: torch.device) -> _Plan:
    header_RH = torch.frombuffer(bytearray(headers), dtype=torch.float32).view(num_rows, width)
    num_members = width - _EXTRA_COLUMNS
    weights_RM, is_log_R, temperature_R = (
        header_RH[:, :num_members],
        header_RH[:, num_members] > 0,
        header_RH[:, num_members + 1],
    )
    is_active_RM = weights_RM > 0
    shares = []
    for member in is_active_RM.any(0).nonzero().flatten().tolist():
        rows = None if is_active_RM[:, member].all() else is_active_RM[:, member].nonzero().flatten()
        chosen = slice(None) if rows is None else rows
        weight_r1, is_log_r1 = weights_RM[chosen, member, None], is_log_R[chosen, None]
        is_alone_r = is_active_RM[chosen].sum(1) == 1
        shares.append(
            _Share(
                member=member,
                rows=None if rows is None else rows.to(device),
                weight_r1=weight_r1.to(device),
                weight=float(weight_r1[0]) if bool((weight_r1 == weight_r1[0]).all()) else None,
                is_log_r1=is_log_r1.to(device) if is_log_r1.any() else None,
                is_whole_mixture=rows is None and bool((weight_r1 == 1).all()),
                sole_rows=is_alone_r.nonzero().flatten().to(device) if is_alone_r.any() else None,
            )
        )
    needs_norm_R = (is_log_R & (is_active_RM.sum(1) > 1)) | (temperature_R != 1)
    return _Plan(
        shares=tuple(shares),
        is_log_R=is_log_R.to(device),
        has_log_pools=bool((is_log_R & (is_active_RM.sum(1) > 1)).any()),
        unnormalised=needs_norm_R.nonzero().flatten().to(device) if needs_norm_R.any() else None,
        temperature_r1=temperature_R[needs_norm_R, None].to(device),
    )


@lru_cache(maxsize=8)
def _common_plan(mixture: Mixture, num_rows: int, device: torch.device) -> _Plan:
    weights = {member: weight for member, weight in zip(mixture.members, mixture.weights, strict=True) if weight > 0}
    is_alone, is_log = len(weights) == 1, mixture.pool == "log"
    all_rows = torch.arange(num_rows, device=device)
    is_log_R = torch.full((num_rows,), is_log, device=device)
    shares = [
        _Share(
            member=member,
            rows=None,
            weight_r1=torch.full((num_rows, 1), weight, device=device),
            weight=weight,
            is_log_r1=is_log_R[:, None] if is_log else None,
            is_whole_mixture=is_alone,
            sole_rows=all_rows if is_alone else None,
        )
        for member, weight in sorted(weights.items())
    ]
    return _Plan(
        shares=tuple(shares),
        is_log_R=is_log_R,
        has_log_pools=is_log and not is_alone,
        unnormalised=all_rows if (is_log and not is_alone) or mixture.temperature != 1 else None,
        temperature_r1=torch.full((num_rows, 1), mixture.temperature, device=device),
    )


def _initial_pools(is_log_R: Tensor, vocab_size: int) -> Tensor:
    """Pools before their first member: log 0 for linear pools, a sum of 0 for log pools."""
    empty_R1 = torch.where(is_log_R, 0.0, -torch.inf).unsqueeze(1)
    return empty_R1.repeat(1, vocab_size)


def _combine_parts(plan: _Plan, parts_WRV: Tensor) -> Tensor:
    """Combine the partial pools of all ranks."""
    pooled_RV = torch.logsumexp(parts_WRV, dim=0)
    if any(share.is_log_r1 is not None for share in plan.shares):
        pooled_RV = torch.where(plan.is_log_R.unsqueeze(1), parts_WRV.sum(0), pooled_RV)
    return pooled_RV


def _add_share(pooled_RV: Tensor, share: _Share, log_p_rV: Tensor) -> None:
    """Add one member's share to its rows of `pooled_RV`, in place."""
    before_rV = pooled_RV if share.rows is None else pooled_RV[share.rows]
    after_rV = torch.logaddexp(before_rV, log_p_rV + share.weight_r1.log())
    if share.is_log_r1 is not None:
        after_rV = torch.where(share.is_log_r1, before_rV + share.weight_r1 * log_p_rV, after_rV)
    if share.rows is None:
        pooled_RV.copy_(after_rV)
    else:
        pooled_RV[share.rows] = after_rV
