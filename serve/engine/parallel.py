"""Member parallelism: whole members on each rank, and one exchange of pooled distributions per step.

vLLM's tensor parallelism shards every layer of every member, with two reductions per layer. Here each rank builds and runs its
members as on a single rank and pools their distributions; then the ranks combine these partial pools and sample the same tokens.

R rows, V vocabulary, W ranks
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Population

SWITCH = "chorus_member_parallel"
"""Key of vLLM's `--additional-config`: true spreads whole members over the ranks of `--tensor-parallel-size`."""


def tier_order(population: Population) -> list[int]:
    """Indices of all members in the order in which they first appear in tiers, so that nested tiers are prefixes of it."""
    index = {member.name: idx for idx, member in enumerate(population.members)}
    joined = dict.fromkeys(index[name] for tier in population.tiers for name in tier.members)
    return [*joined, *(idx for idx in index.values() if idx not in joined)]


def place(population: Population, num_ranks: int) -> list[list[int]]:
    """The indices of each rank's members: dealt out round-robin in `tier_order`, so that every tier is spread evenly."""
    placed: list[list[int]] = [[] for _ in range(num_ranks)]
    for turn, idx in enumerate(tier_order(population)):
        placed[turn % num_ranks].append(idx)
    return [sorted(members) for members in placed]


def fix_placement(vllm_config: Any) -> None:
    """Store in the configuration which rank holds which members, once for all processes: a refitted prior must not move them."""
    options = vllm_config.additional_config
    if isinstance(options.get(SWITCH, False), list):  # already stored
        return
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    if not options.pop(SWITCH, False) or num_ranks == 1:
        return
    population = manifest.load(Path(vllm_config.model_config.model))
    if num_ranks > len(population.members):
        raise ChorusError(
            f"{num_ranks} ranks cannot each hold a member: the population has only {len(population.members)}. Lower "
            f"--tensor-parallel-size, or remove {SWITCH} from --additional-config to shard every member."
        )
    options[SWITCH] = place(population, num_ranks)


class Ranks:
    """The members of this rank: all of them, if there is one rank or vLLM shards members itself."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)
        """Indices of the members that this rank runs, ascending."""

    @classmethod
    def of(cls, vllm_config: Any, num_members: int) -> "Ranks":
        """The `Ranks` of the calling process, as configured."""
        placed = vllm_config.additional_config.get(SWITCH)
        return SpreadRanks.join(placed) if placed else cls(range(num_members))

    def as_single_rank(self) -> AbstractContextManager[None]:
        """Context in which members are built and run."""
        return nullcontext()


class SpreadRanks(Ranks):
    """One of several ranks that each hold whole members."""

    def __init__(self, members: Sequence[int], all_ranks: Any, own_group: Any) -> None:
        super().__init__(members)
        self._all_ranks = all_ranks
        self._own_group = own_group

    @classmethod
    def join(cls, placed: Sequence[Sequence[int]]) -> Self:
        """Create a process group for each single rank. All ranks must call this together."""
        from vllm.distributed import parallel_state

        world, all_ranks = parallel_state.get_world_group(), parallel_state.get_tp_group()
        own_group = parallel_state.init_model_parallel_group(
            [[rank] for rank in range(world.world_size)],
            world.local_rank,
            torch.distributed.get_backend(all_ranks.device_group),
            group_name="member",
        )
        return cls(placed[all_ranks.rank_in_group], all_ranks, own_group)

    @contextmanager
    def _single_rank_group(self) -> Iterator[None]:
        from vllm.distributed import parallel_state

        parallel_state._TP = self._own_group
        try:
            yield
        finally:
            parallel_state._TP = self._all_ranks

    def as_single_rank(self) -> AbstractContextManager[None]:
        """Make the tensor-parallel group, which vLLM's layers look up when built and when run, one of size one."""
        return self._single_rank_group()

    def gather(self, part_RV: Tensor) -> Tensor:
        """The partial pools (W, R, V) of all ranks, in rank order and equal on all ranks."""
        gathered: Tensor = self._all_ranks.all_gather(part_RV.unsqueeze(0).contiguous(), dim=0)
        return gathered
