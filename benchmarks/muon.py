"""What Muon costs: the share of a training step that it takes on top of AdamW.

    python benchmarks/muon.py

trains a small model (256 wide, 6 layers, 8 heads, feed-forward 704, context 256, vocabulary 4,096)
on random tokens, a step with AdamW and a step with each setting of Muon in turn, and prints
medians. A training step is what the training loop does: gradients of the whole batch, clipping,
the optimizer's step. The machine's noise falls on all alike, since they alternate. While it runs
it shows the medians so far, the optimizer's part in brackets.

Muon's work does not depend on the batch, so its share falls as the batch grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from instar.data.sources import PackedSource
from instar.memory import keep_freed_memory
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.training.loop import accumulate
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.precision import resolve

SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
)
CONTEXT, MICRO_BATCH = 256, 16
CPU = torch.device("cpu")

SETTINGS = {
    "AdamW": OptimizerConfig(name="adamw"),
    "Muon": OptimizerConfig(name="muon"),
    "Muon, 3 iterations": OptimizerConfig(name="muon", muon_iterations=3),
    "Muon, blocks of 64": OptimizerConfig(name="muon", muon_block=64),
    "Muon, blocks of 64, 3 iterations": OptimizerConfig(
        name="muon", muon_block=64, muon_iterations=3
    ),
}


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds.

    Attributes:
        step_s: Seconds of a whole training step.
        optimizer_s: Seconds of the optimizer's part.
    """

    step_s: float
    optimizer_s: float


class Trainer:
    """One model with one optimizer, whose steps are timed."""

    def __init__(self, shape: ModelConfig, setting: OptimizerConfig, tokens: int) -> None:
        model = CausalLM(shape)
        initialize(model, shape, torch.Generator().manual_seed(0))
        self.objective = NextToken(model)
        self.optimizers = Optimizers(self.objective, setting)
        ids = np.random.default_rng(0).integers(shape.vocab_size, size=2**16, dtype=np.uint16)
        self.source = PackedSource(ids, CONTEXT, tokens // CONTEXT, MICRO_BATCH, seed=0)

    def step(self) -> tuple[float, float]:
        """Seconds of a whole step, and of the optimizer's part of it."""
        began = time.perf_counter()
        accumulate(Learner(self.objective), next(self.source), Meter(), 1.0, resolve("auto", CPU))
        learnt = time.perf_counter()
        self.optimizers.step(1e-3)
        self.optimizers.zero_grad()
        ended = time.perf_counter()
        return ended - began, ended - learnt


def measure(
    shape: ModelConfig, settings: dict[str, OptimizerConfig], tokens: int, rounds: int
) -> Iterator[dict[str, Cost]]:
    """Time every setting's steps in turn; after each round, the medians so far.

    Args:
        shape: Of the model.
        settings: By name.
        tokens: A step's batch.
        rounds: Steps of each, after one that does not count.
    """
    trainers = {name: Trainer(shape, setting, tokens) for name, setting in settings.items()}
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for trainer in trainers.values():
        trainer.step()
    for _ in range(rounds):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.step())
        yield {
            name: Cost(*(statistics.median(part) for part in zip(*of_one, strict=True)))
            for name, of_one in seconds.items()
        }


def table(costs: dict[str, Cost], tokens: int) -> str:
    """Markdown; shares are of AdamW's step."""
    adamw = costs["AdamW"]
    lines = [
        f"| {tokens:,} tokens a step | step, ms | optimizer, ms | more than AdamW |",
        "|---|---|---|---|",
    ]
    for name, cost in costs.items():
        more = (cost.optimizer_s - adamw.optimizer_s) / adamw.step_s
        milliseconds = f"{cost.step_s * 1e3:.0f} | {cost.optimizer_s * 1e3:.1f}"
        lines.append(f"| {name} | {milliseconds} | {more:+.1%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="batches")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each setting [15]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[all cores]")
    parser.add_argument("--out", type=Path, help="write the medians as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found = {}
    for tokens in options.tokens:
        costs: dict[str, Cost] = {}
        for done, costs in enumerate(measure(SHAPE, SETTINGS, tokens, options.rounds), start=1):
            milliseconds = ((cost.step_s * 1e3, cost.optimizer_s * 1e3) for cost in costs.values())
            so_far = ", ".join(f"{step:.0f} ({optimizer:.0f})" for step, optimizer in milliseconds)
            print(f"round {done}/{options.rounds}: {so_far} ms", file=sys.stderr, flush=True)
        print(table(costs, tokens), end="\n\n", flush=True)
        found[tokens] = {name: vars(cost) for name, cost in costs.items()}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
