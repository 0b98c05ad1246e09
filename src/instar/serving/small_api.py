"""The small endpoints: which models there are, tokens, health, counters, and a plain chat."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from instar.serving.asking import ERRORS, Here, aside, unless_gone
from instar.serving.chat_api import begin, whole
from instar.serving.chat_turns import turns
from instar.serving.errors import ApiError
from instar.serving.metrics import CONTENT_TYPE
from instar.serving.openai_replies import Health, ModelCard, ModelList, PlainReply, Text, Tokens
from instar.serving.openai_types import (
    ChatRequest,
    DetokenizeRequest,
    PlainChat,
    TokenizeRequest,
)
from instar.serving.served import Served
from instar.tokenizer.chat import prompt_ids

router = APIRouter(responses=ERRORS)


def _card(model: Served) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.context)


@router.get("/v1/models")
async def models(server: Here) -> ModelList:
    """All models that can be asked for."""
    return ModelList(data=[_card(model) for model in server.models])


@router.get("/v1/models/{name:path}")
async def model(name: str, server: Here) -> ModelCard:
    """One of them."""
    return _card(server.find(name))


@router.post("/tokenize")
async def tokenize(request: TokenizeRequest, server: Here) -> Tokens:
    """The tokens of a text, or of a conversation with the frame of its turns."""
    found = server.find(request.model)

    def ids() -> list[int]:
        if request.messages is None:
            whole = request.add_special_tokens is not False
            before = found.tokenizer.before if whole else ()
            return [*before, *found.tokenizer.encode(request.prompt or "")]
        settings = request.chat_template_kwargs or {}
        return prompt_ids(found.tokenizer, turns(request.messages), settings)

    tokens = await aside(ids)
    return Tokens(tokens=tokens, count=len(tokens), max_model_len=found.context)


@router.post("/detokenize")
async def detokenize(request: DetokenizeRequest, server: Here) -> Text:
    """The text of tokens, control tokens included."""
    tokenizer = server.find(request.model).tokenizer
    if any(id >= tokenizer.vocab_size for id in request.tokens):
        raise ApiError(
            400, f"a token id is not below {tokenizer.vocab_size}", "invalid_value", "tokens"
        )
    return Text(prompt=await aside(lambda: tokenizer.decode(request.tokens, skip_special=False)))


@router.get("/health")
async def health(server: Here) -> Health:
    """Whether the server can answer."""
    if not server.worker.alive:
        raise ApiError(503, "the engine's thread has ended; start the server again", "no_engine")
    return Health(status="ok", open_replies=server.worker.open)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Counters for Prometheus."}},
)
async def metrics(server: Here) -> Response:
    """The server's counters, as Prometheus reads them."""
    server.metrics.open.set(server.worker.open)
    return Response(server.metrics.page(), headers={"Content-Type": CONTENT_TYPE})


@router.post("/chat", response_model=PlainReply)
async def chat(request: PlainChat, http: Request, server: Here) -> Response:
    """One message, one answer: the simplest way to talk with the first model."""
    said = {"messages": [{"role": "user", "content": request.message}]}
    settings = {"max_tokens": request.max_length, "temperature": request.temperature}
    asked = await begin(ChatRequest.model_validate({**said, **settings}), server, "message")
    body = await unless_gone(http.receive, whole(asked))
    if body is None:
        return Response(status_code=499)
    return JSONResponse(PlainReply(response=body["choices"][0]["message"]["content"]).model_dump())
