r"""A conversation becomes token ids, and a mask that says which of them the assistant wrote.

Every model has a chat format of its own, a Jinja template beside its tokenizer. Ours is ChatML:
every turn is ``<|im_start|>role\ncontent<|im_end|>\n``. It is written down twice, as a template for
everybody else and by hand for us, since that is faster; a test holds the two equal. Other models'
templates are in ``turns``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from instar.data.schema import Message, Role
from instar.errors import UserError
from instar.tokenizer.template import NO_SETTINGS

if TYPE_CHECKING:
    from instar.tokenizer.hf import Tokenizer

# `generation` marks what the assistant wrote: the reply and the <|im_end|> that closes it, since
# a model that is never taught to close its turn never stops. The line break after it belongs to
# the format. Replies are trimmed because the tokenizer would glue the format's line break to
# white space at the reply's start; trimmed, the prompt's ids always begin the conversation's ids.
CHAT_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- (message['content'] | trim) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

# A tokenizer that nobody gave a template, such as GPT-2's, has no tokens for roles. So roles are
# words here; but every turn ends with the token that ends a document (as in DialoGPT, Zhang et
# al. 2020, arXiv:1911.00536), which no content can hold: "Assistant:" in a message opens nothing.
# A line break before the content, not a space, because many tokenizers glue a space to the word.
_PLAIN = r"""{{- BEFORE -}}
{%- for message in messages -%}
{{- message['role'] | capitalize + ':\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- (message['content'] | trim) + END -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + END -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:\n' -}}
{%- endif -%}
"""


def plain_template(before: str, end: str) -> str:
    r"""A chat template that needs no control token but one: ``User:\ncontent<eos>\n``.

    Args:
        before: The token that stands before every text, if there is one.
        end: The token that ends a document.
    """
    return _PLAIN.replace("BEFORE", json.dumps(before)).replace("END", json.dumps(end))


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        ids: Token ids.
        assistant_mask: One truth value a token: it is part of a reply or the token (such as
            ``<|im_end|>``) that closes one.
    """

    ids: list[int]
    assistant_mask: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> Rendered:
    """Turn messages into ids and the assistant's mask, with the tokenizer's own chat template.

    Ids and mask equal those of transformers' ``apply_chat_template``, with one difference that is
    meant: content is encoded as plain text, so a user who types ``<|im_end|>`` cannot close the
    turn. (transformers does the same only with ``sanitize_control_tokens=True``, and then it
    gives no mask.) Where the template does not mark replies, the mask covers what follows the
    generation prompt, up to the token that closes the turn.

    Messages are not checked here; ``check_messages`` does that once, where data comes in.

    Args:
        tokenizer: Brings the chat template.
        messages: The turns, oldest first.
        add_generation_prompt: End with the opening of an assistant turn.

    Raises:
        UserError: The template refuses the messages, or does not show where replies are.
    """
    if not tokenizer.is_our_chatml:
        return Rendered(*tokenizer.turns.ids_and_mask(messages, add_generation_prompt))
    ids: list[int] = []
    mask: list[bool] = []

    def add(more: list[int], by_assistant: bool = False) -> None:
        ids.extend(more)
        mask.extend([by_assistant] * len(more))

    newline = tokenizer.encode("\n")
    opening = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            add(opening)
            add([*tokenizer.encode(content.strip()), tokenizer.im_end_id], by_assistant=True)
        else:
            turn = tokenizer.encode(f"{role}\n{content}")
            add([tokenizer.im_start_id, *turn, tokenizer.im_end_id])
        add(newline)
    if add_generation_prompt:
        add(opening)
    return Rendered(ids, mask)


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    settings: Mapping[str, bool] = NO_SETTINGS,
) -> list[int]:
    """The ids of a conversation that the assistant is to go on with; as ``render``, no mask.

    Args:
        tokenizer: Brings the chat template.
        messages: The turns, oldest first.
        settings: Names of the template's own, such as Qwen3's ``enable_thinking``; one that does
            not know them does without.
    """
    if tokenizer.is_our_chatml:
        return render(tokenizer, messages, add_generation_prompt=True).ids
    return tokenizer.turns.ids(messages, add_generation_prompt=True, settings=settings)


def check_messages(messages: Sequence[Message], needs_reply: bool = False) -> None:
    """Refuse a conversation that cannot be rendered sensibly.

    A conversation is an optional system message, then user and assistant in turn, user first.

    Args:
        messages: The turns, oldest first.
        needs_reply: Ask for at least one assistant turn; without one there is nothing to
            fine-tune on.

    Raises:
        UserError: Names the message (counted from 0) and what is wrong with it.
    """
    if not messages:
        raise UserError("messages is empty", "Give at least one user message.")
    previous = None
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(
                f"messages[{i}] is {message!r}", "Write it as an object with role and content."
            )
        role, content = message.get("role"), message.get("content")
        if role not in get_args(Role):
            raise UserError(
                f"messages[{i}].role is {role!r}", f"Use one of {', '.join(get_args(Role))}."
            )
        if not isinstance(content, str):
            raise UserError(
                f"messages[{i}].content is of type {type(content).__name__}", "Make it a string."
            )
        if role == "system" and i > 0:
            raise UserError(f"messages[{i}].role is 'system'", "Put the system message first.")
        if role == "assistant" and previous in (None, "system"):
            raise UserError(
                f"messages[{i}].role is 'assistant', before any user message",
                "Begin with a user message (a system message may stand before it).",
            )
        if role == previous:
            raise UserError(
                f"messages[{i - 1}] and messages[{i}] are both of role {role!r}",
                "Join them into one message; user and assistant take turns.",
            )
        previous = role
    if needs_reply and not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            "messages holds no assistant turn, so there is nothing to learn",
            "Add the reply as a message of role 'assistant', or drop the conversation.",
        )
