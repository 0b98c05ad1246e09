"""Any model's chat template: a conversation as ids, and which of them the assistant wrote.

Few templates say what the assistant wrote (``{% generation %}``). For the others it is found by
comparing what they write: a reply is what follows the generation prompt of the turns before it, up
to the control token that closes the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate

from tokenizers import Tokenizer as RustTokenizer

from instar.data.schema import Message
from instar.errors import UserError
from instar.tokenizer.guard import PRIVATE, Guard
from instar.tokenizer.template import NO_SETTINGS, Span, Template

THINKING_ENDS = "</think>"
"""Templates of reasoning models drop what stands before it from earlier replies."""

UNMARKED = UserError(
    "the model's chat template does not show where the assistant's replies begin and end",
    "Put {% generation %} and {% endgeneration %} around them in its chat_template.jinja.",
)


class Turns:
    """Renders conversations with a chat template.

    Args:
        rust: The tokenizer; its copy is changed, not itself.
        source: The template.
        variables: Control tokens that the template may name, such as ``bos_token``.

    Raises:
        UserError: The template is not a Jinja program.
    """

    def __init__(self, rust: RustTokenizer, source: str, variables: dict[str, str]) -> None:
        self._template = Template(source, variables)
        own = frozenset(PRIVATE.findall(source))
        self._usual = Guard(rust, own)
        # A conversation that holds the very characters of the usual guard needs another.
        self._unusual = lru_cache(maxsize=4)(lambda taken: Guard(rust, own | taken))

    def ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        settings: Mapping[str, bool] = NO_SETTINGS,
    ) -> list[int]:
        """The conversation's token ids; raises ``UserError`` where the template refuses it."""
        guard, safe = self._protected(messages)
        text, _ = self._template.write(safe, add_generation_prompt, guard.brackets, settings)
        return guard.encode(text, [])[0]

    def ids_and_mask(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """The conversation's token ids, and which of them belong to a reply or close it.

        Raises:
            UserError: The template refuses the conversation, or does not tell who wrote what.
        """
        guard, safe = self._protected(messages)
        text, spans = self._template.write(safe, add_generation_prompt, guard.brackets)
        if not self._template.marks_replies:
            spans = self._replies(guard, safe, text, add_generation_prompt)
        return guard.encode(text, spans)

    @cached_property
    def closing_ids(self) -> frozenset[int]:
        """The control tokens that close a turn of the assistant."""
        return frozenset(self._usual.ids(self._closing))

    @cached_property
    def _closing(self) -> str:
        """What closes a turn of the assistant: what follows it, up to the last control token.

        Without any control token it is all that follows.
        """
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b" + self._usual.mark},
        ]
        text, _ = self._template.write(probe, False, self._usual.brackets)
        frame = text.partition(self._usual.mark)[2]
        end, found = 0, self._usual.controls(frame)
        while found:
            end, found = found.end(), self._usual.controls(frame, found.end())
        return frame[:end] if end else frame

    def _protected(self, messages: Sequence[Message]) -> tuple[Guard, list[Message]]:
        """A guard for these messages, and what it makes of them."""
        contents = "".join([message["content"] for message in messages])
        taken = frozenset() if contents.isascii() else frozenset(PRIVATE.findall(contents))
        guard = self._usual if taken.isdisjoint(self._usual.characters) else self._unusual(taken)
        return guard, [
            {**message, "content": guard.protect(message["content"])} for message in messages
        ]

    def _replies(
        self, guard: Guard, messages: list[Message], text: str, add_generation_prompt: bool
    ) -> list[Span]:
        """The characters of every reply in ``text``, with what closes its turn."""
        ends = self._ends(guard, messages, text, add_generation_prompt)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for i, end in zip(replies, ends, strict=True):
            prompt, _ = self._template.write(messages[:i], True, guard.brackets)
            if text.startswith(prompt) and len(prompt) <= end:
                start = len(prompt)
            else:
                start = _walk_back(messages[i]["content"], text, end)
            spans.append((start, self._closed(guard, text, end)))
        return spans

    def _ends(
        self, guard: Guard, messages: list[Message], text: str, add_generation_prompt: bool
    ) -> list[int]:
        """Where each reply's content ends: a mark is written behind it, and looked for."""
        count = sum(message["role"] == "assistant" for message in messages)
        if not count:
            return []
        # Templates may strip white space at either end; before it or behind it, one mark stays.
        for with_mark in (_mark_behind_words, _mark_behind_all):
            marked: list[Message] = [
                {**message, "content": with_mark(message["content"], guard.mark)}
                if message["role"] == "assistant"
                else message
                for message in messages
            ]
            written, _ = self._template.write(marked, add_generation_prompt, guard.brackets)
            *pieces, _ = written.split(guard.mark)
            if len(pieces) == count and written.replace(guard.mark, "") == text:
                return list(accumulate(map(len, pieces)))
        raise UNMARKED

    def _closed(self, guard: Guard, text: str, end: int) -> int:
        """Where the turn whose content ends at ``end`` is closed; white space may lie between."""
        after = len(text) - len(text[end:].lstrip())
        for closing, at in ((self._closing, end), (self._closing.lstrip(), after)):
            if text.startswith(closing, at):
                return at + len(closing)
        found = guard.controls(text, after)
        if found and found.start() == after:
            return found.end()
        raise UNMARKED


def _mark_behind_words(content: str, mark: str) -> str:
    core = content.rstrip()
    return core + mark + content[len(core) :]


def _mark_behind_all(content: str, mark: str) -> str:
    return content + mark


def _walk_back(content: str, text: str, end: int) -> int:
    """Where the content that ends at ``end`` begins, whole or without its thinking."""
    for shown in (content, content.rpartition(THINKING_ENDS)[2]):
        for stripped in (shown, shown.rstrip(), shown.strip()):
            if text.endswith(stripped, 0, end):
                return end - len(stripped)
    raise UNMARKED
