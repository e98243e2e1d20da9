"""What vLLM offers, acting on the mixture: pools, the law of sampling, nuclei, penalties, grammars, seeds; and no leaks."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from chorus.population import manifest
from tests.reference import mixture_log_probs
from tests.serve.engine.asking import p_value

pytestmark = pytest.mark.filterwarnings("default")

PROMPT = list(range(40, 60))


def ask(engine: Any, **parameters: Any) -> Any:
    """One request at `max`, unless `tier` says otherwise."""
    extra = {"chorus_tier": parameters.pop("tier", "max")}
    (output,) = engine.generate(
        {"prompt_token_ids": PROMPT}, SamplingParams(extra_args=extra, **parameters), use_tqdm=False
    )
    return output


@pytest.mark.parametrize(("pool", "temperature"), [("log", 1.0), ("log", 1.4), ("linear", 0.6)])
def test_each_pool_and_temperature_is_exact(engine: Any, engine_directory: Path, pool: str, temperature: float) -> None:
    before = manifest.load(engine_directory)
    changed = before.tier("max").model_copy(update={"pool": pool, "temperature": temperature})
    try:
        manifest.save(before.model_copy(update={"tiers": (*before.tiers[:2], changed)}), engine_directory)
        outputs = engine.generate(
            [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": PROMPT[:9]}, {"prompt_token_ids": PROMPT}],
            [
                SamplingParams(
                    temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, extra_args={"chorus_tier": tier}
                )
                for tier in ("max", "standard", "max")
            ],
            use_tqdm=False,
        )
        for output, tier in zip(outputs, ("max", "standard", "max"), strict=True):
            tokens = list(output.outputs[0].token_ids)
            log_p_TV = mixture_log_probs(engine_directory, tier, output.prompt_token_ids + tokens)
            rows_TV = log_p_TV[len(output.prompt_token_ids) - 1 : -1]
            assert tokens == rows_TV.argmax(-1).tolist()
            got = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            assert got == pytest.approx(rows_TV.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).tolist(), abs=1e-4)
    finally:
        manifest.save(before, engine_directory)


def test_twenty_thousand_draws_follow_the_mixture(engine: Any, tiny_population: Path) -> None:
    outputs = [ask(engine, n=4_000, max_tokens=1, temperature=1) for _ in range(5)]
    counts = Counter(completion.token_ids[0] for output in outputs for completion in output.outputs)

    def p(tier: str) -> float:
        expected_V = mixture_log_probs(tiny_population, tier, PROMPT)[-1].exp() * sum(counts.values())
        return p_value([counts[token] for token in range(512)], expected_V.tolist())

    assert p("max") > 1e-3
    assert p("standard") < 1e-9, "the test could not tell one mixture from another"


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(0.5, 0, 0.0), (1.0, 7, 0.0), (1.0, 0, 0.3)])
def test_truncation_acts_on_the_mixture(
    engine: Any, tiny_population: Path, top_p: float, top_k: int, min_p: float
) -> None:
    output = ask(engine, n=600, max_tokens=1, temperature=1, top_p=top_p, top_k=top_k, min_p=min_p, seed=2)
    drawn = {completion.token_ids[0] for completion in output.outputs}
    p_V = mixture_log_probs(tiny_population, "max", PROMPT)[-1].exp()
    order = p_V.argsort(descending=True)
    if top_p < 1:
        kept = order[: int((p_V[order].cumsum(0) < top_p).sum()) + 1]
    elif top_k:
        kept = order[:top_k]
    else:
        kept = (p_V >= min_p * p_V.max()).nonzero().flatten()
    assert drawn <= set(kept.tolist())
    assert len(drawn) > 0.5 * min(len(kept), 50)


def test_penalties_act_on_the_mixtures_log_probabilities(engine: Any, tiny_population: Path) -> None:
    output = ask(engine, temperature=0, max_tokens=24, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.5)
    tokens = list(output.outputs[0].token_ids)
    log_p_TV = mixture_log_probs(tiny_population, "max", PROMPT + tokens)[len(PROMPT) - 1 : -1]
    for step, token in enumerate(tokens):
        row = log_p_TV[step].clone()
        seen = torch.tensor(sorted({*PROMPT, *tokens[:step]}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.3, row[seen] * 1.3)
        for earlier in tokens[:step]:
            row[earlier] -= 0.5
        assert token == int(row.argmax())


def test_bias_grammar_stop_and_seed(engine: Any) -> None:
    biased = ask(engine, temperature=0, max_tokens=3, ignore_eos=True, logit_bias={77: 100.0})
    assert list(biased.outputs[0].token_ids) == [77, 77, 77]
    grammar = StructuredOutputsParams(regex=r"(yes|no), [0-9]{2}")
    assert re.fullmatch(r"(yes|no), [0-9]{2}", ask(engine, max_tokens=20, structured_outputs=grammar).outputs[0].text)
    text = ask(engine, temperature=0, max_tokens=30, ignore_eos=True).outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    assert (
        ask(engine, temperature=0, max_tokens=30, ignore_eos=True, stop=[stop]).outputs[0].text
        == text[: text.index(stop)]
    )
    first, again, other = (ask(engine, max_tokens=20, seed=seed).outputs[0].token_ids for seed in (5, 5, 6))
    assert first == again != other


def test_a_thousand_random_requests_leave_nothing_behind(engine: Any) -> None:
    draw, core = random.Random(0), engine.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    runner = core.model_executor.driver_worker.worker.model_runner
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    live: list[str] = []
    for idx in range(1_000):
        arguments: dict[str, object] = {"chorus_tier": draw.choice(["economy", "standard", "max"])}
        if draw.random() < 0.2:
            arguments["chorus_time_budget_ms"] = draw.choice([1, 50, 10_000])
        prompt = [draw.randrange(2, 512) for _ in range(draw.randrange(1, 60))]
        parameters = SamplingParams(max_tokens=draw.randrange(1, 8), ignore_eos=True, extra_args=arguments)
        live.append(core.add_request(f"random-{idx}", {"prompt_token_ids": prompt}, parameters))
        if draw.random() < 0.1:
            core.abort_request([draw.choice(live)], internal=True)
        if len(scheduler.requests) > 40:
            core.step()
    while core.has_unfinished_requests():
        core.step()
    core.step()
    engine.reset_prefix_cache()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    left = [scheduler._mixtures, scheduler._deadlines, scheduler._kv._allocations, scheduler._changed]
    assert not any(left)
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not any([manager.req_to_blocks, manager.num_cached_block])
    assert len(runner.mixtures) <= len(scheduler.finished_req_ids)
