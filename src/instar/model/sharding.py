"""Models whose weights are spread over processes: a shard on each, whole only while they are used.

Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277; ZeRO: Rajbhandari et al. 2019,
arXiv:1910.02054), by ``torch.distributed.fsdp.fully_shard``: every block is gathered just before
it is used, and its gradients are summed and scattered just after.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from instar.distributed import default_device, is_main, largest_over_ranks, world
from instar.errors import UserError
from instar.model.transformer import Headed

if TYPE_CHECKING:  # it takes seconds to import, and most runs have no use for it
    from torch.distributed.device_mesh import DeviceMesh

Sharding = Literal["zero2", "zero3", "hsdp"]
"""What each rank keeps of the weights between their uses.

- ``zero3``: a shard of everything that learns (FSDP); blocks are gathered for each pass, and again
  for the gradients. Models that do not learn are whole on every rank.
- ``zero2``: shards of the gradients and of the optimizer's state; gathered weights stay until the
  gradients are there.
- ``hsdp``: as ``zero3`` among the ranks of one node, with a copy on every node: only gradients
  travel between nodes.
"""


def make_mesh(sharding: Sharding) -> DeviceMesh:
    """The ranks in a row ``(ranks,)``, or for ``hsdp`` ``(nodes, ranks of one)``.

    Raises:
        UserError: ``hsdp`` on one node, or on nodes of different size.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size, device = world()[1], default_device().type
    if sharding != "hsdp":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    most, fewest = largest_over_ranks(local), -largest_over_ranks(-local)
    if most == size or most != fewest:
        raise UserError(
            f"training.parallel is hsdp, with {size} processes, {fewest} to {most} of them a node",
            "Use zero3 on one node, and as many processes on every node.",
        )
    return init_device_mesh(device, (size // local, local), mesh_dim_names=("replicate", "shard"))


def shard(model: Headed, sharding: Sharding, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread a model's weights over the ranks, in place: each block by itself, then the rest.

    Args:
        model: On its device.
        sharding: How.
        mesh: Over which ranks.
        dtype: The products' format, in which blocks are gathered. Left to autocast, copies in
            that format would be kept whole from the forward pass to the backward one.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # True, and harmless: nobody writes into what `read` returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.blocks:
        again = sharding != "zero2"
        fully_shard(block, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "read")
    model.sharding = sharding


@contextmanager
def gathered(model: Headed) -> Iterator[None]:
    """A sharded model whole on every rank, for passes of which ranks make different numbers."""
    if model.sharding is None:
        yield
        return
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for block in parts[1:]:
            block.set_reshard_after_forward(model.sharding != "zero2")
        reshard(model)


def reshard(module: nn.Module) -> None:
    """Leave only this rank's shards, before weights are read or written."""
    for model in module.modules():
        if isinstance(model, Headed) and model.sharding is not None:
            for part in _parts(model):
                part.reshard()


def _parts(model: Headed) -> list[Any]:
    """What is gathered and spread by itself: the rest of the model first, then its blocks."""
    return [model, *model.model.blocks]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in its whole shape, on every rank; all must ask. Others as they are."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's
    return gather() if gather else tensor


def stored(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor on rank 0's processor, an empty one elsewhere; all must ask."""
    full = whole(tensor.detach())
    return full.to("cpu", copy=True) if is_main() else torch.empty(0)


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same dicts, lists and tuples, with every tensor in them changed, in their order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(change, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(change, inner) for inner in value)
    return value


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks hold whole, spread as ``like`` is.

    Nothing travels: each rank cuts its part out.
    """
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    everywhere = [Replicate()] * mesh.ndim
    copies = DTensor.from_local(tensor.to(like.device), mesh, everywhere, run_check=False)
    return copies.redistribute(placements=like.placements)
