"""How the next token is chosen: reshape the distribution, then draw from it.

Every filter is a pure function from logits to logits; a token that may not be drawn gets -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instar.errors import UserError

NEVER = float("-inf")

COLDEST = 1e-6
"""Below this temperature only the likeliest token could be drawn, and quotients would overflow."""


@dataclass(frozen=True)
class Sampling:
    """The knobs of sampling; each default leaves the model's own distribution as it is.

    Attributes:
        temperature: Divides the logits; below 1 is more careful, 0 takes the likeliest token.
        top_k: Keep only the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likely tokens whose probabilities reach ``top_p``
            (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: Keep tokens at least ``min_p`` times as likely as the likeliest one
            (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: Makes tokens that were already seen, the prompt included, less likely
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 does nothing.
        presence_penalty: Subtracted from the logit of every token that the reply already has.
        frequency_penalty: Subtracted as often as the reply has the token. Both as OpenAI's API
            defines them: ``logit - count * frequency_penalty - (count > 0) * presence_penalty``.
        logit_bias: Added to the logits of these tokens.

    Raises:
        UserError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, self, "temperature", "0 (greedy) or more")
        _require(self.top_k >= 0, self, "top_k", "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, self, "min_p", "between 0 and 1")
        _require(0 < self.repetition_penalty < math.inf, self, "repetition_penalty", "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), self, name, "finite")
        for token, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and token >= 0):
                raise UserError(
                    f"logit_bias of token {token} is {bias}", "Choose a token and a finite number."
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, without chance."""
        return self.temperature < COLDEST

    @property
    def remembers(self) -> bool:
        """Whether what was already said plays a part."""
        lowered = self.presence_penalty or self.frequency_penalty
        return bool(lowered) or self.repetition_penalty != 1


def _require(holds: bool, sampling: Sampling, field: str, allowed: str) -> None:
    if not holds:
        value = getattr(sampling, field)
        raise UserError(f"{field} is {value}", f"Choose a value that is {allowed}.")


GREEDY = Sampling(temperature=0.0)


def warp(
    logits: Float[Tensor, "b v"], sampling: Sampling, seen: Bool[Tensor, "b v"] | None = None
) -> Float[Tensor, "b v"]:
    """Apply the filters in the order that transformers uses.

    Args:
        logits: One row a sequence.
        sampling: Which filters, and how strong. Greedy choice needs the repetition penalty only:
            no other filter changes which token is likeliest.
        seen: Which tokens each sequence already holds; needed for a repetition penalty.
    """
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalize(
    logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Lower the seen tokens: divide positive logits by the penalty, multiply negative ones."""
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Float[Tensor, "b v"], k: int) -> Float[Tensor, "b v"]:
    """Keep the k largest; tokens tied with the k-th stay as well."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, NEVER)


def keep_top_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep each token whose *likelier* tokens together have less than ``p``."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities
    drop = torch.empty_like(likelier, dtype=torch.bool).scatter(-1, order, likelier >= p)
    return logits.masked_fill(drop, NEVER)


def keep_min_p(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b v"]:
    """Keep tokens with at least ``p`` times the largest probability.

    A ratio of probabilities is a difference of logits, so no softmax is needed.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), NEVER)


def draw(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Draw one token a row by inverting the cumulative distribution.

    The first token whose cumulative probability exceeds the uniform number. On a CPU this is
    some twenty times faster than ``torch.multinomial``, and a row's token depends on nothing
    but its own logits and its own number.

    Args:
        logits: Warped logits.
        uniforms: One number a row, uniform in [0, 1).
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True)
    # Beyond the end only if the logits are not numbers, of which `choose` tells.
    return index.squeeze(-1).clamp(max=logits.shape[-1] - 1)
