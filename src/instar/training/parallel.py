"""One objective on many processes: the same step, whoever does which part of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instar.adapters.packed import Packed
from instar.data.batch import Batch
from instar.distributed import default_device, largest_over_ranks, world
from instar.errors import UserError
from instar.model.sharding import Sharding, make_mesh, part_of, reshard, shard, stored
from instar.model.transformer import Headed
from instar.objectives.base import Loss, Objective
from instar.training.layers import Thawing
from instar.training.precision import autocast

Parallel = Literal["ddp", Sharding]
"""``ddp`` keeps a copy of the model on every rank; the others shard it."""


class Learner:
    """An objective, and how its models are spread over the processes of the run.

    Alone, it is only the objective. With ``ddp`` every rank has a copy of the models and gradients
    are averaged (Li et al. 2020, arXiv:2006.15704); otherwise every rank has a shard.

    Args:
        objective: Spread in place; on its device.
        parallel: How.
        dtype: Format of the products.
        unfreeze_every: Steps after which one more block learns; 0 lets all learn at once.

    Raises:
        UserError: Blocks are to be unfrozen one by one, but are spread over processes.
    """

    def __init__(
        self,
        objective: Objective,
        parallel: Parallel = "ddp",
        dtype: torch.dtype = torch.float32,
        unfreeze_every: int = 0,
    ) -> None:
        self.objective, self.dtype = objective, dtype
        self._seed = torch.initial_seed()
        self._thawing = Thawing(objective, unfreeze_every)
        self._forward: nn.Module = objective
        self._frozen = {
            name
            for name, p in objective.named_parameters(remove_duplicate=False)
            if not p.requires_grad
        }
        for name, module in objective.named_modules(remove_duplicate=False):
            if isinstance(module, Packed):
                self._frozen |= {f"{name}.{own}" for own, _ in module.named_buffers()}
        self._sharded = world()[1] > 1 and parallel != "ddp"
        if world()[1] == 1:
            return
        if parallel == "ddp":
            device = default_device()
            self._forward = DistributedDataParallel(
                objective,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                find_unused_parameters=unfreeze_every > 0,
                broadcast_buffers=False,  # those of adapters change everywhere alike
            )
            return
        if unfreeze_every:
            raise UserError(
                f"training.layers.unfreeze_every needs whole blocks, and parallel is {parallel}",
                "Set training.parallel to ddp.",
            )
        mesh = make_mesh(parallel)
        for model in objective.modules():
            if isinstance(model, Headed):
                shard(model, parallel, mesh, dtype)

    def __call__(self, batch: Batch) -> Loss:
        """The summed loss of this rank's rows."""
        return self._forward(batch)

    def prepare(self, step: int) -> None:
        """Before a step: which of the layers learn in it, and what dropout leaves out.

        Chance begins anew with each step and rank, so that a run which goes on after a stop leaves
        out what it would have left out without one.
        """
        self._thawing.at(step)
        self.objective.train()
        torch.manual_seed(random.Random(f"{self._seed} {step} {world()[0]}").getrandbits(63))

    def synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch's forward and backward pass.

        Gradients of copies are averaged over ranks once, after the last micro-batch of a step.
        Those of shards are averaged after each, or every rank would hold whole gradients between.

        Args:
            last: Whether it is the last of the step.
        """
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return nullcontext()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The context in which held-out data is measured: nothing is left out by chance.

        It is measured in float32, where weights allow it.
        """
        half = any(p.dtype == torch.bfloat16 for p in self.objective.parameters())
        dtype = self.dtype if self._sharded or half else torch.float32
        self.objective.eval()
        with autocast(dtype, next(self.objective.parameters()).device):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what learns, whole, on rank 0; all ranks must ask.

        Frozen weights are not in it: whoever goes on has read them from where they came from.
        """
        reshard(self.objective)
        return {name: stored(value) for name, value in self._own().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with those, which all ranks hold."""
        reshard(self.objective)
        own = self._own()
        state = {name: value for name, value in state.items() if name not in self._frozen}
        if own.keys() != state.keys():
            raise RuntimeError(f"the state is of another model: {own.keys() ^ state.keys()}")
        self.objective.load_state_dict(
            {name: part_of(value, own[name]) for name, value in state.items()}, strict=False
        )

    def _own(self) -> dict[str, Tensor]:
        """The tensors that a run changes: those that learn, and buffers."""
        return {k: v for k, v in self.objective.state_dict().items() if k not in self._frozen}


def even(micro_batches: Sequence[Batch]) -> list[Batch]:
    """As many micro-batches as the rank with the most has: the missing ones have no rows.

    Ranks that share shards, or average gradients, must pass through the model equally often.
    """
    missing = largest_over_ranks(len(micro_batches)) - len(micro_batches)
    return [*micro_batches, *[micro_batches[0].rows(slice(0, 0))] * missing]
