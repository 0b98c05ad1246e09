"""Replies that must have a form: JSON of a schema, a regular expression, a call of a function.

The grammars are xgrammar's (Dong et al. 2024, arXiv:2411.15100). What is ours is the end: before
the tokens run out, the reply is closed by the shortest way, so that it is whole JSON all the same.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instar.errors import UserError, installing
from instar.serving.shortest import PARTS, jump
from instar.serving.tools import CLOSING, LITERAL, OPENING
from instar.tokenizer.hf import Tokenizer

NOT_KNOWN = (
    "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "uniqueItems",
    "contains", "multipleOf", "$dynamicRef",
)  # fmt: skip
"""Keywords of JSON Schema that the grammars would silently pass over."""

DEEPEST = 100
"""How deep a schema may be nested."""

MOST_KEYS = 500
"""Properties of one object; for thousands the library takes minutes."""

MOST_CHARACTERS = 65_536
"""The longest schema or expression."""

MOST_S = 1.0
"""Seconds of a processor that one request's grammar may take, since everyone waits for it."""

TOKEN_S = 1e-3
"""Seconds that it may take besides for each token of its replies. Most take less; one that is
ambiguous may take more with every token."""

KEPT_BYTES = 64 << 20
"""Memory for compiled grammars that may be asked for again."""

CONTROLS = re.compile(rb"[\x00-\x09\x0b-\x1f]")

SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")

SLACK = 8
"""Tokens beyond ``jump``: one token may hold several characters that open something."""


class Vocabulary:
    """What the grammars need to know of a tokenizer.

    Args:
        tokenizer: Gives each token its bytes.
        stops: The tokens that end a reply.

    Raises:
        UserError: xgrammar is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
        try:
            import xgrammar
        except ImportError:
            raise UserError(
                "replies with a given form need xgrammar", installing("serve")
            ) from None
        self.library = xgrammar
        self.size = tokenizer.vocab_size
        self.stops = sorted(stops)
        tokens = [b"" if i in stops else tokenizer.token_bytes(i) for i in range(self.size)]
        info = xgrammar.TokenizerInfo(
            tokens,  # pyright: ignore[reportArgumentType] - bytes are what RAW means
            vocab_size=self.size,
            stop_token_ids=self.stops,
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=KEPT_BYTES)
        self._bits = np.zeros((1, -(-self.size // 32)), dtype=np.int32)
        # JSON text has control characters nowhere but between its parts, and there we want none
        # but the line breaks of a call. The library lets them into strings of bounded length.
        self.no_controls = np.array([not CONTROLS.search(token) for token in tokens])
        # It also takes half a surrogate pair for a character, which UTF-8 knows not.
        self.whole = np.array([not SURROGATE.search(token) for token in tokens])
        self.after_ed = self.whole & ~np.array([token[:1] >= b"\xa0" for token in tokens])
        self.ends_in_ed = np.array([token.endswith(b"\xed") for token in tokens])
        self._rank = _ranks(tokens, self.stops)
        self._marks = [tokens.index(mark) if mark in tokens else 0 for mark in (b'"', b"]", b"}")]

    def mask(self, matcher: Any) -> np.ndarray:
        """Which tokens a matcher lets follow, ``(V,)``."""
        bits = np.zeros_like(self._bits)
        matcher.fill_next_token_bitmask(bits)
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.size].astype(bool)

    def closest(self, mask: np.ndarray) -> int:
        """The token that leads to the end of a JSON text soonest, of the allowed; one must be."""
        quote, *brackets = self._marks
        # Both brackets may follow within a string only, and there they close nothing.
        if mask[quote] and mask[brackets].all():
            return quote
        allowed = mask.nonzero()[0]
        return int(allowed[self._rank[allowed].argmin()])

    def json_schema(self, schema: Any, limit: int) -> Grammar:
        """Only what a schema accepts.

        Args:
            schema: A JSON Schema.
            limit: Tokens that the reply has room for.

        Raises:
            UserError: The schema is not one, says what the grammars cannot hold to, or takes too
                long.
        """
        return self._begin(self._compile(self._from_schema(schema)), limit, jump(schema))

    def call(self, schema: Mapping[str, Any], limit: int) -> Grammar:
        """One call of a function: the tags, and JSON of a schema between them."""
        whole = self.library.Grammar
        parts = [f"{OPENING}\n", f"\n{CLOSING}"]
        before, after = (whole.from_ebnf(f"root ::= {json.dumps(part)}") for part in parts)
        grammar = whole.concat(before, self._from_schema(schema), after)
        return self._begin(self._compile(grammar), limit, jump(schema))

    def regex(self, pattern: str, limit: int) -> Grammar:
        """Only what a regular expression matches as a whole; raises as ``json_schema`` does."""
        _check_length(pattern)
        with _Explained("the regular expression"):
            grammar = self.library.Grammar.from_regex(pattern)
        return self._begin(self._compile(grammar), limit, None)

    def _from_schema(self, schema: Any) -> Any:
        _check_keywords(schema)
        text = json.dumps(_tightened(schema))
        _check_length(text)
        with _Explained("the JSON schema"):
            return self.library.Grammar.from_json_schema(
                text, any_whitespace=False, strict_mode=False
            )

    def _compile(self, grammar: Any) -> Any:
        with _Explained("the grammar"):
            return self.compiler.compile_grammar(grammar)

    def _begin(self, compiled: Any, limit: int, longest_jump: int | None) -> Grammar:
        matcher = self.library.GrammarMatcher(compiled)
        if not self.mask(matcher).any():
            raise UserError("nothing can satisfy the grammar", "Change the schema or expression.")
        margin = None if longest_jump is None else longest_jump + SLACK
        grammar = Grammar(self, matcher, limit, margin)
        if margin is not None:
            grammar.look_ahead()
        return grammar


@dataclass
class Time:
    """What the replies to one request share.

    Attributes:
        left_s: Seconds of a processor that their grammar may still take.
    """

    left_s: float


class Grammar:
    """One reply's constraint, as the engine asks for it.

    To see from the beginning how far away the end is takes the longest, and the engine's thread
    has no time for that: it is done once, by ``look_ahead``, and shared by every ``fork``.

    Args:
        vocabulary: The tokenizer's.
        matcher: Knows what may follow what was written.
        limit: Tokens that the reply has room for.
        margin: How many tokens one step may add to what must still be written; None where the
            reply is not closed early.
    """

    def __init__(
        self, vocabulary: Vocabulary, matcher: Any, limit: int, margin: int | None
    ) -> None:
        self.vocabulary, self._matcher = vocabulary, matcher
        self._left, self._margin = limit, margin
        self._steps, self._check_at = 0, -1
        self._closing = False
        self._last: int | None = None
        self._time = Time(MOST_S)

    def fork(self, limit: int) -> Grammar:
        """The same constraint for one more reply to the request, as long as nothing is written.

        Args:
            limit: Tokens that this reply has room for: at most as many as ours has.
        """
        other = copy.copy(self)
        other._matcher, other._left = self._matcher.fork(), limit
        other._plan()
        return other

    def allowed(self) -> Tensor:
        """Which tokens may come next, ``(V,)``; raises ``UserError`` where that takes too long."""
        begun_s = time.thread_time()
        mask = self._mask(self._matcher, self._last)
        self._spend(begun_s)
        if not mask.any():  # a dead end, which a schema without any solution can lead to
            mask[self.vocabulary.stops] = True
        if not self._closing and self._left <= self._check_at:
            self.look_ahead()
        if self._closing:
            token = self.vocabulary.closest(mask)
            mask[:] = False
            mask[token] = True
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Told what was drawn."""
        self._left -= 1
        self._time.left_s += TOKEN_S
        self._last = token
        self._matcher.accept_token(token)

    @property
    def needed(self) -> int:
        """Tokens that the rest of the reply needs; 1 where it is not closed early."""
        return 1 if self._margin is None else self._steps + self._margin

    @property
    def finished(self) -> bool:
        """Whether nothing more may follow."""
        return self._matcher.is_terminated()

    def _mask(self, matcher: Any, last: int | None) -> np.ndarray:
        """Which tokens may follow what a matcher was told, ``last`` being the last of it."""
        known = self.vocabulary
        mask = known.mask(matcher)
        mask &= known.whole if last is None or not known.ends_in_ed[last] else known.after_ed
        return mask if self._margin is None else mask & known.no_controls

    def look_ahead(self) -> None:
        """See whether the end must begin now, or else when to look again.

        Raises:
            UserError: That takes too long.
        """
        self._steps = self._steps_to_end()
        self._plan()

    def _plan(self) -> None:
        """Decide by the steps to the end that were found last."""
        if self._margin is None:
            return
        spare = self._left - self._steps - self._margin
        self._closing = spare <= 0
        self._check_at = self._left - max(1, spare // (1 + self._margin))

    def _steps_to_end(self) -> int:
        """Tokens of the shortest end that is known, the stop token included."""
        matcher, token = self._matcher.fork(), self._last
        for steps in range(1, self._left + 1):
            begun_s = time.thread_time()
            mask = self._mask(matcher, token)
            token = self.vocabulary.closest(mask) if mask.any() else None
            self._spend(begun_s)
            if token is None or token in self.vocabulary.stops:
                return steps
            matcher.accept_token(token)
        return self._left

    def _spend(self, begun_s: float) -> None:
        """Count the processor's time since then; raises ``UserError`` where it was too much."""
        self._time.left_s -= time.thread_time() - begun_s
        if self._time.left_s < 0:
            raise UserError(
                "it takes too long to find out which tokens fit the schema or expression",
                "Simplify it: repetitions within repetitions are the usual cause.",
            )


class _Explained:
    """Turns what the library says of a bad grammar into an error for its author."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, UserError):
            said = str(error).strip().splitlines()[0]
            # The library puts the time and a line of its source before what it says.
            said = said.rpartition(".cc:")[2].partition(": ")[2] or said
            raise UserError(
                f"{self._what} cannot be used ({said.rstrip('. ')})", "Simplify it."
            ) from None


def _check_length(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"the schema or expression has {len(text)} characters",
            f"At most {MOST_CHARACTERS} are read.",
        )


def _check_keywords(schema: Any) -> None:
    """Refuse what would not be held to, and what is nested without end."""
    waiting = [(schema, False, 0)]
    while waiting:
        part, are_names, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"the JSON schema is nested {depth} deep", f"{DEEPEST} is the most.")
        if isinstance(part, list):
            waiting += [(each, False, depth + 1) for each in part]
        if not isinstance(part, dict):
            continue
        refused = None if are_names else _refused(part)
        if refused:
            raise UserError(
                f"the JSON schema uses `{refused}`, which replies cannot be held to",
                "Leave it out, and check the reply yourself.",
            )
        if len(part) > MOST_KEYS:
            raise UserError(f"the JSON schema has {len(part)} keys at one place", "Have fewer.")
        for key, inner in part.items():
            if are_names or key not in LITERAL:
                names = key in PARTS and not are_names
                waiting.append((inner, names, depth + 1))


def _refused(part: dict[str, Any]) -> str | None:
    """A keyword of a schema that cannot be held to."""
    several = isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1
    return "allOf" if several else next((key for key in NOT_KNOWN if key in part), None)


def _tightened(schema: Any) -> Any:
    """The schema without properties that nobody named, which it would let a model make up."""
    if isinstance(schema, list):
        return [_tightened(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: v if key in LITERAL else _tightened(v) for key, v in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        others = ("patternProperties", "unevaluatedProperties", "minProperties")
        if not any(key in schema for key in others):
            inner.setdefault("additionalProperties", False)
    return inner


def _ranks(tokens: list[bytes], stops: list[int]) -> np.ndarray:
    """How soon each token brings a JSON text to its end; smaller is sooner."""
    first = {b"}": 1, b"]": 2, b'"': 3, b",": 4, b"0": 5}
    # Where a stretch is prescribed, such as a key, long tokens are through with it sooner.
    ranks = [first.get(token, 1000 - min(len(token), 900)) for token in tokens]
    for stop in stops:
        ranks[stop] = 0
    return np.array(ranks, dtype=np.int64)
