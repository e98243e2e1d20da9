"""The loss of a member: cross-entropy, and the divergence from its teacher, without ever holding all logits.

The output head is part of the loss: logits are made for some rows at a time, turned into the loss and its gradient in place,
and forgotten. Memory is O(rows · V), not O(N · V), and on a CPU the chunk stays in cache (measured in bench/LOG.md).
"""

# N tokens, C tokens of a chunk, D width, V vocabulary

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_ROWS = 512
_GPU_ROWS = 4_096  # enough for a GPU to be busy with each product; by arithmetic, not measured
_TINY = 1e-38  # keeps the logarithm of a mixture finite where every teacher underflows


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What one teacher says about the same tokens; its width may differ from the student's."""

    hidden_ND: Tensor
    head_VD: Tensor
    weight: float = 1.0
    """Among the teachers, on the simplex."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The teacher, or a mixture of several whose probabilities are averaged, and how much it counts."""

    teachers: tuple[Teacher, ...]
    alpha: float
    """Share of the divergence in the loss, in (0, 1]."""
    temperature: float
    """T > 0: both distributions are softened by it."""

    def log_p(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The teacher's softened log-probabilities (C, V) of some rows."""
        if len(self.teachers) == 1:
            return torch.log_softmax(self._logits(self.teachers[0], rows, dtype).div_(self.temperature), dim=-1)
        mixed_CV: Tensor | None = None
        for teacher in self.teachers:
            p_CV = torch.softmax(self._logits(teacher, rows, dtype), dim=-1).mul_(teacher.weight)
            mixed_CV = p_CV if mixed_CV is None else mixed_CV.add_(p_CV)
        assert mixed_CV is not None
        return torch.log_softmax(mixed_CV.clamp_min_(_TINY).log_().div_(self.temperature), dim=-1)

    @staticmethod
    def _logits(teacher: Teacher, rows: slice, dtype: torch.dtype) -> Tensor:
        return (teacher.hidden_ND[rows] @ teacher.head_VD.T.to(dtype)).float()


def next_token_loss(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, distillation: Distillation | None = None
) -> tuple[Tensor, Tensor]:
    """The mean loss per token, differentiable in `hidden_ND` and `head_VD`, and the mean cross-entropy alone (detached).

    loss = (1 - a) CE + a T² KL(teacher^T || student^T), per-token mean (Hinton et al. 1503.02531; q0, 2606.03938).
    """
    loss, cross_entropy = _NextTokenLoss.apply(hidden_ND, head_VD, targets_N, distillation)  # type: ignore[no-untyped-call]
    return loss, cross_entropy


class _NextTokenLoss(torch.autograd.Function):
    """The gradient is ready when the forward pass ends: with z the logits, p = softmax(z), s = softmax(z / T) and teacher q,
    dCE/dz = p - onehot and d(T² KL)/dz = T (s - q).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, distillation: Distillation | None
    ) -> tuple[Tensor, Tensor]:
        head = head_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        cross_entropy = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        divergence = torch.zeros_like(cross_entropy)
        alpha = distillation.alpha if distillation else 0.0
        num_tokens = targets_N.shape[0]
        at_once = _GPU_ROWS if hidden_ND.is_cuda else _ROWS
        for start in range(0, num_tokens, at_once):
            rows = slice(start, start + at_once)
            hidden_CD, targets_C1 = hidden_ND[rows], targets_N[rows, None]
            logits_CV = (hidden_CD @ head.T).float()
            grad_CV = torch.log_softmax(logits_CV, dim=-1)
            cross_entropy -= grad_CV.gather(1, targets_C1).sum(dtype=torch.float64)
            grad_CV.exp_().scatter_add_(1, targets_C1, grad_CV.new_full((), -1.0).expand(targets_C1.shape))
            if distillation is not None:
                temperature = distillation.temperature
                teacher_CV = distillation.log_p(rows, hidden_CD.dtype)
                student_CV = torch.log_softmax(logits_CV.div_(temperature), dim=-1)
                q_CV = teacher_CV.exp()
                divergence += teacher_CV.sub_(student_CV).mul_(q_CV).sum(dtype=torch.float64)
                grad_CV.mul_(1 - alpha).add_(student_CV.exp_().sub_(q_CV), alpha=alpha * temperature)
            grad_CV = grad_CV.div_(num_tokens).to(head.dtype)
            if hidden_ND.is_cuda:
                grad_hidden_ND[rows] = grad_CV @ head  # in autocast's precision
            else:  # in float32, 5 % of a step slower than bfloat16: a run that was begun so ends with the same bits
                torch.mm(grad_CV, head, out=grad_hidden_ND[rows])
            grad_head_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        cross_entropy /= num_tokens
        loss = (1 - alpha) * cross_entropy
        if distillation is not None:
            loss += alpha * distillation.temperature**2 * divergence / num_tokens
        cross_entropy = cross_entropy.float()
        ctx.mark_non_differentiable(cross_entropy)
        return loss.float(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden_ND * grad_loss, grad_head_VD * grad_loss, None, None
