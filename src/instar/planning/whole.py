"""Whole steps of a stage, tried on this machine: what its parts do not show when tried one by one.

Between the parts there is Python, autograd's bookkeeping, and memory that the next part finds cold.
A few typical steps tell how much that is; the parts then tell what all other steps take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from instar.adapters.base import store_frozen
from instar.data.batch import IGNORE, Batch
from instar.memory import release_freed_memory
from instar.model import CausalLM, ModelConfig
from instar.objectives.base import Loss, Objective
from instar.objectives.language import batch_logprobs
from instar.planning.prediction import learning_s, update_s
from instar.planning.speed import Line, Speed
from instar.planning.weights import formed, stop
from instar.planning.workload import Extent, Step, Workload
from instar.training.loop import TrainingConfig, accumulate
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.precision import resolve

TRIED = 4
"""Steps of a stage that are tried, from its smaller ones to its larger ones."""
MOST_TOKENS = 8192
"""Of a larger step only so many are tried, in whole micro-batches."""
MOST_S = 5.0
"""A step whose parts take longer is not tried: it is all arithmetic, and nobody would wait."""


class Synthetic(Objective):
    """Cross-entropy where there are targets; the sum of what the body says where there are none.

    Args:
        policy: Any weights.
    """

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        self.policy = policy

    def count(self, batch: Batch) -> torch.Tensor:
        """Tokens."""
        return torch.tensor(batch.input_ids.numel())

    def forward(self, batch: Batch) -> Loss:
        """Something to differentiate."""
        if batch.mask.any():
            return Loss(-batch_logprobs(self.policy, batch).sum())
        return Loss(self.policy.read(lambda hidden: hidden, batch.input_ids).sum())


def tried(work: Workload, speed: Speed) -> Speed:
    """The same speed, held against whole steps of this stage, unless they would take too long.

    Args:
        work: The stage.
        speed: What the parts of its model take.
    """
    alone = replace(work, learners=1)

    def parts(step: Step) -> float:
        return update_s(alone, speed) + sum(learning_s(alone, speed, extent) for extent in step)

    steps = [shortened(step) for step in typical(work.steps)]
    if max(map(parts, steps)) > MOST_S:
        return speed
    with torch.random.fork_rng(devices=[]):
        seconds = stepping(work)
        seconds(steps[-1])  # memory is found once, whatever the stage
        met = {(extent.rows, extent.width) for extent in steps[-1]}
        known, spent, choosing = len(met), 0.0, 0.0
        for step in steps:
            first, again = seconds(step), seconds(step)
            spent += again
            shapes = {(extent.rows, extent.width) for extent in step}
            choosing += 0.0 if shapes <= met else first - again
            met |= shapes
    kernel = max(0.0, choosing / max(1, len(met) - known))
    return replace(speed, whole=spent / sum(map(parts, steps)), kernel=kernel)


def stepping(work: Workload) -> Callable[[Step], float]:
    """What takes a step of that size with such a model as learns, and tells its seconds."""
    training, device = work.training, torch.device("cpu")
    dtype = resolve(training.precision, device)
    model = formed(work.model, work.adapter, work.quantize)
    stop(model, training.layers.freeze)
    store_frozen(model, dtype)
    model.model.recompute = training.activation_checkpointing
    learner = Learner(Synthetic(model), dtype=dtype)
    optimizers = Optimizers(learner.objective, training.optimizer, ema=training.ema)

    def seconds(step: Step) -> float:
        batches = [batch_of(extent, work.model) for extent in step]
        began = time.perf_counter()
        accumulate(learner, batches, Meter(), training.gradient_clip, dtype)
        optimizers.step(0.0)
        optimizers.zero_grad()
        return time.perf_counter() - began

    return seconds


def process_bytes() -> int:
    """Memory of a process on a CPU that has trained, and has no model any more.

    All code that training uses is loaded by then: a tiny model has taken a step.
    """
    tiny = ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1)
    part = Line(1.0)
    speed = Speed(*[part] * 7, update=1.0, saved=part, head_saved=part)
    tried(Workload(tiny, TrainingConfig(steps=1), [[Extent(1, 8, 8)]]), speed)
    release_freed_memory()
    return psutil.Process().memory_info().rss


def typical(steps: list[Step]) -> list[Step]:
    """Some of them, from the smaller ones to the larger ones."""
    ordered = sorted(steps, key=lambda step: sum(extent.tokens for extent in step))
    count = min(TRIED, len(ordered))
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def shortened(step: Step) -> Step:
    """As many of its micro-batches as ``MOST_TOKENS`` has room for, and at least one."""
    held, tokens = step[:1], step[0].tokens
    for extent in step[1:]:
        tokens += extent.tokens
        if tokens > MOST_TOKENS:
            break
        held.append(extent)
    return held


def batch_of(extent: Extent, model: ModelConfig) -> Batch:
    """Random tokens of that size; the targets are each row's last ones, as replies are."""
    size, context = (extent.rows, extent.width), model.max_position_embeddings
    targets = torch.randint(model.vocab_size, size)
    per_row = min(extent.width, -(-extent.learnt // extent.rows))
    targets[:, : extent.width - per_row] = IGNORE
    # Rows may be wider than the context: documents share them, and begin anew.
    positions = torch.arange(extent.width).remainder(context).expand(size)
    wide = extent.width > context
    return Batch(torch.randint(model.vocab_size, size), targets, positions if wide else None)
