"""Many prompts in, many replies out: one prefill for each prompt, then one step for each token.

Replies are decoded side by side in batches. What a reply says never depends on its neighbours:
rows are padded on the left, and each draws with random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from instar.checkpoint import load_causal_lm
from instar.distributed import default_device
from instar.errors import UserError
from instar.generation.sampling import Sampling, draw, warp
from instar.generation.stopping import Stopping, StopScanner
from instar.model.cache import KVCache
from instar.model.transformer import CausalLM
from instar.tokenizer.hf import StreamDecoder, Tokenizer

COMPACT_BELOW = 0.75
"""Finished rows are dropped once fewer than this share of a batch is still being written.

Dropping copies the cache once; keeping them wastes their share of every further step.
"""


@dataclass(frozen=True)
class Completion:
    """One finished reply.

    Attributes:
        ids: The drawn tokens, with the stop token if one was drawn: training needs it.
        logprobs: Log-probability of each drawn token under the model itself (temperature 1, no
            filters), in nats and float32.
        finish: ``stop`` if a stop token or string ended it, ``length`` if there was no more room.
        text: The reply as text, without stop token or stop string.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    text: str


class Reply:
    """A reply in the making: gathers tokens and text, and knows when to stop.

    Args:
        prompt: Token ids of the prompt.
        limit: The most tokens to draw.
        stopping: What else ends it.
        tokenizer: Turns tokens into text.
        key: Seed, number of the prompt, number of the sample: they alone decide the draws.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        stopping: Stopping,
        tokenizer: Tokenizer,
        key: tuple[int, int, int],
    ) -> None:
        self.prompt = prompt
        self.limit = limit
        self.key = key
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish: Literal["stop", "length"] | None = None if limit else "length"
        self._stop_ids = stopping.token_ids
        self._decoder = StreamDecoder(tokenizer)
        self._scanner = StopScanner(stopping.strings)

    def uniforms(self) -> np.ndarray:
        """The random numbers of this reply, one a token ``(limit,)``, float32 in [0, 1)."""
        bits = np.random.Philox(np.random.SeedSequence(self.key))
        return np.random.Generator(bits).random(self.limit, dtype=np.float32)

    def add(self, token: int, logprob: float) -> None:
        """Take in the next drawn token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self._stop_ids:
            self.finish = "stop"
        else:
            self.text += self._scanner.push(self._decoder.push(token))
            if self._scanner.found:
                self.finish = "stop"
            elif len(self.ids) == self.limit:
                self.finish = "length"
        if self.finish:
            self.text += self._scanner.push(self._decoder.flush()) + self._scanner.flush()

    def completed(self) -> Completion:
        """The finished reply."""
        assert self.finish is not None
        return Completion(self.ids, self.logprobs, self.finish, self.text)


class Engine:
    """Generates text with a model; the model's weights and training mode stay as they are.

    Args:
        model: Runs in its own precision, on its own device.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path) -> Engine:
        """An engine for a checkpoint directory, on the GPU if there is one.

        Raises:
            UserError: The directory holds no language model, or one with another tokenizer.
        """
        model, tokenizer = load_causal_lm(directory), Tokenizer.load(directory)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model's"
                f" vocab_size is {model.config.vocab_size}",
                "Put the tokenizer that the model was trained with there.",
            )
        return cls(model.to(default_device()), tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stopping: Stopping,
        *,
        samples: int = 1,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: Token ids, one list a prompt.
            sampling: How tokens are chosen.
            stopping: When replies end. A reply that the context has no room for ends earlier.
            samples: Replies to each prompt.
            seed: Replies are a function of the seed, the prompt's number and the sample's; the
                batch size plays no part (up to rounding).
            numbers: The prompts' numbers; their places in ``prompts`` by default.
            batch_size: The most replies to write side by side.
            progress: Called as ``progress(done, total)`` after every batch of replies.

        Returns:
            ``samples`` completions a prompt: prompt ``i``, sample ``j`` stands at
            ``i * samples + j``.

        Raises:
            UserError: A prompt is empty or longer than the context; ``samples`` or ``seed`` is
                out of range.
        """
        if samples < 1:
            raise UserError(f"samples is {samples}", "Choose 1 or more.")
        numbers = range(len(prompts)) if numbers is None else numbers
        replies = [
            self._open(prompt, stopping, (seed, number, j))
            for number, prompt in zip(numbers, prompts, strict=True)
            for j in range(samples)
        ]
        # Neighbours of like length need little padding; the longest come first, so that a lack
        # of memory shows at once. The sort is stable: samples of a prompt stay together.
        waiting = sorted((r for r in replies if not r.finish), key=lambda r: -len(r.prompt))
        for first in range(0, len(waiting), batch_size):
            for _ in self._write(waiting[first : first + batch_size], sampling):
                pass
            if progress:
                progress(sum(reply.finish is not None for reply in replies), len(replies))
        return [reply.completed() for reply in replies]

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, stopping: Stopping, seed: int = 0
    ) -> Iterator[str]:
        """Complete one prompt and hand its text out as it comes.

        The pieces hold complete characters only, and never a part of a stop string. Joined, they
        are the ``text`` that ``generate`` gives for the same prompt and seed.

        Args:
            prompt: Token ids.
            sampling: How tokens are chosen.
            stopping: When the reply ends.
            seed: Decides the draws.

        Raises:
            UserError: The prompt is empty or longer than the context (raised at the call).
        """
        reply = self._open(prompt, stopping, (seed, 0, 0))
        return self._pieces(reply, sampling)

    def _pieces(self, reply: Reply, sampling: Sampling) -> Iterator[str]:
        shown = 0
        for _ in self._write([reply] if not reply.finish else [], sampling):
            if len(reply.text) > shown:
                yield reply.text[shown:]
                shown = len(reply.text)

    def _open(self, prompt: Sequence[int], stopping: Stopping, key: tuple[int, int, int]) -> Reply:
        """Check a prompt and begin its reply."""
        context = self.model.config.max_position_embeddings
        if key[0] < 0:
            raise UserError(f"seed is {key[0]}", "Choose 0 or more.")
        if not len(prompt):
            raise UserError(f"prompt {key[1]} is empty", "Give it at least one token.")
        if len(prompt) > context:
            raise UserError(
                f"prompt {key[1]} has {len(prompt)} tokens, and the context of the model"
                f" (max_position_embeddings) is {context}",
                "Shorten the prompt.",
            )
        limit = min(stopping.max_new_tokens, context - len(prompt))
        return Reply(prompt, limit, stopping, self.tokenizer, key)

    def _write(self, replies: list[Reply], sampling: Sampling) -> Iterator[None]:
        """Write a batch of replies to their ends; comes up for air after every token."""
        if not replies:
            return
        with _thinking(self.model):
            batch = _Batch(self.model, replies, sampling, self.tokenizer.pad_id)
        while True:
            with _thinking(self.model):
                batch.draw()
            yield  # outside of `_thinking`: the consumer keeps its gradients and training mode
            if all(reply.finish for reply in batch.replies):
                return
            with _thinking(self.model):
                batch.compact()
                batch.advance()


@contextmanager
def _thinking(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients, for a while.

    Not ``inference_mode``: its tensors could not be used in training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Batch:
    """Replies that are written side by side, one row each.

    Args:
        model: In evaluation mode.
        replies: None of them finished.
        sampling: How tokens are chosen.
        pad_id: Fills the left end of short prompts; it is never attended to.

    Attributes:
        replies: The replies of the rows.
    """

    def __init__(
        self, model: CausalLM, replies: list[Reply], sampling: Sampling, pad_id: int
    ) -> None:
        self.model, self.replies, self.sampling = model, replies, sampling
        self.step = 0
        weight = next(model.parameters())
        device = weight.device
        # Samples of one prompt have equal keys but for the last part; they share a prefill.
        prompts = {reply.key[1]: reply.prompt for reply in replies}
        row_of = {number: row for row, number in enumerate(prompts)}
        longest = max(len(prompt) for prompt in prompts.values())
        padding = [longest - len(prompt) for prompt in prompts.values()]
        ids = [[pad_id] * n + list(p) for n, p in zip(padding, prompts.values(), strict=True)]
        steps = max(reply.limit for reply in replies)
        # The last token is drawn but never read, hence one column less.
        capacity = longest + steps - 1
        start = torch.tensor(padding, device=device)
        self.cache = KVCache(model.config, start, capacity, weight.dtype)
        logits = self._read(torch.tensor(ids, device=device))
        rows = torch.tensor([row_of[reply.key[1]] for reply in replies], device=device)
        if len(prompts) < len(replies):
            self.cache = self.cache.rows(rows)
        self.logits = logits[rows]
        uniforms = np.zeros((len(replies), steps), dtype=np.float32)
        for row, reply in zip(uniforms, replies, strict=True):
            if not sampling.greedy:
                row[: reply.limit] = reply.uniforms()
        self.uniforms = torch.from_numpy(uniforms).to(device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(self.logits.shape, dtype=torch.bool, device=device)
            for row, reply in zip(self.seen, replies, strict=True):
                row[list(reply.prompt)] = True

    def draw(self) -> None:
        """Choose the next token of every row and give it to its reply."""
        warped = warp(self.logits, self.sampling, self.seen)
        if self.sampling.greedy:
            self.drawn = warped.argmax(dim=-1)
        else:
            self.drawn = draw(warped, self.uniforms[:, self.step])
        if self.seen is not None:
            self.seen.scatter_(1, self.drawn[:, None], True)
        chosen = self.logits.gather(1, self.drawn[:, None]).squeeze(1)
        logprobs = (chosen - self.logits.logsumexp(dim=-1)).tolist()
        if any(logprob != logprob for logprob in logprobs):
            raise UserError(
                "the model's logits are not numbers (NaN)",
                "Its training diverged or its file is damaged; use an earlier checkpoint.",
            )
        for reply, token, logprob in zip(self.replies, self.drawn.tolist(), logprobs, strict=True):
            if not reply.finish:
                reply.add(token, logprob)
        self.step += 1

    def compact(self) -> None:
        """Drop the finished rows if there are enough of them."""
        rows = [i for i, reply in enumerate(self.replies) if not reply.finish]
        if len(rows) > COMPACT_BELOW * len(self.replies):
            return
        index = torch.tensor(rows, device=self.drawn.device)
        self.cache = self.cache.rows(index)
        self.replies = [self.replies[i] for i in rows]
        self.drawn, self.uniforms = self.drawn[index], self.uniforms[index]
        if self.seen is not None:
            self.seen = self.seen[index]

    def advance(self) -> None:
        """Read the drawn tokens: one step of the model."""
        self.logits = self._read(self.drawn[:, None])

    def _read(self, ids: Tensor) -> Tensor:
        """Logits after the last of the ids ``(B, V)``."""

        def last(hidden: Tensor) -> Tensor:
            return self.model.lm_head(hidden[:, -1]).float()

        return self.model.read(last, ids, cache=self.cache)
