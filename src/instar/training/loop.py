"""The one loop: every stage is a source and an objective, and this trains them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from pydantic import model_validator
from torch import nn

from instar.adapters.base import stepped
from instar.compilation import compiled
from instar.config import Config
from instar.data.batch import Batch
from instar.data.sources import Source
from instar.distributed import sum_over_ranks, world
from instar.model.sharding import whole
from instar.training.arithmetic import Compile, compiles
from instar.training.interrupt import Interruptible
from instar.training.layers import LayersConfig
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner, Parallel, even
from instar.training.precision import Precision, autocast, resolve
from instar.training.schedule import ScheduleConfig, factor
from instar.training.state import Progress
from instar.training.track import TrackerName

NonNegative = Annotated[int, Ge(0)]
Hook = Callable[[Progress], None]
"""Called after every step; decides by itself whether there is anything to do."""

REFUSALS = 20
"""After so many refused steps in a row, training has diverged."""

ROLLBACK_RATE = 0.5
"""What the learning rate is multiplied by each time that a run goes back."""

NORM_MEMORY = 0.98
"""Decay of the running mean of the gradient's length, and so of what counts as a spike."""


class Divergence(Exception):  # noqa: N818 - nothing is wrong with the program
    """So many steps in a row were refused that going on is useless."""


class TrainingConfig(Config):
    """How long to train, and how carefully."""

    steps: Annotated[int, Gt(0)]
    """Optimizer steps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The rule that moves the weights."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time."""
    layers: LayersConfig = LayersConfig()
    """Which layers learn, and how fast."""
    gradient_clip: Annotated[float, Gt(0)] = 1.0
    """Longest gradient; longer ones are scaled down to it."""
    spike: Annotated[float, Ge(0)] = 20.0
    """After 50 steps, which say what is usual, a step whose gradient is so many times longer is
    skipped, as one that is not finite always is; 0 skips only those. After twenty skipped in a
    row, the run goes back to the last saved state, at half the rate."""
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Decay of a running average of the weights, such as 0.99; training goes on with the raw ones,
    and the average is validated and kept. 0 keeps none."""
    rollbacks: NonNegative = 3
    """How often a run may go back before it gives up."""
    precision: Precision = "auto"
    """Format of matrix products; `auto` takes bfloat16 where the hardware has it. `float8` is for
    GPUs from Ada and Hopper on (needs torchao); what is outside the blocks is then bfloat16."""
    compile: Compile = "auto"
    """Whether the blocks are compiled; `auto` does so where rows are packed and the run is long
    enough (some ten minutes) to win back the half minute that it takes."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each block anew instead of keeping what was inside it:
    far less memory, a third more work."""
    deterministic: bool = False
    """Whether a GPU, too, adds in a fixed order, so that a resumed run is exact there; slower."""
    parallel: Parallel = "ddp"
    """What each of several processes holds: `ddp` a copy of the models, `zero2` shards of gradients
    and optimizer state, `zero3` (FSDP) shards of all that learns, `hsdp` those within each node.
    One process has no use for it."""
    track: list[TrackerName] = []
    """Trackers that show the metrics as well, if they are installed."""
    log_every: Annotated[int, Gt(0)] = 10
    """Steps between two rows of metrics."""
    validate_every: NonNegative = 0
    """Steps between two validations; 0 validates only at the end."""
    patience: NonNegative = 0
    """Validations without improvement that end the run; 0 never ends it early."""
    keep_best: bool = False
    """Whether the checkpoint is the one with the lowest validation loss, not the last."""
    save_every: NonNegative = 0
    """Steps between two saves of the state from which an interrupted run goes on. It is also saved
    every minute, or where saving takes more than three seconds, after twenty times as long; 0 adds
    nothing to that."""

    @model_validator(mode="after")
    def _validates(self) -> TrainingConfig:
        if self.patience and not self.validate_every:
            raise ValueError("patience needs validate_every: without it there is one validation")
        return self


def fit(
    learner: Learner,
    source: Source,
    optimizers: Optimizers,
    config: TrainingConfig,
    progress: Progress,
    hooks: Sequence[Hook],
    meter: Meter,
    interrupt: Interruptible,
) -> None:
    """Train until ``config.steps``, or until a hook sets ``progress.finished``.

    Args:
        learner: Holds the objective, which owns the trainable models; on its device.
        source: Gives the micro-batches of each step.
        optimizers: Move the objective's parameters.
        config: How long and how carefully.
        progress: Where to begin; moved on in place.
        hooks: Called after every step, in this order.
        meter: Collects the metrics, for a hook to read.
        interrupt: Entered; asked after every step.

    Raises:
        Divergence: The gradient was not finite, or far too long, for many steps in a row.
        Interrupted: Ctrl-C or SIGTERM, after the step under way and its hooks.
    """
    objective = learner.objective
    device = next(objective.parameters()).device
    dtype = resolve(config.precision, device)
    compiling = compiles(config.compile, objective, source, config.steps)
    while progress.step < config.steps and not progress.finished:
        objective.eval()  # what is sampled and judged leaves nothing out by chance
        with autocast(dtype, device):
            micro_batches = even([batch.to(device) for batch in next(source)])
        rate = factor(config.schedule, progress.step, config.steps)
        rate *= ROLLBACK_RATE**progress.rollbacks
        learner.prepare(progress.step)
        with compiled(compiling):
            norm, tokens = accumulate(learner, micro_batches, meter, config.gradient_clip, dtype)
        if is_good(norm, progress, config):
            optimizers.step(rate)
            optimizers.forget(stepped(objective, progress.step + 1, config.steps))
            if norm:
                progress.refused = 0
        else:
            progress.skipped += 1
            progress.refused += 1
        optimizers.zero_grad()
        meter.add({"grad_norm": (torch.tensor(norm), torch.ones(()))})
        progress.step += 1
        progress.tokens += tokens
        progress.means = {"lr": optimizers.lr, **source.metrics()}
        if progress.refused == REFUSALS:
            raise Divergence
        progress.finished = progress.step >= config.steps
        for hook in hooks:
            hook(progress)
        interrupt.check()


def is_good(norm: float, progress: Progress, config: TrainingConfig) -> bool:
    """Whether a gradient of this length is worth a step; keeps the usual length up to date."""
    if not math.isfinite(norm):
        return False
    if norm == 0:  # no reply was better than its siblings: that says nothing of the others' length
        return True
    warm = progress.norms > 1 / (1 - NORM_MEMORY)
    if warm and config.spike and norm > config.spike * progress.usual_norm:
        return False
    # A plain mean at first, then one that forgets.
    memory = min(NORM_MEMORY, progress.norms / (progress.norms + 1))
    progress.usual_norm = memory * progress.usual_norm + (1 - memory) * norm
    progress.norms += 1
    return True


def accumulate(
    learner: Learner,
    micro_batches: Sequence[Batch],
    meter: Meter,
    gradient_clip: float,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Gradients of one step: summed over micro-batches and ranks, divided once, clipped.

    Returns:
        Length of the gradient before clipping, and how many tokens all ranks trained on, padding
        included.
    """
    objective, device = learner.objective, micro_batches[0].input_ids.device
    local = torch.stack([objective.count(batch).double() for batch in micro_batches]).sum()
    positions = sum(batch.input_ids.numel() for batch in micro_batches)
    tokens = torch.full((), positions, device=device)
    count, tokens = sum_over_ranks(local, tokens)
    for number, batch in enumerate(micro_batches, start=1):
        with learner.synchronising(number == len(micro_batches)):
            with autocast(dtype, device):
                loss = learner(batch)
            # Gradient synchronisation averages over ranks, hence the factor.
            (loss.total * (world()[1] / count.clamp(min=1e-8))).backward()
        meter.add({"loss": (loss.total, objective.count(batch)), **loss.metrics})
    norm = nn.utils.clip_grad_norm_(objective.parameters(), gradient_clip)
    return float(whole(norm)), int(tokens)
