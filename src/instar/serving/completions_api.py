"""``POST /v1/completions``: a text goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from instar.generation.scoring import score
from instar.serving.asking import (
    ERRORS,
    Answering,
    Here,
    Server,
    aside,
    constraint_of,
    count_step,
    finished,
    given,
    reply_limit,
    stopping_of,
    unless_gone,
    wishes,
)
from instar.serving.errors import ApiError, later
from instar.serving.events import MEDIA_TYPE, EventStream
from instar.serving.openai_replies import TextReply
from instar.serving.openai_types import MOST_CHOICES, CompletionRequest
from instar.serving.screening import ScreenedText, screen_prompt
from instar.serving.token_words import TextTokens, text_logprobs
from instar.serving.worker import Step, unwritten
from instar.tokenizer.hf import Tokenizer

router = APIRouter()


@dataclass
class Asked(Answering):
    """A request that is being answered.

    Attributes:
        prompts: Token ids; each has as many replies as there are samples.
        scored: Whether the prompts' own log-probabilities are told.
        echoes: What each reply begins with.
        screens: One for each reply.
        tokens: Tell the log-probabilities of each reply.
    """

    request: CompletionRequest
    prompts: list[list[int]]
    scored: bool
    echoes: list[str]
    screens: list[ScreenedText]
    tokens: list[TextTokens]

    def choice(self, step: Step) -> dict[str, Any]:
        """What is new of a reply."""
        screen, i = self.screens[step.index], step.index
        text = screen.push(step.text, step.finish is not None)
        logprobs = None
        # A filter holds text back: its tokens must not come out beside it.
        if self.request.logprobs is not None and not self.server.screen:
            logprobs = self.tokens[i].push(step.ids, step.logprobs, step.top_logprobs)
        count_step(self.server, self.model, step)
        why = None
        if step.finish:
            why = "stop" if step.finish == "stop" else "length"
            why = "content_filter" if screen.stopped else why
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": why}


@router.post(
    "/v1/completions",
    response_model=TextReply,
    responses={**ERRORS, 200: {"content": {MEDIA_TYPE: {}}}},
)
async def complete(request: CompletionRequest, http: Request, server: Here) -> Response:
    """Go on with a text."""
    asked = await _begin(request, server)
    if request.stream:
        return EventStream(_chunks(asked))
    body = await unless_gone(http.receive, _whole(asked))
    return JSONResponse(body) if body else Response(status_code=499)


async def _begin(request: CompletionRequest, server: Server) -> Asked:
    """Check a request, and hand it to the worker."""
    model = server.find(request.model)
    tokenizer = model.tokenizer
    samples = given(request.n, 1)

    def ready() -> tuple[list[list[int]], list[Any]]:
        prompts = _prompts(request, tokenizer)
        if not 1 <= len(prompts) * samples <= MOST_CHOICES:
            count = len(prompts) * samples
            raise ApiError(
                400, f"{count} replies are asked for; from 1 to {MOST_CHOICES} can be", "too_many"
            )
        wanted = request.max_tokens
        limits = [reply_limit(server, model, prompt, wanted, "prompt") for prompt in prompts]
        if server.screen:
            screen_prompt(server.screen, [tokenizer.decode(prompt) for prompt in prompts])
        if wanted == 0:
            return prompts, []
        ends = frozenset({tokenizer.eos_id})
        stoppings = [stopping_of(request, ends, limit) for limit in limits]
        return prompts, wishes(
            server,
            model,
            request,
            list(zip(prompts, stoppings, strict=True)),
            lambda room: constraint_of(request.response_format, model, room),
            given(request.logprobs, 0),
        )

    prompts, asked_for = await aside(ready)
    echoes = [tokenizer.decode(prompt) if request.echo else "" for prompt in prompts]
    echoes = [echo for echo in echoes for _ in range(samples)]
    screens = [ScreenedText(server.screen) for _ in echoes]
    # A filter holds text back: its tokens must not come out beside it.
    scored = bool(request.echo) and request.logprobs is not None and not server.screen
    # Behind a prompt's tokens stand all of the reply's: some count them from the end.
    hidden = frozenset() if scored else model.stops.union(request.stop_token_ids or ())
    tokens = [TextTokens(tokenizer, hidden, len(echo)) for echo in echoes]
    if asked_for:
        writing = await server.worker.write(model.engine, asked_for, bool(request.stream))
    else:
        writing = unwritten(len(echoes))
    count = sum(map(len, prompts))
    server.metrics.tokens.labels(model.name, "prompt").inc(count)
    return Asked(server, model, writing, count, request, prompts, scored, echoes, screens, tokens)


async def _heads(asked: Asked) -> list[dict[str, Any] | None]:
    """The log-probabilities of every reply's prompt, where they are told.

    Raises:
        ApiError: The time was over before all prompts were read.
    """
    if not asked.scored:
        return [None for _ in asked.echoes]
    server, model = asked.server, asked.model
    heads = list[dict[str, Any] | None]()
    try:
        async with asyncio.timeout(server.bounds.timeout_s):
            for prompt in asked.prompts:
                top = given(asked.request.logprobs, 0)
                read = partial(score, model.engine.model, prompt, model.adapter, top)
                async with server.scoring:
                    scores = await server.worker.between(read)
                head = text_logprobs(model.tokenizer, prompt, scores)
                heads += [head] * given(asked.request.n, 1)
    except TimeoutError:
        raise later("the prompts were not read in time", "timeout", 5, status=503) from None
    return heads


def _prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt; a text is the beginning of a document."""
    prompt = request.prompt
    # A list of texts or of lists is many prompts; anything else is one.
    many = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    every: list[Any] = list(prompt[: MOST_CHOICES + 1]) if many else [prompt]
    found = list[list[int]]()
    for each in every:
        ids = [*tokenizer.before, *tokenizer.encode(each)] if isinstance(each, str) else each
        if any(id >= tokenizer.vocab_size for id in ids):
            raise ApiError(
                400, f"a token id is not below {tokenizer.vocab_size}", "invalid_value", "prompt"
            )
        found.append(ids or [tokenizer.start_id])
    return found


async def _whole(asked: Asked) -> dict[str, Any]:
    """The answer in one piece."""
    try:
        heads = await _heads(asked)
        steps = await finished(asked.server, asked.writing)
    finally:
        asked.server.worker.close(asked.writing)
    choices = [await asked.screened(partial(asked.choice, step)) for step in steps]
    for choice, echo, head in zip(choices, asked.echoes, heads, strict=True):
        choice["text"] = echo + choice["text"]
        if head:
            tail = choice["logprobs"]
            choice["logprobs"] = {
                key: told if told is None else told + (tail[key] or [])
                for key, told in head.items()
            }
    usage = asked.usage(sum(len(step.ids) for step in steps))
    return {**asked.frame("cmpl", "text_completion"), "choices": choices, "usage": usage}


async def _chunks(asked: Asked) -> AsyncGenerator[dict[str, Any]]:
    """The answer piece by piece."""
    frame = asked.frame("cmpl", "text_completion")
    options = asked.request.stream_options
    written = 0
    try:
        heads = await _heads(asked)
        for index, (echo, head) in enumerate(zip(asked.echoes, heads, strict=True)):
            if echo:
                choice = {"index": index, "text": echo, "logprobs": head, "finish_reason": None}
                yield {**frame, "choices": [choice]}
        async for step in asked.writing.steps():
            written += len(step.ids)
            choice = await asked.screened(partial(asked.choice, step))
            yield {**frame, "choices": [choice]}
            asked.cut(step, asked.screens[step.index].stopped)
        if options is not None and options.include_usage:
            yield {**frame, "choices": [], "usage": asked.usage(written)}
    finally:
        asked.server.worker.close(asked.writing)
        for screen in asked.screens:
            screen.close()
