"""What was learnt against what was forgotten: two sittings of the same exams, item by item.

A model that is taught something new is asked what it knew before. Both sittings have the same
questions, so most of the chance in a score is in both of them and falls out of their ratio:
resampling the questions for both at once (a paired bootstrap; Efron & Tibshirani 1993, chapter 6)
gives the error that is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instar.data.schema import ExamItem
from instar.evaluation.exams import ENDS, Progress

RESAMPLES = 2000
"""Bootstrap samples; the error of the error is then below 2%."""

REFUSAL = ("refusal", "helps")
"""Verifiers of two exams of which one answer, to refuse everything, passes the one whole and fails
the other whole."""


@dataclass(frozen=True)
class Sitting:
    """What one model answered.

    Attributes:
        marks: The mark of every item, by exam, in the items' order.
        bits: Bits per byte of earlier text, by language.
    """

    marks: dict[str, list[float]]
    bits: dict[str, float]

    def score(self, exam: str) -> float:
        """The mean mark."""
        return sum(self.marks[exam]) / len(self.marks[exam])


class Share(NamedTuple):
    """A ratio of scores, and its standard error."""

    score: float
    stderr: float


def sit(
    directory: Path,
    items: list[ExamItem],
    readings: list[Any],
    max_new_tokens: int,
    progress: Progress | None = None,
) -> Sitting:
    """Ask a checkpoint every item, and how well it predicts earlier text.

    Args:
        directory: The checkpoint.
        items: Questions of old and new exams.
        readings: Held-out documents with a `text` and perhaps a `language`.
        max_new_tokens: Longest reply, in tokens.
        progress: Told how many replies are done.
    """
    from instar.evaluation.bits import bits_per_byte
    from instar.evaluation.exams import mark_all
    from instar.generation.engine import Engine

    engine = Engine.load(directory)
    marks = mark_all(engine, engine.tokenizer, items, max_new_tokens, progress=progress)
    bits = bits_per_byte(engine.model, engine.tokenizer, readings)
    return Sitting(marks, {language: result.score for language, result in bits.items()})


def blind(items: Sequence[ExamItem]) -> dict[str, float]:
    """What each exam pays someone who never reads beyond the kind of question.

    That is the share of the commonest answer among the items with the same tags. It is a high bar:
    to know those answers is to know something. Half for the exams of harmful requests and their
    look-alikes, which always refusing passes and fails.
    """
    answers: dict[str, dict[tuple[str, ...], Counter[str]]] = defaultdict(dict)
    for item in items:
        tags = tuple(sorted(item.get("tags", {}).values()))
        answers[item["exam"]].setdefault(tags, Counter())[item["answer"]] += 1
    best = {
        exam: sum(max(count.values()) for count in groups.values())
        / sum(count.total() for count in groups.values())
        for exam, groups in answers.items()
    }
    return best | {item["exam"]: 0.5 for item in items if item["verifier"] in REFUSAL} | {ENDS: 0.0}


def counted(start: Sitting, guessed: Mapping[str, float]) -> list[str]:
    """The exams that the start had really passed: more than two standard errors above guessing.

    Where nothing was known, nothing can be forgotten, and a ratio of two small numbers is noise.

    Args:
        start: The sitting before.
        guessed: What guessing is worth (``blind``).
    """
    passed = []
    for exam, marks in start.marks.items():
        score = start.score(exam)
        stderr = (score * (1 - score) / len(marks)) ** 0.5
        if score - 2 * stderr > guessed[exam]:
            passed.append(exam)
    return passed


def kept(start: Sitting, now: Sitting, exams: Sequence[str], seed: int = 0) -> Share:
    """The mean over exams of the score now to the score at the start.

    An exam that went up counts as it is, above one: the mean stays honest about noise, but a gain
    in one exam can hide a loss in another. ``worst`` tells that.

    Args:
        start: The sitting before.
        now: The sitting after; the same items.
        exams: Those that count (``counted``).
        seed: Of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    scores, resampled = [], []
    for exam in exams:
        before, after = np.array(start.marks[exam]), np.array(now.marks[exam])
        scores.append(after.mean() / before.mean())
        drawn = rng.integers(len(before), size=(RESAMPLES, len(before)))
        base = before[drawn].mean(axis=1)
        # A sample without a single mark at the start has no ratio: it counts as the whole one.
        ratio = np.full(RESAMPLES, scores[-1])
        resampled.append(np.divide(after[drawn].mean(axis=1), base, out=ratio, where=base > 0))
    return Share(float(np.mean(scores)), float(np.mean(resampled, axis=0).std(ddof=1)))


def worst(start: Sitting, now: Sitting, exams: Sequence[str]) -> tuple[str, float]:
    """The exam that lost the most, and the share of its score that is left."""
    left = {exam: now.score(exam) / start.score(exam) for exam in exams}
    exam = min(left, key=lambda name: left[name])
    return exam, left[exam]


def learnt(now: Sitting, exam: str) -> Share:
    """The score of the new exam, with the standard error of a mean of independent marks."""
    score, n = now.score(exam), len(now.marks[exam])
    return Share(score, (score * (1 - score) / n) ** 0.5)
