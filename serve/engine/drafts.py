"""Speculative decoding within a population: a request's heaviest member drafts tokens, and all its members verify them in one step.

vLLM schedules the drafts and accepts or rejects them (Leviathan et al., arXiv 2211.17192), which preserves the mixture's law. This
module only drafts, without a model or KV cache of its own, since the request already has both. If the last tokens of a greedy
request occurred earlier in its text, the tokens that followed there become the draft and no member runs (prompt lookup decoding),
which suits code, quotations and repetitive answers.

R requests that draft together, V vocabulary
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

from chorus.serve.engine.decoding import MAX_DRAFTS, heaviest
from chorus.serve.engine.mixture import Mixture


def speculative_config(vllm_config: Any) -> Any:
    """The configuration that makes vLLM use `Drafter`."""
    from vllm.config import SpeculativeConfig

    return SpeculativeConfig(
        method="custom_class",
        model=f"{Drafter.__module__}.{Drafter.__qualname__}",
        num_speculative_tokens=MAX_DRAFTS,
        draft_sample_method="probabilistic",
        target_model_config=vllm_config.model_config,
        target_parallel_config=vllm_config.parallel_config,
    )


def uses_drafter(speculative: Any) -> bool:
    """Whether a speculative configuration is that of `speculative_config`."""
    return bool(speculative.model == f"{Drafter.__module__}.{Drafter.__qualname__}")


_MATCH_TOKENS = 4
"""Number of last tokens that must occur earlier in the text for a lookup."""


class Drafter:
    """Drafts the tokens that the next step verifies. vLLM creates one per runner."""

    def __init__(self, vllm_config: Any) -> None:
        if current_platform.is_cpu():
            register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})
        self._vllm_config = vllm_config
        self._probabilities: dict[str, Tensor] = {}
        """The probabilities (k, V) that each request's drafts were drawn from; absent if they were looked up."""
        self.passes: Counter[int] = Counter()
        """Forward passes of each member in the last call of `propose`."""
        self.drafted: dict[str, int] = {}
        """Tokens drafted by members in that call, by request; equals the member rows."""

    def load_model(self, model: Any) -> None:
        """Does nothing: the drafting members are those of `model`."""

    def propose(self, runner: Any, requested: Mapping[str, int], sampled: Sequence[Sequence[int]]) -> list[list[int]]:
        """Up to `requested` drafts for each request, in batch order.

        Args:
            runner: the model runner, after it stored the tokens that the step sampled.
            requested: number of drafts by request id; none for other requests.
            sampled: tokens that the step sampled for each request; empty for an unfinished prompt.
        """
        drafts: list[list[int]] = [[] for _ in sampled]
        self._probabilities.clear()
        self.passes.clear()
        self.drafted.clear()
        groups: dict[Mixture, list[tuple[int, int]]] = {}
        for row, request_id in enumerate(runner.input_batch.req_ids):
            count = min(requested.get(request_id, 0), _max_drafts(runner, row, request_id)) if sampled[row] else 0
            if count <= 0:
                continue
            if request_id in runner.input_batch.greedy_reqs:
                length = int(runner.input_batch.num_tokens_no_spec[row])
                drafts[row] = look_up(runner.input_batch.token_ids_cpu[row, :length], count)
            if not drafts[row]:
                groups.setdefault(heaviest(runner.mixtures[request_id]), []).append((row, count))
        for mixture, counts in groups.items():
            counts.sort(key=lambda pair: pair[1], reverse=True)
            for (row, count), (tokens, probabilities) in zip(counts, self._draft(runner, mixture, counts), strict=True):
                drafts[row] = tokens
                self._probabilities[runner.input_batch.req_ids[row]] = probabilities
                self.drafted[runner.input_batch.req_ids[row]] = count
            self.passes.update(dict.fromkeys(mixture.members, counts[0][1]))
        return drafts

    def probabilities(
        self, request_ids: Sequence[str], num_drafts: Sequence[int], vocab_size: int, device: torch.device
    ) -> Tensor | None:
        """The probabilities that the drafts of a step were drawn from, in batch order; None if there are no drafts.

        Shape (sum of `num_drafts`, V), float32. Zero for looked-up drafts: they occur only in greedy requests, whose probabilities
        are not read.
        """
        parts = [
            self._probabilities[request_id][:count].float()
            if request_id in self._probabilities
            else torch.zeros(count, vocab_size, device=device)
            for request_id, count in zip(request_ids, num_drafts, strict=True)
            if count
        ]
        return torch.cat(parts) if parts else None

    def _draft(self, runner: Any, mixture: Mixture, counts: list[tuple[int, int]]) -> list[tuple[list[int], Tensor]]:
        """The drafts of each request, and the probabilities (count, V) that they were drawn from.

        Args:
            runner: the model runner.
            mixture: the mixture that drafts for all of these requests.
            counts: batch row and number of drafts of each request, largest number first. No request runs further than its number:
                its KV blocks, or the model's positions, may end there.
        """
        batch = runner.input_batch
        rows, requested = np.array(counts).T
        positions = batch.num_tokens_no_spec[rows].astype(np.int64) - 1
        token_ids = torch.from_numpy(batch.token_ids_cpu[rows, positions]).to(runner.device)
        sampler = _Sampler(batch.sampling_metadata, rows, runner.device)
        block_tables = _BlockTables(runner, mixture.members, rows)
        tokens, probabilities = list[Tensor](), list[Tensor]()
        for step in range(int(requested[0])):
            running = int((requested > step).sum())
            step_positions = positions[:running] + step
            context = block_tables.context(step_positions)
            with set_forward_context(
                context.attention, self._vllm_config, num_tokens=running, slot_mapping=context.slots
            ):
                log_p_RV = runner.model.draft(
                    mixture, token_ids[:running], torch.from_numpy(step_positions).to(runner.device)
                )
            token_ids, p_RV = sampler(log_p_RV)
            tokens.append(token_ids)
            probabilities.append(p_RV)
        # Only after all steps are launched, so that a GPU does not wait between them.
        token_ids_by_step = [token_ids.tolist() for token_ids in tokens]
        return [
            (
                [ids[idx] for ids in token_ids_by_step[:count]],
                torch.stack([p_RV[idx] for p_RV in probabilities[:count]]),
            )
            for idx, count in enumerate(requested.tolist())
        ]


def look_up(tokens: NDArray[Any], count: int) -> list[int]:
    """The `count` tokens that followed the latest earlier occurrence of the last `_MATCH_TOKENS` tokens; empty if there is none.

    If the text ends before `count` tokens, it repeats itself, so the continuation repeats as well.
    """
    if len(tokens) <= _MATCH_TOKENS:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], _MATCH_TOKENS)
    matches = np.flatnonzero((windows == tokens[-_MATCH_TOKENS:]).all(axis=1))
    if len(matches) == 0:
        return []
    continuation: list[int] = tokens[int(matches[-1]) + _MATCH_TOKENS :][:count].tolist()
    return [continuation[idx % len(continuation)] for idx in range(count)]


def _expand(
    output_N: Tensor,
    values_R: Tensor,
    num_tokens_before: Tensor,
    replace_from: float,
    replace_to: float,
    max_num_tokens: int | None = None,
) -> None:
    """Write each request's value once per draft into `output_N`, with `replace_from` replaced by `replace_to`.

    Replaces vLLM's CPU kernel (0.32), which writes to a copy unless the dtype is int64: temperatures and top-p of drafts were
    uninitialised memory.
    """
    counts_R = torch.diff(num_tokens_before, prepend=num_tokens_before.new_zeros(1))
    output_N.copy_(torch.repeat_interleave(torch.where(values_R == replace_from, replace_to, values_R), counts_R))


def _max_drafts(runner: Any, row: int, request_id: str) -> int:
    """Maximum number of drafts before the request reaches its length limit; the step that verifies them adds one more token."""
    request = runner.requests[request_id]
    remaining: int = runner.max_model_len - int(runner.input_batch.num_tokens_no_spec[row])
    if request.sampling_params is not None and request.sampling_params.max_tokens is not None:
        remaining = min(remaining, request.sampling_params.max_tokens - len(request.output_token_ids))
    return remaining - 1


class _Sampler:
    """Draws a token for each selected row of the batch, with that row's temperature, top-k, top-p and allowed tokens."""

    def __init__(self, metadata: Any, rows: np.ndarray, device: torch.device) -> None:
        rows_R = torch.from_numpy(rows).to(device)

        def select(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows_R]

        self._forbidden_RV = select(metadata.allowed_token_ids_mask)
        temperature_R = select(metadata.temperature)
        self._is_greedy = metadata.all_greedy or temperature_R is None
        if not self._is_greedy:
            assert temperature_R is not None
            self._is_greedy_R = temperature_R < 1e-5
            self._is_greedy = bool(self._is_greedy_R.all())
            self._temperature_R1 = torch.where(self._is_greedy_R, 1.0, temperature_R).unsqueeze(1)
            self._top_k_R, self._top_p_R = select(metadata.top_k), select(metadata.top_p)

    def __call__(self, log_p_RV: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R,) of the first R rows, and the probabilities (R, V) that they were drawn from.

        The probabilities of greedy rows are meaningless; they are never read.
        """

        def first(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[: len(log_p_RV)]

        if (forbidden_RV := first(self._forbidden_RV)) is not None:
            log_p_RV = log_p_RV.masked_fill(forbidden_RV, -torch.inf)
        best_R = log_p_RV.argmax(-1)
        if self._is_greedy:
            return best_R, log_p_RV
        scaled_RV = log_p_RV / self._temperature_R1[: len(log_p_RV)]
        p_RV = torch.softmax(
            apply_top_k_top_p(scaled_RV, first(self._top_k_R), first(self._top_p_R)), dim=-1, dtype=torch.float32
        )
        sampled_R = random_sample(p_RV.clone(), {})
        return torch.where(self._is_greedy_R[: len(log_p_RV)], best_R, sampled_R), p_RV


class _AttentionInputs:
    """Attention metadata and slots by layer name, for one forward pass of a few members."""

    def __init__(self) -> None:
        self.attention: dict[str, Any] = {}
        self.slots: dict[str, Tensor] = {}


class _BlockTables:
    """The KV-cache block tables of a few members for a few requests."""

    def __init__(self, runner: Any, members: Sequence[int], rows: np.ndarray) -> None:
        self._device = runner.device
        self._query_start_loc = torch.arange(len(rows) + 1, dtype=torch.int32)
        self._groups = []
        for member in members:
            for idx in runner.groups_of[member]:
                table = runner.input_batch.block_table[idx]
                blocks = table.get_numpy_array()[rows]
                self._groups.append((table.block_size, blocks, torch.from_numpy(blocks), runner.attn_groups[idx]))

    def context(self, positions: np.ndarray) -> _AttentionInputs:
        """Attention inputs for one token of each of the first R requests, at `positions` (R,)."""
        context, count = _AttentionInputs(), len(positions)
        seq_lens = torch.from_numpy((positions + 1).astype(np.int32))
        rows, starts = np.arange(count), self._query_start_loc[: count + 1]
        for block_size, blocks, block_table, attention_groups in self._groups:
            slots = blocks[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
            slot_mapping = torch.from_numpy(slots).to(self._device)
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(self._device),
                query_start_loc_cpu=starts,
                seq_lens=seq_lens.to(self._device),
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=count,
                num_actual_tokens=count,
                max_query_len=1,
                max_seq_len=int(positions.max()) + 1,
                block_table_tensor=block_table[:count].to(self._device),
                slot_mapping=slot_mapping,
                causal=True,
            )
            for group in attention_groups:
                metadata = group.get_metadata_builder().build(common_prefix_len=0, common_attn_metadata=common)
                context.attention.update(dict.fromkeys(group.layer_names, metadata))
                context.slots.update(dict.fromkeys(group.layer_names, slot_mapping))
        return context
