"""Trains one trajectory: cycles of steps, each followed by a snapshot and a perturbation.

Progress is reported through `emit`. When `should_stop` returns true, training stops after the current step with a checkpoint.
Several processes may train one trajectory together (`train.group`): all take every step, and the first one writes files. Display
and other trajectories are handled elsewhere.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from chorus.train.checkpoint import Position, load_checkpoint, remove_checkpoints, save_checkpoint
from chorus.train.data import Epoch, TrainTokens
from chorus.train.group import Group
from chorus.train.lineage import Chain, Lineage
from chorus.train.log import Log, Record
from chorus.train.member import add_member
from chorus.train.model import Llama
from chorus.train.perturb import generator_for, perturb
from chorus.train.run import Run, finished_members
from chorus.train.schedule import Cycle
from chorus.train.snapshot import load_member
from chorus.train.step import TrainStep

_INITIALISATION, _PERTURBATION = 0, 1


class Trajectory:
    """The state of one trajectory, trained through its schedule."""

    def __init__(
        self,
        run: Run,
        idx: int,
        device: torch.device,
        *,
        lineage: Lineage | None = None,
        checkpoint_seconds: float = 60.0,
        group: Group = Group(),  # noqa: B008 - frozen
    ) -> None:
        """`lineage`: by default trajectory `idx` of the run's population."""
        self.run, self.idx, self.device, self.group = run, idx, device, group
        self._lineage = lineage or Chain(run, idx)
        self.directory = self._lineage.directory
        if group.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".checkpoint-*"):
                leftover.unlink()
        group.wait()
        self.settings, self.schedule = run.settings.of_trajectory(idx), run.schedule(idx)
        self.model = Llama(run.shape).to(device)
        self.step = TrainStep(self.model, self.settings, device, group)
        self._data = TrainTokens(run.directory / "training")
        self._checkpoint_seconds = checkpoint_seconds
        last = self.schedule.cycles()[-1]
        self._num_steps = last.first_step + last.steps

    def train(self, emit: Callable[[Record], None], should_stop: Callable[[], bool]) -> bool:
        """Train from the last checkpoint. True if all members are finished, False if stopped."""
        if not self._is_finished():
            position = self._restore()
            with self._log(position, emit) as log:
                first_step = position.step
                for cycle in self.schedule.cycles()[position.cycle :]:
                    if not self._train_cycle(cycle, first_step, log, should_stop):
                        return False
                    self._finish_cycle(cycle, log)
                    first_step = 0
        if self.group.is_first:
            remove_checkpoints(self.directory)
        return True

    def initialise(self, cycle: int = 0) -> None:
        """Initialise weights and optimiser, at the start of the run or, with `restart`, of a later cycle."""
        key = (cycle,) if cycle else ()
        self.model.initialise(generator_for(*self._lineage.seeds, _INITIALISATION, *key))
        self.step.optimiser.reset()

    def _is_finished(self) -> bool:
        is_finished = self._lineage.member(self.schedule.cycles()[-1]) in finished_members(self.run.directory)
        self.group.wait()  # all processes read before the first one writes
        return is_finished

    def _restore(self) -> Position:
        position = load_checkpoint(self.directory, self.model, self.step.optimiser)
        if position is None:
            self.initialise()
            position = Position(cycle=0, step=0, log_bytes=0)
        self.group.wait()  # all processes read before the first one writes
        return position

    def _log(self, position: Position, emit: Callable[[Record], None]) -> Log:
        if self.group.is_first:
            return Log(self.directory / "log.jsonl", length=position.log_bytes, forward=emit)
        return Log(None, length=0, forward=lambda record: None)

    def _train_cycle(self, cycle: Cycle, first_step: int, log: Log, should_stop: Callable[[], bool]) -> bool:
        """Train one cycle from `first_step` on. False if stopped, after writing a checkpoint."""
        teachers = self._lineage.teachers(cycle)
        self.step.teach([(load_member(self.run, name, self.device), weight) for name, weight in teachers.items()])
        saved_at = started = time.monotonic()
        for step, (tokens_BT, targets_BT) in self._batches(cycle, first_step):
            rate, decay = self.schedule.rates(cycle, step)
            place = f"trajectory {self.idx}, step {cycle.first_step + step} (cycle {cycle.idx})"
            losses = self.step(tokens_BT, targets_BT, rate=rate, decay=decay, place=place)
            seconds, started = time.monotonic() - started, time.monotonic()
            log.write(self._record(cycle, step, losses, seconds))
            self.step.note_seconds(seconds, self._num_steps - cycle.first_step - step - 1)
            stop = self.group.any(should_stop())
            if step + 1 < cycle.steps and (stop or time.monotonic() - saved_at >= self._checkpoint_seconds):
                self._checkpoint(cycle.idx, step + 1, log)
                saved_at = time.monotonic()
                if stop:
                    return False
        return True

    def _batches(self, cycle: Cycle, first_step: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """The cycle's steps from `first_step` on, with their tokens (B, T) and targets (B, T)."""
        seed, trajectory = self._lineage.seeds
        for epoch_idx in range(first_step // cycle.steps_per_epoch, cycle.epochs):
            epoch = Epoch(self._data, seed=seed, trajectory=trajectory, epoch=cycle.first_epoch + epoch_idx)
            begin = epoch_idx * cycle.steps_per_epoch
            for step in range(max(first_step, begin), begin + cycle.steps_per_epoch):
                batch = epoch.batch(step - begin, rows=cycle.batch_rows, length=self.settings.context_length)
                yield step, (torch.from_numpy(batch[0]), torch.from_numpy(batch[1]))

    def _record(self, cycle: Cycle, step: int, losses: Record, seconds: float) -> Record:
        return {
            "event": "step",
            "trajectory": self.idx,
            "cycle": cycle.idx,
            "step": cycle.first_step + step,
            "epoch": cycle.first_epoch + (step + 1) / cycle.steps_per_epoch,
            **losses,
            "tokens": cycle.batch_rows * self.settings.context_length,
            "seconds": round(seconds, 4),
        }

    def _finish_cycle(self, cycle: Cycle, log: Log) -> None:
        """Save, evaluate and register the snapshot, then perturb the weights."""
        if self.group.is_first:
            self._save_member(cycle, log)
        if cycle.idx + 1 < self.settings.cycles:
            if cycle.sigma_after is not None:
                perturb(self.model, cycle.sigma_after, generator_for(*self._lineage.seeds, _PERTURBATION, cycle.idx))
            if self.settings.restart:
                self.initialise(cycle.idx + 1)
            self.group.align(self.model)
            self._checkpoint(cycle.idx + 1, 0, log)
        self.group.wait()  # the next cycle reads the saved member

    def _save_member(self, cycle: Cycle, log: Log) -> None:
        name, origin = self._lineage.member(cycle), self._lineage.origin(cycle)
        epochs = float(cycle.first_epoch + cycle.epochs)
        selection_loss = add_member(self.model, self.run, name, self.device, epochs=epochs, **origin)
        log.write({"event": "member", "trajectory": self.idx, "name": name, "selection_loss": selection_loss})

    def _checkpoint(self, cycle: int, step: int, log: Log) -> None:
        if self.group.is_first:
            position = Position(cycle=cycle, step=step, log_bytes=log.length())
            save_checkpoint(self.directory, position, self.model, self.step.optimiser)
