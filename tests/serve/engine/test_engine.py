"""The engine against Hugging Face, member by member, in float32: tokens, log-probabilities, and the prefix cache between tiers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from chorus.population import manifest
from tests.reference import member_log_probs, mixture_log_probs
from tests.serve.engine.asking import TIERS, assert_isolated, check_against_reference, greedy, prompts

# vLLM and the libraries under it warn about themselves while they start; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def test_different_tiers_in_one_batch_are_each_exact(engine: Any, tiny_population: Path) -> None:
    texts = prompts(9)
    tiers = [TIERS[idx % 3] for idx in range(len(texts))]
    outputs = engine.generate(texts, [greedy(tier) for tier in tiers], use_tqdm=False)
    for tier, output in zip(tiers, outputs, strict=True):
        check_against_reference(tiny_population, tier, output)


def test_echoed_prompt_log_probabilities_are_the_mixtures(engine: Any, tiny_population: Path) -> None:
    outputs = engine.generate(prompts(3), [greedy(tier, max_tokens=1, echo=True) for tier in TIERS], use_tqdm=False)
    for tier, output in zip(TIERS, outputs, strict=True):
        assert sum(entry is not None for entry in output.prompt_logprobs) > 50
        check_against_reference(tiny_population, tier, output)


def test_returned_log_probabilities_sum_to_one(engine: Any) -> None:
    everything = SamplingParams(max_tokens=1, temperature=1, logprobs=-1, extra_args={"chorus_tier": "max"})
    (output,) = engine.generate(prompts(1), everything, use_tqdm=False)
    log_probs = [entry.logprob for entry in output.outputs[0].logprobs[0].values()]
    assert len(log_probs) == 512
    assert math.fsum(map(math.exp, log_probs)) == pytest.approx(1, abs=1e-4)


def test_a_request_without_a_tier_gets_the_dearest(engine: Any, tiny_population: Path) -> None:
    (output,) = engine.generate(prompts(1), SamplingParams(temperature=0, max_tokens=4, logprobs=1), use_tqdm=False)
    check_against_reference(tiny_population, "max", output)


@pytest.mark.parametrize("tier", ["gold", 3, ["max"]])
def test_an_unknown_tier_is_refused_and_the_engine_lives(engine: Any, tier: object) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="chorus_tier"):
        engine.generate(prompts(1), SamplingParams(max_tokens=1, extra_args={"chorus_tier": tier}), use_tqdm=False)
    assert engine.generate(prompts(1), greedy("economy", max_tokens=1), use_tqdm=False)


def test_one_member_can_be_asked_by_its_name(engine: Any, tiny_population: Path) -> None:
    alone = SamplingParams(temperature=0, max_tokens=4, logprobs=1, extra_args={"chorus_member": "t0-c02"})
    (output,) = engine.generate(prompts(1), alone, use_tqdm=False)
    ids = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
    log_p_TV = member_log_probs(tiny_population, "t0-c02", ids)[len(output.prompt_token_ids) - 1 : -1]
    assert list(output.outputs[0].token_ids) == log_p_TV.argmax(-1).tolist()


def test_requests_hold_blocks_only_for_their_members(engine: Any) -> None:
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    engine.reset_prefix_cache()
    free = pool.get_num_free_blocks()
    held = {}
    for tier in TIERS:
        engine.llm_engine.add_request(tier, {"prompt_token_ids": list(range(2, 202))}, greedy(tier))
        engine.llm_engine.step()
        held[tier] = free - pool.get_num_free_blocks()
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()
        assert pool.get_num_free_blocks() == free
        engine.reset_prefix_cache()
    # 200 tokens and one more fill 7 blocks of 32 in each member's group.
    assert held == {"economy": 7, "standard": 14, "max": 28}
    assert scheduler._mixtures == {}
    assert scheduler._kv._allocations == {}


@pytest.mark.parametrize(("first", "second"), [("economy", "max"), ("max", "economy"), ("standard", "max")])
def test_a_cached_prefix_of_another_tier_changes_nothing(
    engine: Any, tiny_population: Path, first: str, second: str
) -> None:
    assert_isolated(engine, tiny_population, first, second)


def test_members_share_cached_blocks_between_tiers(engine: Any) -> None:
    prompt = {"prompt_token_ids": list(range(2, 202))}
    engine.reset_prefix_cache()
    engine.generate(prompt, greedy("max"), use_tqdm=False)
    (output,) = engine.generate(prompt, greedy("economy"), use_tqdm=False)
    assert output.num_cached_tokens == 192
    engine.reset_prefix_cache()
    engine.generate(prompt, greedy("economy"), use_tqdm=False)
    (output,) = engine.generate(prompt, greedy("max"), use_tqdm=False)
    assert output.num_cached_tokens == 0


def test_a_prior_fitted_again_answers_only_later_requests(
    engine: Any, engine_directory: Path, tiny_population: Path
) -> None:
    before = manifest.load(engine_directory)
    reversed_max = before.tier("max").model_copy(update={"weights": (0.7, 0.1, 0.1, 0.1)})
    core, outputs = engine.llm_engine, {}
    core.add_request("earlier", {"prompt_token_ids": list(range(2, 60))}, greedy("max"))
    for _ in range(3):
        core.step()
    try:
        manifest.save(
            before.model_copy(update={"tiers": (*before.tiers[:2], reversed_max), "prior_version": 1}), engine_directory
        )
        core.add_request("later", {"prompt_token_ids": list(range(2, 60))}, greedy("max"))
        while core.has_unfinished_requests():
            outputs |= {output.request_id: output for output in core.step() if output.finished}
        check_against_reference(tiny_population, "max", outputs["earlier"])
        check_against_reference(engine_directory, "max", outputs["later"])
    finally:
        manifest.save(before, engine_directory)


def in_a_hurry(tier: str, budget_ms: float, floor: str, max_tokens: int = 40) -> SamplingParams:
    arguments = {"chorus_tier": tier, "chorus_time_budget_ms": budget_ms, "chorus_floor": floor}
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, extra_args=arguments)


def late_after_a_token(engine: Any, prompt: list[int], parameters: SamplingParams) -> Any:
    """The answer to a request whose time is over when it has its first token."""
    core = engine.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    core.add_request("late", {"prompt_token_ids": prompt}, parameters)
    core.step()
    (deadline,) = scheduler._deadlines.values()
    deadline.finish_at = 0.0
    finished = []
    while core.has_unfinished_requests():
        finished += [output for output in core.step() if output.finished]
    (output,) = finished
    return output


@pytest.mark.parametrize("floor", ["economy", "standard"])
def test_a_late_request_goes_on_with_fewer_members(engine: Any, tiny_population: Path, floor: str) -> None:
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    prompt = list(range(2, 102))
    output = late_after_a_token(engine, prompt, in_a_hurry("max", 600_000, floor))
    report, kept = output.kv_transfer_params, {"economy": 1, "standard": 2}[floor]
    assert report["members_per_token"] == [[4, 1], [kept, 39]]
    # All four had weight 0.1, 0.2, 0.3, 0.4 by index; the floor's members stay, the others leave lightest first.
    assert [drop["member"] for drop in report["drops"]] == [f"t0-c0{idx}" for idx in range(kept, 4)]
    assert {drop["at_token"] for drop in report["drops"]} == {1}
    tokens = list(output.outputs[0].token_ids)
    before = mixture_log_probs(tiny_population, "max", prompt)[-1]
    after_TV = mixture_log_probs(tiny_population, floor, prompt + tokens)[len(prompt) :]
    assert tokens[0] == int(before.argmax())
    assert tokens[1:] == after_TV[:-1].argmax(-1).tolist()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert scheduler._deadlines == {}


def test_kv_written_after_a_drop_is_never_found_for_the_dropped(engine: Any, tiny_population: Path) -> None:
    engine.reset_prefix_cache()
    prompt = list(range(2, 72))
    first = late_after_a_token(engine, prompt, in_a_hurry("max", 600_000, "economy", max_tokens=100))
    assert first.kv_transfer_params["members_per_token"] == [[4, 1], [1, 99]]
    conversation = prompt + list(first.outputs[0].token_ids) + [5, 6, 7]
    (second,) = engine.generate({"prompt_token_ids": conversation}, greedy("max"), use_tqdm=False)
    assert second.num_cached_tokens == 64, "the two blocks of the prompt that every member has seen"
    check_against_reference(tiny_population, "max", second)
    (cheap,) = engine.generate({"prompt_token_ids": [*conversation, 8]}, greedy("economy"), use_tqdm=False)
    assert cheap.num_cached_tokens == 160, "the member that stayed has seen everything"
    check_against_reference(tiny_population, "economy", cheap)


def test_a_request_with_time_to_spare_keeps_its_members(engine: Any, tiny_population: Path) -> None:
    (output,) = engine.generate(prompts(1), in_a_hurry("max", 600_000, "economy"), use_tqdm=False)
    report = dict(output.kv_transfer_params)
    assert report.pop("decoding")["passes_per_token"] >= 1
    assert report == {"members_per_token": [[4, 40]], "drops": []}
    check_against_reference(tiny_population, "max", output)


@pytest.mark.parametrize("stops_at_token", [False, True])
def test_a_stream_gets_its_report_as_its_stop_reason(engine: Any, stops_at_token: bool) -> None:
    parameters = in_a_hurry("max", 600_000, "economy", max_tokens=6)
    (plain,) = engine.generate(prompts(1), parameters, use_tqdm=False)
    stop = plain.outputs[0].token_ids[3]
    first = plain.outputs[0].token_ids.index(stop)
    if stops_at_token:
        parameters.stop_token_ids, parameters.ignore_eos = [stop], False
    parameters.extra_args = {**parameters.extra_args, "chorus_report_in_stop_reason": "mark:"}
    (output,) = engine.generate(prompts(1), parameters, use_tqdm=False)
    mark, _, told = output.outputs[0].stop_reason.partition(":")
    assert mark == "mark"
    tokens, reason = (first + 1, stop) if stops_at_token else (6, None)
    report = json.loads(told)
    assert report.pop("decoding").keys() == {"passes_per_token", "drafts", "accepted", "caught_up_rows"}
    assert report == {"members_per_token": [[4, tokens]], "drops": [], "stop_reason": reason}


@pytest.mark.parametrize(
    ("fields", "members"),
    [
        ({"chorus_time_budget_ms": 0.01}, 1),  # over before it begins
        ({"chorus_time_budget_ms": 600_000, "chorus_most_members": 3}, 3),
        ({"chorus_time_budget_ms": 600_000, "chorus_most_members": 1, "chorus_floor": "standard"}, 2),
        ({"chorus_time_budget_ms": 600_000, "chorus_most_members": 9}, 4),
        ({"chorus_most_members": 1}, 4),  # only what has a time budget gives members up
    ],
)
def test_a_request_may_begin_with_fewer_members(
    engine: Any, tiny_population: Path, fields: dict[str, Any], members: int
) -> None:
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    engine.reset_prefix_cache()
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    parameters = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    parameters.extra_args = {"chorus_tier": "max", **fields}
    prompt = list(range(2, 80))
    (output,) = engine.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    if "chorus_time_budget_ms" in fields:
        report = output.kv_transfer_params
        assert report["members_per_token"] == [[members, 6]]
        assert [drop["at_token"] for drop in report["drops"]] == [0] * (4 - members)
    if members in {1, 2, 4}:
        tier = {1: "economy", 2: "standard", 4: "max"}[members]
        check_against_reference(tiny_population, tier, output)


@pytest.mark.parametrize(
    "arguments",
    [
        {"chorus_most_members": 0},
        {"chorus_expected_tokens": 0},
        {"chorus_expected_tokens": "12"},
        {"chorus_most_members": 2.5},
        {"chorus_time_budget_ms": -1},
        {"chorus_time_budget_ms": "soon"},
        {"chorus_report_in_stop_reason": 1},
        {"chorus_floor": "gold"},
        {"chorus_weights": 1},
        {"chorus_member": "t9-c99"},
        {"chorus_member": "t0-c00", "chorus_tier": "max"},
    ],
)
def test_bad_arguments_are_refused_by_name(engine: Any, arguments: dict[str, object]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=next(iter(arguments))):
        engine.generate(prompts(1), SamplingParams(max_tokens=1, extra_args=arguments), use_tqdm=False)
