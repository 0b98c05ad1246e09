"""A model that thinks aloud first: ``<think>...</think>`` is told apart from the answer.

The tags are those of DeepSeek-R1 (2025, arXiv:2501.12948) and Qwen3 (2025, arXiv:2505.09388).
Clients know the first part as ``reasoning_content``. Where the answer must have a form, the
thinking before it need not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from instar.generation.stopping import overlap
from instar.serving.grammar import Grammar
from instar.tokenizer.hf import Tokenizer

OPENING, CLOSING = "<think>", "</think>"

SHARE = 4
"""An answer of a form has one token in so many for itself, however long the thinking would be."""

TAIL = 8
"""So many tokens at a prompt's end are looked at for an opening tag."""


class Thinking:
    """Splits a reply into what was thought and what is said.

    Thinking comes first: a tag further on is a word of the answer.

    Args:
        begun: Whether the prompt itself opened the thinking, as some chat templates do.
    """

    def __init__(self, begun: bool = False) -> None:
        self._part: Literal["start", "thought", "answer"] = "thought" if begun else "start"
        self._held = ""
        self._behind_tag = False

    def push(self, piece: str) -> tuple[str, str]:
        """Thought and answer in the next piece of text."""
        text, self._held = self._held + piece, ""
        if self._part == "start":
            bare = text.lstrip()
            if OPENING.startswith(bare) and bare != OPENING:  # nothing yet, or half a tag
                self._held = text
                return "", ""
            self._part = "thought" if bare.startswith(OPENING) else "answer"
            self._behind_tag = self._part == "thought"
            text = bare.removeprefix(OPENING) if self._behind_tag else text
        if self._part == "answer":
            return "", self._trimmed(text)
        thought, closed, answer = text.partition(CLOSING)
        if not closed:
            safe = len(text) - overlap(text, CLOSING)
            self._held = text[safe:]
            return self._trimmed(text[:safe]), ""
        thought = self._trimmed(thought)
        self._part, self._behind_tag = "answer", True
        return thought, self._trimmed(answer)

    def split(self, pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Thought and answer in all pieces of a reply."""
        for piece in pieces:
            yield self.push(piece)
        yield self.flush()

    @property
    def unfinished(self) -> bool:
        """Whether the thinking has begun and not ended."""
        return self._part == "thought"

    def flush(self) -> tuple[str, str]:
        """Thought and answer in what was held back."""
        held, self._held = self._held, ""
        return (held, "") if self._part == "thought" else ("", held)

    def _trimmed(self, text: str) -> str:
        """Text without the line breaks behind either tag, which belong to the format."""
        if self._behind_tag:
            text = text.lstrip("\n")
            self._behind_tag = not text
        return text


class FormBehindThought:
    """A form that the answer must have, and the thinking before it need not.

    The thinking is closed while there is still room for an answer: more than the shortest, so that
    the model may choose, and a share of all where nobody knows how much that is.

    Args:
        form: What holds for the answer.
        tags: The tokens that open and close the thinking.
        begun: Whether the prompt itself opened the thinking.
        limit: Tokens that thinking and answer have room for together.
    """

    def __init__(self, form: Grammar, tags: tuple[int, int], begun: bool, limit: int) -> None:
        self._form, self._limit, self._left = form, limit, limit
        self._opening, self._closing = tags
        self._part: Literal["start", "thought", "answer"] = "thought" if begun else "start"

    def fork(self, limit: int) -> FormBehindThought:
        """The same for one more reply to the request, as ``Grammar.fork``."""
        other = copy.copy(self)
        other._form, other._limit, other._left = self._form.fork(limit), limit, limit
        return other

    def allowed(self) -> Tensor:
        """Which tokens may come next, ``(V,)``; raises as ``Grammar.allowed`` does."""
        spare = self._left - max(self._form.needed + 1, self._limit // SHARE)
        if self._part == "thought":
            mask = torch.full((self._form.vocabulary.size,), spare > 1)
            mask[self._form.vocabulary.stops] = False
            mask[self._closing] = True
            return mask
        mask = self._form.allowed()
        if self._part == "start" and spare > 2:  # for both tags
            mask[self._opening] = True
        return mask

    def accept(self, token: int) -> None:
        """Told what was drawn."""
        self._left -= 1
        if self._part == "thought":
            if token == self._closing:
                self._part, self._form = "answer", self._form.fork(self._left)
        elif self._part == "start" and token == self._opening:
            self._part = "thought"
        else:
            self._part = "answer"
            self._form.accept(token)

    @property
    def finished(self) -> bool:
        """Whether nothing more may follow."""
        return self._part == "answer" and self._form.finished


Form = Grammar | FormBehindThought
"""What the whole reply must look like, or its answer."""


def behind_thought(form: Grammar, tokenizer: Tokenizer, prompt: Sequence[int], limit: int) -> Form:
    """A form as the answer to a prompt needs it.

    A model may think first where its tokenizer has a token for each tag that a reply's text shows,
    as those of models that were taught to think have, and the prompt has not done away with it.

    Args:
        form: What the answer must look like.
        tokenizer: The model's.
        prompt: Token ids.
        limit: Tokens that the reply has room for.
    """
    opening, closing = (tokenizer.encode(tag, special=True) for tag in (OPENING, CLOSING))
    single = len(opening) == len(closing) == 1 and _shown(tokenizer, OPENING, CLOSING)
    if not single or _end(tokenizer, prompt).endswith(CLOSING):
        return form
    tags = opening[0], closing[0]
    return FormBehindThought(form, tags, begun(tokenizer, prompt), limit)


def begun(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with an opening tag, so that the reply begins behind it.

    Where the text would not show the end of the thinking, all of it is taken for the answer.
    """
    return _end(tokenizer, prompt).endswith(OPENING) and _shown(tokenizer, CLOSING)


def _shown(tokenizer: Tokenizer, *tags: str) -> bool:
    """Whether tags stand in a reply's text: control tokens do not."""
    return all(all(map(tokenizer.token_bytes, tokenizer.encode(tag, special=True))) for tag in tags)


def _end(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    return tokenizer.decode(list(prompt[-TAIL:]), skip_special=False).rstrip()
