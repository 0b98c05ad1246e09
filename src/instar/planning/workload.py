"""What a stage asks of a machine: shapes of batches, copies of models, replies to write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import cast

import numpy as np

from instar.adapters.base import AdapterConfig
from instar.adapters.opening import Bits
from instar.data.batch import Batch, padded_width
from instar.data.sources import ExampleSource, in_order
from instar.model.config import ModelConfig
from instar.planning.weights import Weights, weigh
from instar.rollout.folding import partition, row_tokens
from instar.rollout.source import RolloutConfig
from instar.training.loop import TrainingConfig

TYPICAL_STEPS = 1000
"""Steps whose batches are looked at; the others are like them."""


@dataclass(frozen=True)
class Extent:
    """The size of a batch, or of one example of it.

    Attributes:
        rows: Sequences; a preference pair is two.
        width: Tokens a row, padding included.
        learnt: Tokens with a target, over all rows.
    """

    rows: int
    width: int
    learnt: int

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.rows * self.width

    def __len__(self) -> int:
        """What a source counts against ``micro_tokens``."""
        return self.tokens


Step = list[Extent]
"""The micro-batches of one optimizer step."""


@dataclass(frozen=True)
class Experience:
    """One rollout of reinforcement learning.

    Attributes:
        prompts: Tokens of each prompt.
        replies: Tokens of each reply; those to one prompt stand together.
        steps: Optimizer steps that learn from it.
        batch: All of it as one batch, which the frozen models read.
        readings: Forward passes of a language model over it.
        scorings: Forward passes of a score model over it.
    """

    prompts: list[int]
    replies: list[int]
    steps: int
    batch: Extent
    readings: int = 0
    scorings: int = 0


@dataclass(frozen=True)
class Workload:
    """All that counts of a stage.

    Attributes:
        model: Shape of the model.
        training: How many steps, with which optimizer.
        steps: Typical steps.
        learners: Models that learn: 2 with a critic.
        frozen: Models that only annotate.
        readings: Forward passes of frozen models over every micro-batch.
        experience: Typical rollouts; none where nothing is sampled.
        rollout: How they are sampled; none as well.
        validation: Batches of one validation.
        text_bytes: Text that is read and tokenised before the first step.
        speaks: Whether the model that is kept writes text, and sits exams that ask for it.
        adapter: What learns in place of the model; a critic is taken to learn as its policy does.
        quantize: How the weights under an adapter are stored.
        ties: Copies of what learnt at the start that ties to it hold, float32.
    """

    model: ModelConfig
    training: TrainingConfig
    steps: list[Step]
    learners: int = 1
    frozen: int = 0
    readings: int = 0
    experience: list[Experience] = field(default_factory=list)
    rollout: RolloutConfig | None = None
    validation: Step = field(default_factory=list)
    text_bytes: int = 0
    speaks: bool = True
    adapter: AdapterConfig | None = None
    quantize: Bits | None = None
    ties: int = 0

    def shared(self, ranks: int) -> Workload:
        """One rank's part, where several share every step; each measures all held-out data."""
        if ranks == 1:
            return self
        some = slice(None, None, ranks)
        parts = [
            replace(one, prompts=one.prompts[some], replies=one.replies[some])
            for one in self.experience
        ]
        return replace(
            self,
            steps=[_part(step, ranks) for step in self.steps],
            experience=[replace(one, batch=_part([one.batch], ranks)[0]) for one in parts],
        )

    @cached_property
    def weights(self) -> Weights:
        """The numbers of one of its models."""
        patterns = self.training.layers.freeze
        return weigh(self.model, self.adapter, self.quantize, patterns)

    @property
    def tokens(self) -> int:
        """Positions that go through training in the whole stage."""
        seen = sum(extent.tokens for step in self.steps for extent in step)
        return round(seen / len(self.steps) * self.training.steps)

    @property
    def widest(self) -> Extent:
        """The micro-batch with the most positions; among those, the widest."""
        every = (extent for step in self.steps for extent in step)
        return max(every, key=lambda extent: (extent.tokens, extent.width))

    @property
    def validations(self) -> int:
        """How often held-out data is measured; always at the end."""
        if not self.validation:
            return 0
        every = self.training.validate_every
        return -(-self.training.steps // every) if every else 1


def _part(step: Step, ranks: int) -> Step:
    """One rank's rows of a step, in as few micro-batches as they fill."""
    count = -(-len(step) // ranks)
    shares = ranks * count
    width = max(extent.width for extent in step)
    rows = -(-sum(extent.rows for extent in step) // shares)
    tokens = sum(extent.tokens for extent in step) / shares
    learnt = sum(extent.learnt for extent in step) // shares
    return [Extent(rows, min(width, -(-int(tokens) // rows)), learnt)] * count


def headless(work: Workload) -> Workload:
    """The same work for a model that gives one number a token instead of logits."""

    def bare(step: Step) -> Step:
        return [replace(extent, learnt=0) for extent in step]

    return replace(work, steps=[bare(s) for s in work.steps], validation=bare(work.validation))


def gathered(some: Sequence[Extent]) -> Extent:
    """Examples as one batch, padded to the widest."""
    width = padded_width(max(extent.width for extent in some))
    return Extent(sum(e.rows for e in some), width, sum(e.learnt for e in some))


def example_steps(
    examples: Sequence[Extent], batch_size: int, micro_tokens: int, seed: int, steps: int
) -> list[Step]:
    """What training's own source makes of examples of these sizes."""
    collate = cast(Callable[[list[Extent]], Batch], gathered)
    source = ExampleSource(examples, collate, batch_size, micro_tokens, seed)
    return [cast(Step, next(source)) for _ in range(min(steps, TYPICAL_STEPS))]


def cut(examples: Sequence[Extent], size: int, micro_tokens: float = math.inf) -> Step:
    """Examples in batches of ``size`` or less, in their order, as validation reads them."""
    return [gathered(some) for some in in_order(examples, size, micro_tokens)]


def rollouts(
    prompts: Sequence[int],
    replies: Sequence[int],
    config: RolloutConfig,
    steps: int,
    readings: int,
    scorings: int,
) -> list[Experience]:
    """Typical rollouts: prompts and replies of the lengths that the data has.

    Args:
        prompts: Lengths to draw from.
        replies: Lengths to draw from; longer ones are cut off.
        config: How much is sampled.
        steps: Optimizer steps of the stage.
        readings: Forward passes of language models over each rollout.
        scorings: Forward passes of score models.
    """
    rng = np.random.default_rng(0)
    made = []
    count = min(config.prompts, len(prompts))
    per_rollout = config.epochs * config.minibatches
    for _ in range(min(-(-steps // per_rollout), TYPICAL_STEPS // 4)):
        asked = rng.choice(prompts, count, replace=False)
        limited = np.minimum(rng.choice(replies, count * config.samples), config.max_new_tokens)
        rows = asked.repeat(config.samples) + limited
        batch = Extent(len(rows), padded_width(int(rows.max())), int(limited.sum()))
        experience = Experience(asked.tolist(), limited.tolist(), per_rollout, batch)
        made.append(replace(experience, readings=readings, scorings=scorings))
    return made


def rollout_steps(
    made: Sequence[Experience],
    config: RolloutConfig,
    kept: float,
    model: ModelConfig,
    folds: bool = True,
) -> list[Step]:
    """What is learnt from rollouts.

    Args:
        made: The rollouts.
        config: How they are cut.
        kept: Share of the replies that is learnt from.
        model: Who learns.
        folds: Whether replies to one prompt may share rows, as the source has it on a processor.
    """
    rng = np.random.default_rng(0)
    steps: list[Step] = []
    for experience in made:
        asked = np.arange(len(experience.prompts))
        asked = rng.permutation(asked)[: max(1, round(kept * len(asked)))]
        taught = (asked[:, None] * config.samples + np.arange(config.samples)).flatten()
        for _ in range(config.epochs):
            order = rng.permutation(taught)
            for part in np.array_split(order, min(config.minibatches, len(order))):
                steps.append(_learnt(experience, np.sort(part), config, model, folds))
    return list(islice(steps, TYPICAL_STEPS))


def _learnt(
    experience: Experience,
    part: np.ndarray,
    config: RolloutConfig,
    model: ModelConfig,
    folds: bool,
) -> Step:
    """What the source makes of some replies, by rising number."""
    asked, own = part // config.samples, np.array(experience.replies)[part]
    starts = [0, *(np.flatnonzero(np.diff(asked)) + 1).tolist(), len(part)]
    groups = [range(a, b) for a, b in pairwise(starts)]
    # A reply's first token is predicted from the prompt's last one, which is not shared.
    shared = np.array(experience.prompts)[asked] - 1
    rows, held = partition(groups, shared, own, model, config.micro_batch if folds else 1)
    extents = [
        Extent(1, row_tokens(row, shared, own) + 1, int(own[row.start : row.stop].sum()))
        for row in rows
    ]
    extents.sort(key=lambda extent: extent.width)
    return cut(extents, config.micro_batch // held)
