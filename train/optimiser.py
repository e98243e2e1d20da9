"""Two rules for three groups of parameters: Muon for the matrices inside layers, AdamW for embeddings and head, and for norms.

All take one learning rate and one decoupled weight decay, which the schedule sets at every step; embeddings and head may have
their own multiple of that rate. Decay may be cautious (Chen et al. 2510.12402): an element shrinks only where the update pulls it
towards zero as well, so that decay never works against what is being learnt. The rules do not derive from
`torch.optim.Optimizer`: its decorators import the compiler, seven seconds of start for each process, and hold nothing needed here.
"""

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

OptimiserName = Literal["muon", "adamw"]
_ADAM_BETAS = (0.9, 0.95)
_ADAM_EPSILON = 1e-8
_MUON_MOMENTUM = 0.95
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_CPU_PRECISION = torch.float32


class Optimiser:
    """Updates every parameter of a model once per step, and carries its state across cycles and kills."""

    def __init__(
        self, model: nn.Module, name: OptimiserName, *, embedding_rate: float = 1.0, cautious: bool = False
    ) -> None:
        """`embedding_rate` multiplies the learning rate of embeddings and head."""
        named = list(model.named_parameters())
        self._embedding_rate, self._cautious = embedding_rate, cautious
        self._matrices = {n: p for n, p in named if name == "muon" and ".layers." in n and p.ndim == 2}
        self._others = {n: p for n, p in named if n not in self._matrices}
        self.num_steps = 0
        self._momentum = {n: torch.zeros_like(p) for n, p in self._matrices.items()}
        self._mean = {n: torch.zeros_like(p) for n, p in self._others.items()}
        self._square = {n: torch.zeros_like(p) for n, p in self._others.items()}

    @torch.no_grad()
    def step(self, *, learning_rate: float, weight_decay: float) -> None:
        """Update all parameters from their gradients, which are then forgotten."""
        self.num_steps += 1
        self._step_adamw(learning_rate, weight_decay)
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self._matrices.items():
            by_shape[parameter.shape].append(name)
        for names in by_shape.values():
            self._step_muon(names, learning_rate, weight_decay)
        for parameter in (*self._matrices.values(), *self._others.values()):
            parameter.grad = None

    def reset(self) -> None:
        """Forget everything: the next step is the first."""
        self.num_steps = 0
        for tensor in (*self._momentum.values(), *self._mean.values(), *self._square.values()):
            tensor.zero_()

    def state_dict(self) -> dict[str, object]:
        """All that the next step depends on."""
        return {"num_steps": self.num_steps, "momentum": self._momentum, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave."""
        assert isinstance(state["num_steps"], int)
        self.num_steps = state["num_steps"]
        for key, own in (("momentum", self._momentum), ("mean", self._mean), ("square", self._square)):
            saved = state[key]
            assert isinstance(saved, dict)
            assert saved.keys() == own.keys()
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def _step_adamw(self, rate: float, decay: float) -> None:
        """Adam with decoupled weight decay (Loshchilov & Hutter 1711.05101)."""
        first, second = _ADAM_BETAS
        first_correction, second_correction = 1 - first**self.num_steps, 1 - second**self.num_steps
        for name, parameter in self._others.items():
            assert parameter.grad is not None
            own_rate = rate * self._embedding_rate if name.endswith(_EMBEDDINGS) else rate
            mean = self._mean[name].lerp_(parameter.grad, 1 - first)
            square = self._square[name].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
            denominator = (square / second_correction).sqrt_().add_(_ADAM_EPSILON)
            self._decay(parameter, mean, own_rate * decay)
            parameter.addcdiv_(mean, denominator, value=-own_rate / first_correction)

    def _step_muon(self, names: list[str], rate: float, decay: float) -> None:
        """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), with the update's root mean square matched
        to AdamW's, 0.2 (Liu et al. 2502.16982), so that one learning rate serves both rules.

        `torch.optim.Muon` takes one matrix at a time and always in bfloat16, which a CPU without it emulates: 200 ms for one
        192 x 512 matrix where this takes 4, all matrices of one shape together and in float32.
        """
        directions = []
        for name in names:
            gradient = self._matrices[name].grad
            assert gradient is not None
            self._momentum[name].lerp_(gradient, 1 - _MUON_MOMENTUM)
            directions.append(gradient.lerp(self._momentum[name], _MUON_MOMENTUM))  # Nesterov
        scale = 0.2 * max(directions[0].shape) ** 0.5
        for name, update in zip(names, orthogonalise(torch.stack(directions)).unbind(), strict=True):
            self._decay(self._matrices[name], update, rate * decay)
            self._matrices[name].add_(update, alpha=-rate * scale)

    def _decay(self, parameter: Tensor, update: Tensor, share: float) -> None:
        """Shrink by `share`; cautiously, only where the update (of which the sign counts) has the parameter's sign."""
        if self._cautious:
            parameter.sub_(parameter * (parameter * update > 0), alpha=share)
        else:
            parameter.mul_(1 - share)


def orthogonalise(stack: Tensor) -> Tensor:
    """For every matrix U S Vᵀ of the stack (n, rows, columns) about U Vᵀ: its singular values moved close to 1."""
    a, b, c = _NEWTON_SCHULZ
    dtype = torch.bfloat16 if stack.is_cuda else _CPU_PRECISION
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients down together to a norm of at most `max_norm`; the norm that they had."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
