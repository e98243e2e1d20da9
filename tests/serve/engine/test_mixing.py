"""The pools against the obvious formulas in float64, on random mixtures and logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chorus.serve.engine.mixing import make_headers, mix, mix_common, uniform_headers
from chorus.serve.engine.mixture import Mixture


def reference(mixture: Mixture, logits_MV: Tensor) -> Tensor:
    log_p_MV = torch.log_softmax(logits_MV.double(), dim=-1)
    weights_M1 = torch.tensor(mixture.weights, dtype=torch.float64).unsqueeze(1)
    chosen_mV = log_p_MV[list(mixture.members)]
    pooled_V = (weights_M1 * chosen_mV).sum(0) if mixture.pool == "log" else (weights_M1 * chosen_mV.exp()).sum(0).log()
    return torch.log_softmax(pooled_V / mixture.temperature, dim=-1)


@st.composite
def mixtures(draw: st.DrawFn, num_members: int) -> Mixture:
    members = sorted(draw(st.sets(st.integers(0, num_members - 1), min_size=1)))
    raw = [draw(st.floats(0.01, 1.0)) for _ in members]
    return Mixture(
        tier="drawn",
        members=tuple(members),
        weights=tuple(value / math.fsum(raw) for value in raw),
        pool=draw(st.sampled_from(["linear", "log"])),
        temperature=draw(st.sampled_from([1.0, 0.7, 1.5])),
    )


def pool(batch: list[Mixture], logits_MRV: Tensor, *, sum_probabilities: bool = True) -> Tensor:
    asked: list[int] = []

    def logits_of(member: int, rows: Tensor | None) -> Tensor:
        asked.append(member)
        return logits_MRV[member] if rows is None else logits_MRV[member][rows]

    mixed_RV = mix(make_headers(batch, len(logits_MRV)), logits_of, sum_probabilities=sum_probabilities)
    assert set(asked) == {m for mixture in batch for m in mixture.members}, "asked a member that no row runs"
    return mixed_RV


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(mixtures(5), min_size=1, max_size=6), seed=st.integers(0, 2**31), sum_probabilities=st.booleans())
def test_any_batch_of_mixtures_is_pooled_row_by_row(batch: list[Mixture], seed: int, sum_probabilities: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_MRV = torch.randn(5, len(batch), 37, generator=generator) * 5
    mixed_RV = pool(batch, logits_MRV, sum_probabilities=sum_probabilities)
    assert mixed_RV.dtype == torch.float32
    for row, mixture in enumerate(batch):
        torch.testing.assert_close(mixed_RV[row].double(), reference(mixture, logits_MRV[:, row]), atol=2e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(mixture=mixtures(4), num_rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rows_of_one_mixture_need_no_headers(mixture: Mixture, num_rows: int, seed: int) -> None:
    logits_MRV = torch.randn(4, num_rows, 23, generator=torch.Generator().manual_seed(seed)) * 5
    alike_RV = mix_common(mixture, num_rows, lambda member, rows: logits_MRV[member])
    assert torch.equal(alike_RV, pool([mixture] * num_rows, logits_MRV))


@pytest.mark.parametrize("pool_name", ["linear", "log"])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_give_no_nan(pool_name: str, scale: float) -> None:
    logits_MRV = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(0)) * scale
    mixture = Mixture(tier="t", members=(0, 1, 2), weights=(0.5, 0.5 - 1e-30, 1e-30), pool=pool_name, temperature=1.0)  # type: ignore[arg-type]
    mixed_RV = pool([mixture], logits_MRV)
    assert not mixed_RV.isnan().any()
    assert torch.logsumexp(mixed_RV, -1).item() == pytest.approx(0, abs=1e-5)


def test_tokens_that_one_member_rules_out_keep_the_others_probability() -> None:
    logits_MRV = torch.zeros(2, 1, 4)
    logits_MRV[0, 0, 2:] = -torch.inf
    mixture = Mixture(tier="t", members=(0, 1), weights=(0.5, 0.5), pool="linear", temperature=1.0)
    torch.testing.assert_close(pool([mixture], logits_MRV).exp(), torch.tensor([[0.375, 0.375, 0.125, 0.125]]))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(mixtures(4), min_size=1, max_size=6), seed=st.integers(0, 2**31), scale=st.sampled_from([1, 20, 60])
)
def test_probabilities_that_float32_cannot_hold_are_pooled_all_the_same(
    batch: list[Mixture], seed: int, scale: float
) -> None:
    logits_MRV = torch.randn(4, len(batch), 41, generator=torch.Generator().manual_seed(seed)) * scale
    mixed_RV = pool(batch, logits_MRV)
    for row, mixture in enumerate(batch):
        expected_V = reference(mixture, logits_MRV[:, row])
        torch.testing.assert_close(mixed_RV[row].double(), expected_V, atol=1e-4, rtol=1e-5)


def test_a_mixture_of_one_is_that_member_bit_for_bit() -> None:
    logits_MRV = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(0))
    alone = Mixture(tier="t", members=(1,), weights=(1.0,), pool="linear", temperature=1.0)
    both = Mixture(tier="u", members=(0, 2), weights=(0.25, 0.75), pool="linear", temperature=1.0)
    expected_RV = torch.log_softmax(logits_MRV[1], -1)
    assert torch.equal(pool([alone] * 4, logits_MRV), expected_RV)
    assert torch.equal(pool([alone, both, alone, both], logits_MRV)[[0, 2]], expected_RV[[0, 2]])


def test_low_precision_logits_are_pooled_in_float32() -> None:
    logits_MRV = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixture = Mixture(tier="t", members=(0, 1), weights=(0.9, 0.1), pool="linear", temperature=1.0)
    mixed_RV = pool([mixture] * 3, logits_MRV)
    for row in range(3):
        torch.testing.assert_close(mixed_RV[row].double(), reference(mixture, logits_MRV[:, row]), atol=1e-5, rtol=1e-5)


def test_headers_survive_as_the_raw_bits_of_a_smaller_dtype() -> None:
    header_RH = make_headers(
        [Mixture(tier="t", members=(0, 2), weights=(1 / 3, 2 / 3), pool="log", temperature=0.7)] * 5, 3
    )
    bits = header_RH.view(torch.bfloat16)
    assert torch.equal(bits[[4, 1]].contiguous().view(torch.float32), header_RH[[4, 1]])
    assert uniform_headers(2, 4)[0].tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, 1.0]
