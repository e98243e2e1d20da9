"""vLLM's worker and model runner, extended to run each member only on its own rows of a step.

vLLM's runner calls, in this order: `_update_states` (requests join and leave the batch), `_prepare_inputs` (lays out the step),
`_get_slot_mappings` and the attention metadata builders (narrowed to each member's rows), `_model_forward` (ends the step). From
layout to end, the runner sees only the KV-cache groups of the running members, so that others cost nothing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.platforms import current_platform
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from chorus.serve.engine.allocator import keep_freed_memory
from chorus.serve.engine.drafts import Drafter
from chorus.serve.engine.grouped import MAX_MEAN_ROWS
from chorus.serve.engine.kv import groups_by_member
from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.rows import CatchUp, MergedRows, Step, merge_rows, plan_step

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class PopulationWorker(_Worker):
    """The platform's worker, with a `PopulationRunner`."""

    def init_device(self) -> None:
        """Build vLLM's runner, then turn it into a `PopulationRunner`: vLLM has no hook to choose the runner's class."""
        if current_platform.is_cpu():
            keep_freed_memory()
            # vLLM's bfloat16 attention uses AMX if the CPU has it, but does not request permission from Linux. Unless oneDNN has
            # already done so, the worker would die of an illegal instruction. Without AMX this call does nothing.
            torch.cpu._init_amx()
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type(f"Population{type(runner).__name__}", (PopulationRunner, type(runner)), {})
        runner.mixtures = {}
        runner._planned_batch = ([], b"", [])
        runner.groups_of = {}
        runner._merged = None
        if runner.speculative_config is not None:
            # vLLM omits logits processors that it does not support with drafts. Requests that need these get no drafts instead.
            with runner.without_speculation():
                processors = build_logitsprocs(runner.vllm_config, runner.device, PIN_MEMORY, is_pooling_model=False)
            runner.input_batch.logitsprocs = processors

    def held_members(self) -> list[int]:
        """Indices of this rank's members, for `collective_rpc`."""
        return list(self.model_runner.model.ranks.members)


class PopulationRunner(GPUModelRunner):
    """Overrides the platform's runner, which derives from the same class."""

    speculative_config: Any
    drafter: Drafter
    mixtures: dict[str, Mixture]
    """The current mixture of each request, by request id."""
    groups_of: dict[int, tuple[int, ...]]
    """The KV-cache groups of each member."""
    _step: Step
    _planned_batch: tuple[list[Mixture], bytes, list[Mapping[int, int]]]
    """Mixtures, scheduled tokens and missed tokens that `_step` was laid out for. They repeat while the same requests decode."""
    _merged: MergedRows | None
    """The merged rows of all running members, if they run together."""
    _merged_slots: torch.Tensor
    _drafts: Mapping[str, int] = {}
    """Number of drafts to make at the end of this step, by request id."""
    _speculates: bool = False
    """Whether this step verifies or makes drafts."""
    _all_groups: "_Groups"
    _running_groups: "_Groups"

    def _update_states(self, scheduler_output: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.mixtures.pop(request_id, None)
        self.mixtures.update(scheduler_output.mixtures)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: NDArray[np.int32]) -> Any:
        mixtures = [self.mixtures[request_id] for request_id in self.input_batch.req_ids]
        missed: list[Mapping[int, int]] = []
        if scheduler_output.missed:
            missed = [scheduler_output.missed.get(request_id, {}) for request_id in self.input_batch.req_ids]
        batch = (mixtures, num_scheduled_tokens.tobytes(), missed)
        if batch != self._planned_batch:
            local_members, num_members = self.model.ranks.members, self.model.num_members
            self._step = plan_step(
                mixtures,
                num_scheduled_tokens,
                num_members,
                self.device,
                local_members=local_members,
                missed=missed or None,
            )
            self._planned_batch = batch
            self._all_groups = _Groups.of_runner(self)
            self.groups_of = self._all_groups.groups_of
            # A rank without running members still prepares a batch, since vLLM needs at least one group.
            running: Sequence[int] = self._step.running
            self._merged = None
            if len(running) > 1 and self._can_merge:
                merged = merge_rows(self._step, self.model.grouped.ordered(running), num_scheduled_tokens, self.device)
                if merged.num_rows <= MAX_MEAN_ROWS * len(running):
                    running, self._merged = merged.members, merged
            self._running_groups = self._all_groups.of_members(running or local_members[:1])
        self.model.current.step = self._step
        self.model.current.is_merged = self._merged is not None
        self.model.current.catch_up_inputs = {
            member: self._catch_up_inputs(rows.catch_up)
            for member in self._step.running
            if (rows := self._step.rows[member]) is not None and rows.catch_up is not None
        }
        self.model.current.allows_unnormalised = self.input_batch.no_penalties
        self._running_groups.apply_to(self)
        self._drafts, is_verified = scheduler_output.drafts, bool(scheduler_output.scheduled_spec_decode_tokens)
        self._speculates = is_verified or bool(self._drafts)
        with nullcontext() if is_verified else self.without_speculation():
            # With speculation, vLLM would use its rejection sampler even without drafts.
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)

    @contextmanager
    def without_speculation(self) -> Iterator[None]:
        """Hide the speculative configuration from vLLM."""
        speculative = self.speculative_config
        self.speculative_config = self.vllm_config.speculative_config = None
        try:
            yield
        finally:
            self.speculative_config = self.vllm_config.speculative_config = speculative

    def _positions(self, catch_up: CatchUp) -> NDArray[np.int64]:
        positions: NDArray[np.int64] = (
            self.input_batch.num_computed_tokens_cpu[catch_up.requests] + catch_up.offsets
        ).astype(np.int64)
        return positions

    def _catch_up_inputs(self, catch_up: CatchUp) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions of a member's rows. All tokens are on the CPU, since asynchronous scheduling is off."""
        positions = self._positions(catch_up)
        token_ids = torch.from_numpy(self.input_batch.token_ids_cpu[catch_up.requests, positions])
        return token_ids.to(self.device), torch.from_numpy(positions).to(self.device)

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
        step = self.model.current.step
        if step is None:
            return by_group, by_layer
        for idx, group in enumerate(self.kv_cache_config.kv_cache_groups):
            rows = step.rows[group.kv_cache_spec.member]
            if rows is None:
                continue
            if rows.catch_up is None:
                by_group[idx] = by_group[idx][rows.tokens]
            else:
                table = self.input_batch.block_table[idx]
                block, slot = np.divmod(self._positions(rows.catch_up), table.block_size)
                slots = (
                    table.get_numpy_array()[rows.catch_up.requests, block].astype(np.int64) * table.block_size + slot
                )
                by_group[idx] = torch.from_numpy(slots).to(self.device)
            by_layer.update(dict.fromkeys(group.layer_names, by_group[idx]))
        if self._merged is not None:
            self._merged_slots = torch.cat([by_group[idx] for idx in range(len(by_group))])
            names = self.kv_cache_config.kv_cache_groups[0].layer_names
            by_layer = dict.fromkeys(names, self._merged_slots)
        return by_group, by_layer

    @cached_property
    def _can_merge(self) -> bool:
        """Whether members can run together: layers of the same depth share a KV cache tensor, and all blocks have one size."""
        grouped = self.model.grouped
        if grouped is None or any(len(groups) != 1 for groups in self._all_groups.groups_of.values()):
            return False
        if len({table.block_size for table in self._all_groups.tables}) != 1:
            return False
        layers = zip(*(grouped.attention_layers(member) for member in self.model.ranks.members), strict=True)
        return all(len({each.kv_cache.data_ptr() for each in depth}) == 1 for depth in layers)

    def _build_attention_metadata(self, num_tokens: int, num_reqs: int, max_query_len: int, **kwargs: Any) -> Any:
        step, merged = self.model.current.step, self._merged
        if step is None or merged is None:
            return super()._build_attention_metadata(
                num_tokens=num_tokens, num_reqs=num_reqs, max_query_len=max_query_len, **kwargs
            )
        tables = self.input_batch.block_table.block_tables
        parts = [
            (table.get_device_tensor(num_reqs), step.rows[member])
            for table, member in zip(tables, merged.members, strict=True)
        ]
        blocks = torch.cat([blocks if rows is None else blocks[rows.requests] for blocks, rows in parts])
        seq_lens_cpu = self.optimistic_seq_lens_cpu[:num_reqs]
        common = CommonAttentionMetadata(
            query_start_loc=merged.query_start_loc,
            query_start_loc_cpu=merged.query_start_loc_cpu,
            seq_lens=self.seq_lens[:num_reqs][merged.requests],
            seq_lens_cpu_upper_bound=seq_lens_cpu[merged.requests.cpu()],
            num_reqs=merged.num_requests,
            num_actual_tokens=merged.num_rows,
            max_query_len=merged.max_query_len,
            max_seq_len=int(seq_lens_cpu.max()),
            block_table_tensor=blocks,
            slot_mapping=self._merged_slots,
            causal=True,
        )
        metadata: dict[str, Any] = {}
        self.model.current.step = None  # else the builder would narrow the metadata to one member's rows
        for group in self.attn_groups[0]:
            built = group.get_metadata_builder().build(common_prefix_len=0, common_attn_metadata=common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        self.model.current.step = step
        return metadata, common

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.current.step is not None:
            self._all_groups.apply_to(self)
        try:
            return super()._model_forward(*args, **kwargs)
        finally:
            self.model.current.step, self.model.current.is_merged = None, False

    def _input_fits_in_drafter(self, *args: Any) -> bool:
        """Always True: the drafter checks the length of each request itself."""
        return True

    def propose_draft_token_ids(self, scheduler_output: Any, sampled_token_ids: Any, *args: Any) -> list[list[int]]:
        """Make the drafts that the scheduler planned for this step."""
        drafts: list[list[int]] = self.drafter.propose(self, self._drafts, sampled_token_ids)
        return drafts

    def _get_spec_decode_draft_probs(self, spec_decode_metadata: Any) -> torch.Tensor | None:
        if self.input_batch.sampling_metadata.all_greedy:
            return None  # the probabilities are not read
        batch = self.input_batch
        return self.drafter.probabilities(
            batch.req_ids, spec_decode_metadata.num_draft_tokens, batch.vocab_size, self.device
        )

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._speculates else self.without_speculation():
            output = super().sample_tokens(*args, **kwargs)
        if output is not None:
            # These go to the scheduler, which keeps the counts.
            output.seconds = self.model.stopwatch.take()
            output.draft_passes, output.drafted = Counter[int](), {}
            if self._drafts:
                output.draft_passes, output.drafted = self.drafter.passes.copy(), self.drafter.drafted.copy()
        return output


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """A runner's state per KV-cache group: three parallel lists. Each group belongs to one member."""

    config: Any
    attention: list[Any]
    tables: list[Any]
    groups_of: dict[int, tuple[int, ...]]

    @classmethod
    def of_runner(cls, runner: Any) -> Self:
        """The current lists of `runner`."""
        return cls(
            config=runner.kv_cache_config,
            attention=runner.attn_groups,
            tables=runner.input_batch.block_table.block_tables,
            groups_of=groups_by_member(runner.kv_cache_config, runner.model.num_members),
        )

    def of_members(self, members: Sequence[int]) -> Self:
        """The lists, restricted to the groups of `members`."""
        groups = [group for member in members for group in self.groups_of[member]]
        return replace(
            self,
            config=replace(self.config, kv_cache_groups=[self.config.kv_cache_groups[idx] for idx in groups]),
            attention=[self.attention[idx] for idx in groups],
            tables=[self.tables[idx] for idx in groups],
        )

    def apply_to(self, runner: Any) -> None:
        """Give these lists to `runner`."""
        runner.kv_cache_config = self.config
        runner.attn_groups = self.attention
        runner.input_batch.block_table.block_tables = self.tables
