import pytest
import torch
from torch import Tensor

from chorus.train import loss as loss_module
from chorus.train.loss import Distillation, Teacher, TeacherChunk, by_formulas, in_place, next_token_loss

# N tokens, D width, V vocabulary
N, D, V = 70, 12, 33


def slow_loss(hidden: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, alpha: float, t: float) -> Tensor:
    """(1 - a) CE + a T² KL(teacher^T || student^T), written down as in the paper, token by token."""
    total = hidden.new_zeros(())
    for n in range(len(targets)):
        logits = head @ hidden[n]
        cross_entropy = -torch.log_softmax(logits, 0)[targets[n]]
        if teacher is None:
            total = total + cross_entropy
            continue
        q, p = torch.softmax(teacher[n] / t, 0), torch.softmax(logits / t, 0)
        total = total + (1 - alpha) * cross_entropy + alpha * t**2 * (q * (q / p).log()).sum()
    return total / len(targets)


@pytest.mark.parametrize(("alpha", "temperature"), [(None, 1.0), (0.45, 1.2), (1.0, 3.0)])
def test_loss_and_gradients_equal_a_slow_float64_reference(
    alpha: float | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CPU_ROWS", 32)  # three chunks, the last one partial
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    head, teacher_head = (torch.randn(V, D, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(V, (N,), generator=generator)

    slow_inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    teacher = None if alpha is None else teacher_hidden @ teacher_head.T
    expected = slow_loss(*slow_inputs, targets, teacher, alpha or 0.0, temperature)
    expected.backward()

    inputs = hidden.float().requires_grad_(), head.float().requires_grad_()
    distillation = None
    if alpha is not None:
        teacher = Teacher(hidden_ND=teacher_hidden.float(), head_VD=teacher_head.float())
        distillation = Distillation(teachers=(teacher,), alpha=alpha, temperature=temperature)
    found, cross_entropy = next_token_loss(*inputs, targets, distillation)
    (3 * found).backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert cross_entropy.item() == pytest.approx(
        torch.nn.functional.cross_entropy(hidden @ head.T, targets).item(), rel=1e-5
    )
    for ours, theirs in zip(inputs, slow_inputs, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), 3 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_student_equal_to_its_teacher_feels_only_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    same = Distillation(teachers=(Teacher(hidden_ND=hidden, head_VD=head),), alpha=0.4, temperature=2.0)
    found, cross_entropy = next_token_loss(
        hidden.clone().requires_grad_(), head.clone().requires_grad_(), targets, same
    )
    assert found.item() == pytest.approx(0.6 * cross_entropy.item(), rel=1e-6)


def test_several_teachers_are_one_whose_probabilities_are_their_average() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    logits = [torch.randn(N, V, generator=generator) for _ in range(2)]  # each as a teacher whose head is the identity
    teachers = (Teacher(hidden_ND=logits[0], head_VD=torch.eye(V), weight=0.3),
                Teacher(hidden_ND=logits[1], head_VD=torch.eye(V), weight=0.7))  # fmt: skip
    pooled = (0.3 * logits[0].softmax(-1) + 0.7 * logits[1].softmax(-1)).log()
    slow_inputs = hidden.double().requires_grad_(), head.double().requires_grad_()
    expected = slow_loss(*slow_inputs, targets, pooled.double(), 0.8, 1.5)
    expected.backward()
    inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    found, _ = next_token_loss(*inputs, targets, Distillation(teachers=teachers, alpha=0.8, temperature=1.5))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(inputs, slow_inputs, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_teachers", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formulas_for_gpus_are_those_in_place(num_teachers: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, *teacher_logits = ((torch.randn(N, V, generator=generator) * 3).to(dtype) for _ in range(1 + num_teachers))
    targets = torch.randint(V, (N, 1), generator=generator)
    weights = (1.0,) if num_teachers == 1 else (0.3, 0.7)[:num_teachers]
    found = [
        chunk_loss(
            logits.clone(),
            targets,
            TeacherChunk(tuple(map(torch.clone, teacher_logits)), weights, 0.45, 1.2),
            torch.tensor(N),
        )
        for chunk_loss in (in_place, by_formulas)
    ]
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own.float(), other.float(), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
