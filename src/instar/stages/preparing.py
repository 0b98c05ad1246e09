"""What learns, made ready: told how to compute, spread over processes, given an optimizer."""

from __future__ import annotations

import torch

from instar.adapters.base import learnt_parts, lr_factors, penalties, store_frozen
from instar.distributed import default_device, world
from instar.errors import UserError
from instar.model.transformer import Headed
from instar.objectives.base import Objective
from instar.objectives.keeping import AdapterPenalty, Kept
from instar.training.eight_bit import float8_products
from instar.training.layers import freeze, rate_factors
from instar.training.loop import TrainingConfig
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.precision import resolve


def learners(objective: Objective, training: TrainingConfig) -> tuple[Learner, Optimizers]:
    """A prepared objective spread over the processes, and what moves its weights."""
    dtype = resolve(training.precision, default_device())
    learner = Learner(objective, training.parallel, dtype, training.layers.unfreeze_every)
    factors = rate_factors(objective, training.layers.lr_decay)
    for p, factor in lr_factors(objective).items():
        factors[p] = factor * factors.get(p, 1.0)
    return learner, Optimizers(objective, training.optimizer, factors, training.ema)


def prepared(objective: Objective, training: TrainingConfig) -> Objective:
    """Its models told how to compute, before they are copied or spread.

    Raises:
        UserError: Some settings do not go together, or do not fit the device.
    """
    eight_bit = training.optimizer.name == "adamw8bit"
    if eight_bit and training.parallel != "ddp" and world()[1] > 1:
        raise UserError(
            "training.optimizer.name is adamw8bit, whose moments cannot be sharded",
            "Use adamw, or set training.parallel to ddp.",
        )
    torch.use_deterministic_algorithms(training.deterministic)
    freeze(objective, training.layers.freeze)
    dtype = resolve(training.precision, default_device())
    # Shards hold weights of one format.
    whole = training.parallel == "ddp" or world()[1] == 1
    for model in objective.modules():
        if isinstance(model, Headed):
            _check_adapters(model, training, whole)
            if whole:
                store_frozen(model, dtype)
            model.model.recompute = training.activation_checkpointing
            if training.precision == "float8":
                float8_products(model)
    return Kept(objective, {"penalty": AdapterPenalty()}) if penalties(objective) else objective


def _check_adapters(model: Headed, training: TrainingConfig, whole: bool) -> None:
    """Raise ``UserError`` if an adapter cannot learn in such a run."""
    for name, adapter in model.adapters.items():
        if adapter.needs_whole and not whole:
            raise UserError(
                f"training.parallel is {training.parallel}, which spreads each weight, and "
                f"{adapter.method} needs whole ones",
                "Set training.parallel to ddp, or choose another method.",
            )
        if adapter.begins_anew and training.ema:
            raise UserError(
                f"training.ema averages weights, and {adapter.method} replaces them on the way",
                "Leave training.ema at 0.",
            )
        parts = learnt_parts(model, name).values()
        if any(p.requires_grad for part in parts for p in part.parameters()):
            adapter.check_run(training.steps)
