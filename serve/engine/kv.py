"""Memory-exact KV: each member's layers are KV-cache groups of their own, and a request holds blocks only in its members' groups.

All groups share one pool of blocks. A block is hashed together with its group, so a member's cached prefix is found by whoever uses
that member, whatever the tier, and never by a reader of KV that was not written.

vLLM's coordinator asks one manager per group for blocks. Ours asks those of a request's members: in the other groups it needs no
blocks, and caches and finds none. Which request has which members is noted by our scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, replay_boundaries
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
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
        return cls(**{each.name: getattr(spec, each.name) for each in fields(spec)}, member=member)

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
    return FullAttentionSpec(**{each.name: getattr(spec, each.name) for each in fields(FullAttentionSpec)})


@dataclass(kw_only=True, slots=True)
class _Allocation:
    """What one request has in the cache."""

    managers: tuple[tuple[int, Any], ...]
    """Groups of its members, each with its manager."""
    num_slots: int = 0
    """Tokens for which all of them have blocks."""
    num_cached: int = 0
    """Blocks that all of them were asked to cache; -1 where some were not."""
    computed: dict[int, int] = field(default_factory=dict)
    """Computed tokens by group, of members that were left out of some step; those of the others are the request's."""
    left_out: frozenset[int] = frozenset()
    """Groups that the request's step leaves out: the one that runs, or, once planned, the next."""

    def reset(self) -> None:
        """No member has any token or block: the request is over, or preempted and begins anew with all members."""
        self.num_slots = self.num_cached = 0
        self.computed, self.left_out = {}, frozenset()


class MemberCoordinator(KVCacheCoordinator):
    """Goes before vLLM's own coordinator and asks, for each request, only the managers of its members.

    vLLM's would ask the manager of every group four times per request and step: on a population of ten that cost a fifth of a
    step of sixteen one-member requests (bench/LOG.md). And as a request's members fill their blocks in step, none of them is asked
    at all while the last blocks have room: in all steps but one of each block's length.
    """

    groups_of: dict[int, tuple[int, ...]]
    """The groups of each member."""
    searched_request_id: str
    """The request for which the prefix cache is being searched: that search does not name it."""
    _allocations: dict[str, _Allocation]
    _no_blocks: tuple[tuple[()], ...]

    @classmethod
    def adopt(cls, kv_cache_manager: Any, groups_of: dict[int, tuple[int, ...]]) -> Self:
        """Give the coordinator of vLLM's manager our methods: vLLM offers no hook to choose its class."""
        adopted: Any = kv_cache_manager.coordinator
        adopted.__class__ = type(f"Member{type(adopted).__name__}", (cls, type(adopted)), {})
        adopted.groups_of = groups_of
        adopted.searched_request_id = ""
        adopted._allocations = {}
        adopted._no_blocks = ((),) * len(adopted.single_type_managers)
        kv_cache_manager.empty_kv_cache_blocks = _EmptyBlocks(kv_cache_manager.empty_kv_cache_blocks.blocks)
        population_coordinator: Self = adopted
        return population_coordinator

    def assign(self, request_id: str, members: Sequence[int]) -> None:
        """A new request has these members."""
        self._allocations[request_id] = _Allocation(managers=self._managers(members))

    def drop(self, request_id: str, member: int) -> None:
        """Give back the blocks of a member that leaves a running request.

        From now on its managers are not asked for this request: no later request can find KV of the tokens that the member does not
        see. What it cached before was written, and stays.
        """
        allocation, dropped = self._allocations[request_id], self._managers([member])
        allocation.managers = tuple(each for each in allocation.managers if each not in dropped)
        for group, manager in dropped:
            allocation.computed.pop(group, None)
            manager.free(request_id)
        allocation.left_out -= {group for group, _ in dropped}

    def is_behind(self, request_id: str) -> bool:
        """Whether some member of the request has not computed all of its tokens."""
        return bool(self._allocations[request_id].computed)

    def plan(self, request_id: str, members: Sequence[int], num_computed: int) -> dict[int, int]:
        """In its next step only `members` run for the request, which has computed so many tokens.

        Returns:
            How many of those tokens each of `members` has to catch up with. To be followed by `advance` if the step is scheduled.
        """
        allocation = self._allocations[request_id]
        running = {group for group, _ in self._managers(members)}
        allocation.left_out = frozenset(group for group, _ in allocation.managers if group not in running)
        for group in allocation.left_out:
            allocation.computed.setdefault(group, num_computed)
        allocation.num_cached = -1
        behind = {member: allocation.computed.get(self.groups_of[member][0], num_computed) for member in members}
        return {member: num_computed - computed for member, computed in behind.items() if computed < num_computed}

    def advance(self, request_id: str) -> None:
        """The step that was planned runs: its members have computed all tokens of the request."""
        allocation = self._allocations[request_id]
        allocation.computed = {group: allocation.computed[group] for group in allocation.left_out}

    def remove(self, request_id: str) -> None:
        """The request is over, and its blocks are free."""
        del self._allocations[request_id]

    def _managers(self, members: Sequence[int]) -> tuple[tuple[int, Any], ...]:
        return tuple(
            (group, self.single_type_managers[group]) for member in members for group in self.groups_of[member]
        )

    def find_longest_cache_hit(
        self, block_hashes: Any, max_cache_hit_length: int
    ) -> tuple[tuple[list[Any], ...], int, int]:
        """The longest prefix that all members of `searching` have cached, with the blocks of each; others get none."""
        found: list[list[Any]] = [[] for _ in self.single_type_managers]
        if not self.block_pool.enable_caching:
            return tuple(found), 0, 0
        length = max_cache_hit_length
        managers = self._allocations[self.searched_request_id].managers
        for group, manager in managers:
            (found[group],), length = manager.find_longest_cache_hit(
                block_hashes=block_hashes,
                max_length=length,
                kv_cache_group_ids=[group],
                block_pool=self.block_pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=group in self.eagle_group_ids,
                alignment_tokens=self.scheduler_block_size,
            )
        for group, manager in managers:
            del found[group][cdiv(length, manager.block_size) :]
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
        allocation = self._allocations[request_id]
        if num_tokens <= allocation.num_slots:
            return 0
        return sum(
            manager.get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks[group], *args, **kwargs)
            for group, manager in allocation.managers
        )

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Any,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> None:
        """Give a request that begins the cached blocks that were found for its members. External ones are refused at start."""
        managers = self._allocations[request_id].managers
        if any(request_id in manager.num_cached_block for _, manager in managers):
            return
        for group, manager in managers:
            manager.add_local_computed_blocks(
                request_id, new_computed_blocks[group], num_local_computed_tokens, num_external_computed_tokens
            )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, num_encoder_tokens: int = 0
    ) -> tuple[Any, ...]:
        """Blocks for the request's members, and none in the other groups; nothing at all if nobody needs one."""
        allocation = self._allocations[request_id]
        if num_tokens <= allocation.num_slots:
            return ()
        blocks: list[Any] = list(self._no_blocks)
        for group, manager in allocation.managers:
            blocks[group] = manager.allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        allocation.num_slots = min(
            len(manager.req_to_blocks[request_id]) * manager.block_size for _, manager in allocation.managers
        )
        return tuple(blocks)

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Make the full blocks of the request's members known to later requests; nothing of a member that it lacks."""
        if not self.block_pool.enable_caching:
            return
        allocation = self._allocations[request.request_id]
        num_full = num_computed_tokens // self.block_pool.hash_block_size
        if num_full == allocation.num_cached:
            return
        boundaries = replay_boundaries(
            request.num_prompt_tokens, self.scheduler_block_size, use_eagle=bool(self.eagle_group_ids)
        )
        for group, manager in allocation.managers:
            # What a member was left out of has never been written: nobody may find it.
            computed = allocation.computed[group] if group in allocation.left_out else num_computed_tokens
            manager.cache_blocks(
                request,
                self.get_num_cacheable_tokens(computed, group),
                retention_interval=self.retention_interval,
                replay_boundaries=boundaries,
            )
        allocation.num_cached = -1 if allocation.computed else num_full

    def free(self, request_id: str) -> None:
        """Free the blocks of a request that is over or preempted."""
        allocation = self._allocations[request_id]
        allocation.reset()
        for _, manager in allocation.managers:
            manager.free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The same, but the caller frees them, when no step that runs can write to them any more."""
        allocation = self._allocations[request_id]
        allocation.reset()
        return [block for _, manager in allocation.managers for block in manager.pop_blocks_for_free(request_id)]

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: full attention skips no block."""

    def new_step_starts(self) -> None:
        """Nothing: the managers of full attention do not ask."""


class _EmptyBlocks(KVCacheBlocks):
    """What a request gets in nearly every step. vLLM looks through all groups to see that it is nothing."""

    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        """None, or an empty list for each group."""
        return None if allow_none else super().get_block_ids(**kwargs)


def register_spec() -> None:
    """Tell vLLM which manager serves our spec. Its own specs first: it registers them only while the registry is empty."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(MemberAttentionSpec, FullAttentionManager, uniform_type_base_spec=MemberAttentionSpec)
