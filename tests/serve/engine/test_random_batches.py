"""Random priors, batches and arrivals: whatever runs beside it, each request is answered by its own mixture."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from chorus.population import manifest
from chorus.population.manifest import Population, Tier
from tests.serve.engine.asking import check_against_reference

# vLLM and the libraries under it warn about themselves while they start; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def random_tiers(draw: random.Random, population: Population) -> tuple[Tier, ...]:
    """Five tiers of any members, not nested, with any weights, pools and temperatures."""
    names = [member.name for member in population.members]
    tiers = []
    for idx in range(5):
        members = tuple(draw.sample(names, draw.randint(1, len(names))))
        raw = [draw.expovariate(1.0) for _ in members]
        tiers.append(
            Tier(
                name=f"tier-{idx}",
                members=members,
                weights=tuple(weight / sum(raw) for weight in raw),
                pool=draw.choice(["linear", "log"]),
                temperature=draw.choice([1.0, 1.0, 0.8, 1.3]),
                relative_cost=len(members),
            )
        )
    return tuple(tiers)


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_answered_by_its_own_mixture(engine: Any, engine_directory: Path, seed: int) -> None:
    draw, core = random.Random(seed), engine.llm_engine
    before = manifest.load(engine_directory)
    tiers = random_tiers(draw, before)
    shared = [draw.randrange(2, 512) for _ in range(96)]
    asked: dict[str, str] = {}
    finished: list[Any] = []
    manifest.save(before.model_copy(update={"tiers": tiers, "prior_version": 1}), engine_directory)
    try:
        while len(asked) < 14 or core.has_unfinished_requests():
            for _ in range(min(draw.randint(0, 4), 14 - len(asked))):
                tier = draw.choice(tiers).name
                # Some share a prefix, which other members may have cached; some are shorter than a block.
                prompt = shared[: draw.choice([0, 40, 96])] + [
                    draw.randrange(2, 512) for _ in range(draw.randint(1, 20))
                ]
                parameters = SamplingParams(
                    temperature=0, max_tokens=draw.randint(1, 12), ignore_eos=True, logprobs=2,
                    prompt_logprobs=0 if draw.random() < 0.2 else None, extra_args={"chorus_tier": tier},
                )  # fmt: skip
                name = f"random-{seed}-{len(asked)}"
                asked[name] = tier
                core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            finished += [output for output in core.step() if output.finished]
        assert len(finished) == len(asked)
        for output in finished:
            check_against_reference(engine_directory, asked[output.request_id], output)
    finally:
        manifest.save(before, engine_directory)
