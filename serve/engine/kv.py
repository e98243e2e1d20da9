"""Memory-exact KV: each member's layers are KV-cache groups of their own, and a request holds blocks only in its members' groups.

All groups share one pool of blocks. A block is hashed together with its group, so a member's cached prefix is found by whoever uses
that member, whatever the tier, and never by a reader of KV that was not written.

vLLM's coordinator asks one manager per group for blocks. Ours asks those of a request's members: in the other groups it needs no
blocks, and caches and finds none. Which request has which members is noted by our scheduler.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, replay_boundaries
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class MemberAttentionSpec(FullAttentionSpec):
    """The KV cache of one layer of one member. Layers of different members never share a group."""

    member: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, member: int) -> Self:
        """The same cache, belonging to `member`."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, member=member)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group. vLLM takes an AssertionError for "these do not belong together".

        The inherited method builds the merged spec field by field and would drop `member`: vLLM would then put all members into one
        group without a word.
        """
        if any(spec.member != specs[0].member for spec in specs):
            raise AssertionError("layers of different members belong to different KV-cache groups")
        merged = FullAttentionSpec.merge([_plain(spec) for spec in specs])
        return cls.of(merged, specs[0].member)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers of the engine are this member's."""
        return all(
            isinstance(spec, MemberAttentionSpec) and spec.member == self.member for spec in kv_cache_specs.values()
        )


def groups_by_member(kv_cache_config: Any, num_members: int) -> dict[int, tuple[int, ...]]:
    """The KV-cache groups of each member, by index.

    One for each, where members have as many layers as each other. vLLM wants groups of like size, and cuts a deeper member into
    several. Where members are spread over ranks, groups stand in the order of the ranks.

    Raises:
        RuntimeError: some group is no member's, or some member has none.
    """
    groups: dict[int, tuple[int, ...]] = {}
    for idx, group in enumerate(kv_cache_config.kv_cache_groups):
        member = getattr(group.kv_cache_spec, "member", -1)
        groups[member] = (*groups.get(member, ()), idx)
    if sorted(groups) != list(range(num_members)):
        raise RuntimeError(
            f"vLLM made KV-cache groups for the members {list(groups)}, of {num_members}. Each member must have its own, or "
            "requests would read KV that was never written: a bug of chorus with this version of vLLM."
        )
    return groups


def _plain(spec: MemberAttentionSpec) -> FullAttentionSpec:
    return FullAttentionSpec(**{field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)})


class MemberCoordinator(KVCacheCoordinator):
    """Goes before vLLM's own coordinator and asks, for each request, only the managers of its members.

    vLLM's would ask the manager of every group four times per request and step: on a population of ten that cost a fifth of a
    step of sixteen one-member requests (bench/LOG.md).
    """

    member_sets: dict[str, tuple[int, ...]]
    """The members of each live request; the scheduler writes it."""
    searching: tuple[int, ...]
    """Members of the request for which the prefix cache is being searched: that search names no request."""
    groups_of: dict[int, tuple[int, ...]]
    """The groups of each member."""
    _no_blocks: tuple[tuple[()], ...]

    @classmethod
    def adopt(cls, coordinator: KVCacheCoordinator, groups_of: dict[int, tuple[int, ...]]) -> Self:
        """Give vLLM's coordinator our methods: vLLM offers no hook to choose its class."""
        own = type(f"Member{type(coordinator).__name__}", (cls, type(coordinator)), {})
        adopted: Any = coordinator
        adopted.__class__ = own
        adopted.member_sets = {}
        adopted.searching = ()
        adopted.groups_of = groups_of
        adopted._no_blocks = ((),) * len(adopted.single_type_managers)
        population_coordinator: Self = adopted
        return population_coordinator

    def find_longest_cache_hit(
        self, block_hashes: Any, max_cache_hit_length: int
    ) -> tuple[tuple[list[Any], ...], int, int]:
        """The longest prefix that all members of `searching` have cached, with the blocks of each; others get none."""
        found: list[list[Any]] = [[] for _ in self.single_type_managers]
        if not self.block_pool.enable_caching:
            return tuple(found), 0, 0
        length = max_cache_hit_length
        groups = [group for member in self.searching for group in self.groups_of[member]]
        for group in groups:
            manager = self.single_type_managers[group]
            (found[group],), length = manager.find_longest_cache_hit(
                block_hashes=block_hashes,
                max_length=length,
                kv_cache_group_ids=[group],
                block_pool=self.block_pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=group in self.eagle_group_ids,
                alignment_tokens=self.scheduler_block_size,
            )
        for group in groups:
            del found[group][cdiv(length, self.single_type_managers[group].block_size) :]
        return tuple(found), length, 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        num_encoder_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks that the request's members need."""
        return sum(
            self.single_type_managers[group].get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks[group], *args, **kwargs
            )
            for group in self._groups(request_id)
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, num_encoder_tokens: int = 0
    ) -> tuple[Any, ...]:
        """Blocks for the request's members, and none in the other groups."""
        blocks: list[Any] = list(self._no_blocks)
        for group in self._groups(request_id):
            blocks[group] = self.single_type_managers[group].allocate_new_blocks(
                request_id, num_tokens, num_tokens_main_model
            )
        return tuple(blocks)

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Make the full blocks of the request's members known to later requests; nothing of a member that it lacks."""
        if not self.block_pool.enable_caching:
            return
        boundaries = replay_boundaries(
            request.num_prompt_tokens, self.scheduler_block_size, use_eagle=bool(self.eagle_group_ids)
        )
        for group in self._groups(request.request_id):
            self.single_type_managers[group].cache_blocks(
                request,
                self.get_num_cacheable_tokens(num_computed_tokens, group),
                retention_interval=self.retention_interval,
                replay_boundaries=boundaries,
            )

    def free_member(self, request_id: str, member: int) -> None:
        """Give back the blocks of a member that leaves a running request."""
        for group in self.groups_of[member]:
            self.single_type_managers[group].free(request_id)

    def _groups(self, request_id: str) -> list[int]:
        return [group for member in self.member_sets[request_id] for group in self.groups_of[member]]

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: full attention skips no block."""


def register_spec() -> None:
    """Tell vLLM which manager serves our spec. Its own specs first: it registers them only while the registry is empty."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(MemberAttentionSpec, FullAttentionManager, uniform_type_base_spec=MemberAttentionSpec)
