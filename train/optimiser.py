"""Muon for the matrices inside layers, AdamW for embeddings, output head and norms.

All share one learning rate and one decoupled weight decay, which the schedule sets at every step; embeddings and head may multiply
the rate. Cautious decay (Chen et al. 2510.12402) shrinks an element only if the update also moves it towards zero, so that decay
never works against the update. This does not derive from `torch.optim.Optimizer`, whose decorators import the compiler: seven
seconds of startup per process for nothing needed here.
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
    """Updates every parameter of a model once per step. Its state persists across cycles and, in checkpoints, across kills."""

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
        """Update all parameters from their gradients, then clear the gradients."""
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
        """Clear the state, as before the first step."""
        self.num_steps = 0
        for tensor in (*self._momentum.values(), *self._mean.values(), *self._square.values()):
            tensor.zero_()

    def state_dict(self) -> dict[str, object]:
        """The complete state of the optimiser."""
        return {"num_steps": self.num_steps, "momentum": self._momentum, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore a state from `state_dict`."""
        assert isinstance(state["num_steps"], int)
        self.num_steps = state["num_steps"]
        for key, tensors in (("momentum", self._momentum), ("mean", self._mean), ("square", self._square)):
            saved = state[key]
            assert isinstance(saved, dict)
            assert saved.keys() == tensors.keys()
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])

    def _step_adamw(self, rate: float, decay: float) -> None:
        """Adam with decoupled weight decay (Loshchilov & Hutter 1711.05101)."""
        first, second = _ADAM_BETAS
        first_correction, second_correction = 1 - first**self.num_steps, 1 - second**self.num_steps
        for name, parameter in self._others.items():
            assert parameter.grad is not None
            parameter_rate = rate * self._embedding_rate if name.endswith(_EMBEDDINGS) else rate
            mean = self._mean[name].lerp_(parameter.grad, 1 - first)
            square = self._square[name].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
            denominator = (square / second_correction).sqrt_().add_(_ADAM_EPSILON)
            self._decay(parameter, mean, parameter_rate * decay)
            parameter.addcdiv_(mean, denominator, value=-parameter_rate / first_correction)

    def _step_muon(self, names: list[str], rate: float, decay: float) -> None:
        """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024). The root mean square of the update is scaled
        to 0.2, as in AdamW (Liu et al. 2502.16982), so that both rules share one learning rate.

        All matrices of one shape are updated together, in float32 on CPUs. `torch.optim.Muon` takes one matrix at a time, always in
        bfloat16, which some CPUs emulate: there it takes 200 ms for one 192 x 512 matrix, and this takes 4 ms.
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
        """Shrink a parameter by `share`; with cautious decay, only elements whose update has the parameter's sign."""
        if self._cautious:
            parameter.sub_(parameter * (parameter * update > 0), alpha=share)
        else:
            parameter.mul_(1 - share)


def orthogonalise(stack: Tensor) -> Tensor:
    """Map every matrix U S Vᵀ of the stack (n, rows, columns) to approximately U Vᵀ, with singular values close to 1."""
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
    """Scale all gradients down to a joint norm of at most `max_norm`. Returns the norm before scaling."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
