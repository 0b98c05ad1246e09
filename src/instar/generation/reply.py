"""A reply in the making, and what is left of it when it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from instar.errors import UserError
from instar.generation.request import Request
from instar.generation.stopping import StopScanner
from instar.tokenizer.hf import StreamDecoder, Tokenizer

Finish = Literal["stop", "length", "cancelled", "timeout", "failed"]
"""Why a reply ended: a stop token, a stop string or its grammar; no more room, in the reply or in
the context; nobody wants it any more; its time was up; it cannot go on."""


@dataclass(frozen=True)
class Completion:
    """One finished reply.

    Attributes:
        ids: The drawn tokens, with the stop token if one was drawn: training needs it.
        logprobs: Log-probability of each drawn token under the model itself (temperature 1, no
            filters), in nats and float32.
        finish: Why it ended.
        text: The reply as text, without stop token or stop string.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    text: str


class Reply:
    """Gathers tokens and text, and knows when to stop.

    Args:
        request: What is answered.
        limit: The most tokens to draw.
        tokenizer: Turns tokens into text.

    Attributes:
        ids: Drawn so far.
        logprobs: Of each of them, under the model itself.
        top_logprobs: The likeliest tokens at each place, with their log-probabilities, if asked.
        text: What may be shown.
        finish: Why it ended, once it has.
        failure: What is wrong where it cannot go on.
    """

    def __init__(self, request: Request, limit: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.limit = limit
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.text = ""
        self.finish: Finish | None = None if limit else "length"
        self.failure: UserError | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._scanner = StopScanner(request.stopping.strings)
        self._uniforms: np.ndarray | None = None
        if request.constraint is not None and request.constraint.finished:
            self.finish = "stop"

    @property
    def uniform(self) -> float:
        """The random number that decides the next token, in [0, 1) and exact in float32."""
        if self._uniforms is None:
            bits = np.random.Philox(np.random.SeedSequence(self.request.key))
            generator = np.random.Generator(bits)
            self._uniforms = generator.random(self.limit, dtype=np.float32)
        return float(self._uniforms[len(self.ids)])

    @property
    def columns(self) -> int:
        """Columns of the cache that it may come to need.

        Its last token is never read, but where that follows the prompt at once, a column is
        computed in vain beside others who are written on.
        """
        return len(self.request.prompt) + max(self.limit - 1, 1)

    def add(
        self, token: int, logprob: float, likeliest: list[tuple[int, float]] | None = None
    ) -> None:
        """Take in the next drawn token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if likeliest is not None:
            self.top_logprobs.append(likeliest)
        if token in self.request.stopping.token_ids:
            self.end("stop")
            return
        self.text += self._scanner.push(self._decoder.push(token))
        constraint = self.request.constraint
        if constraint is not None:
            constraint.accept(token)
        if self._scanner.found or (constraint is not None and constraint.finished):
            self.end("stop")
        elif len(self.ids) == self.limit:
            self.end("length")

    def end(self, why: Finish) -> None:
        """No more tokens; what was held back of the text is shown. Later ends change nothing."""
        if self.finish is None:
            self.finish = why
            self.text += self._scanner.push(self._decoder.flush()) + self._scanner.flush()

    def fail(self, failure: UserError) -> None:
        """It cannot go on; its neighbours can."""
        self.failure = failure
        self.end("failed")

    def completed(self) -> Completion:
        """The finished reply; raises ``UserError`` where it could not be finished."""
        if self.failure:
            raise self.failure
        assert self.finish is not None
        return Completion(self.ids, self.logprobs, self.finish, self.text)
