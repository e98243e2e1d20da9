"""KV-cache allocation per member: each member's layers form their own groups, and a request holds blocks only for its members.

All groups share one pool of blocks. A block's hash includes its group, so a member's cached prefix serves requests of any tier with
that member, and KV that was never written is never found. vLLM's coordinator calls the manager of every group; ours calls only
those of a request's members, so the request neither allocates, caches nor finds blocks in other groups. The scheduler assigns the
members.
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
    """The KV cache spec of one member's layer. Layers of different members never share a group."""

    member: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, member: int) -> Self:
        """`spec`, assigned to `member`."""
        return cls(**{each.name: getattr(spec, each.name) for each in fields(spec)}, member=member)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group. On AssertionError, vLLM keeps the layers in different groups.

        The inherited method builds the merged spec field by field and would lose `member`: vLLM would then silently put all members
        into one group.
        """
        if any(spec.member != specs[0].member for spec in specs):
            raise AssertionError("layers of different members belong to different KV-cache groups")
        merged = FullAttentionSpec.merge([_plain(spec) for spec in specs])
        return cls.of(merged, specs[0].member)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers in `kv_cache_specs` belong to this member."""
        return all(
            isinstance(spec, MemberAttentionSpec) and spec.member == self.member for spec in kv_cache_specs.values()
        )


def groups_by_member(kv_cache_config: Any, num_members: int) -> dict[int, tuple[int, ...]]:
    """The indices of each member's KV-cache groups.

    Members with equally many layers have one group each; since vLLM requires groups of similar size, it splits a deeper member into
    several. If members are spread over ranks, the groups are ordered by rank.

    Raises:
        RuntimeError: a group belongs to no member, or a member has no group.
    """
    groups: dict[int, tuple[int, ...]] = {}
    for idx, group in enumerate(kv_cache_config.kv_cache_groups):
        member = getattr(group.kv_cache_spec, "member", -1)
        groups[member] = (*groups.get(member, ()), idx)
    if sorted(groups) != list(range(num_members)):
        raise RuntimeError(
            f"vLLM created KV-cache groups for members {list(groups)}, but there are {num_members} members and each needs its own: "
            "otherwise requests would read KV that was never written. This is a bug of chorus with this version of vLLM."
        )
    return groups


def _plain(spec: MemberAttentionSpec) -> FullAttentionSpec:
    return FullAttentionSpec(**{each.name: getattr(spec, each.name) for each in fields(FullAttentionSpec)})


@dataclass(kw_only=True, slots=True)
class _Allocation:
    """The KV cache of one request."""

    managers: tuple[tuple[int, Any], ...]
    """The groups of its members, each with its manager."""
    num_slots: int = 0
    """Tokens that the blocks of every group have room for."""
    num_cached: int = 0
    """Full blocks offered to the prefix cache in every group; -1 if the groups differ."""
    computed: dict[int, int] = field(default_factory=dict)
    """Computed tokens by group, only for members that are behind; all others have computed the request's tokens."""
    left_out: frozenset[int] = frozenset()
    """Groups that do not run in the request's current step or, once planned, its next one."""

    def reset(self) -> None:
        """Forget all tokens and blocks: the request has finished, or was preempted and restarts with all members."""
        self.num_slots = self.num_cached = 0
        self.computed, self.left_out = {}, frozenset()


class MemberCoordinator(KVCacheCoordinator):
    """Overrides vLLM's coordinator to call, for each request, only the managers of its members.

    vLLM's coordinator calls every group's manager four times per request and step: with ten members, that cost a fifth of a step of
    sixteen one-member requests (bench/LOG.md). Since a request's members fill their blocks in lockstep, no manager is called while
    the last blocks have room: managers are called in only one step per block length.
    """

    groups_of: dict[int, tuple[int, ...]]
    """The groups of each member."""
    searched_request_id: str
    """The request whose prefix is being searched. Set before each search, because vLLM's call does not pass it."""
    _allocations: dict[str, _Allocation]
    _no_blocks: tuple[tuple[()], ...]

    @classmethod
    def adopt(cls, kv_cache_manager: Any, groups_of: dict[int, tuple[int, ...]]) -> Self:
        """Turn the coordinator of vLLM's manager into one of this class: vLLM has no hook to choose the class."""
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
        """Register a new request with its members."""
        self._allocations[request_id] = _Allocation(managers=self._managers(members))

    def drop(self, request_id: str, member: int) -> None:
        """Free the blocks of a member that is dropped from a running request.

        Its managers no longer see this request, so later requests never find KV of tokens that the member did not compute. Blocks
        that it cached before were written, and stay valid.
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
        """Plan a step of the request that runs only `members`. Call `advance` if the step is scheduled.

        Returns:
            For each of `members` that is behind, how many of the request's `num_computed` tokens it must catch up with.
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
        """Mark the planned step as scheduled: its members have then computed all tokens of the request."""
        allocation = self._allocations[request_id]
        allocation.computed = {group: allocation.computed[group] for group in allocation.left_out}

    def remove(self, request_id: str) -> None:
        """Unregister a finished request whose blocks are free."""
        del self._allocations[request_id]

    def _managers(self, members: Sequence[int]) -> tuple[tuple[int, Any], ...]:
        return tuple(
            (group, self.single_type_managers[group]) for member in members for group in self.groups_of[member]
        )

    def find_longest_cache_hit(
        self, block_hashes: Any, max_cache_hit_length: int
    ) -> tuple[tuple[list[Any], ...], int, int]:
        """The longest prefix cached by all members of `searched_request_id`, with its blocks; none in other groups."""
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
        """Number of blocks that the request's members need."""
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
        """Give a new request the cached blocks found for its members. External blocks cannot occur: KV transfer is refused."""
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
        """New blocks by group, none in groups of other members; an empty tuple if no member needs any."""
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
        """Add the full blocks of the request's members to the prefix cache, as far as each member has computed them."""
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
            # KV of tokens that the member has not computed was never written, and must not be found.
            computed = allocation.computed[group] if group in allocation.left_out else num_computed_tokens
            manager.cache_blocks(
                request,
                self.get_num_cacheable_tokens(computed, group),
                retention_interval=self.retention_interval,
                replay_boundaries=boundaries,
            )
        allocation.num_cached = -1 if allocation.computed else num_full

    def free(self, request_id: str) -> None:
        """Free the blocks of a finished or preempted request."""
        allocation = self._allocations[request_id]
        allocation.reset()
        for _, manager in allocation.managers:
            manager.free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Like `free`, but returns the blocks; the caller frees them once no running step can write to them."""
        allocation = self._allocations[request_id]
        allocation.reset()
        return [block for _, manager in allocation.managers for block in manager.pop_blocks_for_free(request_id)]

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: full attention skips no blocks."""

    def new_step_starts(self) -> None:
        """Does nothing: managers of full attention do not need it."""


class _EmptyBlocks(KVCacheBlocks):
    """The empty allocation that a request gets in nearly every step. vLLM's class would search all groups to find it empty."""

    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        """None if allowed, else an empty list for each group."""
        return None if allow_none else super().get_block_ids(**kwargs)


def register_spec() -> None:
    """Register our spec's manager with vLLM, after vLLM's own specs: it registers those only while the registry is empty."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(MemberAttentionSpec, FullAttentionManager, uniform_type_base_spec=MemberAttentionSpec)
