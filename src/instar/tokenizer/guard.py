"""Keeps what users write apart from what a template writes: control tokens are the template's.

A template joins frame and content to one text, in which ``</s>`` of a user looks like ``</s>`` of
the frame. So both are written in characters that no text holds (private-use characters of Unicode)
while they are together: in a content, the first character of whatever looks like a control token
gets a stand-in, and is put back once the frame's control tokens, the only ones left, have become
one private character each. The library then encodes everything in one go, and knows those single
characters as the control tokens, so that ids are those of transformers for all other contents.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from instar.errors import UserError
from instar.tokenizer.template import Span

PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
"""The private-use characters of planes 15 and 16; fonts and scripts have other ones."""

FIRST, LAST = 0xF0000, 0x10FFFD


def control_tokens_of(rust: RustTokenizer) -> dict[int, AddedToken]:
    """The added tokens that are marked special, by id; ``<think>`` and its like often are not."""
    added = rust.get_added_tokens_decoder()
    return {id: token for id, token in added.items() if token.special and token.content}


class Guard:
    """The private characters of one tokenizer, and a copy of it that knows them.

    Args:
        rust: The tokenizer; it is left as it is.
        taken: Private characters that texts hold; others are used.

    Attributes:
        brackets: Two characters for ``Template.write``.
        mark: One more, which may be put into a text and taken out again.
        characters: All that must not occur in a conversation.

    Raises:
        UserError: The texts leave no room.
    """

    def __init__(self, rust: RustTokenizer, taken: frozenset[str]) -> None:
        control = control_tokens_of(rust)
        tokens = {token.content: id for id, token in control.items()}
        letters = sorted({char for token in tokens for char in token})
        self._tokens = tokens
        free = _free(3 + len(letters) + len(tokens), taken)
        self.brackets, self.mark = free[:2], free[2]
        self.characters = frozenset(free)
        self._stand_in = dict(zip(letters, free[3:], strict=False))
        self._stood = re.compile(f"[{''.join(self._stand_in.values())}]" if letters else "(?!)")
        self._restore = {ord(new): old for old, new in self._stand_in.items()}
        self._sign = dict(zip(tokens, free[3 + len(letters) :], strict=True))
        longest_first = sorted(tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._prefixes = {token[:n] for token in tokens for n in range(1, len(token))}
        self._suffixes = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=1)
        self._rust = RustTokenizer.from_str(rust.to_str())
        # The control tokens themselves become plain text; their signs read as they did.
        self._rust.encode_special_tokens = True
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.add_tokens([_like(t, self._sign[t.content]) for t in control.values()])
        self._real = {self._rust.token_to_id(sign): tokens[t] for t, sign in self._sign.items()}
        # What a model knows no other token for may come from any text.
        unknown = getattr(rust.model, "unk_token", None)
        self._never = {id for content, id in tokens.items() if content != unknown}

    def protect(self, content: str) -> str:
        """The content with stand-ins, of the same length, in which nothing is a control token.

        Its ends get them as well where a frame could complete what they begin.
        """
        places = set[int]()
        found = self._control.search(content)
        while found:
            places.add(found.start())
            found = self._control.search(content, found.start() + 1)
        core = content.strip()
        start = len(content) - len(content.lstrip())
        for n in range(1, min(self._longest, len(core) + 1)):
            if core[-n:] in self._prefixes:
                places.add(start + len(core) - n)
            if core[:n] in self._suffixes:
                places.add(start + n - 1)
        if not places:
            return content
        letters = list(content)
        for place in places:
            letters[place] = self._stand_in[letters[place]]
        return "".join(letters)

    def controls(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The frame's first control token from ``start`` on."""
        return self._control.search(text, start)

    def ids(self, text: str) -> list[int]:
        """The control tokens of a piece of the frame, as ids."""
        return [self._tokens[found[0]] for found in self._control.finditer(text)]

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Token ids of a text whose contents are protected.

        Args:
            text: The whole conversation.
            spans: Stretches of it, in order.

        Returns:
            The ids, and for each whether a part of it lies in a span.

        Raises:
            UserError: The tokenizer does not read one of its control tokens where it stands.
        """
        parts, at, ends, shifts = list[str](), 0, [0], [0]
        for found in self._control.finditer(text):
            parts += (text[at : found.start()], self._sign[found[0]])
            at = found.end()
            ends.append(at)
            shifts.append(shifts[-1] + len(found[0]) - 1)
        hidden = "".join([*parts, text[at:]])
        if self._stood.search(hidden):
            hidden = hidden.translate(self._restore)
        encoding = self._rust.encode(hidden, add_special_tokens=False)
        self._check(encoding.ids, len(ends) - 1)
        moved = [
            tuple(place - shifts[bisect_right(ends, place) - 1] for place in span) for span in spans
        ]
        ids = [self._real.get(id, id) for id in encoding.ids]
        return ids, _within(encoding.offsets, moved) if moved else [False] * len(ids)

    def _check(self, ids: Sequence[int], controls: int) -> None:
        """That the frame's control tokens were read, and no text became one."""
        if sum(id in self._real for id in ids) != controls:
            raise UserError(
                "the tokenizer reads control tokens of its chat template as plain text",
                'Give them "normalized": false and "single_word": false in tokenizer.json.',
            )
        if not self._never.isdisjoint(ids):
            raise UserError(
                "the tokenizer makes a control token of plain text in the conversation",
                "Take the piece of that name out of its vocabulary's merges or scores.",
            )


def _like(token: AddedToken, content: str) -> AddedToken:
    """A token that is found as the other one is, beside white space for example."""
    return AddedToken(
        content,
        special=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        single_word=token.single_word,
    )


def _free(count: int, taken: Iterable[str]) -> str:
    """So many private-use characters in a row, none of them taken."""
    used = sorted(map(ord, taken))
    start = FIRST
    for place in [*used, LAST + 1]:
        if place - start >= count:
            return "".join(map(chr, range(start, start + count)))
        start = place + 1
    raise UserError(
        "the conversation holds private-use characters of Unicode in great number",
        "Leave them out; they mean nothing by themselves.",
    )


def _within(offsets: Sequence[Span], spans: Sequence[tuple[int, ...]]) -> list[bool]:
    """For each token whether it shares a character with a span; both are in order."""
    inside, number = list[bool](), 0
    for first, end in offsets:
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        inside.append(number < len(spans) and spans[number][0] < end and first < end)
    return inside
