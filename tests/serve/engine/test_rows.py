"""Who runs what in a step: against a loop over requests and tokens."""

import random

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.rows import merge_rows, plan_step


def mixture_of(members: set[int]) -> Mixture:
    weights = tuple(1 / len(members) for _ in members)
    return Mixture(tier="t", members=tuple(sorted(members)), weights=weights, pool="linear", temperature=1.0)


requests = st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 7)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(requests)
@example([({1, 2}, 3), ({1, 2}, 1)])
def test_each_member_gets_exactly_the_rows_of_its_requests(batch: list[tuple[set[int], int]]) -> None:
    lengths = np.array([length for _, length in batch], dtype=np.int32)
    step = plan_step([mixture_of(members) for members, _ in batch], lengths, 4, torch.device("cpu"))
    owners = [row for row, length in enumerate(lengths) for _ in range(length)]
    runners = set().union(*(members for members, _ in batch))
    assert set(step.running) == runners
    if all(members == batch[0][0] for members, _ in batch):
        assert step.common == mixture_of(batch[0][0])
        assert step.header_TH is None
        assert step.rows == (None,) * 4
        return
    assert step.common is None
    assert step.header_TH is not None
    assert step.header_TH.shape == (len(owners), 6)
    for token, row in enumerate(owners):
        assert {m for m in range(4) if step.header_TH[token, m] > 0} == batch[row][0]
    for member in range(4):
        wanted = [row for row, (members, _) in enumerate(batch) if member in members]
        rows = step.rows[member]
        if len(wanted) == len(batch):
            assert rows is None
            continue
        assert rows is not None
        assert rows.requests.tolist() == wanted
        assert rows.num_requests == len(wanted)
        assert rows.tokens.tolist() == [token for token, row in enumerate(owners) if row in wanted]
        assert rows.num_rows == len(rows.tokens)
        assert rows.catch_up is None
        assert rows.query_start_loc.tolist() == np.cumsum([0, *lengths[wanted]]).tolist()
        assert rows.max_query_len == max(lengths[wanted], default=0)


behind = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 3), st.integers(0, 5), min_size=1), st.integers(1, 4)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(behind)
@example([({1: 3}, 1)])
def test_a_member_runs_what_it_missed_before_what_is_scheduled(batch: list[tuple[dict[int, int], int]]) -> None:
    lengths = np.array([length for _, length in batch], dtype=np.int32)
    mixtures = [mixture_of(set(members)) for members, _ in batch]
    missed = [{m: count for m, count in members.items() if count} for members, _ in batch]
    step = plan_step(mixtures, lengths, 4, torch.device("cpu"), missed=missed)
    for member in step.running:
        wanted, starts, kept, tokens, token = list[tuple[int, int]](), [0], list[int](), list[int](), 0
        for row, (members, length) in enumerate(batch):
            if member in members:
                kept += range(len(wanted) + members[member], len(wanted) + members[member] + length)
                tokens += range(token, token + length)
                wanted += [(row, offset) for offset in range(-members[member], length)]
                starts.append(len(wanted))
            token += length
        rows = step.rows[member]
        if all(members.get(member) == 0 for members, _ in batch):
            assert rows is None
            continue
        assert rows is not None
        assert rows.num_rows == len(wanted)
        assert rows.query_start_loc.tolist() == starts
        assert rows.max_query_len == max(np.diff(starts))
        assert rows.tokens.tolist() == tokens
        if rows.catch_up is None:
            assert kept == list(range(len(wanted)))
        else:
            ran = zip(rows.catch_up.requests.tolist(), rows.catch_up.offsets.tolist(), strict=True)
            assert list(ran) == wanted
            assert rows.catch_up.kept.tolist() == kept


@settings(max_examples=200, deadline=None)
@given(behind, st.randoms(use_true_random=False))
def test_merged_rows_are_those_of_each_member_one_after_the_other(
    batch: list[tuple[dict[int, int], int]], random: random.Random
) -> None:
    lengths = np.array([length for _, length in batch], dtype=np.int32)
    mixtures = [mixture_of(set(members)) for members, _ in batch]
    step = plan_step(mixtures, lengths, 4, torch.device("cpu"), missed=[members for members, _ in batch])
    order = random.sample(step.running, len(step.running))
    merged = merge_rows(step, order, lengths, torch.device("cpu"))
    wanted = [
        (row, length + members[member])
        for member in order
        for row, (members, length) in enumerate(batch)
        if member in members
    ]
    assert list(merged.members) == order
    assert merged.requests.tolist() == [row for row, _ in wanted]
    assert merged.query_start_loc_cpu.tolist() == np.cumsum([0, *(length for _, length in wanted)]).tolist()
    assert merged.query_start_loc.tolist() == merged.query_start_loc_cpu.tolist()
    assert (merged.num_requests, merged.num_rows) == (len(wanted), sum(length for _, length in wanted))
    assert merged.max_query_len == max(length for _, length in wanted)
