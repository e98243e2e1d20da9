"""Averages the weights of a trajectory's snapshots: new candidates without training (Izmailov et al. 1803.05407).

Snapshots of one trajectory usually lie in one valley of the loss, with the mean of their weights near its middle. The mean across
trajectories is noise, so only members of one trajectory are averaged.
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
    """The float32 mean of the weights of the last `last` members of a trajectory."""
    cycles = range(run.settings.cycles - last, run.settings.cycles)
    members = [load_member(run, member_name(trajectory, cycle), torch.device("cpu")) for cycle in cycles]
    mean = members[0]
    with torch.no_grad():
        for parameter, *others in zip(*(member.parameters() for member in members), strict=True):
            parameter.copy_(torch.stack([parameter, *others]).mean(dim=0))
    assert isinstance(mean, Llama)
    return mean


def missing_averages(run: Run, last: int) -> dict[int, str]:
    """The averages still to be made, as trajectory index to name; an interrupted command may have made some of them.

    Raises:
        ChorusError: none is missing, the run is not finished, or its trajectories have fewer than `last` members.
    """
    if not run.finished:
        raise ChorusError(f"{run.directory} is not finished. Finish it with `chorus train` first.")
    if not 2 <= last <= run.settings.cycles:
        raise ChorusError(
            f"--last is {last}; expected 2 to {run.settings.cycles}, the number of members in a trajectory."
        )
    known = {member.name for member in manifest.load(run.directory).members}
    names = {idx: average_name(idx, last) for idx in range(run.settings.trajectories)}
    missing = {idx: name for idx, name in names.items() if name not in known}
    if not missing:
        raise ChorusError(
            f"{run.directory} already has the averages of the last {last} members. Choose another --last."
        )
    return missing
