"""Drafts of a request's heaviest member: the mixture's law and its log-probabilities, whatever else runs."""

import os
import random
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from chorus.serve.engine.decoding import (
    MAX_DRAFTS,
    MIN_GAIN,
    Acceptance,
    DecodingChoice,
    best_draft_length,
    tokens_per_step,
    why_not_speculative,
)
from tests.reference import mixture_log_probs
from tests.serve.engine.asking import TIERS, check_against_reference, p_value
from tests.serve.engine.test_decoding import core_of, parameters

# vLLM and the libraries under it warn about themselves while they start; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def speculative(tier: str = "max", **more: Any) -> SamplingParams:
    return parameters(extra_args={"chorus_tier": tier, "chorus_decoding": "speculative"}, **more)


class Counted:
    """Drafts that steps verified, and those that they accepted."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drafted = self.accepted = 0
        observe = Acceptance.observe

        def counted(acceptance: Acceptance, drafted: int, accepted: int) -> None:
            if acceptance is core_of(engine).scheduler._chooser.acceptance:
                self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
            observe(acceptance, drafted, accepted)

        monkeypatch.setattr(Acceptance, "observe", counted)


@pytest.fixture
def counted(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(engine, monkeypatch)


def test_greedy_tokens_are_the_mixtures(engine: Any, tiny_population: Path, counted: Counted) -> None:
    prompts = [{"prompt_token_ids": list(range(2 + idx, 30 + 3 * idx))} for idx in range(9)]
    asked = [speculative(TIERS[idx % 3], temperature=0, max_tokens=40, logprobs=2) for idx in range(9)]
    outputs = engine.generate(prompts, asked, use_tqdm=False)
    for idx, output in enumerate(outputs):
        assert len(output.outputs[0].token_ids) == 40
        check_against_reference(tiny_population, TIERS[idx % 3], output)
    assert 0 < counted.accepted < counted.drafted


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_of_drafts_is_exact(engine: Any, tiny_population: Path, seed: int, counted: Counted) -> None:
    """Requests of all ways arrive, are preempted and aborted at random; some share prefixes, some end at a stop token."""
    draw, core, scheduler = random.Random(seed), engine.llm_engine, core_of(engine).scheduler
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    shared = [draw.randrange(2, 512) for _ in range(96)]
    num_added, outputs, tiers = 0, [], {}
    while num_added < 20 or core.has_unfinished_requests():
        for _ in range(min(draw.randint(0, 2), 20 - num_added)):
            prompt = shared[: draw.choice([0, 40, 96])] + [draw.randrange(2, 512) for _ in range(draw.randint(1, 9))]
            way = draw.choice(["speculative", "speculative", "auto", "plain", "sampled"])
            more = {} if way == "sampled" else {"temperature": 0, "logprobs": 1}
            tier = "max" if way == "sampled" else draw.choice(TIERS)
            name = f"{seed}-{num_added}"
            if way != "sampled":
                tiers[name] = tier
            asked = parameters(
                max_tokens=draw.randint(1, 140),
                stop_token_ids=[draw.randrange(512) for _ in range(draw.choice([0, 60]))],
                extra_args={"chorus_tier": tier, "chorus_decoding": way},
                **more,
            )
            core.add_request(name, {"prompt_token_ids": prompt}, asked)
            num_added += 1
        if draw.random() < 0.04:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if draw.random() < 0.04:
            core.abort_request([f"{seed}-{draw.randrange(num_added)}"])
        outputs += [each for each in core.step() if each.finished]
    assert counted.accepted > 0
    for output in outputs:
        if output.request_id in tiers:
            check_against_reference(tiny_population, tiers[output.request_id], output)
    assert scheduler._speculating == {}
    assert scheduler._kv._allocations == {}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_many_mixed_requests_leave_nothing_behind(engine: Any) -> None:
    """In all ways, some cancelled; greedy ones get the tokens of the plain mixture. CHORUS_REQUESTS=1000 is the long version."""
    draw, core, scheduler = random.Random(7), engine.llm_engine, core_of(engine).scheduler
    count = int(os.environ.get("CHORUS_REQUESTS", "100"))
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    prompts = [draw.choices(range(2, 512), k=draw.randint(1, 60)) for _ in range(count)]
    lengths = [draw.choice([1, 4, 8, 8, 8, 60]) for _ in range(count)]
    greedy, cancelled = set(range(0, count, 2)), set(draw.sample(range(count), count // 10))
    answers: dict[str, dict[int, list[int]]] = {"plain": {}, "mixed": {}}
    for run, found in answers.items():
        waiting = [idx for idx in range(count) if run == "mixed" or idx in greedy]
        while waiting or core.has_unfinished_requests():
            for idx in (waiting.pop() for _ in range(min(len(waiting), draw.randint(0, 3)))):
                way = (
                    "plain"
                    if run == "plain"
                    else draw.choice(["speculative", "auto"] + ["sampled"] * (idx not in greedy))
                )
                asked = parameters(
                    max_tokens=lengths[idx],
                    temperature=0 if idx in greedy else 1,
                    extra_args={"chorus_tier": TIERS[idx % 3], "chorus_decoding": way},
                )
                core.add_request(f"{run}-{idx}", {"prompt_token_ids": prompts[idx]}, asked)
            if run == "mixed" and draw.random() < 0.05:
                core.abort_request([f"mixed-{idx}" for idx in cancelled])
            for output in core.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
    assert set(range(count)) - cancelled <= answers["mixed"].keys()
    for idx in greedy & answers["mixed"].keys() - cancelled:
        assert answers["mixed"][idx] == answers["plain"][idx]
    assert scheduler._speculating == scheduler._sampling == scheduler._mixtures == scheduler._kv._allocations == {}
    assert scheduler._planned == {}
    assert scheduler._changed == set()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    ("more", "most_tokens"),
    [
        ({}, 2048),
        ({}, 8),
        ({"temperature": 0.7, "top_p": 0.8}, 2048),
        ({"temperature": 1.3, "top_k": 3}, 2048),
        ({"presence_penalty": 1.5}, 2048),
    ],
)
def test_answers_follow_the_law_of_the_mixture(
    engine: Any,
    tiny_population: Path,
    counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    most_tokens: int,
) -> None:
    """All 125 answers of three tokens out of five, 10,000 times, against Hugging Face. Some steps leave requests out."""
    monkeypatch.setattr(core_of(engine).scheduler, "max_num_scheduled_tokens", most_tokens)
    prompt, allowed = [5, 9], [17, 80, 200, 333, 480]
    law = {tokens: law_of(tiny_population, prompt, tokens, allowed, **more) for tokens in product(allowed, repeat=3)}
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    seen = dict.fromkeys(law, 0)
    for _ in range(20):
        asked = speculative(max_tokens=3, n=500, allowed_token_ids=allowed, **more)
        (output,) = engine.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
        for completion in output.outputs:
            seen[tuple(completion.token_ids)] += 1
    assert counted.accepted > 1000
    assert p_value([seen[tokens] for tokens in law], [p * 10_000 for p in law.values()]) > 1e-4


def law_of(
    directory: Path, prompt: list[int], tokens: tuple[int, ...], allowed: list[int], *, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, presence_penalty: float = 0.0,
) -> float:  # fmt: skip
    """The probability of an answer: the mixture's log-probabilities, reshaped one after the other as vLLM does."""
    log_p_TV = mixture_log_probs(directory, "max", [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    probability = 1.0
    for idx, token in enumerate(tokens):
        logits = {each: float(log_p_TV[idx, each]) - presence_penalty * (each in tokens[:idx]) for each in allowed}
        order = sorted(allowed, key=lambda each: -logits[each])[: top_k or None]
        p = torch.softmax(torch.tensor([logits[each] / temperature for each in order], dtype=torch.float64), -1)
        kept = [each for each, before in zip(order, (p.cumsum(0) - p).tolist(), strict=True) if before < top_p]
        if token not in kept:
            return 0.0
        probability *= float(p[order.index(token)] / p[: len(kept)].sum())
    return probability


def test_what_drafts_cannot_do_gets_none(engine: Any, counted: Counted) -> None:
    prompt = {"prompt_token_ids": list(range(2, 30))}
    for more in ({"min_p": 0.1}, {"logit_bias": {7: 100.0}}, {"seed": 3}):
        asked = parameters(max_tokens=12, extra_args={"chorus_tier": "max"}, **more)
        (output,) = engine.generate(prompt, asked, use_tqdm=False)
        if "logit_bias" in more:
            assert set(output.outputs[0].token_ids) == {7}
    assert counted.drafted == 0


def test_nothing_is_drafted_beside_requests_that_bar_it(engine: Any, tiny_population: Path, counted: Counted) -> None:
    core = engine.llm_engine
    plain = {"extra_args": {"chorus_decoding": "plain"}}
    core.add_request("first", {"prompt_token_ids": [5, 6]}, speculative(temperature=0, max_tokens=40, logprobs=1))
    for _ in range(6):
        core.step()
    before = counted.drafted
    assert before > 0
    barring = parameters(max_tokens=6, logprobs=2, logprob_token_ids=[7, 8], **plain)
    core.add_request("second", {"prompt_token_ids": [5, 6, 7]}, barring)
    finished: list[str] = []
    while core.has_unfinished_requests():
        for output in core.step():
            finished += [output.request_id] if output.finished else []
            if output.request_id == "first" and output.finished:
                check_against_reference(tiny_population, "max", output)
            if finished == [] or finished == ["first"]:
                assert counted.drafted == before
    assert sorted(finished) == ["first", "second"]
    assert counted.drafted > before
    assert core_of(engine).scheduler._draft_blockers == set()


@pytest.mark.parametrize("more", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}, {"seed": 3}])
def test_speculation_is_refused_where_it_would_not_be_exact(engine: Any, more: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    assert why_not_speculative(parameters(**more)) is not None
    with pytest.raises(VLLMValidationError, match="would not be exact"):
        engine.generate({"prompt_token_ids": [5]}, speculative(**more), use_tqdm=False)


@pytest.mark.parametrize(
    ("text", "count", "found"),
    [
        ("abcdXYZ-abcd", 3, "XYZ"),
        ("abcdX-abcdY-abcd", 2, "Y-"),
        ("-abcabcabc", 5, "abcab"),
        ("aaaaa", 3, "aaa"),
        ("abcde-bcde!", 2, ""),
        ("abcd", 2, ""),
        ("", 2, ""),
    ],
)
def test_what_followed_the_end_of_a_text_before_is_looked_up(text: str, count: int, found: str) -> None:
    from chorus.serve.engine.drafts import look_up

    tokens = np.array([ord(each) for each in text], dtype=np.int32)
    assert look_up(tokens, count) == [ord(each) for each in found]


def test_repetitions_are_drafted_without_a_pass(engine: Any, tiny_population: Path, counted: Counted) -> None:
    """Greedy answers of small random members go round in circles."""
    from chorus.serve.engine.drafts import Drafter

    passes = Counter[int]()
    propose = Drafter.propose

    def noted(drafter: Drafter, *arguments: Any) -> list[list[int]]:
        drafts = propose(drafter, *arguments)
        passes.update(drafter.passes)
        return drafts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "propose", noted)
        asked = speculative(temperature=0, max_tokens=200, logprobs=1)
        (output,) = engine.generate({"prompt_token_ids": [5, 6]}, asked, use_tqdm=False)
    check_against_reference(tiny_population, "max", output)
    assert sum(passes.values()) < counted.drafted


@pytest.fixture
def drafts_many(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts as there may be, whether they pay or not."""
    monkeypatch.setattr(core_of(engine).scheduler._chooser, "choose", lambda candidates: None)
    monkeypatch.setattr(core_of(engine).scheduler._chooser, "current", DecodingChoice(drafts=MAX_DRAFTS))


@pytest.mark.usefixtures("drafts_many")
def test_answers_fill_their_context_to_the_last_token(engine: Any, tiny_population: Path, counted: Counted) -> None:
    """Requests that draft together get there at different steps."""
    lengths = [226, 254, 240, 248, 255, 233]
    draw = random.Random(0)
    prompts = [{"prompt_token_ids": draw.choices(range(2, 512), k=length)} for length in lengths]
    asked = speculative(temperature=0, max_tokens=100, logprobs=1)
    outputs = engine.generate(prompts, asked, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [256 - length for length in lengths]
    for output in outputs:
        check_against_reference(tiny_population, "max", output)
    assert counted.accepted > 0


@pytest.mark.usefixtures("drafts_many")
def test_drafts_of_different_lengths_keep_their_own_parameters(engine: Any, counted: Counted) -> None:
    draw = random.Random(1)
    for _ in range(5):
        prompts = [{"prompt_token_ids": draw.choices(range(2, 512), k=12)} for _ in range(8)]
        fields: list[dict[str, Any]] = [
            {
                "max_tokens": draw.randint(2, 12),
                "allowed_token_ids": draw.sample(range(2, 512), 40),
                "presence_penalty": draw.choice([0.0, 1.5]),
                **draw.choice([{"temperature": 0}, {"top_k": 1}, {"temperature": 1.3, "top_p": 1e-6}]),
            }
            for _ in prompts
        ]
        drafted, plain = (
            engine.generate(
                prompts,
                [parameters(extra_args={"chorus_tier": "max", "chorus_decoding": way}, **each) for each in fields],
                use_tqdm=False,
            )
            for way in ("speculative", "plain")
        )
        for one, other in zip(drafted, plain, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert counted.accepted > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 0.99), min_size=1, max_size=5),
    st.integers(0, 5),
    st.floats(0.1, 10),
    st.floats(0, 10),
)
def test_the_best_length_is_the_fastest(rates: list[float], others: int, fixed: float, per_draft: float) -> None:
    best, speed = best_draft_length(rates, others, lambda drafts: fixed + per_draft * drafts)
    speeds = []
    for drafts in range(MAX_DRAFTS + 1):
        tokens = others + sum(sum(rate**j for j in range(drafts + 1)) for rate in rates)
        speeds.append(tokens / (fixed + per_draft * drafts))
    assert speed == pytest.approx(speeds[best])
    assert best == 0 or speed == pytest.approx(max(speeds))
    assert speed >= max(speeds) / (MIN_GAIN + 0.01)


def test_acceptance_is_learned_from_accepted_and_first_rejected_drafts() -> None:
    draw, acceptance = random.Random(0), Acceptance()
    assert acceptance.rate(0.7) == 0.7
    for _ in range(400):
        accepted = next((idx for idx in range(4) if draw.random() > 0.8), 4)
        acceptance.observe(4, accepted)
    assert acceptance.rate(0.1) == pytest.approx(0.8, abs=0.08)
    assert tokens_per_step(0.5, 2) == 1.75
