"""What stages that learn from pairs of replies share: where the pairs are, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from instar.data.batch import Batch
from instar.data.packing import short_ones
from instar.data.pairs import Pair, pad_pairs, preference_pairs
from instar.data.sources import ExampleSource, in_order
from instar.distributed import world
from instar.planning.survey import NO_LIMIT, Survey
from instar.planning.workload import Workload, cut, example_steps
from instar.stages.config import TrainedStageConfig
from instar.tokenizer.hf import Tokenizer

Positive = Annotated[int, Gt(0)]


class PairsConfig(TrainedStageConfig):
    """A stage that learns from pairs of replies."""

    out: Path
    init: Path = Path("{run}/sft")
    """Checkpoint to begin with."""
    data: list[Path] = [Path("{run}/data/preferences.jsonl")]
    """JSON lines with `messages`, `chosen` and `rejected` each."""
    valid: list[Path] = [Path("{run}/data/preferences_valid.jsonl")]
    """The same, held out; none is allowed."""
    batch_size: Positive = 32
    """Pairs an optimizer step."""
    max_length: Positive | None = None
    """Pairs of which a row has more tokens are left out; by default they must fit the context."""
    micro_tokens: Positive = 4096
    """The most tokens a micro-batch, padding included: the less, the less memory."""

    def files(self) -> list[Path]:
        """Training and held-out pairs."""
        return self.data + self.valid

    def parents(self) -> list[Path]:
        """The model to begin with."""
        return [self.init]

    def read(
        self, paths: list[Path], tokenizer: Tokenizer, context: int, notes: list[str]
    ) -> list[Pair]:
        """The pairs in some files; notes take a line if some are left out."""
        records = self.records(paths, ("messages", "chosen", "rejected"))
        if self.max_length is None:
            return preference_pairs(records, tokenizer, context)
        pairs = preference_pairs(records, tokenizer, None)
        return short_ones(pairs, lambda pair: pair.longest, min(self.max_length, context), notes)

    def needs(self, survey: Survey) -> Workload:
        """What one model that learns from the pairs asks of a machine."""
        steps = self.training.steps
        most = self.max_length or NO_LIMIT
        pairs = survey.pairs(self.data, most)
        valid = survey.whole().pairs(self.valid, most) if self.valid else []
        return Workload(
            survey.model(self.init),
            self.training,
            example_steps(pairs, self.batch_size, self.micro_tokens, self.seed, steps),
            validation=cut(valid, self.batch_size, self.micro_tokens),
            text_bytes=survey.text_bytes(*self.data),
        )

    def source(self, pairs: list[Pair], tokenizer: Tokenizer) -> ExampleSource[Pair]:
        """Batches to train on, in an order of the seed's."""
        return ExampleSource(
            pairs,
            lambda some: pad_pairs(some, tokenizer.pad_id),
            self.batch_size,
            self.micro_tokens,
            self.seed,
            *world(),
        )

    def batches(self, pairs: list[Pair], tokenizer: Tokenizer) -> Iterator[Batch]:
        """Batches to measure on: every pair once."""
        for some in in_order(pairs, self.batch_size, self.micro_tokens):
            yield pad_pairs(some, tokenizer.pad_id)
