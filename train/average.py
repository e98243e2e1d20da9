"""Weight averages inside a trajectory: candidates that cost no training (Izmailov et al. 1803.05407).

Snapshots of one trajectory lie in one valley more often than not, and the mean of their weights near its middle. Across
trajectories the mean is noise, so none is made there.
"""

import torch

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.train.model import Llama
from chorus.train.run import Run, member_name
from chorus.train.snapshot import load_member


def average_name(trajectory: int, last: int) -> str:
    """`t0-a03`: the mean of the last three members of trajectory 0."""
    return f"t{trajectory}-a{last:02d}"


def average(run: Run, trajectory: int, last: int) -> Llama:
    """The mean, in float32, of the weights of the trajectory's last members."""
    cycles = range(run.settings.cycles - last, run.settings.cycles)
    members = [load_member(run, member_name(trajectory, cycle), torch.device("cpu")) for cycle in cycles]
    mean = members[0]
    with torch.no_grad():
        for parameter, *others in zip(*(member.parameters() for member in members), strict=True):
            parameter.copy_(torch.stack([parameter, *others]).mean(dim=0))
    assert isinstance(mean, Llama)
    return mean


def missing_averages(run: Run, last: int) -> dict[int, str]:
    """Trajectories whose average of the last members is yet to be made, and its name: all, or what an interruption left.

    Raises:
        ChorusError: none is missing, the run is not finished, or has not so many members in a trajectory.
    """
    if not run.finished:
        raise ChorusError(f"{run.directory} is not finished. Run `chorus train` on it to the end first.")
    if not 2 <= last <= run.settings.cycles:
        raise ChorusError(f"--last is {last}; 2 to {run.settings.cycles} members of a trajectory can be averaged.")
    known = {member.name for member in manifest.load(run.directory).members}
    names = {idx: average_name(idx, last) for idx in range(run.settings.trajectories)}
    missing = {idx: name for idx, name in names.items() if name not in known}
    if not missing:
        raise ChorusError(f"{run.directory} has the averages of the last {last} already. Give another --last.")
    return missing
