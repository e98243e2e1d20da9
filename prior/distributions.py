"""Streams the members' full next-token distributions over a text, in batches; `prior.pools` is fitted on them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from chorus.population.manifest import Population, Tier
from chorus.prior.likelihoods import load_model, logits
from chorus.prior.pools import Block, Pooled, pooled_losses
from chorus.prior.quadratic import FloatArray
from chorus.prior.splits import ScoredSplit

_BLOCK_BYTES = 1 << 27  # of float32 log-probabilities, all members together


class MemberDistributions:
    """A `prior.pools.Source`: the members' distributions over splits. A member is loaded on first use and stays loaded."""

    def __init__(self, population: Population, directory: Path, splits: Sequence[ScoredSplit]) -> None:
        self._population = population
        self._directory = directory
        self._splits = splits
        self._models: dict[int, PreTrainedModel] = {}

    def num_tokens(self, part: int) -> int:
        """Number of scored tokens in a split."""
        return self._splits[part].num_scored

    def blocks(self, part: int, members: tuple[int, ...]) -> Iterator[Block]:
        """The split's tokens in batches. All members run a batch before the next one starts."""
        split = self._splits[part]
        rows = _BLOCK_BYTES // (4 * self._population.vocab_size * len(members))
        streams = [logits(self._model(member), split, rows=rows) for member in members]
        for batches in zip(*streams, strict=True):  # one batch per member
            columns_R, targets_R, _ = batches[0]
            log_p = [torch.log_softmax(logits_RV.float(), dim=-1) for _, _, logits_RV in batches]
            yield Block(positions_B=columns_R, targets_B=targets_R, log_p_KBV=torch.stack(log_p))

    def _model(self, member: int) -> PreTrainedModel:
        if member not in self._models:
            self._models[member] = load_model(self._directory / self._population.members[member].path, self._population)
        return self._models[member]


def needs_only_likelihoods(tier: Tier) -> bool:
    """Whether the true tokens' probabilities suffice to compute a tier's loss."""
    return tier.temperature == 1 and (tier.pool == "linear" or len(tier.members) == 1)


def tier_losses(population: Population, directory: Path, split: ScoredSplit, tiers: Sequence[Tier]) -> list[FloatArray]:
    """-log p of every scored token (N) under tiers of any pool and temperature. Runs the members."""
    idx_of = {member.name: idx for idx, member in enumerate(population.members)}
    mixtures = [
        Pooled(
            members=tuple(idx_of[name] for name in tier.members),
            weights=tier.weights,
            pool=tier.pool,
            temperature=tier.temperature,
        )
        for tier in tiers
    ]
    return pooled_losses(MemberDistributions(population, directory, [split]), 0, mixtures) if tiers else []
