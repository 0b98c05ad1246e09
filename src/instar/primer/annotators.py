"""Simulated annotators err in known ways, so that the harm their errors do can be measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from instar.errors import UserError
from instar.primer.question import Question
from instar.primer.rubric import score

Comparison = tuple[Question, str, str]
"""A question and the two replies, a and b, to choose from."""


@dataclass(frozen=True)
class Annotator:
    """Someone who compares two replies by the gold rubric, more or less.

    Attributes:
        noise: Share of labels that are flipped, in [0, 1].
        length_bias: Rubric points that ten more characters are worth (0.1 is one virtue of form).
        position_bias: Rubric points that being shown first is worth.
    """

    noise: float = 0.05
    length_bias: float = 0.0
    position_bias: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a noise that is no share.

        Raises:
            UserError: The noise is outside [0, 1].
        """
        if not 0 <= self.noise <= 1:
            raise UserError(f"annotator noise is {self.noise}", "Give a share between 0 and 1")

    def prefers(self, question: Question, a: str, b: str, rng: random.Random) -> bool:
        """Whether ``a`` is preferred to ``b``; a tie is decided by a coin."""
        margin = score(question, a).total - score(question, b).total + self.position_bias
        margin += self.length_bias * (len(a) - len(b)) / 10
        prefers_a = margin > 0 if abs(margin) > 1e-9 else rng.random() < 0.5
        return prefers_a != (rng.random() < self.noise)


GOLD = Annotator(noise=0.0)


def agreement(
    annotators: Sequence[Annotator], pairs: Sequence[Comparison], rng: random.Random
) -> float:
    """How far annotators agree beyond chance: Cohen's kappa for two, Fleiss' for more.

    Args:
        annotators: At least two.
        pairs: What each of them labels.
        rng: Source of their noise.

    Raises:
        UserError: There are fewer than two annotators.
    """
    if len(annotators) < 2:
        raise UserError(f"{len(annotators)} annotator(s) given", "Agreement needs at least two")
    labels = [[who.prefers(*pair, rng) for pair in pairs] for who in annotators]
    if len(annotators) == 2:
        return cohen_kappa(*labels)
    counts = [(sum(votes), len(votes) - sum(votes)) for votes in zip(*labels, strict=True)]
    return fleiss_kappa(counts)


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    r"""Agreement of two raters, :math:`\kappa = (p_o - p_e) / (1 - p_e)` (Cohen, 1960).

    Args:
        first: One label an item.
        second: The other rater's labels of the same items.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    yes_a, yes_b = sum(first) / n, sum(second) / n
    return _beyond_chance(observed, yes_a * yes_b + (1 - yes_a) * (1 - yes_b))


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    r"""Agreement of many raters, :math:`\kappa = (\bar P - \bar P_e) / (1 - \bar P_e)`.

    Fleiss, 1971, "Measuring nominal scale agreement among many raters".

    Args:
        counts: ``counts[i][j]`` raters put item ``i`` into category ``j``; every row has the
            same sum, at least 2.
    """
    raters, items = sum(counts[0]), len(counts)
    pairs = raters * (raters - 1)
    observed = sum(sum(c * (c - 1) for c in row) / pairs for row in counts) / items
    shares = [sum(column) / (items * raters) for column in zip(*counts, strict=True)]
    return _beyond_chance(observed, sum(share**2 for share in shares))


def _beyond_chance(observed: float, expected: float) -> float:
    """Kappa; where chance alone agrees always, so do the raters, and kappa is taken as 1."""
    return (observed - expected) / (1 - expected) if expected < 1 else 1.0
