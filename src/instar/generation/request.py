"""What is asked of the engine: a prompt, and all that decides how it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool
from torch import Tensor

from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping


class Constraint(Protocol):
    """A grammar: which tokens may come next. Each request has one of its own."""

    def allowed(self) -> Bool[Tensor, " v"]:
        """Which of the tokenizer's tokens may come next; those that stop a reply included.

        Raises:
            UserError: It cannot say; the reply then fails.
        """
        ...

    def accept(self, token: int) -> None:
        """Told what was drawn."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more may follow; the reply then ends."""
        ...


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        prompt: Token ids.
        sampling: How tokens are chosen.
        stopping: When the reply ends, apart from the end of the context.
        key: Seed, number of the prompt, number of the sample: they alone decide the draws.
        top_logprobs: So many of the likeliest tokens are recorded at each place.
        constraint: What the reply must look like.
        adapter: Which of the model's adapters speaks; none for what is active in it.
        deadline_s: When the reply ends in any case, by ``time.perf_counter()``.
    """

    prompt: Sequence[int]
    sampling: Sampling
    stopping: Stopping
    key: tuple[int, int, int] = (0, 0, 0)
    top_logprobs: int = 0
    constraint: Constraint | None = None
    adapter: str | None = None
    deadline_s: float | None = None
