"""What clients send: OpenAI's words, and a few that other servers have added.

Fields that say nothing about the answer (``user``, ``metadata``, ...) are passed over; those that
would change it, and that nothing here does, are refused unless they ask for nothing: ``refused``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

from instar.serving import refused
from instar.tokenizer.template import RESERVED

MOST_CHOICES = 64
"""Replies to one request."""

INT64 = 2**63 - 1

Positive = Annotated[int, Field(ge=1, le=1 << 30)]
TokenId = Annotated[int, Field(ge=0, le=1 << 30)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16)] | None


class Wanted(BaseModel):
    """A record of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)


class StreamOptions(Wanted):
    """How a stream is written."""

    include_usage: bool = False
    """End with a chunk that counts the tokens."""


class Sampled(Wanted):
    """What every way of asking has: which model, how tokens are chosen, when the reply ends."""

    model: str | None = None
    """The model's name; the first one that is served without it."""
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    """Replies to each prompt."""
    stream: bool | None = False
    """Send the text as it is written, as server-sent events."""
    stream_options: StreamOptions | None = None
    """How a stream is written."""
    max_tokens: Positive | None = None
    """The most tokens of a reply."""
    temperature: float | None = Field(1.0, ge=0, le=2)
    """How bold the words are: 0 takes the likeliest."""
    top_p: float | None = Field(1.0, ge=0, le=1)
    """Choose among the likeliest tokens that together reach this probability; 0 is one token."""
    top_k: int | None = Field(0, ge=-1, le=1 << 30)
    """Choose among so many of the likeliest tokens; 0 and -1 are all."""
    min_p: float | None = Field(0.0, ge=0, le=1)
    """Leave out tokens that are less than this many times as likely as the likeliest."""
    repetition_penalty: float | None = Field(1.0, gt=0, le=10)
    """Above 1, tokens that already occurred become less likely."""
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    """Taken off a token's logit if the reply holds it already."""
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    """Taken off a token's logit for every time that the reply holds it."""
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    """Added to the logits of tokens, by their ids."""
    stop: Stop = None
    """The reply ends before the first of these."""
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    """The reply ends where one of these tokens is drawn, too."""
    ignore_eos: bool | None = False
    """Write past the model's own ends, until there are enough tokens."""
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    """The same seed gives the same reply to the same request."""
    best_of: int | None = None
    """Not supported: more replies than are sent; it must be equal to ``n``."""

    @field_validator("best_of")
    @classmethod
    def _every_one(cls, best_of: int | None, others: ValidationInfo) -> None:
        if best_of not in (None, given(others.data.get("n"), 1)):
            raise ValueError("not supported. Ask for n replies, and choose among them.")


class JsonSchema(Wanted):
    """A form for a reply."""

    name: str = Field("reply", max_length=64)
    """What to call it."""
    schema_: dict[str, Any] = Field(alias="schema")
    """A JSON Schema."""
    strict: bool | None = None
    """Replies are held to the schema either way."""


class AnyText(Wanted):
    """A reply of any form."""

    type: Literal["text"]
    """Its kind."""


class AnyObject(Wanted):
    """A reply that is a JSON object."""

    type: Literal["json_object"]
    """Its kind."""


class OfSchema(Wanted):
    """A reply that is JSON of a schema."""

    type: Literal["json_schema"]
    """Its kind."""
    json_schema: JsonSchema
    """The schema."""


class OfRegex(Wanted):
    """A reply that a regular expression matches; not of OpenAI's."""

    type: Literal["regex"]
    """Its kind."""
    pattern: str = Field(min_length=1)
    """The expression."""


ResponseFormat = Annotated[AnyText | AnyObject | OfSchema | OfRegex, Field(discriminator="type")]


class Part(Wanted):
    """A part of a message."""

    type: str
    """Its kind; only ``text`` is understood."""
    text: str | None = None
    """The text."""


class AskedFunction(Wanted):
    """Which function was called, and with what."""

    name: str
    """Its name."""
    arguments: str = "{}"
    """A JSON object, as text."""


class AskedCall(Wanted):
    """A call that the assistant asked for earlier."""

    id: str = ""
    """What the answer refers to."""
    type: Literal["function"] = "function"
    """Its kind."""
    function: AskedFunction
    """The call."""


class ChatMessage(Wanted):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: str | list[Part] | None = None
    """What is said."""
    tool_calls: list[AskedCall] | None = None
    """Calls that the assistant asked for."""
    tool_call_id: str | None = None
    """The call that a ``tool`` message answers."""


class Function(Wanted):
    """A function that can be called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    """Its name."""
    description: str | None = None
    """What it does."""
    parameters: dict[str, Any] | None = None
    """A JSON Schema of its arguments."""


class Tool(Wanted):
    """Something that the model may use."""

    type: Literal["function"]
    """Its kind."""
    function: Function
    """The function."""


class ChosenName(Wanted):
    """A function by its name."""

    name: str
    """Its name."""


class ChosenTool(Wanted):
    """The function that is to be called."""

    type: Literal["function"] = "function"
    """Its kind."""
    function: ChosenName
    """Which."""


def _own_names(settings: dict[str, bool]) -> dict[str, bool]:
    taken = sorted(RESERVED & settings.keys())
    if taken:
        raise ValueError(f"{taken[0]!r} is set by the server, or a function of every template")
    return settings


TemplateSettings = Annotated[
    dict[str, StrictBool], Field(max_length=16), AfterValidator(_own_names)
]
"""Names of a chat template's own."""


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    """The conversation."""
    max_completion_tokens: Positive | None = None
    """The most tokens of a reply; the newer name of ``max_tokens``."""
    logprobs: bool | None = False
    """Give the log-probability of each token."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """Give so many of the likeliest tokens at each place as well."""
    response_format: ResponseFormat | None = None
    """The form of the reply."""
    tools: list[Tool] | None = Field(None, max_length=128)
    """Functions that the model may ask to have called."""
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    """Whether it may, must, or must call a certain one."""
    parallel_tool_calls: bool | None = True
    """Whether one reply may ask for several calls; otherwise it ends after the first."""
    chat_template_kwargs: TemplateSettings | None = None
    """What the model's chat template is told, such as ``enable_thinking``: yes or no."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_else(cls, sent: Any) -> Any:
        return refused.checked(sent, refused.IN_CHATS)

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        must_call = self.tool_choice not in (None, "none", "auto")
        if must_call and not self.tools:
            raise ValueError("tool_choice asks for a call, and there are no tools")
        return self


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(max_length=1 << 20)
    """The beginning of the text, or several, or their token ids."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Give the log-probability of each token, and of so many of the likeliest."""
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    """The most tokens of a reply; 0 writes none, and with ``echo`` only scores the prompt."""
    echo: bool | None = False
    """Begin the answer with the prompt."""
    response_format: ResponseFormat | None = None
    """The form of the reply."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_else(cls, sent: Any) -> Any:
        return refused.checked(sent, refused.IN_COMPLETIONS)


class PlainChat(Wanted):
    """``POST /chat``."""

    message: str
    """What to answer."""
    max_length: Positive = 256
    """The most tokens of the reply."""
    temperature: float = Field(0.7, ge=0, le=2)
    """How bold the words are."""


class TokenizeRequest(Wanted):
    """``POST /tokenize``: either a text or a conversation."""

    model: str | None = None
    """The model's name."""
    prompt: str | None = None
    """A text."""
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096)
    """A conversation that the assistant is to go on with."""
    add_special_tokens: bool | None = None
    """Begin a text as ``/v1/completions`` does; a conversation has what its template writes."""
    chat_template_kwargs: TemplateSettings | None = None
    """What the model's chat template is told."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_else(cls, sent: Any) -> Any:
        return refused.checked(sent, refused.IN_TOKENIZE)

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.chat_template_kwargs and self.messages is None:
            raise ValueError("chat_template_kwargs needs messages")
        if self.add_special_tokens and self.messages is not None:
            raise ValueError("add_special_tokens needs prompt: the template adds what is needed")
        return self


class DetokenizeRequest(Wanted):
    """``POST /detokenize``."""

    model: str | None = None
    """The model's name."""
    tokens: list[TokenId] = Field(max_length=1 << 20)
    """Token ids."""


def given(value: Any, otherwise: Any) -> Any:
    """What a client sent, or the default where it sent nothing or ``null``."""
    return otherwise if value is None else value


def biases(request: Sampled, vocab_size: int) -> Mapping[int, float]:
    """The biases by token id; what is no id of the vocabulary raises ``ValueError``."""
    found = {int(key): value for key, value in (request.logit_bias or {}).items()}
    if any(not 0 <= id < vocab_size for id in found):
        raise ValueError(f"ids are from 0 to {vocab_size - 1}")
    return found
