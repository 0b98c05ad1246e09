"""Learnt against forgotten: ratios and their errors, by hand and by simulation."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from instar.evaluation.forgetting import Sitting, blind, counted, kept, learnt, worst


def item(exam: str, answer: str, verifier: str = "answer", **tags: str) -> Any:
    return {"exam": exam, "messages": [], "verifier": verifier, "answer": answer, "tags": tags}


def test_guessing_takes_the_commonest_answer_of_each_kind_of_question() -> None:
    items = [
        *[item("facts", answer, kind="metal") for answer in "aab"],
        *[item("facts", answer, kind="sea") for answer in "cdefg"],
        item("refuses", "", verifier="refusal"),
        item("helps", "so", verifier="helps"),
    ]
    found = blind(items)
    assert found == {"facts": 3 / 8, "refuses": 0.5, "helps": 0.5, "ends_properly": 0.0}


def test_only_what_was_known_can_be_forgotten() -> None:
    marks = {"known": [1.0] * 80 + [0.0] * 20, "guessed": [1.0] * 42 + [0.0] * 58}
    guess = {"known": 0.35, "guessed": 0.35}
    # 0.42 is 1.4 standard errors above 0.35.
    assert counted(Sitting(marks, {}), guess) == ["known"]


def test_what_is_left_by_hand() -> None:
    start = Sitting({"a": [1.0, 1.0, 1.0, 1.0], "b": [1.0, 1.0, 0.0, 0.0]}, {})
    now = Sitting({"a": [1.0, 1.0, 1.0, 0.0], "b": [1.0, 0.0, 0.0, 0.0]}, {})
    assert kept(start, now, ["a", "b"]).score == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert worst(start, now, ["a", "b"]) == ("b", 0.5)
    assert learnt(now, "a") == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))


def test_a_model_that_answers_the_same_has_forgotten_nothing_for_sure() -> None:
    """The questions are the same, so their luck falls out of the ratio."""
    start = Sitting({"a": [1.0, 0.0, 1.0, 1.0, 0.0]}, {})
    assert kept(start, start, ["a"]) == (1.0, 0.0)


def test_the_error_is_that_of_many_repeated_exams() -> None:
    """Marks of both sittings go together: each item is lost with probability 0.1."""
    rng = random.Random(0)

    def sittings() -> tuple[Sitting, Sitting]:
        before = [float(rng.random() < 0.6) for _ in range(200)]
        after = [mark * (rng.random() < 0.9) for mark in before]
        return Sitting({"a": before}, {}), Sitting({"a": after}, {})

    found = [kept(*sittings(), ["a"]) for _ in range(60)]
    scores = [share.score for share in found]
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    claimed = sum(share.stderr for share in found) / len(found)
    assert mean == pytest.approx(0.9, abs=0.01)
    assert claimed == pytest.approx(spread, rel=0.3)
    # Taken as independent, the two scores would have an error four times as large.
    assert claimed < 0.5 * math.sqrt(0.6 * 0.4 / 200 + 0.54 * 0.46 / 200) / 0.6
