"""Many requests in, many replies out: prompts are read once, then one step for each token.

Replies are written side by side, and come and go as they please. What a reply says never depends
on its neighbours: each has a row of its own, and draws with random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from instar.adapters.base import check_loaded
from instar.adapters.opening import load_causal_lm, load_tokenizer
from instar.distributed import default_device
from instar.errors import UserError
from instar.generation.body import fits
from instar.generation.desk import Desk
from instar.generation.products import Format
from instar.generation.reading import LeanReader, ModelReader, Reader
from instar.generation.reply import Completion, Reply
from instar.generation.request import Request
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.machine import has_fast_bfloat16
from instar.model.transformer import CausalLM
from instar.tokenizer.hf import Tokenizer

BUDGET = 512
"""Tokens of prompts that a step of a server reads at most, so that replies at work do not stall."""


Precision = Literal["auto", "float32", "bfloat16", "int8"]


class Engine:
    """Generates text with a model; the model's weights and training mode stay as they are.

    ``submit`` and ``step`` are for who serves: requests come and go. ``generate`` and ``stream``
    are for who waits. One thread owns an engine.

    A reply for which the context has no more room ends with ``length``; nothing is ever dropped
    from the context to make room.

    Args:
        model: Runs in its own precision, on its own device.
        tokenizer: The model's tokenizer.
        precision: Format of the matrices while writing. ``float32`` differs from the model by
            rounding alone; ``auto`` is bfloat16 where that is faster; ``int8`` rounds the weights
            to eight bits, and what they multiply to eight or sixteen, and takes the fewest bytes.
            A model that is more than a plain decoder (adapters, experts, windows, GPT-2) runs as
            it is.
        slots: The most replies that ``step`` writes side by side.
        cache_bytes: The most memory for their keys and values; without a limit by default. Fewer
            replies are written side by side where they are long, the others wait.

    Raises:
        UserError: ``precision`` is none of these, or a number is out of range.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        precision: Precision = "float32",
        slots: int = 64,
        cache_bytes: int | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("cache_bytes", cache_bytes)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", "Choose 1 or more.")
        if precision not in get_args(Precision):
            allowed = ", ".join(get_args(Precision))
            raise UserError(f"precision is {precision!r}", f"Choose one of {allowed}.")
        self.model = model
        self.tokenizer = tokenizer
        self.slots, self.cache_bytes = slots, cache_bytes
        self.precision: Precision = precision
        self._reader: Reader | None = None
        self._desk: Desk | None = None

    @classmethod
    def load(cls, directory: Path, precision: Precision = "float32") -> Engine:
        """An engine for a checkpoint directory, on the GPU if there is one.

        Raises:
            UserError: The directory holds no language model, or one with another tokenizer.
        """
        model, tokenizer = load_causal_lm(directory), load_tokenizer(directory)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model's"
                f" vocab_size is {model.config.vocab_size}",
                "Put the tokenizer that the model was trained with there.",
            )
        return cls(model.to(default_device()), tokenizer, precision=precision)

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing is at work."""
        return self._desk is None or self._desk.idle

    def submit(self, request: Request) -> Reply:
        """Queue a request; ``step`` answers it.

        Raises:
            UserError: Its prompt is empty or longer than the context, prompt and reply may become
                longer than there is memory for, it asks for an adapter that is not loaded, or one
                of its numbers is out of range.
        """
        reply = self._open(request)
        if self._desk is None or self._desk.idle:
            self._look()
            if self._desk is None or self._desk.reader is not self._reader:
                self._desk = self._new_desk(
                    self.slots, budget=BUDGET, retains=True, cache_bytes=self.cache_bytes
                )
        if not reply.finish:
            self._desk.take(reply)
        return reply

    def step(self) -> None:
        """Admit waiting requests into free slots, then one token for everyone at work."""
        if self._desk is not None:
            self._desk.step()

    def cancel(self, reply: Reply) -> None:
        """End a reply; its slot is free at the next step."""
        reply.end("cancelled")

    def prepare(self) -> None:
        """Take up the weights now, for which the first request would else have to wait."""
        self._look()
        assert self._reader is not None
        self._reader.refresh()

    def rest(self) -> None:
        """Give back what memory is held between requests: copies of weights, and rows.

        What is at work or waits is dropped. The next request takes it all up again.
        """
        self._reader = self._desk = None

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
            progress: Called as ``progress(done, total)`` whenever replies are done.

        Returns:
            ``samples`` completions a prompt: prompt ``i``, sample ``j`` stands at
            ``i * samples + j``.

        Raises:
            UserError: A prompt is empty or longer than the context; ``samples`` or ``seed`` is
                out of range; the model's logits are not numbers.
        """
        if samples < 1:
            raise UserError(f"samples is {samples}", "Choose 1 or more.")
        numbers = range(len(prompts)) if numbers is None else numbers
        replies = [
            self._open(Request(prompt, sampling, stopping, (seed, number, j)))
            for number, prompt in zip(numbers, prompts, strict=True)
            for j in range(samples)
        ]
        self._answer(replies, batch_size, progress)
        return [reply.completed() for reply in replies]

    def _answer(
        self, replies: list[Reply], batch_size: int, progress: Callable[[int, int], None] | None
    ) -> None:
        """Write replies to their ends, at a desk of their own."""
        # Neighbours of like length need little padding; the longest come first, so that a lack
        # of memory shows at once. The sort is stable: samples of a prompt stay together.
        waiting = [reply for reply in replies if not reply.finish]
        waiting.sort(key=lambda reply: -len(reply.request.prompt))
        self._look()
        rows = max(1, min(batch_size, len(waiting)))
        desk = self._new_desk(rows, patience=max(1, rows // 8))
        desk.waiting.extend(waiting)
        desk.columns = max((reply.columns for reply in waiting), default=0)
        done = 0
        while not desk.idle:
            desk.step()
            now = sum(reply.finish is not None for reply in replies)
            if progress and now > done:
                progress(now, len(replies))
            done = now

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
        return self._pieces(self.submit(Request(prompt, sampling, stopping, (seed, 0, 0))))

    def _pieces(self, reply: Reply) -> Iterator[str]:
        shown = 0
        try:
            while not reply.finish:
                self.step()
                if len(reply.text) > shown:
                    yield reply.text[shown:]
                    shown = len(reply.text)
            if reply.failure:
                raise reply.failure
        finally:
            self.cancel(reply)  # whoever stops listening frees the slot

    def _look(self) -> None:
        """Choose how the model is read: the fast way if it is of a kind that allows it.

        Adapters may have been put in, or merged, since the last time.
        """
        if not fits(self.model):
            if not isinstance(self._reader, ModelReader):
                self._reader = ModelReader(self.model)
        elif not isinstance(self._reader, LeanReader) or not self._reader.suits():
            device = next(self.model.parameters()).device
            self._reader = LeanReader(self.model, format_of(self.precision, device))

    def _new_desk(
        self,
        rows: int,
        budget: int | None = None,
        retains: bool = False,
        patience: int = 1,
        cache_bytes: int | None = None,
    ) -> Desk:
        assert self._reader is not None
        return Desk(
            self._reader,
            self.tokenizer.vocab_size,
            rows=rows,
            budget=budget,
            retains=retains,
            patience=patience,
            cache_bytes=cache_bytes,
        )

    def _open(self, request: Request) -> Reply:
        """Check a request and begin its reply."""
        context, (seed, number, _) = self.model.context, request.key
        if seed < 0:
            raise UserError(f"seed is {seed}", "Choose 0 or more.")
        if not len(request.prompt):
            raise UserError(f"prompt {number} is empty", "Give it at least one token.")
        if len(request.prompt) > context:
            raise UserError(
                f"prompt {number} has {len(request.prompt)} tokens, and the context of the model"
                f" (max_position_embeddings) is {context}",
                "Shorten the prompt.",
            )
        if request.top_logprobs < 0:
            raise UserError(f"top_logprobs is {request.top_logprobs}", "Choose 0 or more.")
        check_loaded(self.model, request.adapter)
        limit = min(request.stopping.max_new_tokens, context - len(request.prompt))
        return Reply(request, limit, self.tokenizer)


def format_of(precision: Precision, device: torch.device) -> Format:
    """The format of the matrices; a machine is only asked where the user leaves it open."""
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision
