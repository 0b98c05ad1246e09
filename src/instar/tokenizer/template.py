"""Chat templates: Jinja programs that come with a model and write a conversation as text.

They run as transformers runs them, so that they write the same text; they are other people's
programs, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from instar.data.schema import Message
from instar.errors import UserError

Span = tuple[int, int]
"""First character, and the one behind the last."""

_BRACKETS = "__generation_brackets__"

NO_SETTINGS: Mapping[str, bool] = MappingProxyType({})
"""A template's own names are as it has them."""

RESERVED = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"}
    | {"bos_token", "eos_token", "pad_token", "unk_token", _BRACKETS}
    | {"namespace", "raise_exception", "strftime_now", *DEFAULT_NAMESPACE}
)
"""Names that are no template's own: its caller sets them, or all templates may call them."""


class Written(NamedTuple):
    """What a template wrote.

    Attributes:
        text: The conversation.
        generated: What it wrote between ``{% generation %}`` and ``{% endgeneration %}``.
    """

    text: str
    generated: list[Span]


class _Namespace(Namespace):
    """What ``namespace()`` makes: it holds no names of Python's inner parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """The tag ``{% generation %}``: puts its text in brackets, which are taken out again."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("bracketed"), [], [], body).set_lineno(line)

    @pass_context
    def bracketed(self, context: Context, caller: Macro) -> str:
        """The text of the block, in brackets."""
        opening, closing = context[_BRACKETS]
        return opening + caller() + closing


class Template:
    """A compiled chat template.

    Args:
        source: The Jinja program.
        variables: Names that it may use, such as ``bos_token``.

    Raises:
        UserError: It is not a Jinja program.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self._variables = variables
        try:
            self._compiled, self.marks_replies = _compiled(source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template cannot be read ({error})",
                "Mend chat_template.jinja, or take the model's directory from its source again.",
            ) from None

    def write(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        brackets: str,
        settings: Mapping[str, bool] = NO_SETTINGS,
    ) -> Written:
        """The conversation as text.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: End with the opening of an assistant turn.
            brackets: Two characters that occur nowhere in the conversation.
            settings: Names of the template's own, such as Qwen3's ``enable_thinking``.

        Raises:
            UserError: The template refuses the conversation.
        """
        # Keys beside role and content would be passed on by transformers, too.
        values: dict[str, Any] = {**settings, **self._variables}
        values |= {_BRACKETS: (brackets[0], brackets[1])}
        values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            text = self._compiled.render(values, tools=None, documents=None)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"the model's chat template refuses the conversation ({error})",
                "Many know no system message, or ask for user and assistant in turn; change the"
                " messages or chat_template.jinja.",
            ) from None
        return _unbracketed(text, brackets)


def _unbracketed(text: str, brackets: str) -> Written:
    """Take the brackets out and note where they stood."""
    parts, spans, at = [], list[Span](), 0
    pieces = text.split(brackets[0])
    for number, piece in enumerate(pieces):
        inside, closing, outside = piece.partition(brackets[1])
        if number and closing:
            spans.append((at, at + len(inside)))
        parts += (inside, outside)
        at += len(inside) + len(outside)
    return Written("".join(parts), spans)


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    """The program, and whether it marks what the assistant wrote."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    calls = environment.parse(source).find_all(nodes.CallBlock)
    marks = any(isinstance(call.call.node, nodes.ExtensionAttribute) for call in calls)
    return environment.from_string(source), marks


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write ``<`` as an HTML page needs it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    """What a template calls when a conversation is not to its liking."""
    raise jinja2.TemplateError(message)
