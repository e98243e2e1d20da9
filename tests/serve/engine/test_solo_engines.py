"""Tests that start an engine of their own. They stand last: stopping it ends vLLM's process groups, for the shared engine too."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from chorus.population import assemble
from tests.serve.engine.asking import TIERS, assert_isolated, check_against_reference, greedy, prompts
from tests.serve.engine.conftest import running_engine
from tests.serve.engine.test_grouped import runner_of
from tests.worlds import save_checkpoint, save_member, save_tokenizer

# vLLM and the libraries under it warn about themselves while they start; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")


def check_mixed(engine: Any, directory: Path, tiers: list[str]) -> None:
    """Ask for a greedy answer at each of these tiers, all at once, and hold them to Hugging Face's members."""
    outputs = engine.generate(prompts(len(tiers)), [greedy(tier) for tier in tiers], use_tqdm=False)
    for tier, output in zip(tiers, outputs, strict=True):
        check_against_reference(directory, tier, output)


def test_chunked_prefill_and_preemption_stay_exact(tiny_population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus.serve.engine.scheduler import PopulationScheduler

    preempted: list[str] = []
    preempt = PopulationScheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(PopulationScheduler, "_preempt_request", counted)
    # 33 usable blocks; eight requests that grow from 1 to 3 blocks per member want up to 54.
    with running_engine(
        tiny_population, max_num_batched_tokens=24, max_num_seqs=8, num_gpu_blocks_override=34
    ) as cramped:
        texts = prompts(8, characters=50)
        tiers = [TIERS[idx % 3] for idx in range(len(texts))]
        outputs = cramped.generate(texts, [greedy(tier, max_tokens=60) for tier in tiers], use_tqdm=False)
        for tier, output in zip(tiers, outputs, strict=True):
            check_against_reference(tiny_population, tier, output)
    assert preempted, "the pool was not small enough to preempt anyone"


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_other_architectures_are_mixed_exactly(architecture: str, tmp_path: Path) -> None:
    for idx in range(2):
        save_checkpoint(tmp_path / f"tune-{idx}", architecture, seed=idx)
    directory = tmp_path / architecture
    assemble.gather([tmp_path / "tune-0", tmp_path / "tune-1"], directory)
    with running_engine(directory) as other:
        check_mixed(other, directory, ["economy", "max"] * 2)


def test_members_of_different_architectures_are_mixed_exactly(tmp_path: Path) -> None:
    save_member(tmp_path / "llama", seed=0)
    save_tokenizer(tmp_path / "llama")
    for idx, architecture in enumerate(("qwen2", "gpt2"), start=1):
        save_checkpoint(tmp_path / architecture, architecture, seed=idx)
    directory = tmp_path / "all"
    assemble.gather([tmp_path / name for name in ("llama", "qwen2", "gpt2")], directory)
    with running_engine(directory) as mixed:
        for first, second in (("economy", "max"), ("max", "economy")):
            assert_isolated(mixed, directory, first, second)
        check_mixed(mixed, directory, ["economy", "max"] * 2)


def test_members_of_different_depth_and_width_are_mixed_exactly(tmp_path: Path) -> None:
    for idx, (layers, width) in enumerate([(2, 64), (3, 96)]):
        save_member(tmp_path / f"tune-{idx}", seed=idx, layers=layers, width=width)
        save_tokenizer(tmp_path / f"tune-{idx}")
    directory = tmp_path / "uneven"
    assemble.gather([tmp_path / "tune-0", tmp_path / "tune-1"], directory)
    with running_engine(directory) as uneven:
        for first, second in (("economy", "max"), ("max", "economy")):
            assert_isolated(uneven, directory, first, second)
        check_mixed(uneven, directory, ["economy", "max"] * 2)


def test_compiled_members_share_code_and_are_mixed_exactly(tmp_path: Path) -> None:
    for idx, width in enumerate((64, 64, 96)):
        save_member(tmp_path / f"tune-{idx}", seed=idx, width=width)
        save_tokenizer(tmp_path / f"tune-{idx}")
    save_checkpoint(tmp_path / "tune-3", "qwen2", seed=3)
    directory = tmp_path / "compiled"
    assemble.gather([tmp_path / f"tune-{idx}" for idx in range(4)], directory)
    with running_engine(directory, enforce_eager=False) as compiled:
        code = [each.model.aot_compiled_fn for each in runner_of(compiled).model.members.values()]
        assert code[0] is code[1]
        assert len({id(each) for each in code}) == 3
        for first, second in (("economy", "max"), ("max", "economy")):
            assert_isolated(compiled, directory, first, second)
        check_mixed(compiled, directory, ["economy", "max"] * 2)


def test_members_that_run_together_do_so_beside_compiled_code(tiny_population: Path) -> None:
    with running_engine(tiny_population, enforce_eager=False) as compiled:
        assert len({id(each.model.aot_compiled_fn) for each in runner_of(compiled).model.members.values()}) == 1
        for tier in TIERS:  # one row of each member, then several, then unequal numbers
            check_mixed(compiled, tiny_population, [tier] * 2)
        check_mixed(compiled, tiny_population, [TIERS[idx % 3] for idx in range(6)])


def test_drafts_in_bfloat16_are_verified_beside_sampled_requests(tiny_population: Path) -> None:
    with running_engine(tiny_population, dtype="bfloat16") as half:
        ways = [{"temperature": 0, "logprobs": 1}, {"temperature": 1}, {"temperature": 0.8, "top_p": 0.9}] * 3
        asked = [
            SamplingParams(max_tokens=24, ignore_eos=True, extra_args={"chorus_decoding": decoding}, **way)
            for decoding in ("speculative", "auto")
            for way in ways
        ]
        for output in half.generate(prompts(len(asked)), asked, use_tqdm=False):
            assert len(output.outputs[0].token_ids) == 24
        assert half.llm_engine.engine_core.engine_core.scheduler._chooser.acceptance.accepted > 0


@pytest.mark.parametrize("whole_members", [False, True], ids=["sharded", "whole members on each rank"])
def test_two_ranks_give_what_one_gives(
    tiny_population: Path, monkeypatch: pytest.MonkeyPatch, whole_members: bool
) -> None:
    # vLLM wants a NUMA node for each rank, or to be told where they run.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    additional = {"additional_config": {"chorus_member_parallel": whole_members}}
    with running_engine(tiny_population, **options, **additional) as sharded:
        held = sharded.collective_rpc("held_members")
        assert held == ([[0, 2], [1, 3]] if whole_members else [[0, 1, 2, 3]] * 2)
        check_mixed(sharded, tiny_population, [TIERS[idx % 3] for idx in range(4)])


def test_the_isolation_test_fails_without_isolation(tiny_population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import block_pool

    of_group = block_pool.make_block_hash_with_group_id
    monkeypatch.setattr(block_pool, "make_block_hash_with_group_id", lambda block_hash, group: of_group(block_hash, 0))
    with running_engine(tiny_population) as leaky, pytest.raises(AssertionError):
        assert_isolated(leaky, tiny_population, "economy", "max")
