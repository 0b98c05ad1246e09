"""Resumable iterators; each item is the list of micro-batches of one optimizer step.

What a step holds depends on the data, the seed and the step's number, and on nothing else: not
on how many ranks share the work, nor on how often the run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from instar.data.batch import Batch
from instar.data.shards import Tokens
from instar.errors import UserError

T = TypeVar("T", bound=Sized)


class Source(Protocol):
    """What the training loop draws from."""

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next optimizer step."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the source itself measured while it made the last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here (tensors and plain values)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


def check_share(batch_size: int, world_size: int) -> None:
    """Raise ``UserError`` if some process would have nothing to do."""
    if batch_size < world_size:
        raise UserError(
            f"a step has {batch_size} rows, and there are {world_size} processes",
            "Raise batch_size, or start fewer.",
        )


class StepSource:
    """A source whose only state is how many steps it has given."""

    def __init__(self) -> None:
        self.step = 0

    def metrics(self) -> dict[str, float]:
        """Nothing of its own to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The step's number."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that step."""
        self.step = state["step"]


class PackedSource(StepSource):
    """Windows of a token stream, in a new order each epoch, or in the stream's own.

    Args:
        tokens: The stream ``(N,)``.
        context: Tokens a row.
        batch_size: Rows a step, over all ranks.
        micro_batch: Rows a micro-batch.
        seed: Decides the order, and where each epoch's first window begins.
        rank: This process.
        world_size: How many processes share the step.
        shuffle: Whether the order is a new one each epoch.

    Raises:
        UserError: The stream is shorter than one window.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        context: int,
        batch_size: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.shuffle = shuffle
        if len(tokens) < 2 * context + 1:
            raise UserError(
                f"the corpus has {len(tokens)} tokens, one window needs {2 * context + 1}",
                "Give more text, or a smaller `context`.",
            )
        self.tokens, self.context = tokens, context
        check_share(batch_size, world_size)
        self.batch_size, self.micro_batch, self.seed = batch_size, micro_batch, seed
        self.rank, self.world_size = rank, world_size
        self.windows = (len(tokens) - 1 - context) // context
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __next__(self) -> list[Batch]:
        first = self.step * self.batch_size
        starts = [self._start(i) for i in range(first, first + self.batch_size)]
        starts = starts[self.rank :: self.world_size]
        self.step += 1
        cuts = range(0, len(starts), self.micro_batch)
        return [self._rows(starts[i : i + self.micro_batch]) for i in cuts]

    def _start(self, index: int) -> int:
        """Where the ``index``-th window of the endless sequence begins."""
        epoch, place = divmod(index, self.windows)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(self.context)
            order = rng.permutation(self.windows) if self.shuffle else np.arange(self.windows)
            self._order = (epoch, offset + self.context * order)
        return int(self._order[1][place])

    def _rows(self, starts: list[int]) -> Batch:
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        return Batch(input_ids=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


def fitting(lengths: Sequence[int] | np.ndarray, micro_tokens: float) -> Iterator[slice]:
    """Stretches of examples of which as many as fit share ``micro_tokens``; one always fits."""
    first = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > first and (i - first + 1) * longest > micro_tokens:
            yield slice(first, i)
            first, longest = i, length
    if first < len(lengths):
        yield slice(first, len(lengths))


def in_order(examples: Sequence[T], batch_size: int, micro_tokens: float) -> Iterator[Sequence[T]]:
    """Every example once, as it comes, in parts of such sizes: for measuring."""
    for i in range(0, len(examples), batch_size):
        some = examples[i : i + batch_size]
        for part in fitting([len(example) for example in some], micro_tokens):
            yield some[part]


class ExampleSource(StepSource, Generic[T]):
    """Examples of varied length, grouped so that a batch holds similar ones.

    Each epoch shuffles, sorts stretches of some batches by length, cuts them into batches, and
    shuffles those: little padding, and still a new mixture every time.

    Args:
        examples: What to draw from.
        collate: Turns some of them into a batch.
        batch_size: Examples a step, over all ranks.
        micro_tokens: The most tokens a micro-batch, padding included; one example always fits.
        seed: Decides the order.
        rank: This process.
        world_size: How many processes share the step.
        earlier: What is rehearsed besides, and how many of each an epoch has: the next ones each
            time, until all had their turn.
    """

    STRETCH = 16
    """Batches that are sorted together."""

    def __init__(
        self,
        examples: Sequence[T],
        collate: Callable[[list[T]], Batch],
        batch_size: int,
        micro_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        earlier: Sequence[tuple[Sequence[T], int]] = (),
    ) -> None:
        super().__init__()
        self.examples, self.collate = list(examples), collate
        self.new, self.turns = len(examples), list[tuple[np.ndarray, int]]()
        for pool, count in earlier:
            rng = np.random.default_rng([seed, len(self.examples)])
            turns = len(self.examples) + rng.permutation(len(pool))
            self.turns.append((turns, min(count, len(pool))))
            self.examples += pool
        size = self.new + sum(count for _, count in self.turns)
        self.batch_size = min(batch_size, size)
        check_share(self.batch_size, world_size)
        self.micro_tokens, self.seed = micro_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.lengths = np.array([len(e) for e in self.examples])
        self.batches = size // self.batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))

    @property
    def mean_length(self) -> int:
        """Tokens of a typical example."""
        return round(self.lengths[self._arrange(0)].mean())

    def __next__(self) -> list[Batch]:
        epoch, place = divmod(self.step, self.batches)
        if self._order[0] != epoch:
            self._order = (epoch, self._arrange(epoch))
        chosen = self._order[1][place][self.rank :: self.world_size]
        self.step += 1
        parts = fitting(self.lengths[chosen], self.micro_tokens)
        return [self.collate([self.examples[j] for j in chosen[part]]) for part in parts]

    def _arrange(self, epoch: int) -> np.ndarray:
        """Indices of every batch of an epoch ``(batches, batch_size)``."""
        rng = np.random.default_rng([self.seed, epoch])
        members = [np.arange(self.new)]
        for turns, count in self.turns:
            members.append(turns.take(range(epoch * count, (epoch + 1) * count), mode="wrap"))
        order = rng.permutation(np.concatenate(members))[: self.batches * self.batch_size]
        stretch = self.STRETCH * self.batch_size
        for i in range(0, len(order), stretch):
            part = order[i : i + stretch]
            order[i : i + stretch] = part[np.argsort(self.lengths[part], kind="stable")]
        return rng.permutation(order.reshape(self.batches, self.batch_size))


class AnnotatedSource:
    """A source whose batches a frozen model has written into.

    Args:
        source: Where the batches come from.
        annotate: Adds fields to a batch; runs without gradients.
    """

    def __init__(self, source: Source, annotate: Callable[[Batch], Batch]) -> None:
        self.source, self.annotate = source, annotate

    def __next__(self) -> list[Batch]:
        with torch.no_grad():
            return [self.annotate(batch) for batch in next(self.source)]

    def metrics(self) -> dict[str, float]:
        """What the inner source measured."""
        return self.source.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The inner source's state; annotations are made again."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.source.load_state_dict(state)
