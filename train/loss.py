"""The loss of a member, cross-entropy and distillation, computed without holding all logits.

The output head is part of the loss: logits are computed for a chunk of rows, turned into loss and gradient, and discarded. Memory
is O(rows · V), not O(N · V). CPUs work in place, so that the chunk stays in cache. GPUs use formulas that the compiler can fuse:
as separate passes over memory they take a tenth of a distilled step (both measured in bench/LOG.md).
"""

# N tokens, C tokens of a chunk, D width, V vocabulary

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_CPU_ROWS = 512
_GPU_ROWS = 4_096  # enough to keep a GPU busy with each matrix product; calculated, not measured
_MIN_PROBABILITY = 1e-38  # keeps the logarithm of a mixture finite if every teacher underflows


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One teacher's output for the same tokens. Its width may differ from the student's."""

    hidden_ND: Tensor
    head_VD: Tensor
    weight: float = 1.0
    """Weight in the mixture of teachers, on the simplex."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """One teacher, or a linear mixture of several, and its weight in the loss."""

    teachers: tuple[Teacher, ...]
    alpha: float
    """Weight of the distillation term in the loss, in (0, 1]."""
    temperature: float
    """T > 0, applied to both distributions."""

    def logits(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Each teacher's logits (C, V) for a chunk of rows."""
        return tuple(teacher.hidden_ND[rows] @ teacher.head_VD.T.to(dtype) for teacher in self.teachers)


def next_token_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    distillation: Distillation | None = None,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean loss per token, differentiable in `hidden_ND` and `head_VD`, and the mean cross-entropy alone (detached).

    loss = (1 - a) CE + a T² KL(teacher^T || student^T), mean per token (Hinton et al. 1503.02531; q0, 2606.03938).

    Args:
        compiled: compile the formulas on a GPU; the first call then takes some seconds.
    """
    chunk_loss: ChunkLoss = in_place
    if hidden_ND.is_cuda:
        chunk_loss = _compiled() if compiled else by_formulas
    loss, cross_entropy = _NextTokenLoss.apply(hidden_ND, head_VD, targets_N, distillation, chunk_loss)  # type: ignore[no-untyped-call]
    return loss, cross_entropy


class TeacherChunk(NamedTuple):
    """The teachers' logits for a chunk, and the parameters of the distillation term."""

    logits: tuple[Tensor, ...]
    """(C, V) of each teacher; empty without a teacher."""
    weights: tuple[float, ...]
    alpha: float
    temperature: float


ChunkLoss = Callable[[Tensor, Tensor, TeacherChunk, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps logits (C, V), targets (C, 1), the teachers and N to the gradient (C, V) of the mean loss with respect to the logits, and
the sums over the chunk of the cross-entropies and of the divergences (zero without a teacher).

With z the logits, p = softmax(z), s = softmax(z / T) and teacher q: dCE/dz = p - onehot and d(T² KL)/dz = T (s - q).
"""


def in_place(
    logits_CV: Tensor, targets_C1: Tensor, teachers: TeacherChunk, num_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ChunkLoss`; uses as little memory as possible."""
    teacher_logits, weights, alpha, temperature = teachers
    logits_CV = logits_CV.float()
    grad_CV = torch.log_softmax(logits_CV, dim=-1)
    cross_entropy = -grad_CV.gather(1, targets_C1).sum(dtype=torch.float64)
    divergence = torch.zeros_like(cross_entropy)
    grad_CV.exp_().scatter_add_(1, targets_C1, grad_CV.new_full((), -1.0).expand(targets_C1.shape))
    if teacher_logits:
        teacher_CV = _teacher_log_probabilities(tuple(each.float() for each in teacher_logits), weights, temperature)
        student_CV = torch.log_softmax(logits_CV.div_(temperature), dim=-1)
        q_CV = teacher_CV.exp()
        divergence = teacher_CV.sub_(student_CV).mul_(q_CV).sum(dtype=torch.float64)
        grad_CV.mul_(1 - alpha).add_(student_CV.exp_().sub_(q_CV), alpha=alpha * temperature)
    return grad_CV.div_(num_tokens), cross_entropy, divergence


def _teacher_log_probabilities(
    teacher_logits: tuple[Tensor, ...], weights: tuple[float, ...], temperature: float
) -> Tensor:
    """Log-probabilities (C, V) at a temperature, of one teacher or a linear mixture of several. Overwrites `teacher_logits`."""
    if len(teacher_logits) == 1:
        return torch.log_softmax(teacher_logits[0].div_(temperature), dim=-1)
    mixed_CV = torch.zeros_like(teacher_logits[0])
    for logits_CV, weight in zip(teacher_logits, weights, strict=True):
        mixed_CV.add_(torch.softmax(logits_CV, dim=-1), alpha=weight)
    return torch.log_softmax(mixed_CV.clamp_min_(_MIN_PROBABILITY).log_().div_(temperature), dim=-1)


def by_formulas(
    logits_CV: Tensor, targets_C1: Tensor, teachers: TeacherChunk, num_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ChunkLoss`; for the compiler. The gradient has the dtype of the logits: under autocast, half the bytes of float32."""
    teacher_logits, weights, alpha, temperature = teachers
    z_CV = logits_CV.float()
    log_p_CV = torch.log_softmax(z_CV, dim=-1)
    cross_entropy = -log_p_CV.gather(1, targets_C1).sum()
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C1
    grad_CV = log_p_CV.exp() - is_target_CV.float()
    if not teacher_logits:
        return (grad_CV / num_tokens).to(logits_CV.dtype), cross_entropy, torch.zeros_like(cross_entropy)
    if len(teacher_logits) == 1:
        log_q_CV = torch.log_softmax(teacher_logits[0].float() / temperature, dim=-1)
    else:
        pairs = zip(teacher_logits, weights, strict=True)
        mixed_CV = torch.stack([torch.softmax(each.float(), dim=-1) * weight for each, weight in pairs]).sum(0)
        log_q_CV = torch.log_softmax(mixed_CV.clamp_min(_MIN_PROBABILITY).log() / temperature, dim=-1)
    log_s_CV = torch.log_softmax(z_CV / temperature, dim=-1)
    q_CV = log_q_CV.exp()
    divergence = (q_CV * (log_q_CV - log_s_CV)).sum()
    grad_CV = (1 - alpha) * grad_CV + alpha * temperature * (log_s_CV.exp() - q_CV)
    return (grad_CV / num_tokens).to(logits_CV.dtype), cross_entropy, divergence


@cache
def _compiled() -> ChunkLoss:
    compiled: ChunkLoss = torch.compile(by_formulas)
    return compiled


class _NextTokenLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass; `backward` only scales it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        distillation: Distillation | None,
        chunk_loss: ChunkLoss,
    ) -> tuple[Tensor, Tensor]:
        head = head_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        cross_entropy = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        divergence = torch.zeros_like(cross_entropy)
        alpha, temperature = (distillation.alpha, distillation.temperature) if distillation else (0.0, 1.0)
        weights = tuple(teacher.weight for teacher in distillation.teachers) if distillation else ()
        num_tokens = targets_N.shape[0]
        divisor = torch.tensor(float(num_tokens), device=hidden_ND.device)
        chunk_rows = _GPU_ROWS if hidden_ND.is_cuda else _CPU_ROWS
        for start in range(0, num_tokens, chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_CD = hidden_ND[rows]
            teacher_logits = distillation.logits(rows, hidden_CD.dtype) if distillation else ()
            teachers = TeacherChunk(teacher_logits, weights, alpha, temperature)
            grad_CV, chunk_cross_entropy, chunk_divergence = chunk_loss(
                hidden_CD @ head.T, targets_N[rows, None], teachers, divisor
            )
            cross_entropy += chunk_cross_entropy
            divergence += chunk_divergence
            if hidden_ND.is_cuda:
                grad_hidden_ND[rows] = grad_CV @ head  # in the precision of autocast
            else:  # float32 makes a step 5 % slower than bfloat16, but keeps the results of runs that began with it bit-identical
                grad_CV = grad_CV.to(head.dtype)
                torch.mm(grad_CV, head, out=grad_hidden_ND[rows])
            grad_head_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        cross_entropy /= num_tokens
        loss = (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence / num_tokens
        cross_entropy = cross_entropy.float()
        ctx.mark_non_differentiable(cross_entropy)
        return loss.float(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden_ND * grad_loss, grad_head_VD * grad_loss, None, None, None
