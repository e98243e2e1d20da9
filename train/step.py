"""One training step: the loss of a batch in micro-batches, its gradient averaged over the group, and an update of the weights."""

# B rows, T positions, N = B T tokens, D width

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from chorus.population.errors import ChorusError
from chorus.train.compiling import Compilation
from chorus.train.group import Averaged, Group
from chorus.train.log import Record
from chorus.train.loss import Distillation, Teacher, next_token_loss
from chorus.train.model import Llama
from chorus.train.optimiser import Optimiser, clip_gradients
from chorus.train.settings import Settings

_MAX_GRADIENT_NORM = 1.0
# Tokens per micro-batch: activations stay near a CPU's cache, and fit in any GPU at these sizes.
_MICRO_TOKENS = {"cpu": 4_096, "cuda": 32_768}


class TrainStep:
    """The steps of one model with its optimiser."""

    def __init__(self, model: Llama, settings: Settings, device: torch.device, group: Group) -> None:
        self._model, self._settings, self._device, self._group = model, settings, device, group
        self.optimiser = make_optimiser(model, settings)
        self.teachers: Sequence[tuple[Llama, float]] = ()
        """Frozen models and their weights; empty without distillation."""
        self._averaged = Averaged(model, group, device)
        self._compilation = Compilation(settings.compile, device)
        self._compilation.apply(model)

    def teach(self, teachers: Sequence[tuple[Llama, float]]) -> None:
        """Distil from `teachers`, with weights on the simplex, from now on."""
        self.teachers = teachers
        self._compilation.apply(*(teacher for teacher, _ in teachers))

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, *, rate: float, decay: float, place: str) -> Record:
        """Update the weights once. Returns the losses and the norm of the gradient, for the log.

        Raises:
            ChorusError: the loss or the gradient is not finite; `place` names the trajectory and step.
        """
        loss, cross_entropy = self._accumulate_gradient(tokens_BT, targets_BT)
        norm = clip_gradients(self._model, _MAX_GRADIENT_NORM)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ChorusError(
                f"{place} diverged: loss {loss}, gradient norm {norm}, at a learning rate of {rate:.3g}. "
                f"Train into a new --out with a lower --lr (try {self._settings.lr / 3:.2g}), or a lower --perturbation "
                "if it followed a boundary. Members finished so far stay usable."
            )
        self.optimiser.step(learning_rate=rate, weight_decay=decay)
        return {
            "loss": round(loss, 6),
            "cross_entropy": round(cross_entropy, 6),
            "learning_rate": rate,
            "weight_decay": decay,
            "gradient_norm": round(norm, 4),
        }

    def note_seconds(self, seconds: float, steps_left: int) -> None:
        """Compile from now on if the measured seconds of a step show that it saves time."""
        if self._compilation.should_start(seconds, steps_left):
            self._compilation.apply(self._model, *(teacher for teacher, _ in self.teachers))

    def _accumulate_gradient(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[float, float]:
        """The gradient of the batch's mean loss; returns that loss and its cross-entropy."""
        self._model.train()
        loss = cross_entropy = 0.0
        own_rows = self._group.rows(len(tokens_BT))
        rows = max(1, micro_tokens(self._settings, self._device) // tokens_BT.shape[1])
        parts = list(zip(torch.split(tokens_BT[own_rows], rows), torch.split(targets_BT[own_rows], rows), strict=True))
        for idx, (tokens, targets) in enumerate(parts):
            share = len(tokens) / len(tokens_BT)
            with self._averaged.accumulating(idx + 1 < len(parts)):
                part, part_cross_entropy = self._loss(tokens.to(self._device), targets.to(self._device))
                (part * (share * self._group.size)).backward()  # type: ignore[no-untyped-call] # the group averages, but the shares must add up
            loss += share * float(part.detach())
            cross_entropy += share * float(part_cross_entropy)
        loss, cross_entropy = self._group.sums(loss, cross_entropy)
        return loss, cross_entropy

    def _loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        settings = self._settings
        with autocast(self._device):
            distillation = None
            if self.teachers:
                with torch.no_grad():
                    teachers = tuple(
                        Teacher(hidden_ND=model(tokens_BT).flatten(0, 1), head_VD=model.lm_head.weight, weight=weight)
                        for model, weight in self.teachers
                    )
                alpha, temperature = settings.distil_alpha, settings.distil_temperature
                distillation = Distillation(teachers=teachers, alpha=alpha, temperature=temperature)
            hidden_ND = self._averaged(tokens_BT).flatten(0, 1)
            head_VD, compiled = self._model.lm_head.weight, self._compilation.started
            return next_token_loss(hidden_ND, head_VD, targets_BT.flatten(), distillation, compiled=compiled)


def make_optimiser(model: Llama, settings: Settings) -> Optimiser:
    """The optimiser of the settings."""
    return Optimiser(model, settings.optimiser, embedding_rate=settings.embedding_rate, cautious=settings.cautious)


def micro_tokens(settings: Settings, device: torch.device) -> int:
    """Tokens per forward and backward pass."""
    return settings.micro_batch_tokens or _MICRO_TOKENS[device.type]


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 for matrix products if the hardware supports it; else float32, since emulated bfloat16 is far slower."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()
