"""Reward model: a score head on a language model's body learns which reply people prefer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from instar.checkpoint import score_model_from
from instar.data.batch import Batch
from instar.data.pairs import Pair, pad_pairs, preference_pairs
from instar.data.readers import read_all
from instar.data.sources import ExampleSource
from instar.distributed import default_device, world
from instar.objectives.base import Objective
from instar.objectives.reward import BradleyTerry
from instar.stages.base import Job, Stage, TrainedStageConfig, trained
from instar.tokenizer.hf import Tokenizer
from instar.training.meter import Meter

Positive = Annotated[int, Gt(0)]


class PairsConfig(TrainedStageConfig):
    """A stage that learns from pairs of replies."""

    out: Path
    init: Path = Path("{run}/sft")
    """Checkpoint to begin with."""
    data: list[Path] = [Path("{run}/data/preferences.jsonl")]
    """JSON lines with `messages`, `chosen` and `rejected` each."""
    valid: list[Path] = [Path("{run}/data/preferences_valid.jsonl")]
    """The same, held out."""
    batch_size: Positive = 32
    """Pairs an optimizer step."""
    micro_batch: Positive = 32
    """Pairs a micro-batch."""

    def files(self) -> list[Path]:
        """Training and held-out pairs."""
        return self.data + self.valid

    def parents(self) -> list[Path]:
        """The model to begin with."""
        return [self.init]

    def read(self, paths: list[Path], tokenizer: Tokenizer, context: int) -> list[Pair]:
        """The pairs in some files."""
        records = read_all(map(self.at, paths), ("messages", "chosen", "rejected"))
        return preference_pairs(records, tokenizer, context)

    def source(self, pairs: list[Pair], tokenizer: Tokenizer) -> ExampleSource[Pair]:
        """Batches of pairs."""
        return ExampleSource(
            pairs,
            lambda some: pad_pairs(some, tokenizer.pad_id),
            self.batch_size,
            self.micro_batch,
            self.seed,
            *world(),
        )

    def validator(
        self,
        pairs: list[Pair],
        tokenizer: Tokenizer,
        objective: Objective,
        annotate: Callable[[Batch], Batch],
    ) -> Callable[[], dict[str, float]]:
        """Measures the objective on held-out pairs."""

        @torch.no_grad()
        def validate() -> dict[str, float]:
            meter = Meter()
            for i in range(0, len(pairs), self.micro_batch):
                batch = pad_pairs(pairs[i : i + self.micro_batch], tokenizer.pad_id)
                meter.add(objective(annotate(batch)).metrics)
            return meter.means()

        return validate


class RewardConfig(PairsConfig):
    """Learn a score that puts the better of two replies first."""

    stage: str = "reward"
    out: Path = Path("{run}/reward")
    center: Annotated[float, Ge(0)] = 0.01
    """Weight of the term that keeps scores around zero."""


def build(config: RewardConfig) -> Job:
    """Source and objective of a reward model."""
    tokenizer = Tokenizer.load(config.at(config.init))
    model = score_model_from(config.at(config.init))
    context = model.config.max_position_embeddings
    pairs = config.read(config.data, tokenizer, context)
    held_out = config.read(config.valid, tokenizer, context)
    objective = BradleyTerry(model, config.center)

    mean_length = sum(map(len, pairs)) // len(pairs)
    flops = model.config.flops_per_token(mean_length)
    source = config.source(pairs, tokenizer)
    validate = config.validator(
        held_out, tokenizer, objective, lambda batch: batch.to(default_device())
    )
    return Job(objective, source, model, tokenizer, flops, validate)


STAGE = Stage("reward", "learn which of two replies is better", RewardConfig, trained(build))
