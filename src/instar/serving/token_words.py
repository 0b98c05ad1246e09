"""Tokens and their log-probabilities, as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instar.generation.scoring import Scores
from instar.serving.worker import Step
from instar.tokenizer.hf import StreamDecoder, Tokenizer

Likeliest = list[tuple[int, float]]

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot write."""


def shown(tokenizer: Tokenizer, id: int) -> str:
    """A token as text; half a character is shown as U+FFFD."""
    return tokenizer.decode([id], skip_special=False)


def _word(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(id)
    text = shown(tokenizer, id)
    written = list(content or text.encode())
    return {"token": text, "logprob": max(LEAST, logprob), "bytes": written}


def chat_logprobs(tokenizer: Tokenizer, step: Step, stops: frozenset[int]) -> dict[str, Any]:
    """The tokens of a step, each with its bytes and the likeliest alternatives."""
    content = []
    for i, (id, logprob) in enumerate(zip(step.ids, step.logprobs, strict=True)):
        if id in stops:
            continue
        others = step.top_logprobs[i] if step.top_logprobs else []
        word = _word(tokenizer, id, logprob)
        word["top_logprobs"] = [_word(tokenizer, other, value) for other, value in others]
        content.append(word)
    return {"content": content}


def _text(content: bytes) -> str | None:
    """The text of a token's bytes, unless it begins or ends within a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _named(tokenizer: Tokenizer, id: int) -> str:
    """A token as text, or where it is a part of a character, by its bytes."""
    content = tokenizer.token_bytes(id)
    if _text(content) is None:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return shown(tokenizer, id)


class TextTokens:
    """The tokens of one completion in the older form, that of ``/v1/completions``.

    A token that is a part of a character is called by its bytes, as OpenAI does, and stands where
    the character does.

    Args:
        tokenizer: The model's.
        stops: Tokens that are not shown.
        at: Characters before the completion.
    """

    def __init__(self, tokenizer: Tokenizer, stops: frozenset[int], at: int) -> None:
        self._tokenizer, self._stops, self._at = tokenizer, stops, at
        self._decoder = StreamDecoder(tokenizer)

    def push(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Likeliest]
    ) -> dict[str, Any]:
        """The tokens that come next, with their log-probabilities and the likeliest instead."""
        shown = [i for i, id in enumerate(ids) if id not in self._stops]
        told = [self._alternatives(likeliest[i]) for i in shown] if likeliest else None
        return {
            "tokens": [_named(self._tokenizer, ids[i]) for i in shown],
            "token_logprobs": [max(LEAST, logprobs[i]) for i in shown],
            "top_logprobs": told or None,
            "text_offset": [self._offset(ids[i]) for i in shown],
        }

    def _alternatives(self, likeliest: Likeliest) -> dict[str, float]:
        return {_named(self._tokenizer, other): max(LEAST, v) for other, v in likeliest}

    def _offset(self, id: int) -> int:
        """Characters before a token, which is taken in."""
        before = self._at
        self._at += len(self._decoder.push(id))
        text = _text(self._tokenizer.token_bytes(id))
        # What was never completed is told, as U+FFFD, together with the token behind it.
        return before if text is None else self._at - len(text)


def text_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], scores: Scores) -> dict[str, Any]:
    """All tokens of a prompt in the same form; the first one has nothing that it comes after."""
    likeliest = [] if scores.top_logprobs is None else [[], *scores.top_logprobs]
    told = TextTokens(tokenizer, frozenset(), 0).push(prompt, [0.0, *scores.logprobs], likeliest)
    told["token_logprobs"][0] = None
    if told["top_logprobs"]:
        told["top_logprobs"][0] = None
    return told
