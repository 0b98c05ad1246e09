"""The next token of many rows at once, each by its own request's rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from instar.errors import UserError
from instar.generation.reply import Reply
from instar.generation.sampling import NEVER, Sampling, draw, warp


class NotNumbersError(UserError):
    """The model's logits are not numbers."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not numbers (NaN)",
            "Its training diverged or its file is damaged; use an earlier checkpoint.",
        )


def choose(logits: Tensor, replies: Sequence[Reply], known: int) -> None:
    """Draw a token for every row and give it to its reply; a reply that cannot go on fails alone.

    Args:
        logits: What the model says of the next token ``(R, V)``, float32.
        replies: The rows' replies; those of finished rows are none of ours.
        known: Tokens that the tokenizer knows; the model may have a longer vocabulary, of whose
            rest none is drawn.
    """
    drawn = torch.empty(len(replies), dtype=torch.long, device=logits.device)
    for sampling, rows in _alike(replies):
        some = slice(None) if len(rows) == len(replies) else torch.tensor(rows)
        own = logits[some, :known]
        whose = [replies[row] for row in rows]
        drawn[some] = _draw(_shaped(own, sampling, whose), sampling, whose)
    every = logits.log_softmax(dim=-1)
    logprobs = every.gather(1, drawn[:, None]).squeeze(1).tolist()
    likeliest = _likeliest(every, replies)
    tokens = drawn.tolist()
    for row, reply in enumerate(replies):
        if math.isnan(logprobs[row]):
            reply.fail(NotNumbersError())
        if not reply.failure:
            reply.add(tokens[row], logprobs[row], likeliest.get(row))


def _alike(replies: Sequence[Reply]) -> list[tuple[Sampling, list[int]]]:
    """Rows with equal settings, together; most batches have one kind only."""
    found: list[tuple[Sampling, list[int]]] = []
    for row, reply in enumerate(replies):
        own = reply.request.sampling
        for sampling, rows in found:
            if sampling is own or sampling == own:
                rows.append(row)
                break
        else:
            found.append((own, [row]))
    return found


def _shaped(logits: Tensor, sampling: Sampling, replies: Sequence[Reply]) -> Tensor:
    """Logits after grammars, biases, penalties and filters."""
    seen: Tensor | None = None
    if sampling.remembers:
        said = torch.stack([_counts(reply.ids, logits) for reply in replies])
        if sampling.repetition_penalty != 1:
            asked = torch.stack([_counts(reply.request.prompt, logits) for reply in replies])
            seen = said + asked > 0
        logits = (
            logits
            - said * sampling.frequency_penalty
            - (said > 0).to(logits.dtype) * sampling.presence_penalty
        )
    if sampling.logit_bias:
        logits = logits.clone()
        tokens = [token for token in sampling.logit_bias if token < logits.shape[1]]
        bias = [sampling.logit_bias[token] for token in tokens]
        logits[:, tokens] += torch.tensor(bias, device=logits.device)
    if any(reply.request.constraint for reply in replies):
        allowed = [_allowed(reply, logits) for reply in replies]
        logits = logits.masked_fill(~torch.stack(allowed), NEVER)
    return warp(logits, sampling, seen)


def _counts(ids: Sequence[int], like: Tensor) -> Tensor:
    """How often each token occurs ``(V,)``."""
    known = like.shape[1]
    found = torch.bincount(torch.tensor(list(ids), dtype=torch.long), minlength=known)[:known]
    return found.to(like)


def _allowed(reply: Reply, like: Tensor) -> Tensor:
    """What a reply's grammar lets come next; everything where it has none, or is of no help."""
    everything = torch.ones(like.shape[1], dtype=torch.bool, device=like.device)
    constraint = reply.request.constraint
    if constraint is None:
        return everything
    try:
        allowed = constraint.allowed()[: like.shape[1]]
        if not bool(allowed.any()):
            raise UserError("a grammar lets no token follow", "Let it say that it is finished.")
    except UserError as error:
        reply.fail(error)
        return everything
    everything[: len(allowed)] = allowed.to(like.device)
    everything[len(allowed) :] = False
    return everything


def _draw(warped: Tensor, sampling: Sampling, replies: Sequence[Reply]) -> Tensor:
    if sampling.greedy:
        if warped.device.type != "cpu":
            return warped.argmax(dim=-1)
        return torch.from_numpy(warped.numpy().argmax(axis=-1))  # six times as fast as torch's
    uniforms = torch.tensor([reply.uniform for reply in replies], device=warped.device)
    return draw(warped, uniforms)


def _likeliest(logprobs: Tensor, replies: Sequence[Reply]) -> dict[int, list[tuple[int, float]]]:
    """The likeliest tokens of the rows that ask for them, with log-probabilities."""
    asked = {row: r.request.top_logprobs for row, r in enumerate(replies) if r.request.top_logprobs}
    if not asked:
        return {}
    best = logprobs.topk(min(max(asked.values()), logprobs.shape[1]), dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    return {
        row: list(zip(tokens[row][:count], values[row][:count], strict=True))
        for row, count in asked.items()
    }
