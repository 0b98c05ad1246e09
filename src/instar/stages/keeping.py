"""Keep what was known: the settings that hold a model to its start, and what they build."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import torch
from annotated_types import Ge, Gt, Le, Lt

from instar.adapters.base import frozen_twin
from instar.config import Config
from instar.data.batch import Batch
from instar.data.sources import AnnotatedSource, Source
from instar.distributed import default_device, world
from instar.errors import UserError
from instar.model import CausalLM
from instar.model.sharding import part_of, reshard
from instar.objectives.base import Objective
from instar.objectives.keeping import Distilled, Kept, Tie, annotated, fisher
from instar.objectives.language import NextToken
from instar.planning.workload import Workload
from instar.training.loop import TrainingConfig

T = TypeVar("T")

Positive = Annotated[int, Gt(0)]
Weight = Annotated[float, Ge(0)]
Amount = Annotated[int, Gt(0)] | Annotated[float, Gt(0), Lt(1)]
"""A count, or below one the share of all that is learnt from."""


class KeepConfig(Config):
    """What holds a model to the checkpoint that it began with, against forgetting."""

    l2_sp: Weight = 0.0
    """Alpha of L2-SP: weight decay towards the start (arXiv:1802.01483)."""
    ewc: Weight = 0.0
    """Lambda of elastic weight consolidation (arXiv:1612.00796): the same, where earlier data
    needs it. 1 weighs a token of earlier data like a new one. Needs earlier data: `replay` or
    `replay_conversations`."""
    ewc_examples: Positive = 400
    """Earlier examples that the importance of each weight is estimated from."""
    ewc_only: bool = False
    """Whether that is all that the earlier data is for: then none of it is learnt again."""
    kl: Weight = 0.0
    """Weight of the divergence of what the model says from what it said (arXiv:1606.09282), a
    token."""
    kl_classes: Positive = 64
    """Likeliest tokens of the start that it compares; the others count as one."""
    interpolate: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the way from the start to what was learnt at which the product lies; 1 is all of it
    (WiSE-FT, arXiv:2109.01903)."""

    @property
    def readings(self) -> int:
        """Forward passes of the frozen start over every batch."""
        return int(self.kl > 0)

    def needs(self, work: Workload, on_cpu: bool) -> Workload:
        """What a stage asks of a machine, the frozen start included.

        Args:
            work: What it asks without anything that holds it.
            on_cpu: Whether it runs on a processor; a start that only the product is averaged with
                stays there.
        """
        start = self.kl > 0 or (on_cpu and self.interpolate < 1)
        # The start, and the way from there, which the backward pass needs; EWC's importance too.
        ties = 2 * (self.l2_sp > 0) + 3 * (self.ewc > 0)
        return replace(work, frozen=int(start), readings=self.readings, ties=ties)


def replayed(amount: Amount, new: int) -> int:
    """How many earlier examples go beside so many new ones.

    Args:
        amount: A count, or the share of the whole mixture that they make up.
        new: New examples.
    """
    return int(amount) if amount >= 1 else round(amount / (1 - amount) * new)


def drawn(records: Sequence[T], count: int, seed: int) -> list[T]:
    """At most so many records, drawn by the seed, in their order."""
    if count >= len(records):
        return list(records)
    chosen = random.Random(f"{seed} earlier").sample(range(len(records)), count)
    return [records[place] for place in sorted(chosen)]


@dataclass
class Held:
    """A stage's job with everything that holds it.

    Attributes:
        objective: What is trained.
        measured: What validation measures: the plain loss.
        source: Batches, annotated where that is needed.
        flops: Floating-point operations a token, the frozen start's included.
        finish: What is done to the model when training is over.
    """

    objective: Objective
    measured: NextToken
    source: Source
    flops: int
    finish: Callable[[], None]


def hold(
    model: CausalLM,
    keep: KeepConfig,
    training: TrainingConfig,
    source: Source,
    earlier: Callable[[], list[Batch]],
    length: int,
    fresh: bool = False,
    adapter: bool = False,
) -> Held:
    """Put everything together that holds a model to its start.

    Args:
        model: As it begins.
        keep: By what it is held.
        training: How it is trained.
        source: What it learns from.
        earlier: Makes batches of earlier data, for EWC.
        length: Tokens of a typical row, for the count of operations.
        fresh: Whether it begins with random weights, so that there is nothing to keep.
        adapter: Whether its adapter is fresh, so that the start is the base alone.

    Raises:
        UserError: There is no start to be held to, it is not on a straight line with what is
            learnt, or the model is spread over processes in a way that does not go with a penalty
            on its weights.
    """
    flops, plain = model.config.flops_per_token(length), NextToken(model)
    if keep == KeepConfig():
        return Held(plain, plain, source, flops, lambda: None)
    if fresh:
        raise UserError("`keep` holds a model to its start, and this one is fresh", "Set `init`.")
    if model.adapters and keep.interpolate < 1:
        raise UserError(
            "keep.interpolate goes straight from weights to weights, and an adapter's are factors "
            "of each other",
            "Leave it out; then merge the adapter, and average that with its base (instar merge).",
        )
    if (keep.l2_sp or keep.ewc) and any(a.begins_anew for a in model.adapters.values()):
        raise UserError(
            "keep.l2_sp and keep.ewc hold weights to where they began, and relora's begin anew",
            "Hold what the model says instead (keep.kl), or choose another method.",
        )
    inner: Objective = plain
    if keep.kl:  # on its device before the start is copied, so that they share what is frozen
        plain.to(default_device())
    start = frozen_twin(model, adapter) if keep.kl or keep.interpolate < 1 else None
    if keep.kl and start:
        inner, source = Distilled(model, keep.kl), _beside(start, source, keep.kl_classes)
        flops += model.config.flops_per_token(length, backward=False)
    ties = _ties(plain, keep, training, earlier)
    objective = Kept(inner, ties) if ties else inner

    def finish() -> None:
        if start and keep.interpolate < 1:
            _towards(model, start, keep.interpolate)

    return Held(objective, plain, source, flops, finish)


def _beside(teacher: CausalLM, source: Source, k: int) -> Source:
    """The source, with the start's own predictions written into its batches."""
    teacher.to(default_device())
    k = min(k, teacher.config.vocab_size)

    def annotate(batch: Batch) -> Batch:
        batch = batch.to(default_device())
        ids, logprobs = annotated(teacher, batch, k)
        return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)

    return AnnotatedSource(source, annotate)


def _ties(
    plain: NextToken,
    keep: KeepConfig,
    training: TrainingConfig,
    earlier: Callable[[], list[Batch]],
) -> dict[str, Tie]:
    """The penalties on the weights' way, by name."""
    if (keep.l2_sp or keep.ewc) and training.parallel != "ddp" and world()[1] > 1:
        raise UserError(
            f"training.parallel is {training.parallel}, which spreads each weight, and keep.l2_sp "
            "and keep.ewc look at all of them",
            "Set training.parallel to ddp.",
        )
    ties = {"l2_sp": Tie(plain, keep.l2_sp)} if keep.l2_sp else {}
    if keep.ewc:
        plain.to(default_device())
        batches = [batch.to(default_device()) for batch in earlier()]
        ties["ewc"] = Tie(plain, keep.ewc, fisher(plain, batches))
    return ties


@torch.no_grad()
def _towards(model: CausalLM, start: CausalLM, share: float) -> None:
    """Leave what learnt at a share of the way from its start to what it has become."""
    reshard(model)
    began = dict(start.named_parameters())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            before = part_of(began[name].detach().to(weight.device), weight)
            weight.copy_(before.lerp(weight, share))
