"""``POST /v1/completions``: a text goes on."""

from __future__ import annotations

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
from instar.serving.errors import ApiError
from instar.serving.events import MEDIA_TYPE, EventStream
from instar.serving.openai_replies import TextReply
from instar.serving.openai_types import MOST_CHOICES, CompletionRequest
from instar.serving.screening import ScreenedText, screen_prompt
from instar.serving.served import Served
from instar.serving.token_words import TextTokens, text_logprobs
from instar.serving.worker import Step, unwritten
from instar.tokenizer.hf import Tokenizer

router = APIRouter()


@dataclass
class Asked(Answering):
    """A request that is being answered.

    Attributes:
        echoes: What each reply begins with.
        screens: One for each reply.
        tokens: Tell the log-probabilities of each reply.
        heads: Those of the prompts that are echoed, one for each reply.
    """

    request: CompletionRequest
    echoes: list[str]
    screens: list[ScreenedText]
    tokens: list[TextTokens]
    heads: list[dict[str, Any] | None]

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
    heads = [await _head(request, server, model, p) for p in prompts for _ in range(samples)]
    if asked_for:
        writing = await server.worker.write(model.engine, asked_for, bool(request.stream))
    else:
        writing = unwritten(len(heads))
    count = sum(map(len, prompts))
    server.metrics.tokens.labels(model.name, "prompt").inc(count)
    echoes = [tokenizer.decode(prompt) if request.echo else "" for prompt in prompts]
    echoes = [echo for echo in echoes for _ in range(samples)]
    screens = [ScreenedText(server.screen) for _ in echoes]
    # Behind a prompt's tokens stand all of the reply's: some count them from the end.
    hidden = frozenset() if heads[0] else model.stops
    tokens = [TextTokens(tokenizer, hidden, len(echo)) for echo in echoes]
    return Asked(server, model, writing, count, request, echoes, screens, tokens, heads)


async def _head(
    request: CompletionRequest, server: Server, model: Served, prompt: list[int]
) -> dict[str, Any] | None:
    """The log-probabilities of a prompt, where it is echoed with them; none beside a filter."""
    if not request.echo or request.logprobs is None or server.screen:
        return None
    read = partial(score, model.engine.model, prompt, model.adapter, request.logprobs)
    return text_logprobs(model.tokenizer, prompt, await server.worker.between(read))


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
    steps = await finished(asked.server, asked.writing)
    choices = [await asked.screened(partial(asked.choice, step)) for step in steps]
    for choice, echo, head in zip(choices, asked.echoes, asked.heads, strict=True):
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
        for index, (echo, head) in enumerate(zip(asked.echoes, asked.heads, strict=True)):
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
