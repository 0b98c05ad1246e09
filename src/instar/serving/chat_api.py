"""``POST /v1/chat/completions``: a conversation goes on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

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
from instar.serving.chat_turns import must_call, offered_tools, turns
from instar.serving.events import MEDIA_TYPE, EventStream
from instar.serving.grammar import Grammar
from instar.serving.openai_replies import ChatReply
from instar.serving.openai_types import ChatRequest
from instar.serving.reasoning import Form, Thinking, begun, behind_thought
from instar.serving.screening import ScreenedText, screen_turns
from instar.serving.token_words import chat_logprobs
from instar.serving.tools import Call, CallParser
from instar.serving.worker import Step
from instar.tokenizer.chat import prompt_ids

router = APIRouter()


@dataclass
class Said:
    """What is new of a reply: thought, said, and asked for."""

    thought: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()

    def add(self, content: str, calls: Sequence[Call] = ()) -> None:
        """Words and calls that come next."""
        self.content += content
        self.calls += tuple(calls)


class Speaker:
    """Sorts one reply's text into thoughts, words and calls of functions.

    Args:
        thinks: Whether the prompt has opened the thinking already; None where the reply has a form
            from its first token on, which leaves no room for thoughts.
        parser: Looks for calls, if there are functions to call.
        screened: Holds back what a filter stops.

    Attributes:
        begun: Whether a stream has told of the reply.
        called: How many functions it asks to have called.
    """

    def __init__(
        self, thinks: bool | None, parser: CallParser | None, screened: ScreenedText
    ) -> None:
        self._thinking = None if thinks is None else Thinking(thinks)
        self._parser = parser
        self.screened = screened
        self.begun, self.called = False, 0

    def push(self, text: str, last: bool) -> Said:
        """Sort the next piece; with the last one comes all that was held back."""
        said = Said()
        text = self.screened.push(text, last)
        pieces = [self._thinking.push(text) if self._thinking else ("", text)]
        if last and self._thinking:
            pieces.append(self._thinking.flush())
        for thought, answer in pieces:
            said.thought += thought
            said.add(*(self._parser.push(answer) if self._parser else (answer, ())))
        if last and self._parser:
            said.add(*self._parser.flush())
        self.called += len(said.calls)
        return said

    @property
    def done(self) -> bool:
        """Whether nothing of what may still come would be told."""
        return self.screened.stopped or (self._parser is not None and self._parser.done)

    def finish(self, why: str) -> str:
        """OpenAI's word for why the reply ended."""
        if self.screened.stopped:
            return "content_filter"
        if self.called and (why == "stop" or self.done):
            return "tool_calls"
        # Time is bounded like tokens, and OpenAI has no word for it.
        return "stop" if why == "stop" else "length"


@dataclass
class Asked(Answering):
    """A chat request that is being answered.

    Attributes:
        speakers: One for each reply.
    """

    request: ChatRequest
    speakers: list[Speaker]

    def logprobs(self, step: Step) -> dict[str, Any] | None:
        """The step's tokens, if asked for; none beside a filter, which holds text back."""
        if not self.request.logprobs or self.server.screen:
            return None
        hidden = self.model.stops.union(self.request.stop_token_ids or ())
        return chat_logprobs(self.model.tokenizer, step, hidden)


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses={**ERRORS, 200: {"content": {MEDIA_TYPE: {}}}},
)
async def chat(request: ChatRequest, http: Request, server: Here) -> Response:
    """Go on with a conversation."""
    asked = await begin(request, server)
    if request.stream:
        return EventStream(_chunks(asked))
    body = await unless_gone(http.receive, whole(asked))
    return JSONResponse(body) if body else Response(status_code=499)


async def begin(request: ChatRequest, server: Server, field: str = "messages") -> Asked:
    """Check a request, and hand it to the worker.

    Args:
        request: What is asked.
        server: Who is asked.
        field: Where the client put the conversation.

    Raises:
        ApiError: It cannot be answered.
    """
    model = server.find(request.model)
    offered = offered_tools(request)
    conversation = turns(request.messages, offered)

    def ready() -> tuple[list[int], list[Any]]:
        call = must_call(request)
        settings = request.chat_template_kwargs or {}
        prompt = prompt_ids(model.tokenizer, conversation, settings)
        wanted = given(request.max_completion_tokens, request.max_tokens)
        limit = reply_limit(server, model, prompt, wanted, field)
        screen_turns(server.screen, conversation)
        stopping = stopping_of(request, model.stops, limit)

        def constrained(room: int) -> Form | None:
            form = constraint_of(request.response_format, model, room, call)
            return form and behind_thought(form, model.tokenizer, prompt, room)

        return prompt, wishes(
            server,
            model,
            request,
            [(prompt, stopping)],
            constrained,
            given(request.top_logprobs, 0),
        )

    prompt, asked_for = await aside(ready)
    writing = await server.worker.write(model.engine, asked_for, bool(request.stream))
    server.metrics.tokens.labels(model.name, "prompt").inc(len(prompt))
    at_once = isinstance(asked_for[0].constraint, Grammar)
    thinks = None if at_once else begun(model.tokenizer, prompt)
    only_one = request.parallel_tool_calls is False

    def speaker() -> Speaker:
        parser = CallParser(only_one) if offered else None
        return Speaker(thinks, parser, ScreenedText(server.screen))

    speakers = [speaker() for _ in asked_for]
    return Asked(server, model, writing, len(prompt), request, speakers)


async def whole(asked: Asked) -> dict[str, Any]:
    """The answer in one piece; raises as ``Writing.steps``."""
    steps = await finished(asked.server, asked.writing)
    choices = []
    for speaker, step in zip(asked.speakers, steps, strict=True):
        count_step(asked.server, asked.model, step)
        said = await asked.screened(partial(speaker.push, step.text, last=True))
        message: dict[str, Any] = {"role": "assistant", "content": said.content}
        if said.thought:
            message["reasoning_content"] = said.thought
        if said.calls:
            message["tool_calls"] = [call.written() for call in said.calls]
            message["content"] = said.content.strip() or None
        choices.append(
            {
                "index": step.index,
                "message": message,
                "logprobs": asked.logprobs(step),
                "finish_reason": speaker.finish(step.finish or ""),
            }
        )
    usage = asked.usage(sum(len(step.ids) for step in steps))
    return {**asked.frame("chatcmpl", "chat.completion"), "choices": choices, "usage": usage}


async def _chunks(asked: Asked) -> AsyncGenerator[dict[str, Any]]:
    """The answer piece by piece."""
    frame = asked.frame("chatcmpl", "chat.completion.chunk")
    options = asked.request.stream_options
    counted = options is not None and options.include_usage
    if counted:
        frame["usage"] = None
    written = 0
    try:
        async for step in asked.writing.steps():
            written += len(step.ids)
            count_step(asked.server, asked.model, step)
            for chunk in await asked.screened(partial(_step_chunks, asked, frame, step)):
                yield chunk
            asked.cut(step, asked.speakers[step.index].done)
        if counted:
            yield {**frame, "choices": [], "usage": asked.usage(written)}
    finally:
        asked.server.worker.close(asked.writing)
        for speaker in asked.speakers:
            speaker.screened.close()


def _step_chunks(asked: Asked, frame: dict[str, Any], step: Step) -> list[dict[str, Any]]:
    """What one step of a reply adds to a stream."""
    speaker = asked.speakers[step.index]
    before = speaker.called
    said = speaker.push(step.text, last=step.finish is not None)
    delta: dict[str, Any] = {}
    if said.thought:
        delta["reasoning_content"] = said.thought
    if said.content:
        delta["content"] = said.content
    if said.calls:
        delta["tool_calls"] = [
            {"index": before + i, **call.written()} for i, call in enumerate(said.calls)
        ]
    chunks = []
    if not speaker.begun:  # not before there is something: some take it for the first token
        speaker.begun = True
        chunks.append(_chunk(frame, step.index, {"role": "assistant", "content": ""}))
    logprobs = asked.logprobs(step)
    if delta or logprobs:
        chunks.append(_chunk(frame, step.index, delta, logprobs))
    if step.finish:
        end = _chunk(frame, step.index, {})
        end["choices"][0]["finish_reason"] = speaker.finish(step.finish)
        chunks.append(end)
    return chunks


def _chunk(
    frame: dict[str, Any], index: int, delta: dict[str, Any], logprobs: Any = None
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
    return {**frame, "choices": [choice]}
