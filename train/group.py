"""Groups of processes that train one trajectory together: each takes a share of the rows of every batch, gradients are averaged.

PyTorch's DistributedDataParallel averages gradients, and its `all_reduce` sums other values; torchrun starts the processes. A group
of one uses none of this. Only the group's first process writes files, and all read them, so a group on several machines needs a
shared file system.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chorus.population.errors import ChorusError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of processes, as seen from one of them."""

    rank: int = 0
    size: int = 1
    first_rank: int = 0
    """Global rank of the group's first process."""
    handle: "ProcessGroup | None" = None
    """None for a group of one."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and records."""
        return self.rank == 0

    def rows(self, batch_rows: int) -> slice:
        """This process's share of the rows of a batch, as even as possible."""
        return slice(batch_rows * self.rank // self.size, batch_rows * (self.rank + 1) // self.size)

    def sums(self, *values: float) -> list[float]:
        """Sum each value over the group. Every process gets the same result."""
        if self.handle is None:
            return list(values)
        device = _reduction_device(self.handle)
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(summed, group=self.handle)
        return [float(value) for value in summed]

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process of the group."""
        return self.sums(float(value))[0] > 0

    def wait(self) -> None:
        """Block until all processes of the group have reached this call."""
        self.sums(0.0)

    def align(self, model: nn.Module) -> None:
        """Copy the first process's weights to all others, so that rounding cannot make them diverge."""
        if self.handle is not None:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.detach(), src=self.first_rank, group=self.handle)


class Averaged:
    """A model whose gradients are averaged over the group on `backward`, except inside `accumulating`."""

    def __init__(self, model: nn.Module, group: Group, device: torch.device) -> None:
        self._parallel = None if group.handle is None else _parallel(model, group.handle, device)
        self._forward = self._parallel or model

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """The model's forward pass."""
        hidden_BTD: Tensor = self._forward(tokens_BT)
        return hidden_BTD

    def accumulating(self, more_follow: bool) -> AbstractContextManager[None]:
        """If more micro-batches follow, gradients inside the block accumulate without being averaged."""
        return self._parallel.no_sync() if more_follow and self._parallel is not None else nullcontext()


@contextmanager
def joined(*, rank: int, world: int, size: int, device: torch.device) -> Iterator[Group]:
    """This process's group among the `world` processes that torchrun started, `size` per trajectory.

    Raises:
        ChorusError: `size` does not divide `world`.
    """
    if world % size:
        raise ChorusError(
            f"--ranks-per-trajectory {size} does not divide the {world} processes. Start a multiple of {size} processes."
        )
    if size == 1:
        yield Group()
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        handles = [torch.distributed.new_group(list(range(start, start + size))) for start in range(0, world, size)]
        group_idx = rank // size
        yield Group(rank=rank % size, size=size, first_rank=group_idx * size, handle=handles[group_idx])
    finally:
        torch.distributed.destroy_process_group()


def _parallel(model: nn.Module, handle: "ProcessGroup", device: torch.device) -> "DistributedDataParallel":
    from torch.nn.parallel import DistributedDataParallel  # a slow import, not needed for a group of one

    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, process_group=handle, broadcast_buffers=False)


def _reduction_device(handle: "ProcessGroup") -> torch.device:
    nccl = torch.distributed.get_backend(handle) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
