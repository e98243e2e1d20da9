"""What the rooms do on a GPU, held against the same on the CPU or against float64; skipped where there is no GPU.

`python -m pytest tests/test_cuda.py` needs PyTorch, Transformers and this package, no vLLM.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chorus.population import manifest
from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.likelihoods import likelihoods as prior_likelihoods
from chorus.prior.splits import ScoredSplit
from chorus.serve.engine.mixing import make_headers, mix, mix_common
from chorus.serve.engine.mixture import Mixture
from chorus.serve.engine.rows import plan_step
from chorus.serve.engine.stopwatch import MIXING, Stopwatch
from chorus.train.evaluate import likelihoods
from chorus.train.log import Record
from chorus.train.loss import Distillation, Teacher, next_token_loss
from chorus.train.model import Llama
from chorus.train.optimiser import orthogonalise
from chorus.train.perturb import generator_for, perturb
from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from chorus.train.shape import Shape
from chorus.train.snapshot import load_member
from chorus.train.trajectory import Trajectory
from tests.serve.engine.test_mixing import reference as pooled_in_float64

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = Settings(
    corpus="stdlib", max_bytes=60_000, layers=2, width=64, heads=2, context_length=64, vocab_size=300,
    batch_tokens=1_024, trajectories=1, cycles=3, epochs_per_cycle=1,
)  # fmt: skip


def train(run: Run, device: torch.device, *, until: int = 10**9) -> list[Record]:
    """The records of a trajectory that is stopped after so many."""
    records: list[Record] = []
    Trajectory(run, 0, device).train(records.append, lambda: len(records) >= until)
    return records


def of(records: list[Record], event: str, key: str) -> list[float]:
    return [float(record[key]) for record in records if record["event"] == event]


def test_a_trajectory_begins_and_is_perturbed_as_on_the_cpu() -> None:
    shape = Shape(vocab_size=300, context_length=64, layers=2, width=64, heads=2)
    models = [Llama(shape).to(device) for device in (CPU, GPU)]
    for model in models:
        model.initialise(generator_for(3, 0))
    own, other = (nn.utils.parameters_to_vector(model.parameters()).detach().cpu() for model in models)
    assert torch.equal(own, other)
    for model in models:
        perturb(model, 0.1, generator_for(3, 1))
    own, other = (nn.utils.parameters_to_vector(model.parameters()).detach().cpu() for model in models)
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # PyTorch's compiler
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.45])
def test_the_loss_and_its_gradients_are_those_of_float64(alpha: float | None, compiled: bool) -> None:
    num_tokens, width, vocab_size, temperature = 9_000, 64, 1_000, 1.2  # three chunks, the last one partial
    generator = torch.Generator().manual_seed(1)
    hidden, said = (torch.randn(num_tokens, width, generator=generator) for _ in range(2))
    head, teacher = (torch.randn(vocab_size, width, generator=generator) / 4 for _ in range(2))
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)

    slow = hidden.double().requires_grad_(), head.double().requires_grad_()
    log_p = torch.log_softmax(slow[0] @ slow[1].T, -1)
    expected = -log_p.gather(1, targets[:, None]).mean()
    distillation = None
    if alpha is not None:
        log_q = torch.log_softmax(said.double() @ teacher.double().T / temperature, -1)
        log_s = torch.log_softmax(slow[0] @ slow[1].T / temperature, -1)
        divergence = (log_q.exp() * (log_q - log_s)).sum(-1).mean()
        expected = (1 - alpha) * expected + alpha * temperature**2 * divergence
        teachers = (Teacher(hidden_ND=said.to(GPU), head_VD=teacher.to(GPU)),)
        distillation = Distillation(teachers=teachers, alpha=alpha, temperature=temperature)
    expected.backward()

    inputs = hidden.to(GPU).requires_grad_(), head.to(GPU).requires_grad_()
    found, _ = next_token_loss(*inputs, targets.to(GPU), distillation, compiled=compiled)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(inputs, slow, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 64, 172), (2, 172, 64)])
def test_updates_are_orthogonalised_as_on_the_cpu(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert (torch.linalg.svdvals(orthogonalise(stack.to(GPU)).float()) < 1.3).all()
    own, other = orthogonalise(stack), orthogonalise(stack.to(GPU)).cpu()  # the one in float32, the other in bfloat16
    assert (own - other).norm() / own.norm() < 0.1


def test_losses_follow_those_of_the_cpu(tmp_path: Path) -> None:
    records = [train(prepare(TINY, tmp_path / device.type), device) for device in (CPU, GPU)]
    first, other = (of(found, "step", "cross_entropy") for found in records)
    assert len(first) == len(other) > 20
    assert other[:5] == pytest.approx(first[:5], abs=0.01)
    members = [of(found, "member", "selection_loss") for found in records]
    assert members[1] == pytest.approx(members[0], abs=0.1)


def test_a_run_that_is_stopped_many_times_ends_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    whole = train(prepare(TINY, tmp_path / "whole"), GPU)
    run, moments = prepare(TINY, tmp_path / "stopped"), random.Random(4)
    while not run.finished:
        train(run, GPU, until=moments.randint(3, 12))
    ends = [prior_rows(each)[-1] for each in (Run.load(tmp_path / "whole"), run)]
    assert float(np.abs(np.log(ends[0]) - np.log(ends[1])).mean()) < 0.05  # atomic additions: not to the bit
    assert len(of(whole, "member", "selection_loss")) == TINY.cycles


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_steps_are_those_of_plain_ones(tmp_path: Path) -> None:
    plain = train(prepare(TINY, tmp_path / "plain"), GPU, until=10)
    compiled = train(prepare(replace(TINY, compile=True), tmp_path / "compiled"), GPU, until=10)
    pairs = zip(of(plain, "step", "loss"), of(compiled, "step", "loss"), strict=True)
    assert all(abs(one - other) < 0.02 for one, other in pairs)


def prior_rows(run: Run) -> NDArray[np.float32]:
    tokens = TokenSplit.load(split_path(run.directory, "selection"))
    split = ScoredSplit(name="selection", split=tokens, context_length=TINY.context_length)
    return np.array(prior_likelihoods(manifest.load(run.directory), run.directory, [split]))


def test_members_are_scored_as_on_the_cpu(tmp_path: Path) -> None:
    run = prepare(TINY, tmp_path / "run")
    train(run, GPU)
    split = TokenSplit.load(split_path(run.directory, "selection"))
    for row, member in zip(prior_rows(run), manifest.load(run.directory).members, strict=True):
        expected = likelihoods(load_member(run, member.name, CPU), split, CPU)
        on_gpu = likelihoods(load_member(run, member.name, GPU), split, GPU)
        np.testing.assert_allclose(on_gpu, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)


def random_mixture(moments: random.Random, num_members: int) -> Mixture:
    members = sorted(moments.sample(range(num_members), moments.randint(1, num_members)))
    raw = [moments.uniform(0.01, 1) for _ in members]
    return Mixture(
        tier="drawn",
        members=tuple(members),
        weights=tuple(value / sum(raw) for value in raw),
        pool=moments.choice(["linear", "log"]),
        temperature=moments.choice([1.0, 0.7, 1.5]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_mixtures_are_pooled_row_by_row(dtype: torch.dtype) -> None:
    moments = random.Random(6)
    for seed in range(20):
        batch = [random_mixture(moments, 6) for _ in range(moments.randint(1, 9))]
        logits_MRV = (torch.randn(6, len(batch), 3_001, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)
        on_gpu = logits_MRV.to(GPU)

        def logits_of(member: int, rows: Tensor | None, found: Tensor = on_gpu) -> Tensor:
            return found[member] if rows is None else found[member][rows]

        mixed_RV = mix(make_headers(batch, 6), logits_of, sum_probabilities=False, device=GPU)
        assert mixed_RV.device == GPU
        for row, mixture in enumerate(batch):
            expected = pooled_in_float64(mixture, logits_MRV[:, row])
            torch.testing.assert_close(mixed_RV[row].double().cpu(), expected, atol=3e-5, rtol=1e-5)
        alike_RV = mix_common(batch[0], len(batch), logits_of, sum_probabilities=False, device=GPU)
        expected = pooled_in_float64(batch[0], logits_MRV[:, -1])
        torch.testing.assert_close(alike_RV[-1].double().cpu(), expected, atol=3e-5, rtol=1e-5)


def test_steps_are_laid_out_on_the_device_and_timed_on_its_clock() -> None:
    moments = random.Random(7)
    batch = [random_mixture(moments, 4) for _ in range(5)]
    lengths = np.array([1, 3, 1, 7, 2], dtype=np.int32)
    own, other = (plan_step(batch, lengths, 4, device) for device in (CPU, GPU))
    assert own.running == other.running
    for one, two in zip(own.rows, other.rows, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert two.tokens.device == two.requests.device == two.query_start_loc.device == GPU
            assert torch.equal(one.tokens, two.tokens.cpu())
            assert torch.equal(one.query_start_loc, two.query_start_loc.cpu())
    watch = Stopwatch(2, GPU)
    x = torch.randn(4_096, 4_096, device=GPU)
    start = watch.mark()
    for _ in range(20):
        x = torch.nn.functional.normalize(x @ x)
    watch.add(1, start)
    watch.add(MIXING, start, sign=-1)
    torch.cuda.synchronize()
    first, second, mixing = watch.take()
    assert first == 0
    assert 1e-3 < second < 1
    assert mixing < 0
    assert watch.take() == [0.0, 0.0, 0.0]
