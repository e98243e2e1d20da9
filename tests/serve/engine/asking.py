"""What engine tests ask, and how an answer is held against Hugging Face."""

from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from vllm import SamplingParams

from tests.reference import mixture_log_probs
from tests.worlds import some_documents

TIERS = ("economy", "standard", "max")
TOLERANCE = 1e-4


def prompts(count: int, characters: int = 300) -> list[str]:
    return [document.text[:characters] for document in some_documents(count)]


def greedy(tier: str, *, max_tokens: int = 12, echo: bool = False) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, prompt_logprobs=0 if echo else None,
        extra_args={"chorus_tier": tier},
    )  # fmt: skip


def check_against_reference(directory: Path, tier: str, output: Any) -> None:
    """Every generated token is the mixture's argmax, every log-probability the mixture's."""
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    ids = prompt + list(completion.token_ids)
    log_p_TV = mixture_log_probs(directory, tier, ids)
    for step, token in enumerate(completion.token_ids):
        row = log_p_TV[len(prompt) - 1 + step]
        assert token == int(row.argmax()), f"{tier}: token {step} is not the mixture's argmax"
        assert completion.logprobs[step][token].logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
    for position, entry in enumerate(output.prompt_logprobs or []):
        if entry is not None:
            expected = log_p_TV[position - 1, prompt[position]].item()
            assert entry[prompt[position]].logprob == pytest.approx(expected, abs=TOLERANCE)


def p_value(observed: list[float], expected: list[float]) -> float:
    """Of a chi-square test of counts; what is expected fewer than five times is counted together."""
    cells = [(seen, wanted) for seen, wanted in zip(observed, expected, strict=True) if wanted >= 5]
    rare_seen, rare = (
        sum(values) - sum(found) for values, found in zip((observed, expected), zip(*cells, strict=True), strict=True)
    )
    if rare > 1:
        cells.append((rare_seen, rare))
    counts, wanted = (list(values) for values in zip(*cells, strict=True))
    scale = sum(counts) / sum(wanted)
    return float(stats.chisquare(counts, [scale * each for each in wanted]).pvalue)


def assert_isolated(engine: Any, directory: Path, first: str, second: str) -> None:
    """A long prompt at `first`, then at `second`: the latter answers exactly as if the former had never been."""
    engine.reset_prefix_cache()
    prompt = {"prompt_token_ids": list(range(2, 202))}
    engine.generate(prompt, greedy(first), use_tqdm=False)
    (output,) = engine.generate(prompt, greedy(second), use_tqdm=False)
    check_against_reference(directory, second, output)
