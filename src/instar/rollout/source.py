"""Reinforcement learning's source: let the policy answer, judge the answers, hand out batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt

from instar.config import Config
from instar.data.batch import Batch
from instar.data.packing import check_place, pad_rows, reply_row
from instar.data.readers import place_of
from instar.data.schema import Task
from instar.distributed import gather_lists, world
from instar.errors import UserError
from instar.generation.engine import Engine, Precision
from instar.generation.reply import Completion
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model.sharding import gathered
from instar.rollout.folding import fold
from instar.tokenizer.chat import prompt_ids

Positive = Annotated[int, Gt(0)]


class RolloutConfig(Config):
    """How much experience to gather, and how often to learn from it."""

    prompts: Positive = 16
    """Prompts a rollout."""
    samples: Positive = 8
    """Replies to each prompt; the prompt itself is read once."""
    max_new_tokens: Positive = 64
    """Longest reply, in tokens."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of the sampler; at 1 replies come from the policy itself (but for rounding), as the
    mathematics supposes."""
    precision: Precision = "auto"
    """Format of the policy's matrices while it answers; `auto` is that of training's products. A
    policy with adapters, experts or windows, and GPT-2, answers as it trains. What is learnt from
    is always what the policy itself says of a reply."""
    epochs: Positive = 1
    """How often each reply is learnt from."""
    minibatches: Positive = 1
    """Optimizer steps in which one epoch over a rollout is made, if it has as many replies left to
    learn from."""
    micro_batch: Positive = 64
    """Replies a micro-batch."""

    def written_in(self, products: torch.dtype) -> Precision:
        """The format in which a policy answers whose training multiplies in ``products``."""
        if self.precision != "auto":
            return self.precision
        return "float32" if products == torch.float32 else "bfloat16"


@dataclass(frozen=True)
class Rollout:
    """What the policy said.

    Attributes:
        tasks: The task of every reply, N of them; the replies to one prompt stand together.
        completions: The replies.
        batch: Prompts and replies as rows ``(N, T)``, targets on the replies.
        samples: Replies a prompt.
    """

    tasks: list[Task]
    completions: list[Completion]
    batch: Batch
    samples: int

    @property
    def finished(self) -> torch.Tensor:
        """Which replies ended by themselves ``(N,)``."""
        return torch.tensor([c.finish == "stop" for c in self.completions])


Judge = Callable[[Rollout], tuple[Batch, dict[str, float]]]
"""Gives the rows to learn from, with their advantages, and says what it measured."""


class RolloutSource:
    """Rollouts of the current policy, cut into the batches of some optimizer steps.

    A rollout depends on the seed, its number and the policy. Rollouts that are not used up yet
    belong to the state: a resumed run goes on in the middle of an epoch.

    Each rank answers its share of the prompts, and learns from its share of the rows; what was
    answered all ranks hold, since rows are shuffled over all of them.

    Args:
        tasks: Prompts to draw from.
        engine: Generates with the policy that is being trained.
        judge: Turns replies into advantages.
        config: How much, and how often.
        seed: Decides the prompts and the replies.

    Raises:
        UserError: A prompt cannot be rendered or leaves no room for a reply, or a rollout has
            fewer replies than minibatches.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        judge: Judge,
        config: RolloutConfig,
        seed: int,
    ) -> None:
        self.tasks, self.engine, self.judge = tasks, engine, judge
        self.config, self.seed = config, seed
        tokenizer = engine.tokenizer
        places = [place_of(task, f"prompt {i}") for i, task in enumerate(tasks, start=1)]
        for place, task in zip(places, tasks, strict=True):
            check_place(task["messages"], place)
        replies = min(config.prompts, len(tasks)) * config.samples
        if config.minibatches > replies:
            raise UserError(
                f"rollout.minibatches is {config.minibatches}, a rollout has {replies} replies",
                "Lower it, or gather more replies.",
            )
        self._prompts = [prompt_ids(tokenizer, task["messages"]) for task in tasks]
        context = engine.model.context
        for place, ids in zip(places, self._prompts, strict=True):
            if len(ids) >= context:
                raise UserError(
                    f"{place} has {len(ids)} tokens, the context has {context}",
                    "Shorten it; a reply needs room.",
                )
        self._sampling = Sampling(temperature=config.temperature)
        self._stopping = Stopping(tokenizer.turn_end_ids, max_new_tokens=config.max_new_tokens)
        self.sampled = 0
        """Tokens of all rollouts so far, prompts and padding included."""
        self._number = 0
        self._pending: list[Batch] = []
        self._metrics: dict[str, float] = {}

    def __next__(self) -> list[Batch]:
        if not self._pending:
            with torch.no_grad():
                batch, measured = self.judge(self.collect())
            self._metrics = measured
            self._pending = self._cut(batch)
            self._number += 1
        rank, size = world()
        step = self._pending.pop(0)
        # Neighbours go to one rank: replies to one prompt may share it.
        mine = step.rows(torch.arange(len(step.input_ids)).tensor_split(size)[rank])
        most = self.config.micro_batch
        mine, replies = fold(mine, self.engine.model.config, most)
        # The short rows come first: those of like length share a micro-batch, and little of it is
        # padding.
        order = mine.row_lengths().argsort(stable=True)
        parts = order.split(most // replies)
        return [mine.rows(part).trimmed() for part in parts]

    def collect(self) -> Rollout:
        """Let the policy answer the next prompts, of which each rank has its share."""
        rng = np.random.default_rng([self.seed, self._number])
        chosen = rng.choice(len(self.tasks), min(self.config.prompts, len(self.tasks)), False)
        samples, (rank, size) = self.config.samples, world()
        with gathered(self.engine.model):
            replies = self.engine.generate(
                [self._prompts[i] for i in chosen[rank::size]],
                self._sampling,
                self._stopping,
                samples=samples,
                seed=int(rng.integers(2**31)),
                numbers=range(rank, len(chosen), size),
                batch_size=self.config.prompts * samples,
            )
        self.engine.rest()  # training needs the memory, and changes the weights
        groups = [replies[i : i + samples] for i in range(0, len(replies), samples)]
        completions = [reply for group in gather_lists(groups) for reply in group]
        asked = np.repeat(chosen, samples)
        rows = [
            reply_row(self._prompts[i], reply.ids)
            for i, reply in zip(asked, completions, strict=True)
        ]
        device = next(self.engine.model.parameters()).device
        batch = pad_rows(rows, self.engine.tokenizer.pad_id).to(device)
        self.sampled += batch.input_ids.numel()
        return Rollout([self.tasks[int(i)] for i in asked], completions, batch, samples)

    def _cut(self, batch: Batch) -> list[Batch]:
        """Epochs and minibatches of one rollout, rows shuffled in each epoch.

        Within a minibatch the replies to one prompt stand together.
        """
        rng = np.random.default_rng([self.seed, self._number, 1])
        steps: list[Batch] = []
        for _ in range(self.config.epochs):
            order = torch.from_numpy(rng.permutation(len(batch.input_ids)))
            # A judge may have left out so many replies that there are fewer than minibatches.
            for part in order.tensor_split(min(self.config.minibatches, len(order))):
                steps.append(batch.rows(part.sort().values).trimmed())
        return steps

    def metrics(self) -> dict[str, float]:
        """What the judge measured on the rollout in use."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Number of the next rollout, and what is left of this one."""
        return {
            "number": self._number,
            "sampled": self.sampled,
            "pending": [step.tensors() for step in self._pending],
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a rollout."""
        self._number, self._metrics = state["number"], state["metrics"]
        self.sampled = state["sampled"]
        device = next(self.engine.model.parameters()).device
        self._pending = [Batch(**tensors).to(device) for tensors in state["pending"]]
