"""Sampled members: the law of the mixture, and what a member that was left out computes when it is drawn again."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from vllm import SamplingParams

from chorus.population import manifest
from chorus.serve.engine.decoding import MAX_DRAFTS, MemberDraws, decoding_of, expected_num_members, why_not_sampled
from chorus.serve.engine.mixture import Mixture, Prior
from tests.reference import member_log_probs, mixture_log_probs
from tests.serve.engine.asking import TOLERANCE, check_against_reference, greedy, p_value

# vLLM and the libraries under it warn about themselves while they start; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def mixture(*weights: float, **more: Any) -> Mixture:
    fields: dict[str, Any] = {"tier": "t", "members": tuple(range(len(weights))), "pool": "linear", "temperature": 1.0}
    return Mixture(**(fields | {"weights": weights} | more))


def parameters(**more: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 1, "max_tokens": 8, "ignore_eos": True} | more))


def sampled(**more: Any) -> SamplingParams:
    return parameters(extra_args={"chorus_tier": "max", "chorus_decoding": "sampled"}, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1},
        {"frequency_penalty": 1}, {"repetition_penalty": 1.1}, {"logprobs": 0}, {"logit_bias": {5: 1.0}},
        {"min_tokens": 2}, {"allowed_token_ids": [5]},
    ],
)  # fmt: skip
def test_what_reshapes_or_reports_the_mixture_needs_all_members(more: dict[str, Any]) -> None:
    assert why_not_sampled(parameters(**more), mixture(0.5, 0.5)) is not None


def test_log_pools_and_temperatures_of_tiers_need_all_members() -> None:
    assert why_not_sampled(parameters(), mixture(0.5, 0.5)) is None
    assert why_not_sampled(parameters(), mixture(0.5, 0.5, pool="log")) is not None
    assert why_not_sampled(parameters(), mixture(1.0, pool="log")) is None
    assert why_not_sampled(parameters(), mixture(0.5, 0.5, temperature=1.2)) is not None


def test_members_are_drawn_by_their_weights() -> None:
    weights, draws = (0.5, 0.3, 0.15, 0.05), MemberDraws(None)
    counts = Counter(draws.draw(mixture(*weights), idx).members[0] for idx in range(20_000))
    assert stats.chisquare([counts[m] for m in range(4)], [20_000 * w for w in weights]).pvalue > 1e-6


def test_a_seed_and_a_position_settle_the_member() -> None:
    whole = mixture(0.25, 0.25, 0.25, 0.25)
    first, second = MemberDraws(7), MemberDraws(7)
    forwards = [first.draw(whole, idx) for idx in range(40)]
    assert [second.draw(whole, idx) for idx in reversed(range(40))] == forwards[::-1]
    assert [MemberDraws(8).draw(whole, idx) for idx in range(40)] != forwards
    assert len({each.members for each in forwards}) == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=3), st.integers(1, 6))
def test_members_that_run_are_those_of_others_and_those_that_are_drawn(others: list[int], num_sampled: int) -> None:
    whole = mixture(0.4, 0.3, 0.2, 0.1)
    chances = [1.0 if m in others else 1 - (1 - w) ** num_sampled for m, w in enumerate(whole.weights)]
    expected, plain = expected_num_members([whole] * num_sampled, [(m,) for m in others])
    assert expected == pytest.approx(sum(chances))
    assert plain == 4


def core_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core


@dataclass(frozen=True)
class Row:
    """Logits with which a token was drawn."""

    request_id: str
    token_ids: list[int]
    members: tuple[int, ...]
    log_p_V: Tensor


@contextmanager
def recorded(engine: Any) -> Iterator[list[Row]]:
    """The rows of every step in which each request has one, as the sampler sees them."""
    runner = core_of(engine).model_executor.driver_worker.worker.model_runner
    rows: list[Row] = []
    plain = type(runner.model).compute_logits

    def compute_logits(hidden_states: Tensor) -> Tensor:
        logits_RV: Tensor = plain(runner.model, hidden_states)
        batch, lengths = runner.input_batch, runner.optimistic_seq_lens_cpu
        if len(logits_RV) == len(batch.req_ids):
            for row, request_id in enumerate(batch.req_ids):
                token_ids = batch.token_ids_cpu[row, : int(lengths[row])].tolist()
                members = runner.mixtures[request_id].members
                rows.append(Row(request_id, token_ids, members, torch.log_softmax(logits_RV[row].double(), -1)))
        return logits_RV

    runner.model.compute_logits = compute_logits
    try:
        yield rows
    finally:
        del runner.model.compute_logits


def assert_exact(rows: list[Row], directory: Path) -> None:
    """Every row is that of its members after its tokens: Hugging Face runs each request once, over all of its tokens."""
    assert rows
    for request_id in {row.request_id for row in rows}:
        own = [row for row in rows if row.request_id == request_id]
        longest = max((row.token_ids for row in own), key=len)
        for members in {row.members for row in own}:
            if len(members) == 1:
                log_p_TV = member_log_probs(directory, f"t0-c{members[0]:02}", longest)
            else:
                log_p_TV = mixture_log_probs(directory, "max", longest)
            for row in (row for row in own if row.members == members):
                assert row.token_ids == longest[: len(row.token_ids)]
                torch.testing.assert_close(row.log_p_V, log_p_TV[len(row.token_ids) - 1], atol=TOLERANCE, rtol=0)


def test_one_member_runs_at_each_token_and_catches_up_exactly(engine: Any, tiny_population: Path) -> None:
    scheduler = core_of(engine).scheduler
    with recorded(engine) as rows:
        engine.generate({"prompt_token_ids": list(range(2, 42))}, sampled(max_tokens=60), use_tqdm=False)
    assert [len(row.members) for row in rows] == [4] + [1] * 59
    assert len({row.members for row in rows}) == 5
    assert_exact(rows, tiny_population)
    assert scheduler._sampling == {}
    assert scheduler._kv._allocations == {}


def test_a_prefix_that_only_some_members_computed_is_not_found(engine: Any, tiny_population: Path) -> None:
    """The trap: a block is full of tokens, but not of every member's keys and values."""
    engine.reset_prefix_cache()
    prompt = list(range(2, 42))
    (output,) = engine.generate({"prompt_token_ids": prompt}, sampled(max_tokens=150), use_tqdm=False)
    again = prompt + list(output.outputs[0].token_ids)
    for tier in ("max", "standard", "economy"):
        (output,) = engine.generate({"prompt_token_ids": again}, greedy(tier), use_tqdm=False)
        check_against_reference(tiny_population, tier, output)


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_of_catching_up_is_exact(engine: Any, tiny_population: Path, seed: int) -> None:
    """Sampled, automatic and greedy requests arrive, are preempted and aborted at random; some share prefixes."""
    draw, core, scheduler = random.Random(seed), engine.llm_engine, core_of(engine).scheduler
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    shared = [draw.randrange(2, 512) for _ in range(96)]
    num_added, outputs = 0, []
    with recorded(engine) as rows:
        while num_added < 16 or core.has_unfinished_requests():
            for _ in range(min(draw.randint(0, 2), 16 - num_added)):
                prompt = shared[: draw.choice([0, 40, 96])] + [
                    draw.randrange(2, 512) for _ in range(draw.randint(1, 9))
                ]
                kind = draw.choice(["sampled", "auto", "greedy"])
                asked = greedy("max", max_tokens=draw.randint(1, 40))
                asked.extra_args["chorus_decoding"] = "plain"
                if kind != "greedy":
                    arguments = {"chorus_tier": "max", "chorus_decoding": kind}
                    asked = parameters(max_tokens=draw.randint(1, 40), extra_args=arguments)
                core.add_request(f"{seed}-{num_added}", {"prompt_token_ids": prompt}, asked)
                num_added += 1
            if draw.random() < 0.04:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            if draw.random() < 0.04:
                core.abort_request([f"{seed}-{draw.randrange(num_added)}"])
            outputs += [each for each in core.step() if each.finished]
    assert {len(row.members) for row in rows} == {1, 4}
    assert_exact(rows, tiny_population)
    for output in outputs:
        if output.outputs[0].logprobs:
            check_against_reference(tiny_population, "max", output)
    assert scheduler._sampling == {}
    assert scheduler._planned == {}
    assert scheduler._kv._allocations == {}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("way", ["sampled", "speculative"])
def test_tokens_follow_the_law_of_the_mixture(engine: Any, tiny_population: Path, way: str) -> None:
    """The second token of 20,000 answers, against the sum over all first ones, by Hugging Face."""
    prompt = [5, 9]
    first_V = mixture_log_probs(tiny_population, "max", prompt)[-1].exp()
    continued = [[*prompt, token] for token in range(len(first_V))]
    second_VV = mixture_log_probs(tiny_population, "max", continued)[:, -1].exp()
    counts_V = torch.zeros(len(first_V))
    asked = parameters(max_tokens=3, n=500, extra_args={"chorus_tier": "max", "chorus_decoding": way})
    for _ in range(40):
        (output,) = engine.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
        for completion in output.outputs:
            counts_V[completion.token_ids[1]] += 1
    assert p_value(counts_V.tolist(), (20_000 * first_V @ second_VV).tolist()) > 1e-4


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(engine: Any) -> None:
    prompt = {"prompt_token_ids": list(range(2, 30))}
    seeded = parameters(seed=11, max_tokens=24, extra_args={"chorus_tier": "max"})
    (alone,) = engine.generate(prompt, seeded, use_tqdm=False)
    among = engine.generate([prompt] * 5, [seeded, *[greedy("max", max_tokens=24)] * 4], use_tqdm=False)
    assert alone.outputs[0].token_ids == among[0].outputs[0].token_ids


@pytest.mark.parametrize("more", [{"top_p": 0.5}, {"temperature": 0}, {"logprobs": 1}])
def test_sampled_is_refused_where_it_would_not_be_exact(engine: Any, more: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="would not be exact"):
        engine.generate({"prompt_token_ids": [5]}, sampled(**more), use_tqdm=False)


def test_plain_runs_all_members_at_every_token(engine: Any) -> None:
    with recorded(engine) as rows:
        arguments = {"chorus_tier": "max", "chorus_decoding": "plain"}
        engine.generate({"prompt_token_ids": [5]}, parameters(extra_args=arguments), use_tqdm=False)
    assert {len(row.members) for row in rows} == {4}


def reported(engine: Any, *, seed: int | None = None, top_p: float = 1.0, **arguments: Any) -> dict[str, Any]:
    """The report on forty tokens of the largest tier, at temperature 1."""
    extra = {"chorus_tier": "max", "chorus_report_in_stop_reason": "", **arguments}
    parameters = SamplingParams(
        temperature=1, max_tokens=40, ignore_eos=True, seed=seed, top_p=top_p, extra_args=extra
    )  # fmt: skip
    (output,) = engine.generate([{"prompt_token_ids": list(range(2, 40))}], parameters, use_tqdm=False)
    assert output.outputs[0].stop_reason is None
    report: dict[str, Any] = output.kv_transfer_params["decoding"]
    return report


def test_a_report_counts_the_passes_of_plain_steps(engine: Any) -> None:
    assert reported(engine, chorus_decoding="plain") == {
        "passes_per_token": 4.0, "drafts": 0, "accepted": 0, "caught_up_rows": 0
    }  # fmt: skip


def test_a_report_counts_the_rows_with_which_sampled_members_caught_up(engine: Any, tiny_population: Path) -> None:
    mixture = Prior(tiny_population).mixture("max")
    draws, computed, caught_up = MemberDraws(5), dict.fromkeys(range(4), 0), 0
    for token in range(1, 40):  # all members run the prompt, which gives the first token
        (member,) = draws.draw(mixture, token).members
        caught_up += token - 1 - computed[member]
        computed[member] = token
    assert reported(engine, seed=5, chorus_decoding="sampled") == {
        "passes_per_token": round((4 + 39) / 40, 3), "drafts": 0, "accepted": 0, "caught_up_rows": caught_up
    }  # fmt: skip


def test_a_report_counts_drafts(engine: Any) -> None:
    report = reported(engine, chorus_decoding="speculative")
    steps = 40 - report["accepted"]
    assert 0 < report["accepted"] <= report["drafts"]
    # All members verify, and one has drafted: what is verified, and perhaps more for a step that never came.
    passes = round(40 * report["passes_per_token"])
    assert 4 * steps + report["drafts"] <= passes <= 4 * steps + report["drafts"] + MAX_DRAFTS


def test_a_tier_prefers_a_way_and_a_request_chooses_it() -> None:
    prefers = replace(mixture(0.5, 0.5), decoding="sampled")
    assert decoding_of(None, sampled(), prefers) == "sampled"
    assert decoding_of(None, sampled(top_p=0.9), prefers) == "auto", "that would not be exact"
    assert decoding_of("plain", sampled(), prefers) == "plain"
    assert decoding_of(None, parameters(min_p=0.1), replace(prefers, decoding="speculative")) == "auto"
    assert decoding_of(None, parameters(min_p=0.1), replace(prefers, decoding="plain")) == "plain"


@pytest.mark.parametrize("decoding", ["plain", "sampled"])
def test_requests_are_decoded_as_their_tier_prefers(engine: Any, engine_directory: Path, decoding: Any) -> None:
    before = manifest.load(engine_directory)
    tier = before.tiers[-1].model_copy(update={"decoding": decoding})
    manifest.save(before.model_copy(update={"tiers": (*before.tiers[:-1], tier)}), engine_directory)
    try:
        passes = reported(engine)["passes_per_token"]
        assert passes == {"plain": 4.0, "sampled": round((4 + 39) / 40, 3)}[decoding]
        assert reported(engine, chorus_decoding="plain", top_p=0.9)["passes_per_token"] == 4.0
    finally:
        manifest.save(before, engine_directory)
