"""Trains a student: one model distilled from the mixture of a tier, and added to the population as a member.

It is trained like a trajectory of a single cycle, with the same batches, checkpoints and log. Its teachers are the members of the
tier, their probabilities averaged with the tier's weights. `chorus prior fit` decides whether a tier uses it.

DIR/training/students/NAME/plan.json   its settings and teachers
"""

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.files import write_text
from chorus.population.manifest import Tier
from chorus.train.run import Run
from chorus.train.schedule import Cycle
from chorus.train.settings import Settings
from chorus.train.trajectory import Trajectory


class StudentPlan(BaseModel):
    """The settings and teachers of a student."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    """Settings of a run with one trajectory and one cycle."""
    tier: str
    teachers: dict[str, float]
    """Weights by member."""


def make_plan(
    run: Run, tier: Tier, *, epochs: int, alpha: float, temperature: float, layers: int, width: int, heads: int
) -> StudentPlan:
    """Plan a student of a finished run.

    Raises:
        ChorusError: the sizes are incompatible.
    """
    settings = replace(
        run.settings, trajectories=1, cycles=1, epochs_per_cycle=epochs, layers=layers, width=width, heads=heads,
        distil_alpha=alpha, distil_temperature=temperature, distil_after=None, restart=False,
        burn_in=0, vary={},
    )  # fmt: skip
    return StudentPlan(settings=settings, tier=tier.name, teachers=dict(zip(tier.members, tier.weights, strict=True)))


def claim(run: Run, name: str, plan: StudentPlan) -> StudentPlan:
    """Write a student's plan. If it was started before, return the plan and teachers of that start.

    Raises:
        ChorusError: there is a member, or a student with other settings, of that name.
    """
    if name in {member.name for member in manifest.load(run.directory).members}:
        raise ChorusError(f"{run.directory} already has a member {name!r}. Choose another --name for the student.")
    started = read_plan(run.directory, name)
    if started is None:
        write_text(_plan_path(run.directory, name), plan.model_dump_json(indent=2) + "\n")
        return plan
    if (started.settings, started.tier) != (plan.settings, plan.tier):
        raise ChorusError(
            f"a student {name!r} was started in {run.directory} with other settings. "
            "Use those to continue it, or choose another --name."
        )
    return started


def read_plan(directory: Path, name: str) -> StudentPlan | None:
    """A student's plan; None if there is none.

    Raises:
        ChorusError: the file is damaged or from another version.
    """
    path = _plan_path(directory, name)
    if not path.exists():
        return None
    try:
        return StudentPlan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ChorusError(f"{path} is not a valid student plan of this version. Choose another --name.") from error


def student_run(run: Run, plan: StudentPlan) -> Run:
    """The run that trains the student: the same corpus and directory, with the student's settings."""
    return replace(run, settings=plan.settings)


def training(run: Run, name: str, device: torch.device, *, checkpoint_seconds: float = 60.0) -> Trajectory:
    """The training of the student `name` of `run`.

    Raises:
        ChorusError: the student has no plan, or a damaged one.
    """
    plan = read_plan(run.directory, name)
    if plan is None:
        raise ChorusError(f"{run.directory} has no plan for a student {name!r}. Start it with `chorus distil`.")
    lineage = _StudentLineage(run, name, plan)
    return Trajectory(student_run(run, plan), 0, device, lineage=lineage, checkpoint_seconds=checkpoint_seconds)


class _StudentLineage:
    """One member, taught by the members of a tier."""

    def __init__(self, run: Run, name: str, plan: StudentPlan) -> None:
        self._name, self._plan = name, plan
        self.directory = run.directory / "training" / "students" / name
        # An unused trajectory number: initialisation and document orders differ from those of all teachers.
        self.seeds = run.settings.seed, run.settings.trajectories

    def member(self, cycle: Cycle) -> str:
        """See `Lineage`."""
        return self._name

    def origin(self, cycle: Cycle) -> dict[str, JsonValue]:
        """See `Lineage`."""
        return {}

    def teachers(self, cycle: Cycle) -> dict[str, float]:
        """See `Lineage`."""
        return self._plan.teachers


def _plan_path(directory: Path, name: str) -> Path:
    return directory / "training" / "students" / name / "plan.json"
