"""Trains one trajectory: cycles of steps, each followed by a snapshot and a perturbation.

Progress is reported through `emit`. When `should_stop` returns true, training stops after the current step with a checkpoint.
Several processes may train one trajectory together (`train.group`): all take every step, and the first one writes files. Display
and other trajectories are handled elsewhere.
"""

# B rows, T positions, N = B T tokens, D width

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from chorus.population.errors import ChorusError
from chorus.train import heldout
from chorus.train.checkpoint import Position, load_checkpoint, remove_checkpoints, save_checkpoint
from chorus.train.compiling import Compilation
from chorus.train.data import Epoch, TrainTokens
from chorus.train.group import Averaged, Group
from chorus.train.log import Log, Record
from chorus.train.loss import Distillation, Teacher, next_token_loss
from chorus.train.member import add_member
from chorus.train.model import Llama
from chorus.train.optimiser import Optimiser, clip_gradients
from chorus.train.perturb import generator_for, perturb
from chorus.train.run import Run, finished_members, likelihoods_path, member_name
from chorus.train.schedule import Cycle, saturated
from chorus.train.settings import Settings
from chorus.train.snapshot import load_member

_INITIALISATION, _PERTURBATION = 0, 1
_MAX_GRADIENT_NORM = 1.0
# Tokens per micro-batch: activations stay near a CPU's cache, and fit in any GPU at these sizes.
_MICRO_TOKENS = {"cpu": 4_096, "cuda": 32_768}


class Trajectory:
    """The state of one trajectory, trained through its schedule."""

    def __init__(
        self,
        run: Run,
        idx: int,
        device: torch.device,
        *,
        checkpoint_seconds: float = 60.0,
        group: Group = Group(),  # noqa: B008 - frozen
    ) -> None:
        self.run, self.idx, self.device, self.group = run, idx, device, group
        self.directory = self._directory()
        if group.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".checkpoint-*"):
                leftover.unlink()
        group.wait()
        self.settings, self.schedule = run.settings.of_trajectory(idx), run.schedule(idx)
        self.model = Llama(run.shape).to(device)
        self._compilation = Compilation(self.settings.compile, device)
        self._compilation.apply(self.model)
        self.optimiser = make_optimiser(self.model, self.settings)
        self._averaged = Averaged(self.model, group, device)
        self._teachers: list[tuple[Llama, float]] = []
        """Frozen models and their weights; empty without distillation."""
        self._data = TrainTokens(run.directory / "training")
        self._checkpoint_seconds = checkpoint_seconds
        last = self.schedule.cycles()[-1]
        self._num_steps = last.first_step + last.steps

    def train(self, emit: Callable[[Record], None], should_stop: Callable[[], bool]) -> bool:
        """Train from the last checkpoint. True if all members are finished, False if stopped."""
        cycles = self.schedule.cycles()
        if self._name(cycles[-1]) in finished_members(self.run.directory):
            self.group.wait()
            if self.group.is_first:
                remove_checkpoints(self.directory)
            return True
        position = load_checkpoint(self.directory, self.model, self.optimiser)
        if position is None:
            self._initialise(0)
            position = Position(cycle=0, step=0, log_bytes=0)
        self.group.wait()  # all processes read before the first writes
        with self._log(position, emit) as log:
            first_step = position.step
            for cycle in cycles[position.cycle :]:
                if not self._train_cycle(cycle, first_step, log, should_stop):
                    return False
                self._finish_cycle(cycle, log)
                first_step = 0
        if self.group.is_first:
            remove_checkpoints(self.directory)
        return True

    def _log(self, position: Position, emit: Callable[[Record], None]) -> Log:
        if self.group.is_first:
            return Log(self.directory / "log.jsonl", length=position.log_bytes, forward=emit)
        return Log(None, length=0, forward=lambda record: None)

    def _train_cycle(self, cycle: Cycle, first_step: int, log: Log, should_stop: Callable[[], bool]) -> bool:
        """Train one cycle from `first_step` on. False if stopped, after writing a checkpoint."""
        self._teachers = self._load_teachers(cycle)
        self._compilation.apply(*(teacher for teacher, _ in self._teachers))
        epoch_idx, epoch = -1, None
        saved_at = started = time.monotonic()
        for step in range(first_step, cycle.steps):
            if epoch is None or step // cycle.steps_per_epoch != epoch_idx:
                epoch_idx = step // cycle.steps_per_epoch
                number = cycle.first_epoch + epoch_idx
                seed, trajectory = self._seeds()
                epoch = Epoch(self._data, seed=seed, trajectory=trajectory, epoch=number)
            batch = epoch.batch(
                step % cycle.steps_per_epoch, rows=cycle.batch_rows, length=self.settings.context_length
            )
            losses = self._step(cycle, step, torch.from_numpy(batch[0]), torch.from_numpy(batch[1]))
            seconds, started = time.monotonic() - started, time.monotonic()
            log.write(
                {
                    "event": "step",
                    "trajectory": self.idx,
                    "cycle": cycle.idx,
                    "step": cycle.first_step + step,
                    "epoch": cycle.first_epoch + (step + 1) / cycle.steps_per_epoch,
                    **losses,
                    "tokens": cycle.batch_rows * self.settings.context_length,
                    "seconds": round(seconds, 4),
                }
            )
            if self._compilation.should_start(seconds, self._num_steps - cycle.first_step - step - 1):
                self._compilation.apply(self.model, *(teacher for teacher, _ in self._teachers))
            stop = self.group.any(should_stop())
            if step + 1 < cycle.steps and (stop or time.monotonic() - saved_at >= self._checkpoint_seconds):
                self._checkpoint(cycle.idx, step + 1, log)
                saved_at = time.monotonic()
                if stop:
                    return False
        return True

    def _step(self, cycle: Cycle, step: int, tokens_BT: Tensor, targets_BT: Tensor) -> Record:
        """Update the weights once. Returns the fields of the log record."""
        self.model.train()
        rate, decay = self.schedule.rates(cycle, step)
        loss = cross_entropy = 0.0
        own_rows = self.group.rows(len(tokens_BT))
        rows = max(1, micro_tokens(self.settings, self.device) // tokens_BT.shape[1])
        parts = list(zip(torch.split(tokens_BT[own_rows], rows), torch.split(targets_BT[own_rows], rows), strict=True))
        for idx, (tokens, targets) in enumerate(parts):
            share = len(tokens) / len(tokens_BT)
            with self._averaged.accumulating(idx + 1 < len(parts)):
                part, part_cross_entropy = self._loss(tokens.to(self.device), targets.to(self.device))
                (part * (share * self.group.size)).backward()  # type: ignore[no-untyped-call] # the group averages, but the shares must add up
            loss += share * float(part.detach())
            cross_entropy += share * float(part_cross_entropy)
        loss, cross_entropy = self.group.sums(loss, cross_entropy)
        norm = clip_gradients(self.model, _MAX_GRADIENT_NORM)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ChorusError(
                f"trajectory {self.idx} diverged at step {cycle.first_step + step} (cycle {cycle.idx}): loss {loss}, "
                f"gradient norm {norm}, at a learning rate of {rate:.3g}. Train into a new --out with a lower --lr "
                f"(try {self.settings.lr / 3:.2g}), or a lower --perturbation if it followed a boundary. "
                "Members finished so far stay usable."
            )
        self.optimiser.step(learning_rate=rate, weight_decay=decay)
        return {
            "loss": round(loss, 6),
            "cross_entropy": round(cross_entropy, 6),
            "learning_rate": rate,
            "weight_decay": decay,
            "gradient_norm": round(norm, 4),
        }

    def _loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        with autocast(self.device):
            distillation = None
            if self._teachers:
                with torch.no_grad():
                    teachers = tuple(
                        Teacher(hidden_ND=model(tokens_BT).flatten(0, 1), head_VD=model.lm_head.weight, weight=weight)
                        for model, weight in self._teachers
                    )
                alpha, temperature = settings.distil_alpha, settings.distil_temperature
                distillation = Distillation(teachers=teachers, alpha=alpha, temperature=temperature)
            hidden_ND = self._averaged(tokens_BT).flatten(0, 1)
            compiled = self._compilation.started
            return next_token_loss(
                hidden_ND, self.model.lm_head.weight, targets_BT.flatten(), distillation, compiled=compiled
            )

    def _finish_cycle(self, cycle: Cycle, log: Log) -> None:
        """Save, evaluate and register the snapshot, then perturb the weights."""
        if self.group.is_first:
            self._save_member(cycle, log)
        if cycle.idx + 1 < self.settings.cycles:
            if cycle.sigma_after is not None:
                perturb(self.model, cycle.sigma_after, generator_for(*self._seeds(), _PERTURBATION, cycle.idx))
            if self.settings.restart:
                self._initialise(cycle.idx + 1)
            self.group.align(self.model)
            self._checkpoint(cycle.idx + 1, 0, log)
        self.group.wait()  # the next cycle reads the saved member

    def _seeds(self) -> tuple[int, int]:
        """The seeds of initialisation, document order and noise, besides epoch and cycle."""
        return self.settings.seed, self.idx

    def _directory(self) -> Path:
        """The directory of its checkpoints and log."""
        return self.run.directory / "training" / f"t{self.idx}"

    def _name(self, cycle: Cycle) -> str:
        """The name of the member that the cycle produces."""
        return member_name(self.idx, cycle.idx)

    def _origin(self, cycle: Cycle) -> dict[str, JsonValue]:
        """The optional manifest fields of that member."""
        teacher = member_name(self.idx, cycle.idx - 1) if self._distils(cycle) else None
        return {"trajectory": self.idx, "cycle": cycle.idx, "teacher": teacher}

    def _load_teachers(self, cycle: Cycle) -> list[tuple[Llama, float]]:
        """The teachers of the cycle, with weights: the trajectory's previous member, as saved."""
        if not self._distils(cycle):
            return []
        return [(load_member(self.run, member_name(self.idx, cycle.idx - 1), self.device), 1.0)]

    def _distils(self, cycle: Cycle) -> bool:
        """Whether the cycle distils. It depends only on files of finished members, so a resumed run decides the same."""
        if cycle.distils is not None:
            return cycle.distils
        paths = [likelihoods_path(self.run, member_name(self.idx, earlier)) for earlier in range(cycle.idx)]
        return saturated([heldout.loss(np.load(path)) for path in paths])

    def _save_member(self, cycle: Cycle, log: Log) -> None:
        name = self._name(cycle)
        epochs = float(cycle.first_epoch + cycle.epochs)
        selection_loss = add_member(self.model, self.run, name, self.device, epochs=epochs, **self._origin(cycle))
        log.write({"event": "member", "trajectory": self.idx, "name": name, "selection_loss": selection_loss})

    def _initialise(self, cycle: int) -> None:
        """Initialise weights and optimiser, at the start of the run or, with `restart`, of a later cycle."""
        key = (cycle,) if cycle else ()
        self.model.initialise(generator_for(*self._seeds(), _INITIALISATION, *key))
        self.optimiser.reset()

    def _checkpoint(self, cycle: int, step: int, log: Log) -> None:
        if self.group.is_first:
            position = Position(cycle=cycle, step=step, log_bytes=log.length())
            save_checkpoint(self.directory, position, self.model, self.optimiser)


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
