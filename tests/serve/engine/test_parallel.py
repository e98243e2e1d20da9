"""Members spread over ranks: who holds what, and mixtures put together from the ranks' parts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.serve.engine.mixing import Exchange, make_headers, mix, mix_common
from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.parallel import SWITCH, fix_placement, place
from tests.serve.engine.test_mixing import mixtures


def population(num_members: int, tiers: list[list[int]]) -> Any:
    names = [f"m{idx}" for idx in range(num_members)]
    return SimpleNamespace(
        members=[SimpleNamespace(name=name) for name in names],
        tiers=[SimpleNamespace(members=[names[idx] for idx in tier]) for tier in tiers],
    )


def test_the_members_of_every_tier_are_spread_evenly() -> None:
    nested = [[4], [4, 0], [4, 0, 2, 6]]
    placed = place(population(8, nested), 2)
    assert sorted(placed[0] + placed[1]) == list(range(8))
    for tier in nested:
        counts = [len(set(tier) & set(members)) for members in placed]
        assert max(counts) - min(counts) <= 1
    assert len(placed[0]) == len(placed[1]) == 4


def in_step(num_ranks: int, ask: Any) -> list[Tensor]:
    """What `ask(rank, gather)` gives on each rank, all at once: `gather` waits for everybody, as the real one does."""
    parts: list[Any] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)

    def gather_for(rank: int) -> Any:
        def gather(part_RV: Tensor) -> Tensor:
            parts[rank] = part_RV
            barrier.wait(10)
            return torch.stack(parts)

        return gather

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: ask(rank, gather_for(rank)), range(num_ranks)))


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(mixtures(5), min_size=1, max_size=5), num_ranks=st.integers(2, 4), seed=st.integers(0, 2**31))
def test_parts_from_all_ranks_make_the_mixture(batch: list[Mixture], num_ranks: int, seed: int) -> None:
    logits_MRV = torch.randn(5, len(batch), 23, generator=torch.Generator().manual_seed(seed)) * 5
    is_alike = all(mixture == batch[0] for mixture in batch)

    def logits_of(member: int, rows: Tensor | None) -> Tensor:
        return logits_MRV[member] if rows is None else logits_MRV[member][rows]

    def ask(rank: int, gather: Any) -> Tensor:
        local_members = range(rank, 5, num_ranks)

        def local_logits(member: int, rows: Tensor | None) -> Tensor:
            assert member in local_members
            return logits_of(member, rows)

        exchange = Exchange(members=local_members, gather=gather, vocab_size=23)
        if is_alike:
            return mix_common(batch[0], len(batch), local_logits, exchange)
        return mix(make_headers(batch, 5), local_logits, exchange)

    expected_RV = mix(make_headers(batch, 5), logits_of)
    found = in_step(num_ranks, ask)
    for mixed_RV in found:
        torch.testing.assert_close(mixed_RV, expected_RV, atol=1e-5, rtol=1e-5)
        assert torch.equal(mixed_RV, found[0]), "ranks that disagree would sample different tokens"


def configured(directory: Any, num_ranks: int, **options: Any) -> Any:
    return SimpleNamespace(
        additional_config=options,
        parallel_config=SimpleNamespace(tensor_parallel_size=num_ranks),
        model_config=SimpleNamespace(model=str(directory)),
    )


def test_members_are_placed_once_and_only_on_several_ranks(tiny_population: Any) -> None:
    config = configured(tiny_population, 2, **{SWITCH: True})
    fix_placement(config)
    placed = config.additional_config[SWITCH]
    assert placed == place(manifest.load(tiny_population), 2)
    fix_placement(config)
    assert config.additional_config[SWITCH] is placed
    for unchanged in (configured(tiny_population, 1, **{SWITCH: True}), configured(tiny_population, 2)):
        fix_placement(unchanged)
        assert SWITCH not in unchanged.additional_config


def test_more_ranks_than_members_are_refused(tiny_population: Any) -> None:
    with pytest.raises(ChorusError, match="5 ranks cannot each hold a member: the population has only 4"):
        fix_placement(configured(tiny_population, 5, **{SWITCH: True}))
