"""Who else is working on this run: rank, number of ranks, sums over all of them.

``torchrun``, ``accelerate launch`` and Slurm's ``srun`` start the same command several times and
tell each process its rank by environment variables; a process that was told nothing is alone, and
everything here is then free.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from instar.errors import Elsewhere, UserError

T = TypeVar("T")

_alone = False
"""Whether this process, rank 0, is doing something for all: then nobody else takes part."""

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: exams and reports are made by one alone."""

LOST = r"onnection (closed|reset|refused)|roken pipe|ocket closed|NCCL (error|communicator)"
"""What errors say when the process at the other end has gone."""

SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",  # such as 8(x2)
}
"""What Slurm calls what torchrun tells its processes."""


@contextmanager
def launched() -> Iterator[None]:
    """Join the other processes of this run, if there are several, and leave them at the end.

    NCCL connects GPUs, gloo processors. What Slurm tells is put into the environment in
    torchrun's words.

    Raises:
        UserError: The launcher said too little, or another process went away.
    """
    # What `training.deterministic` needs; cuBLAS reads it at the first product of all.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "SLURM_STEP_ID" in os.environ:
        for name, slurm in SLURM.items():
            if found := re.match(r"\d+", os.environ.get(slurm, "")):
                os.environ.setdefault(name, found[0])
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ):
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not set: {', '.join(sorted(missing))}",
            "Start the processes with torchrun, accelerate launch or srun (docs/scale.md), or set "
            "WORLD_SIZE=1 to run alone.",
        )
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # Small messages between the processors of GPU machines need not wait for the GPUs.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        yield
    except RuntimeError as error:
        # The others find out by a broken connection; who broke it has said why by itself.
        if isinstance(error, dist.DistError) or re.search(LOST, str(error)):
            raise UserError(
                "another process of this run has ended, and they cannot go on without it "
                f"({str(error).splitlines()[0][:200]})",
                "See what it said, and run the same command again: it goes on from the last "
                "saved state, with as many processes as you like.",
            ) from error
        raise
    # Not after an error: others may be in the middle of a message, and NCCL would wait for them.
    dist.barrier()  # nobody goes while another still listens
    dist.destroy_process_group()


def world() -> tuple[int, int]:
    """``(rank, world_size)``; a process that is alone, or acts for all, is ``(0, 1)``."""
    if not _alone and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks to people."""
    return world()[0] == 0


def default_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Some launchers show every process one GPU only.
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local % torch.cuda.device_count())


def sum_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each scalar summed over all ranks, in one message."""
    if world()[1] == 1:
        return list(values)
    packed = torch.stack([value.double().to(default_device()) for value in values])
    dist.all_reduce(packed)
    return list(packed.unbind())


def largest_over_ranks(value: int) -> int:
    """The largest of the ranks' numbers; asked between processors, GPUs go on."""
    if world()[1] == 1:
        return value
    packed = torch.tensor(value)
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    return int(packed)


def gather_lists(mine: list[T]) -> list[T]:
    """One list of all ranks' items: those of ranks 0, 1, … in turn, as cards are dealt.

    Args:
        mine: This rank's; no rank has more than one item more than another, or fewer than a later.
    """
    size = world()[1]
    if size == 1:
        return mine
    hands: list[Any] = [None] * size
    dist.all_gather_object(hands, mine)
    whole: list[Any] = [None] * sum(map(len, hands))
    for rank, hand in enumerate(hands):
        whole[rank::size] = hand
    return whole


def share_rows(function: Callable[[slice], Tensor], rows: int) -> Tensor:
    """Values of all rows ``(rows, ...)``, of which each rank computes its share.

    Args:
        function: Gives the values of the rows in a slice, which may be none.
        rows: How many there are.
    """
    rank, size = world()
    mine = function(slice(rank, None, size))
    if size == 1:
        return mine
    whole = mine.new_zeros(rows, *mine.shape[1:])
    whole[rank::size] = mine
    dist.all_reduce(whole)
    return whole


def on_main(function: Callable[[], T]) -> T:
    """What the function returns on rank 0, which is alone meanwhile, on every rank.

    Raises:
        Elsewhere: On the other ranks, if rank 0 raised something.
    """
    global _alone
    if world()[1] == 1:
        return function()
    if is_main():
        try:
            _alone = True
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what went wrong here matters more
                dist.broadcast_object_list([(False, None)])
            raise
        finally:
            _alone = False
        dist.broadcast_object_list([(True, result)])
        return result
    told: list[Any] = [None]
    dist.broadcast_object_list(told)
    went_well, result = told[0]
    if not went_well:
        raise Elsewhere("rank 0 has failed")
    return result
