"""Who else is working on this run: rank, number of ranks, sums over all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """``(rank, world_size)``; one process that was not launched as a group is ``(0, 1)``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each scalar summed over all ranks, in one message."""
    if world()[1] == 1:
        return list(values)
    packed = torch.stack([value.double() for value in values])
    dist.all_reduce(packed)
    return list(packed.unbind())


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
