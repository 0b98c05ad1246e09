"""Whole steps of a stage, tried on this machine: what its parts do not show when tried one by one.

Between the parts there is Python, autograd's bookkeeping, and memory that the next part finds cold.
A few typical steps tell how much that is; the parts then tell what all other steps take.
"""

from __future__ import annotations

import time
from dataclasses import replace

import psutil
import torch

from instar.data.batch import IGNORE, Batch
from instar.memory import release_freed_memory
from instar.model import CausalLM, ModelConfig
from instar.objectives.base import Loss, Objective
from instar.objectives.language import batch_logprobs
from instar.planning.prediction import learning_s
from instar.planning.speed import Line, Speed
from instar.planning.workload import Extent, Step, Workload
from instar.training.loop import TrainingConfig, accumulate
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.precision import resolve

TRIED = 4
"""Steps of a stage that are tried, from its smaller ones to its larger ones."""


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
    """The same speed, held against whole steps of this stage.

    Args:
        work: The stage.
        speed: What the parts of its model take.
    """
    generator = torch.get_rng_state()
    training, device = work.training, torch.device("cpu")
    model = CausalLM(work.model)
    model.model.recompute = training.activation_checkpointing
    dtype = resolve(training.precision, device)
    learner = Learner(Synthetic(model), dtype=dtype)
    optimizers = Optimizers(learner.objective, training.optimizer)

    def seconds(step: Step) -> float:
        batches = [batch_of(extent, work.model.vocab_size) for extent in step]
        began = time.perf_counter()
        accumulate(learner, batches, Meter(), training.gradient_clip, dtype)
        optimizers.step(0.0)
        optimizers.zero_grad()
        return time.perf_counter() - began

    alone = replace(work, learners=1)
    steps = typical(work.steps)
    seconds(steps[-1])  # memory is found once, whatever the stage
    met = {(extent.rows, extent.width) for extent in steps[-1]}
    known, spent, parts, choosing = len(met), 0.0, 0.0, 0.0
    for step in steps:
        first, again = seconds(step), seconds(step)
        spent += again
        parts += speed.update + sum(learning_s(alone, speed, extent) for extent in step)
        choosing += first - again
        met |= {(extent.rows, extent.width) for extent in step}
    torch.set_rng_state(generator)
    kernel = max(0.0, choosing / max(1, len(met) - known))
    return replace(speed, whole=spent / parts, kernel=kernel)


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


def batch_of(extent: Extent, vocab_size: int) -> Batch:
    """Random tokens of that size; the targets are each row's last ones, as replies are."""
    size = (extent.rows, extent.width)
    targets = torch.randint(vocab_size, size)
    per_row = min(extent.width, -(-extent.learnt // extent.rows))
    targets[:, : extent.width - per_row] = IGNORE
    return Batch(torch.randint(vocab_size, size), targets)
