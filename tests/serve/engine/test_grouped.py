"""Members that run together: against each by itself, and against float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import SamplingParams

from chorus.population import manifest
from chorus.serve.engine.parallel import tier_order
from tests.serve.engine.asking import greedy, prompts

pytestmark = pytest.mark.filterwarnings("default")


def runner_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def calls(engine: Any, monkeypatch: pytest.MonkeyPatch, *, is_grouped: bool) -> Iterator[list[list[int]]]:
    """The members of each forward of several together, while members run together or not."""
    runner = runner_of(engine)
    seen: list[list[int]] = []
    kind = type(runner.model.grouped)
    plain = kind.__call__

    def spy(self: Any, running: Any, inputs: Any) -> list[Tensor]:
        seen.append(list(running))
        hidden: list[Tensor] = plain(self, running, inputs)
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", spy)
        if not is_grouped:
            patch.setattr(runner.model, "grouped", None)
            patch.setitem(runner.__dict__, "_can_merge", False)
        runner._planned_batch = ([], b"", [])
        yield seen
    runner._planned_batch = ([], b"", [])


def mixed(engine: Any, parameters: list[SamplingParams]) -> list[tuple[tuple[int, ...], list[float]]]:
    """The tokens of some requests at once, and their log-probabilities."""
    engine.reset_prefix_cache()
    outputs = engine.generate(prompts(len(parameters)), parameters, use_tqdm=False)
    found = []
    for output in outputs:
        (choice,) = output.outputs
        steps = zip(choice.token_ids, choice.logprobs, strict=True)
        found.append((tuple(choice.token_ids), [step[token].logprob for token, step in steps]))
    return found


@pytest.mark.parametrize(
    "tiers", [["max"] * 3, ["standard"] * 2, ["max", "standard", "economy"], ["economy", "economy"]]
)
def test_members_answer_together_as_each_does_by_itself(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tiers: list[str]
) -> None:
    parameters = [greedy(tier) for tier in tiers]
    for each in parameters:
        each.extra_args = {**each.extra_args, "chorus_decoding": "plain"}
    with calls(engine, monkeypatch, is_grouped=False) as seen:
        separate = mixed(engine, parameters)
        assert seen == []
    with calls(engine, monkeypatch, is_grouped=True) as seen:
        together = mixed(engine, parameters)
    most = max({"economy": 1, "standard": 2, "max": 4}[tier] for tier in tiers)
    assert max(map(len, seen)) == most
    for (tokens, log_p), (expected_tokens, expected_log_p) in zip(together, separate, strict=True):
        assert tokens == expected_tokens
        assert log_p == pytest.approx(expected_log_p, abs=2e-5)


def test_the_members_of_small_tiers_run_first(engine: Any, tiny_population: Path) -> None:
    grouped = runner_of(engine).model.grouped
    order = tier_order(manifest.load(tiny_population))
    assert grouped.ordered(range(4)) == order
    assert grouped.ordered(order[1:3]) == order[1:3]


@pytest.mark.parametrize("name", ["qkv", "output", "gate_up", "down"])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 3], [2, 1, 4], [5]])
def test_each_row_meets_its_own_members_matrix(engine: Any, tiny_population: Path, name: str, sizes: list[int]) -> None:
    grouped = runner_of(engine).model.grouped
    population = manifest.load(tiny_population)
    running = tier_order(population)[: len(sizes)]
    linear = getattr(grouped._layers[1], f"_{name}")
    weights = [
        matrix_of(tiny_population / population.members[member].path, name).double() for member in running
    ]  # fmt: skip
    x_NI = torch.randn(sum(sizes), weights[0].shape[1], generator=torch.Generator().manual_seed(0))
    found_NO = linear(grouped._rows_of(running, sizes, torch.device("cpu")), x_NI)
    expected = [x.double() @ weight.T for x, weight in zip(x_NI.split(sizes), weights, strict=True)]
    torch.testing.assert_close(found_NO.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


def matrix_of(checkpoint: Path, name: str) -> Tensor:
    """The matrix of the second layer, as vLLM joins it."""
    parts = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "output": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }[name]
    weights: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        weights |= load_file(file)
    return torch.cat([weights[f"model.layers.1.{part}.weight"].float() for part in parts])
