"""Who runs what in a step: against a loop over requests and tokens."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.rows import plan_step


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
        assert rows.num_tokens == len(rows.tokens)
        assert rows.query_start_loc.tolist() == np.cumsum([0, *lengths[wanted]]).tolist()
        assert rows.max_query_len == max(lengths[wanted], default=0)
