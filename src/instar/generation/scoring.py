"""What a model makes of a text that is there already: the log-probability of every token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from instar.adapters.base import using
from instar.generation.reading import evaluating
from instar.model.transformer import CausalLM

CHUNK = 256
"""Positions whose logits exist at the same time."""


@dataclass(frozen=True)
class Scores:
    """Of the tokens of a text after the first, which nothing comes before.

    Attributes:
        logprobs: Log-probability of each after those before it, in nats.
        top_logprobs: The likeliest tokens at each place, with their log-probabilities; none where
            they were not asked for.
    """

    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None


def score(model: CausalLM, ids: Sequence[int], adapter: str | None = None, top: int = 0) -> Scores:
    """Read a text once, in the model's own precision.

    Args:
        model: Whose weights and training mode stay as they are.
        ids: Token ids, one at least.
        adapter: Which of the model's adapters speaks; none for what is active in it.
        top: How many of the likeliest tokens are told at each place.
    """
    logprobs: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []

    def head(hidden: Float[Tensor, "1 t d"]) -> None:
        for start in range(0, len(ids) - 1, CHUNK):
            some = hidden[:, start : min(start + CHUNK, len(ids) - 1)]
            every = model.lm_head(some)[0].float().log_softmax(dim=-1)
            followed = torch.tensor(ids[start + 1 : start + 1 + len(every)], device=every.device)
            logprobs.extend(every.gather(1, followed[:, None])[:, 0].tolist())
            if top:
                best = every.topk(min(top, every.shape[1]), dim=-1)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                likeliest.extend(list(zip(*pair, strict=True)) for pair in pairs)

    text = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with evaluating(model), using(model, adapter) if adapter else nullcontext():
        model.read(head, text)
    return Scores(logprobs, likeliest if top else None)
