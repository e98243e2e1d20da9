"""PopulationForCausalLM: all members in one vLLM model, whose logits are the log-probabilities of each row's mixture.

vLLM's own sampling, penalties, grammar masks, `logprobs` and echoed prompt log-probabilities therefore act on the mixture.

M members, T token rows, R rows that need logits, V vocabulary, D a member's width, H columns: those of the header and the hidden
states of the running members
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model
from vllm.transformers_utils.config import get_config

from chorus.population import manifest
from chorus.serve.engine.attention import CurrentStep, MemberLayers
from chorus.serve.engine.compiling import Compiled
from chorus.serve.engine.grouped import Grouped
from chorus.serve.engine.mixing import Exchange, header_width, mix, mix_common, uniform_headers
from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.parallel import Ranks, SpreadRanks, tier_order
from chorus.serve.engine.rows import Step
from chorus.serve.engine.stopwatch import MIXING, Stopwatch


@dataclass(slots=True)
class _OutputLayout:
    """Layout of the last output of `forward`, for `compute_logits`. A separate object: setting an attribute of a module is slow."""

    columns: dict[int, slice] = field(default_factory=dict)
    """Each member's columns."""
    common: Mixture | None = None
    """The mixture of all rows, if they have the same one."""


class PopulationForCausalLM(nn.Module):
    """The members, each built by vLLM from its own config and run on its rows of `current.step`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        directory = Path(vllm_config.model_config.model)
        population = manifest.load(directory)
        configs = [get_config(str(directory / member.path), trust_remote_code=False) for member in population.members]
        self.num_members = len(configs)
        self.current = CurrentStep()
        self.ranks = Ranks.of(vllm_config, self.num_members)
        with self.ranks.as_single_rank():
            # `member_0`, not `members.0`: vLLM parses the layer index from the name and fails on a second number.
            self._members: dict[int, Any] = {  # read in every step, and faster to read than a `ModuleDict`
                idx: init_vllm_registered_model(vllm_config, hf_config=configs[idx], prefix=f"member_{idx}")
                for idx in self.ranks.members
            }
        self.grouped = Grouped.of(self._members, [idx for idx in tier_order(population) if idx in self._members])
        """Runs members together; None if they differ in shape or are not plain Llamas."""
        self.members = nn.ModuleDict({str(idx): member for idx, member in self._members.items()})
        device = torch.device(vllm_config.device_config.device)
        self.stopwatch = Stopwatch(self.num_members, device)
        self._layers = {idx: MemberLayers(member, idx, self.current) for idx, member in self._members.items()}
        self._compiled = Compiled(self._members, configs, self._layers, vllm_config.compilation_config)
        self._pooling: dict[str, Any] = {"sum_probabilities": device.type == "cpu", "device": device}
        self._exchange: Exchange | None = None
        if isinstance(self.ranks, SpreadRanks):
            self._exchange = Exchange(
                members=self._members.keys(),
                gather=self.ranks.gather,
                vocab_size=population.vocab_size,
            )
        self._widths = [config.get_text_config().hidden_size for config in configs]
        self._layout = _OutputLayout()
        self._dtype = vllm_config.model_config.dtype
        # The float32 header is stored as raw bits in columns of a smaller dtype, since bf16 would round the weights.
        self._header_columns = header_width(self.num_members) * 4 // self._dtype.itemsize

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The first member's embeddings. vLLM requires this method of generative models, but never calls it for populations."""
        embeddings: Tensor = self._members[self.ranks.members[0]].embed_input_ids(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (T, H) of the running members, side by side in ascending order of members.

        If requests have different mixtures, each row starts with its header, and a member's columns are undefined, and never read,
        in rows that it does not run. If all have the same mixture, there is no header; with one member, its output is returned as
        it is.
        """
        step = self.current.step
        layout = self._layout
        layout.common = None if step is None else step.common
        if step is not None and layout.common is not None:
            running = step.running
            layout.columns = self._assign_columns(running, start=0)
            if not running:
                # All members of this mixture are on other ranks, but vLLM still needs one row per token.
                return torch.zeros(len(input_ids), 1, dtype=self._dtype, device=input_ids.device)
            hidden = self._run_members(running, step, input_ids, positions)
            return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)

        num_tokens = len(input_ids)
        header_TH = None if step is None else step.header_TH
        if header_TH is None:
            header_TH = uniform_headers(num_tokens, self.num_members)
        running = self.ranks.members if step is None else step.running
        columns = layout.columns = self._assign_columns(running, start=self._header_columns)
        width = self._header_columns + sum(self._widths[idx] for idx in running)
        hidden_TH = torch.empty(num_tokens, width, dtype=self._dtype, device=input_ids.device)
        hidden_TH[: len(header_TH), : self._header_columns] = header_TH.to(input_ids.device).view(self._dtype)
        hidden_TH[len(header_TH) :, : self._header_columns] = 0
        parts = self._run_members(running, step, input_ids, positions)
        for idx, hidden_rH in zip(running, parts, strict=True):
            rows = None if step is None else step.rows[idx]
            hidden_TH[slice(None) if rows is None else rows.tokens, columns[idx]] = hidden_rH
        return hidden_TH

    def draft(self, mixture: Mixture, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (R, V) of a drafting mixture for one token of each request, not necessarily normalised."""
        hidden = {idx: self._run((idx,), [(input_ids, positions)])[0] for idx in mixture.members}
        if self._is_single_member(mixture):
            return self._logits_of(mixture.members[0], hidden[mixture.members[0]])

        def logits_of(idx: int, rows: Tensor | None) -> Tensor:
            return self._logits_of(idx, hidden[idx] if rows is None else hidden[idx][rows])

        return mix_common(mixture, len(input_ids), logits_of, **self._pooling)

    def _run_members(
        self, running: Sequence[int], step: Step | None, input_ids: Tensor, positions: Tensor
    ) -> list[Tensor]:
        """Each member's hidden states for its token rows. Catch-up rows run as well, but are not returned."""
        inputs, kept = [], []
        for idx in running:
            rows = None if step is None else step.rows[idx]
            if rows is None:
                inputs.append((input_ids, positions))
            elif rows.catch_up is None:
                inputs.append((input_ids[rows.tokens], positions[..., rows.tokens]))
            else:
                inputs.append(self.current.catch_up_inputs[idx])
            kept.append(None if rows is None or rows.catch_up is None else rows.catch_up.kept)
        if self.current.is_merged and self.grouped is not None:
            by_member = dict(zip(running, inputs, strict=True))
            ordered = self.grouped.ordered(running)
            by_member_hidden = dict(zip(ordered, self._run(ordered, [by_member[idx] for idx in ordered]), strict=True))
            hidden = [by_member_hidden[idx] for idx in running]
        else:
            hidden = []
            for idx, each in zip(running, inputs, strict=True):
                hidden.append(self._run((idx,), [each])[0])
                if step is None:  # vLLM's warm-up, which compiles members
                    self._compiled.share(idx)
        return [each if rows is None else each[rows] for each, rows in zip(hidden, kept, strict=True)]

    def _run(self, running: Sequence[int], inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The hidden states of one member, or of several that run together."""
        start = self.stopwatch.mark()
        first = running[0]
        with self.ranks.as_single_rank(), self._layers[first].in_context():
            if self.grouped is None or (len(running) == 1 and first in self._compiled):
                hidden = [self._members[first](*inputs[0])]
            else:
                hidden = self.grouped(running, inputs)
        num_rows = sum(map(len, hidden))
        for idx, each in zip(running, hidden, strict=True):
            self.stopwatch.add(idx, start, share=len(each) / num_rows)
        return hidden

    def _assign_columns(self, running: Sequence[int], *, start: int) -> dict[int, slice]:
        columns = {}
        for idx in running:
            columns[idx] = slice(start, start + self._widths[idx])
            start += self._widths[idx]
        return columns

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Log-probabilities (R, V) of each row's mixture, float32. Rows are any selection from the last output of `forward`.

        If all rows have the same single member and no request has penalties, these are the member's raw logits: apart from
        penalties, vLLM's processing is invariant to an additive constant, and a log-softmax costs a twentieth of a small member's
        step (bench/LOG.md).
        """
        common = self._layout.common
        if common is not None and self._is_single_member(common) and self.current.allows_unnormalised:
            return self._logits_of(common.members[0], hidden_states)
        start = self.stopwatch.mark()

        def logits_of(idx: int, rows: Tensor | None) -> Tensor:
            logits_start = self.stopwatch.mark()
            hidden_RD = hidden_states[:, self._layout.columns[idx]]
            logits_RV = self._logits_of(idx, hidden_RD if rows is None else hidden_RD[rows])
            self.stopwatch.add(MIXING, logits_start, share=-1)
            return logits_RV

        if common is not None:
            mixed_RV = mix_common(common, len(hidden_states), logits_of, self._exchange, **self._pooling)
        else:
            header_RH = hidden_states[:, : self._header_columns].contiguous().view(torch.float32).cpu()
            mixed_RV = mix(header_RH, logits_of, self._exchange, **self._pooling)
        self.stopwatch.add(MIXING, start)
        return mixed_RV

    def _logits_of(self, idx: int, hidden_RD: Tensor) -> Tensor:
        start = self.stopwatch.mark()
        with self.ranks.as_single_rank():
            logits_RV: Tensor = self._members[idx].compute_logits(hidden_RD)
        self.stopwatch.add(idx, start)
        return logits_RV

    def _is_single_member(self, mixture: Mixture) -> bool:
        return len(mixture.members) == 1 and mixture.temperature == 1.0 and self._exchange is None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights named `members.{idx}.{name}`, each with its member's own loading rules."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        if self.grouped is not None:
            self.grouped.stack()
        return loaded
