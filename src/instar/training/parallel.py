"""One objective on many processes: the same step, whoever does which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instar.data.batch import Batch
from instar.distributed import default_device, largest_over_ranks, world
from instar.model.sharding import Sharding, make_mesh, part_of, reshard, shard, whole
from instar.model.transformer import Headed
from instar.objectives.base import Loss, Objective

Parallel = Literal["ddp", Sharding]
"""``ddp`` keeps a copy of the model on every rank; the others shard it."""


class Learner:
    """An objective, and how its models are spread over the processes of the run.

    Alone, it is only the objective. With ``ddp`` every rank has a copy of the models and gradients
    are averaged (Li et al. 2020, arXiv:2006.15704); otherwise every rank has a shard.

    Args:
        objective: Spread in place; on its device.
        parallel: How.
    """

    def __init__(self, objective: Objective, parallel: Parallel = "ddp") -> None:
        self.objective = objective
        self._forward: nn.Module = objective
        if world()[1] == 1:
            return
        if parallel == "ddp":
            device = default_device()
            ids = [device.index] if device.type == "cuda" else None
            self._forward = DistributedDataParallel(objective, device_ids=ids)
            return
        mesh = make_mesh(parallel)
        for model in objective.modules():
            if isinstance(model, Headed):
                shard(model, parallel, mesh)

    def __call__(self, batch: Batch) -> Loss:
        """The summed loss of this rank's rows."""
        return self._forward(batch)

    def synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """While entered, gradients are averaged over ranks: copies', after the last micro-batch.

        Shards are averaged after each, or every rank would hold whole gradients in between.
        """
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """The objective's tensors, whole; all ranks must ask."""
        reshard(self.objective)
        return {name: whole(value) for name, value in self.objective.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with those, which all ranks hold."""
        reshard(self.objective)
        own = self.objective.state_dict()
        self.objective.load_state_dict({k: part_of(v, own[k]) for k, v in state.items()})


def even(micro_batches: Sequence[Batch]) -> list[Batch]:
    """As many micro-batches as the rank with the most has: the missing ones have no rows.

    Ranks that share shards, or average gradients, must pass through the model equally often.
    """
    missing = largest_over_ranks(len(micro_batches)) - len(micro_batches)
    return [*micro_batches, *[micro_batches[0].rows(slice(0, 0))] * missing]
