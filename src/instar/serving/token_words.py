"""Tokens and their log-probabilities, as OpenAI's API writes them."""

from __future__ import annotations

from typing import Any

from instar.serving.worker import Step
from instar.tokenizer.hf import Tokenizer

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


def text_logprobs(
    tokenizer: Tokenizer, step: Step, stops: frozenset[int], at: int
) -> dict[str, Any]:
    """The same in the older form of ``/v1/completions``.

    Args:
        tokenizer: The model's.
        step: What is new of the completion.
        stops: Tokens that are not shown.
        at: Characters before this step's.
    """
    names, values, alternatives, offsets = [], [], [], []
    for i, (id, logprob) in enumerate(zip(step.ids, step.logprobs, strict=True)):
        if id in stops:
            continue
        text = shown(tokenizer, id)
        names.append(text)
        values.append(max(LEAST, logprob))
        offsets.append(at)
        at += len(text)
        if step.top_logprobs:
            others = step.top_logprobs[i]
            alternatives.append({shown(tokenizer, o): max(LEAST, v) for o, v in others})
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": alternatives or None,
        "text_offset": offsets,
    }
