"""Speculation inside the population: a request's heaviest members draft tokens, and all of its members verify them in one step.

vLLM's own machinery schedules the drafts and accepts or rejects them (Leviathan et al., arXiv 2211.17192), so the mixture's law is
kept. Only the drafter is ours: it needs no model and no KV cache of its own, since a request has both already.

Where the end of a greedy answer stood in its text before, the draft is what followed there, and no member runs for it (prompt
lookup decoding): code, quotations and answers that go round in circles.

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
    """The configuration with which vLLM takes drafts from `Drafter`."""
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
    """Whether that configuration is ours."""
    return bool(speculative.model == f"{Drafter.__module__}.{Drafter.__qualname__}")


_MATCH_TOKENS = 4
"""Tokens at the end of a text that must have stood in it before."""


class Drafter:
    """Drafts the tokens that the next step verifies. One for each runner."""

    def __init__(self, vllm_config: Any) -> None:
        """As vLLM makes it."""
        if current_platform.is_cpu():
            register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})
        self._vllm_config = vllm_config
        self._probabilities: dict[str, Tensor] = {}
        """From what the drafts of each request were drawn, (k, V); missing where they were looked up."""
        self.passes: Counter[int] = Counter()
        """Forwards of each member in the last call of `propose`."""
        self.drafted: dict[str, int] = {}
        """Tokens that they drafted, by request: as many token rows."""

    def load_model(self, model: Any) -> None:
        """Nothing: the members that draft are those of `model`."""

    def propose(self, runner: Any, requested: Mapping[str, int], sampled: Sequence[Sequence[int]]) -> list[list[int]]:
        """Up to `wanted` tokens for each request of the batch, in its order.

        Args:
            runner: the model runner, right after it noted the tokens that the step sampled.
            wanted: drafts by request id; none for those that are missing.
            sampled: the tokens that the step sampled; none where a prompt goes on.
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
        """From what the drafts of a step were drawn, (their sum, V) in float32, in batch order; None if there are none.

        Zero where they were looked up: of greedy requests nobody reads it.
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
        """The drafts of some requests, and the probabilities (count, V) from which each was drawn.

        Args:
            runner: the model runner.
            mixture: what drafts for all of them.
            counts: their rows of the batch and how many tokens each needs, most first. None runs further than it needs: the KV
                cache, and the positions of the model, may end there.
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
        # Once all steps are on their way: a GPU need not wait between them.
        token_ids_by_step = [token_ids.tolist() for token_ids in tokens]
        return [
            (
                [ids[idx] for ids in token_ids_by_step[:count]],
                torch.stack([p_RV[idx] for p_RV in probabilities[:count]]),
            )
            for idx, count in enumerate(requested.tolist())
        ]


def look_up(tokens: NDArray[Any], count: int) -> list[int]:
    """The `count` tokens that followed the last `_MATCH` of `tokens` where these stood before, the last time; none if nowhere.

    Where the text ends before that many, it goes round in circles, and so does what follows.
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
    """Each request's value for each of its drafts, with `new` in place of `old`.

    In place of vLLM's kernel for CPUs (0.32), which writes to a copy of what is not int64: the temperatures and top-p of drafts
    were whatever the memory held.
    """
    counts_R = torch.diff(num_tokens_before, prepend=num_tokens_before.new_zeros(1))
    output_N.copy_(torch.repeat_interleave(torch.where(values_R == replace_from, replace_to, values_R), counts_R))


def _max_drafts(runner: Any, row: int, request_id: str) -> int:
    """Drafts that could still become tokens: the step that verifies them adds one more."""
    request = runner.requests[request_id]
    remaining: int = runner.max_model_len - int(runner.input_batch.num_tokens_no_spec[row])
    if request.sampling_params is not None and request.sampling_params.max_tokens is not None:
        remaining = min(remaining, request.sampling_params.max_tokens - len(request.output_token_ids))
    return remaining - 1


class _Sampler:
    """Draws a token for each of some rows of the batch, by its own temperature, top-k, top-p and allowed tokens."""

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
        """The tokens (R,) of the first R rows, and the probabilities (R, V) from which they were drawn.

        Of greedy rows nobody reads the probabilities.
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
    """What a forward of some members needs beside its inputs: metadata and slots by layer."""

    def __init__(self) -> None:
        self.attention: dict[str, Any] = {}
        self.slots: dict[str, Tensor] = {}


class _BlockTables:
    """Where some members' KV of some requests is."""

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
        """For one token of each of the first R requests, at these positions (R,)."""
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
