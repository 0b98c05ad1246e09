"""Models whose weights are spread over processes: a shard on each, whole only while they are used.

Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277; ZeRO: Rajbhandari et al. 2019,
arXiv:1910.02054), by ``torch.distributed.fsdp.fully_shard``: every block is gathered just before
it is used, and its gradients are summed and scattered just after.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from instar.distributed import default_device, world
from instar.errors import UserError
from instar.model.transformer import Headed

Sharding = Literal["zero2", "zero3", "hsdp"]
"""What each rank keeps of the weights between their uses.

- ``zero3``: a shard of everything (FSDP); blocks are gathered for each pass, and again for the
  gradients.
- ``zero2``: shards of the gradients and of the optimizer's state; gathered weights stay until the
  gradients are there.
- ``hsdp``: as ``zero3`` among the ranks of one node, with a copy on every node: only gradients
  travel between nodes.
"""


def make_mesh(sharding: Sharding) -> DeviceMesh:
    """The ranks in a row, or for ``hsdp`` nodes times the ranks of one.

    Raises:
        UserError: ``hsdp`` on one node, or on nodes of different size.
    """
    size, device = world()[1], default_device().type
    if sharding != "hsdp":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    if size == local or size % local:
        raise UserError(
            f"training.parallel is hsdp, with {size} processes of which {local} are on this node",
            "Use zero3 on one node, and as many processes on every node.",
        )
    return init_device_mesh(device, (size // local, local), mesh_dim_names=("replicate", "shard"))


def shard(model: Headed, sharding: Sharding, mesh: DeviceMesh) -> None:
    """Spread a model's weights over the ranks, in place: each block by itself, then the rest."""
    # True, and harmless: nobody writes into what `read` returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=sharding != "zero2")
    register_fsdp_forward_method(model, "read")
    model.sharding = sharding


@contextmanager
def gathered(model: Headed) -> Iterator[None]:
    """A sharded model whole on every rank, for passes of which ranks make different numbers."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    try:
        yield
    finally:
        model.set_reshard_after_forward(model.sharding != "zero2")
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Leave only this rank's shards, before weights are read or written."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all must ask. Other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks hold whole, spread as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    copies = DTensor.from_local(
        tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return copies.redistribute(placements=like.placements)
