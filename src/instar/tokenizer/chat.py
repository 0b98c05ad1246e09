r"""A conversation becomes token ids, and a mask that says which of them the assistant wrote.

The format is ChatML: every turn is ``<|im_start|>role\ncontent<|im_end|>\n``. The same format is
written down twice, as a Jinja template for everybody else and as ``render`` for us; a test holds
the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from instar.data.schema import Message, Role
from instar.errors import UserError

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


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        ids: Token ids.
        assistant_mask: One truth value a token: it is part of a reply or the ``<|im_end|>`` that
            closes one.
    """

    ids: list[int]
    assistant_mask: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> Rendered:
    """Turn messages into ids and the assistant's mask.

    Ids and mask equal those of transformers' ``apply_chat_template``, with one difference that is
    meant: content is encoded as plain text, so a user who types ``<|im_end|>`` cannot close the
    turn. (transformers does the same only with ``sanitize_control_tokens=True``, and then it
    gives no mask.)

    Messages are not checked here; ``check_messages`` does that once, where data comes in.

    Args:
        tokenizer: Knows ``<|im_start|>`` and ``<|im_end|>``.
        messages: The turns, oldest first.
        add_generation_prompt: End with the opening of an assistant turn.
    """
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
