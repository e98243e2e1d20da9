"""The processes that train one trajectory together: each takes its share of the rows of every batch, gradients are averaged.

Averaging is PyTorch's DistributedDataParallel, agreement its `all_reduce`; torchrun starts the processes. A group of one needs none
of it. Everything on disk is written by the group's first process and read by all, so a group over several machines needs a file
system that all of them see.
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
    """A process's place among those of its trajectory."""

    rank: int = 0
    size: int = 1
    first_rank: int = 0
    """Rank of the group's first process among all."""
    handle: "ProcessGroup | None" = None
    """None for a group of one."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what the group has to say."""
        return self.rank == 0

    def rows(self, batch_rows: int) -> slice:
        """This process's rows of a batch: as even as can be, none left out."""
        return slice(batch_rows * self.rank // self.size, batch_rows * (self.rank + 1) // self.size)

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the group, the same in every process."""
        if self.handle is None:
            return list(values)
        device = _reduction_device(self.handle)
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(summed, group=self.handle)
        return [float(value) for value in summed]

    def any(self, value: bool) -> bool:
        """Whether it is so in any process of the group."""
        return self.sums(float(value))[0] > 0

    def wait(self) -> None:
        """Until all processes of the group are here."""
        self.sums(0.0)

    def align(self, model: nn.Module) -> None:
        """Give every process the first one's weights: rounding must not let them drift apart."""
        if self.handle is not None:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.detach(), src=self.first_rank, group=self.handle)


class Averaged:
    """A model whose gradients, after `backward` outside of `keeping`, are those of the group's whole batch."""

    def __init__(self, model: nn.Module, group: Group, device: torch.device) -> None:
        self._parallel = None if group.handle is None else _parallel(model, group.handle, device)
        self._forward = self._parallel or model

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """The model's forward pass."""
        hidden_BTD: Tensor = self._forward(tokens_BT)
        return hidden_BTD

    def keeping(self, keeps: bool) -> AbstractContextManager[None]:
        """Within the block, where `keeps`, gradients add up without being averaged: more micro-batches follow."""
        return self._parallel.no_sync() if keeps and self._parallel is not None else nullcontext()


@contextmanager
def joined(*, rank: int, world: int, size: int, device: torch.device) -> Iterator[Group]:
    """This process's group among `world` processes that torchrun started, `size` to a trajectory.

    Raises:
        ChorusError: the processes do not make whole groups.
    """
    if world % size:
        raise ChorusError(
            f"--ranks-per-trajectory {size} does not divide the {world} processes. Start a multiple of {size}."
        )
    if size == 1:
        yield Group()
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        handles = [torch.distributed.new_group(list(range(start, start + size))) for start in range(0, world, size)]
        mine = rank // size
        yield Group(rank=rank % size, size=size, first_rank=mine * size, handle=handles[mine])
    finally:
        torch.distributed.destroy_process_group()


def _parallel(model: nn.Module, handle: "ProcessGroup", device: torch.device) -> "DistributedDataParallel":
    from torch.nn.parallel import DistributedDataParallel  # not for a group of one: it imports much

    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, process_group=handle, broadcast_buffers=False)


def _reduction_device(handle: "ProcessGroup") -> torch.device:
    nccl = torch.distributed.get_backend(handle) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
