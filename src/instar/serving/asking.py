"""From what a client sent to what the engine is asked: the part that all endpoints share."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.types import Receive

from instar.errors import UserError
from instar.generation import Sampling, Stopping
from instar.generation.request import Request as Wish
from instar.serving.errors import ApiError, ErrorReply
from instar.serving.grammar import Grammar
from instar.serving.metrics import Metrics
from instar.serving.openai_types import AnyObject, OfRegex, OfSchema, Sampled, biases, given
from instar.serving.reasoning import Form
from instar.serving.safety import Filter
from instar.serving.served import Served
from instar.serving.worker import Step, Worker, Writing

T = TypeVar("T")

LEAST_TOP_P = 1e-9
"""Stands for a ``top_p`` of 0: the likeliest token alone reaches it, whatever the vocabulary."""


@dataclass(frozen=True)
class Bounds:
    """How much one request may ask for.

    Attributes:
        usual_tokens: The most tokens of a reply, where the request does not say.
        most_tokens: The most tokens of a reply, whatever the request says.
        timeout_s: Seconds that a request may take, with the waiting.
    """

    usual_tokens: int = 512
    most_tokens: int = 4096
    timeout_s: float = 300.0


@dataclass
class Server:
    """What every endpoint needs.

    Attributes:
        models: What can be asked for; the first one is meant where a request names none.
        worker: Writes.
        bounds: How much may be asked for.
        screen: Reads what is asked and answered, if there is one.
        metrics: Counts.
        scoring: Held while a prompt is scored, so that between two of them replies get a step.
    """

    models: Sequence[Served]
    worker: Worker
    bounds: Bounds = field(default_factory=Bounds)
    screen: Filter | None = None
    metrics: Metrics = field(default_factory=Metrics)
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, name: str | None) -> Served:
        """The model of a name; raises ``ApiError``."""
        if name is None:
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models)
        raise ApiError(
            404, f"there is no model {name!r}. Served: {known}.", "model_not_found", "model"
        )


def _server(request: Request) -> Server:
    return request.app.state.server


Here = Annotated[Server, Depends(_server)]
"""An endpoint's server."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": what}
    for status, what in (
        (400, "The request cannot be answered as it is."),
        (401, "The API key is missing or wrong."),
        (403, "A web page of another origin may not ask."),
        (404, "There is no such model."),
        (408, "The body did not arrive in time."),
        (413, "The body is too large."),
        (429, "Too many requests, or too many replies are waiting."),
        (503, "The reply's turn did not come in time."),
    )
}
"""Answers that the API's description lists for every endpoint."""


def reply_limit(
    server: Server, model: Served, prompt: Sequence[int], wanted: int | None, field: str
) -> int:
    """The most tokens of a reply to a prompt.

    Args:
        server: Bounds replies.
        model: Has a context.
        prompt: Token ids.
        wanted: The most that the request asks for, if it says; for none no room is needed.
        field: The request's field that the prompt comes from.

    Raises:
        ApiError: The prompt leaves no room for one.
    """
    room = model.context - len(prompt)
    least = 0 if wanted == 0 else 1
    if room < least:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, and the model's context is {model.context} for "
            "prompt and reply together. Shorten the prompt.",
            "context_length_exceeded",
            field,
        )
    bounds = server.bounds
    return min(room, bounds.most_tokens, given(wanted, bounds.usual_tokens))


def sampling_of(request: Sampled, model: Served) -> Sampling:
    """How a request's tokens are chosen; raises ``ApiError``."""
    try:
        bias = biases(request, model.tokenizer.vocab_size)
    except ValueError as error:
        raise ApiError(400, f"logit_bias: {error}", "invalid_value", "logit_bias") from None
    return Sampling(
        temperature=given(request.temperature, 1.0),
        top_k=max(0, given(request.top_k, 0)),
        top_p=max(LEAST_TOP_P, given(request.top_p, 1.0)),
        min_p=given(request.min_p, 0.0),
        repetition_penalty=given(request.repetition_penalty, 1.0),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        logit_bias=bias,
    )


def stopping_of(request: Sampled, ends: frozenset[int], limit: int) -> Stopping:
    """When a request's replies end."""
    ends = frozenset() if request.ignore_eos else ends
    stop = given(request.stop, [])
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    return Stopping(ends.union(request.stop_token_ids or ()), strings, limit)


def constraint_of(
    response_format: object, model: Served, limit: int, call: Mapping[str, Any] | None = None
) -> Grammar | None:
    """A fresh constraint; raises ``UserError`` where the grammar cannot be used.

    Args:
        response_format: The request's.
        model: Whose tokens are constrained.
        limit: The most tokens that a reply to the request has room for.
        call: The schema of a call that the reply must be.
    """
    if call is not None:
        return model.vocabulary.call(call, limit)
    if isinstance(response_format, OfSchema):
        return model.vocabulary.json_schema(response_format.json_schema.schema_, limit)
    if isinstance(response_format, AnyObject):
        return model.vocabulary.json_schema({"type": "object"}, limit)
    if isinstance(response_format, OfRegex):
        return model.vocabulary.regex(response_format.pattern, limit)
    return None


def wishes(
    server: Server,
    model: Served,
    request: Sampled,
    prompts: Sequence[tuple[Sequence[int], Stopping]],
    constrain: Callable[[int], Form | None],
    top_logprobs: int,
) -> list[Wish]:
    """What the engine is asked: ``n`` replies to every prompt, those of one prompt together."""
    grammar = constrain(max(stopping.max_new_tokens for _, stopping in prompts))
    seed = secrets.randbits(62) if request.seed is None else request.seed % (1 << 63)
    sampling = sampling_of(request, model)
    deadline_s = time.perf_counter() + server.bounds.timeout_s
    return [
        Wish(
            prompt,
            sampling,
            stopping,
            (seed, number, sample),
            top_logprobs,
            grammar and grammar.fork(stopping.max_new_tokens),
            model.adapter,
            deadline_s,
        )
        for number, (prompt, stopping) in enumerate(prompts)
        for sample in range(given(request.n, 1))
    ]


async def aside(work: Callable[[], T]) -> T:
    """Do what takes a while, such as cutting a long text into tokens, beside the event loop."""
    try:
        return await asyncio.to_thread(work)
    except RecursionError:
        raise ApiError(400, "something in the request is nested too deeply", "too_deep") from None
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value") from None


async def unless_gone(receive: Receive, answer: Awaitable[T]) -> T | None:
    """An answer, or None as soon as the client has left: the work for it is cancelled then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    writing, watching = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
        return writing.result() if writing.done() else None
    finally:
        for task in (writing, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


@dataclass
class Answering:
    """A request that is being answered.

    Attributes:
        prompt_tokens: Of all its prompts together.
    """

    server: Server
    model: Served
    writing: Writing
    prompt_tokens: int

    def frame(self, prefix: str, kind: str) -> dict[str, Any]:
        """The fields that whole answers and chunks begin with.

        Args:
            prefix: What its id begins with.
            kind: OpenAI's name for what it is.
        """
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model.name,
        }

    async def screened(self, work: Callable[[], T]) -> T:
        """Do what reads a reply: a filter may need a while, and does it beside the event loop."""
        return await aside(work) if self.server.screen else work()

    def cut(self, step: Step, done: bool) -> None:
        """A reply of which nothing more would be told need not be written to its end."""
        if done and not step.finish:
            self.server.worker.cancel(self.writing, step.index)

    def usage(self, written: int) -> dict[str, int]:
        """Tokens read and written."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }


async def finished(server: Server, writing: Writing) -> list[Step]:
    """The last step of every reply, in order; raises as ``Writing.steps``."""
    last = dict[int, Step]()
    try:
        async for step in writing.steps():
            last[step.index] = step
    finally:
        server.worker.close(writing)
    return [last[index] for index in range(writing.replies)]


def count_step(server: Server, model: Served, step: Step) -> None:
    """Note what is new of a reply."""
    server.metrics.tokens.labels(model.name, "completion").inc(len(step.ids))
    if step.waited_s is not None:
        server.metrics.first_token_s.labels(model.name).observe(step.waited_s)
    if step.finish:
        server.metrics.replies.labels(model.name, step.finish).inc()
